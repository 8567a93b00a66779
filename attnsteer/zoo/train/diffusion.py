"""What both diffusion models share: training scenes, the autoencoder, latents kept in memory, the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..shapes.language import describe
from ..shapes.render import render
from ..shapes.world import Prior, Scene, rng, sample_scene
from ..tokenizers import TEXT_LENGTH, clip_tokenizer
from .loop import Curve, Plan, fit

# Attributes come together a little, so that an unguided model has something to fall back on.
PRIOR = Prior(partner=0.3, usual=0.25, twin=0.12)
# How often a scene has one, two, ... objects.
COUNTS = (0.25, 0.35, 0.2, 0.12, 0.08)
SCENES = 40_000
EMPTY = 0.1
VAE_BATCH = 16
VAE_PLAN = Plan(steps=1500, lr=2e-3, warmup=100, decay=0.0, ema=0.998)
KL = 1e-5
# How much more a pixel at an object counts: the ground fills most of the image and is soon learnt.
OBJECT = 4.0


def scene(index: int, split: str = "train") -> Scene:
    """Scene `index` of the diffusion models' data."""
    g = rng(split, index, stream=1)
    return sample_scene(g, count=int(g.choice(5, p=COUNTS)) + 1, prior=PRIOR, textured=False)


def pixels(scenes: list[Scene]) -> Tensor:
    """Images in [-1, 1], fp32 [B, 3, 64, 64]."""
    return render(scenes) * 2 - 1


def autoencoder() -> Any:
    """An AutoencoderKL from 64x64x3 to 16x16x4, 1.0 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def vae_loss(model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
    """L1 + MSE, pixels at objects weighted, and a little KL."""
    scenes = [scene(step * VAE_BATCH + i) for i in range(VAE_BATCH)]
    x = pixels(scenes)
    weight = 1 + OBJECT * (x.std(dim=1, keepdim=True) > 0.02).float()
    weight = nn.functional.max_pool2d(weight, 3, 1, 1)
    x, weight = (v.to(next(model.parameters()).device) for v in (x, weight / weight.mean()))
    posterior = model.encode(x).latent_dist
    # Drawn per step, so that a resumed run repeats it.
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step)).to(x.device)
    y = model.decode(posterior.mean + posterior.std * noise).sample.float()
    rebuilt = ((y - x).abs() * weight).mean() + ((y - x).square() * weight).mean()
    return rebuilt + KL * posterior.kl().float().mean() / 64, {"L1 + MSE": rebuilt.item()}


def train_autoencoder(out: Path, device: str, steps: int | None = None) -> tuple[Any, Curve]:
    """The trained autoencoder, in fp32, its `scaling_factor` set to one over the deviation of the latents."""
    from .loop import shorten

    plan = shorten(VAE_PLAN, steps)
    torch.manual_seed(plan.seed)
    model = autoencoder()
    curve = fit("vae", model, vae_loss, plan, out, device=device, preview=lambda m, s: _compare(m, out / "vae"))
    z = encode(model, [scene(i) for i in range(256)])
    model.register_to_config(scaling_factor=round(1 / float(z.float().std()), 4))
    return model, curve


@torch.no_grad()
def encode(vae: Any, scenes: list[Scene]) -> Tensor:
    """Means of the latents, not scaled, fp16 [N, 4, 16, 16]."""
    device = next(vae.parameters()).device
    found = []
    for start in range(0, len(scenes), 100):
        x = pixels(scenes[start : start + 100]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            found.append(vae.encode(x).latent_dist.mean.half().cpu())
    return torch.cat(found)


def latents(vae: Any, out: Path, count: int = SCENES) -> Tensor:
    """Scaled latents of the training scenes, fp16 [count, 4, 16, 16], kept in a file of `out`."""
    from safetensors.torch import load_file, save_file

    path = out / "latents.safetensors"
    if path.exists():
        kept = load_file(path)["latents"]
        if len(kept) >= count:
            return kept[:count]
    z = torch.cat([encode(vae, [scene(i) for i in range(s, min(s + 1000, count))]) for s in range(0, count, 1000)])
    z = (z.float() * vae.config.scaling_factor).half()
    out.mkdir(parents=True, exist_ok=True)
    save_file({"latents": z.contiguous()}, path)
    return z


def text_encoder(width: int = 96, layers: int = 1, projection: bool = False) -> Any:
    """A CLIP text encoder. One layer keeps the words apart; it is causal, so a noun knows its adjectives."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 24,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


class Batches:
    """Latents and tokens of each training step."""

    def __init__(
        self, z: Tensor, size: int, stream: int, empty: Sequence[float] = (EMPTY,) * len(COUNTS), single: float = 0.0
    ):
        """`empty`: share of captions left out, by count of objects. `single`: share of rows drawn among single objects."""
        self.z, self.size, self.stream, self.empty, self.single = z, size, stream, empty, single
        self.singles = np.array([i for i in range(len(z)) if single and len(scene(i).objects) == 1])
        self.tokenizer = clip_tokenizer()
        self.words: dict[str, int] = {}

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents fp32 [B, 4, 16, 16] and tokens [B, L]; captions are empty as often as `empty` says."""
        g, rows = self._draw(step)
        shown = [scene(int(i)).objects for i in rows]
        texts = ["" if g.random() < self.empty[len(objects) - 1] else describe(objects, g) for objects in shown]
        return self.z[torch.from_numpy(rows)].float(), self.tokens(texts)

    def scenes(self, step: int) -> list[Scene]:
        """The scenes of a step."""
        return [scene(int(i)) for i in self._draw(step)[1]]

    def _draw(self, step: int) -> tuple[np.random.Generator, np.ndarray]:
        g = rng("train", step, stream=self.stream)
        rows = g.integers(0, len(self.z), self.size)
        if self.single:
            rows = np.where(g.random(self.size) < self.single, g.choice(self.singles, self.size), rows)
        return g, rows

    def tokens(self, texts: list[str]) -> Tensor:
        """Padded ids [B, L]; whole words only, so a table is enough."""
        ends, starts = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        ids = torch.full((len(texts), TEXT_LENGTH), self.tokenizer.pad_token_id)
        for row, text in enumerate(texts):
            for word in text.split():
                if word not in self.words:
                    self.words[word] = self.tokenizer(word).input_ids[1]
            line = [starts, *(self.words[w] for w in text.split())][: TEXT_LENGTH - 1] + [ends]
            ids[row, : len(line)] = torch.tensor(line)
        return ids


def _compare(vae: Any, folder: Path) -> None:
    """Originals above, reconstructions below."""
    x = pixels([scene(i, "calibration") for i in range(16)])
    y = vae.decode(vae.encode(x.to(next(vae.parameters()).device)).latent_dist.mean).sample.cpu()
    sheet(torch.cat([x, y]) / 2 + 0.5, folder / "look.png", 16)


def sheet(images: Tensor, path: Path, columns: int) -> None:
    """Images [N, 3, S, S] in [0, 1] side by side, twice as large, as a PNG."""
    from PIL import Image

    rows = -(-len(images) // columns)
    side = images.shape[-1]
    board = torch.ones(rows * columns, 3, side, side)
    board[: len(images)] = images.clamp(0, 1)
    board = board.view(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    picture = Image.fromarray((board * 255).round().byte().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)
