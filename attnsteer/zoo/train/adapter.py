"""An IP-Adapter for shapes-sd, in diffusers' own format, that carries one character: the star of a picture.

What it carries is the star's colour and size and the grey of the ground; a caption that leaves the colour out takes it from the
references. The image encoder is a CLIPVisionModelWithProjection of three layers, fitted first, whose embedding is a code of these
three; the adapter (projection to four tokens, keys and values of each cross-attention) is then trained through the frozen UNet with
one to four references, other pictures of the same star.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import load
from ..shapes.language import Phrase
from ..shapes.render import render
from ..shapes.world import COLOUR_NAMES, SHAPES, SIZES, Scene, place, rng, sample_ground
from .diffusion import Batches
from .loop import Plan, fit, shorten

HERO = "star"
OTHERS = tuple(s for s in SHAPES if s != HERO)
COMPANIONS = (0.4, 0.4, 0.2)
# The code: colours, sizes, and the ground's grey, centred and scaled.
CODE = len(COLOUR_NAMES) + len(SIZES) + 1
LEVEL, SPREAD = 0.525, 0.1
BATCH, POOL, MOST = 16, 3000, 4
# Where colour, size and ground are settled: the last steps of a picture know them already.
LEAST = 100
TOWER_PLAN = Plan(steps=1500, lr=2e-3, warmup=100, ema=0.99, every=60.0)
PLAN = Plan(steps=500, lr=6e-4, warmup=50, decay=0.0, ema=0.99, seed=1, every=60.0)
# Of the captions: without the star's colour; with neither words nor references; with words alone.
UNNAMED, EMPTY, ALONE = 0.75, 0.1, 0.08
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WEIGHTS = "ip-adapter.safetensors"


def scene(g: np.random.Generator, colour: str, size: str, ground: Any = None) -> Scene:
    """A picture of the star, first of the objects, with up to two companions of other shapes."""
    count = int(g.choice(len(COMPANIONS), p=COMPANIONS))
    shapes = [OTHERS[int(i)] for i in g.permutation(len(OTHERS))[:count]]
    looks = [(HERO, colour)] + [(s, COLOUR_NAMES[int(g.integers(len(COLOUR_NAMES)))]) for s in shapes]
    objects = place(g, looks, [size, *[None] * count])
    return Scene(objects, sample_ground(g, textured=False) if ground is None else ground)


def hero(g: np.random.Generator) -> tuple[str, str]:
    """Colour and size of a star."""
    return COLOUR_NAMES[int(g.integers(len(COLOUR_NAMES)))], SIZES[int(g.integers(len(SIZES)))]


def caption(scene: Scene, g: np.random.Generator) -> str:
    """The phrases in random order; the star's colour left out now and then, its size never said."""
    star, *rest = scene.objects
    words = [str(Phrase(o.colour, o.shape, o.size if g.random() < 0.25 else None)) for o in rest]
    words.append(f"a {HERO}" if g.random() < UNNAMED else f"a {star.colour} {HERO}")
    order = [words[int(i)] for i in g.permutation(len(words))]
    return order[0] if len(order) == 1 else " , ".join(order[:-1]) + " and " + order[-1]


def code(scenes: list[Scene]) -> Tensor:
    """What the image encoder is to say of pictures: fp32 [B, CODE]."""
    found = torch.zeros(len(scenes), CODE)
    for row, s in zip(found, scenes, strict=True):
        row[COLOUR_NAMES.index(s.objects[0].colour)] = 1
        row[len(COLOUR_NAMES) + SIZES.index(s.objects[0].size)] = 1
        row[-1] = (s.ground.level - LEVEL) / SPREAD
    return found


def image_encoder() -> Any:
    """The image encoder, 0.1 M parameters."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, projection_dim=CODE, num_hidden_layers=3, num_attention_heads=4,
            image_size=64, patch_size=8,
        )
    )  # fmt: skip


def seen(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as a CLIPImageProcessor gives them."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def worn(images: Tensor, g: torch.Generator) -> Tensor:
    """Pictures as an autoencoder or a resizing leaves them: some blurred, some with noise."""
    kind = torch.rand(len(images), 1, 1, 1, generator=g)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    rough = images + 0.04 * torch.randn(images.shape, generator=g)
    return torch.where(kind < 0.3, soft, torch.where(kind < 0.6, rough, images)).clamp(0, 1)


def tower_loss(model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
    """The squared distance to the code."""
    g = rng("train", step, stream=71)
    shown = [scene(g, *hero(g)) for _ in range(64)]
    x = worn(render(shown), torch.Generator().manual_seed(step))
    place = next(model.parameters()).device
    found, wanted = model(seen(x).to(place)).image_embeds.float(), code(shown).to(place)
    right = found[:, : len(COLOUR_NAMES)].argmax(1) == wanted[:, : len(COLOUR_NAMES)].argmax(1)
    return (found - wanted).square().sum(1).mean(), {"colour": right.float().mean().item()}


class Adapter(nn.Module):
    """The frozen UNet with the adapter loaded; the adapter's parameters alone are trained."""

    def __init__(self, pipe: Any):
        super().__init__()
        self.unet = pipe.unet.requires_grad_(False)
        self.unet._load_ip_adapter_weights([first(pipe)], low_cpu_mem_usage=False)
        for name, p in self.unet.named_parameters():
            p.requires_grad_("_ip." in name or "encoder_hid_proj" in name)

    def forward(self, noisy: Tensor, t: Tensor, text: Tensor, references: Tensor) -> Tensor:
        """The predicted noise; references are codes [B, n, CODE]."""
        added = {"image_embeds": [references]}
        return self.unet(noisy, t, text, added_cond_kwargs=added).sample


def first(pipe: Any) -> dict[str, dict[str, Tensor]]:
    """The adapter before training: its tokens are those of the text "a red star", its keys and values the text's."""
    hidden = lambda text: pipe.text_encoder(  # noqa: E731
        pipe.tokenizer(text, return_tensors="pt").input_ids, output_hidden_states=True
    ).hidden_states[-1][0]
    with torch.no_grad():
        named = torch.stack([hidden(f"a {c} {HERO}")[[2, 3, 4, 0]] for c in COLOUR_NAMES])
        sized = [torch.stack([hidden(f"a {s} {c} {HERO}")[[3, 4, 5, 0]] for c in COLOUR_NAMES]).mean(0) for s in SIZES]
    middle = named.mean(0)
    weight = torch.cat(
        [named - middle, torch.stack(sized) - torch.stack(sized).mean(0), torch.zeros_like(middle)[None]]
    )
    norm = pipe.text_encoder.text_model.final_layer_norm if hasattr(pipe.text_encoder, "text_model") else None
    norm = pipe.text_encoder.final_layer_norm if norm is None else norm
    state = {
        "image_proj": {
            "proj.weight": weight.flatten(1).T.contiguous(),
            "proj.bias": middle.flatten().clone(),
            "norm.weight": norm.weight.detach().clone(),
            "norm.bias": norm.bias.detach().clone(),
        },
        "ip_adapter": {},
    }
    for number, name in enumerate(pipe.unet.attn_processors):
        if name.endswith("attn2.processor"):
            site = pipe.unet.get_submodule(name.removesuffix(".processor"))
            state["ip_adapter"][f"{number}.to_k_ip.weight"] = site.to_k.weight.detach().clone()
            state["ip_adapter"][f"{number}.to_v_ip.weight"] = 0.4 * site.to_v.weight.detach().clone()
    return state


def trained(unet: Any) -> dict[str, Tensor]:
    """The adapter's weights under the names of its published files."""
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    found = {
        "image_proj.proj.weight": projection.image_embeds.weight,
        "image_proj.proj.bias": projection.image_embeds.bias,
        "image_proj.norm.weight": projection.norm.weight,
        "image_proj.norm.bias": projection.norm.bias,
    }
    for number, (name, processor) in enumerate(unet.attn_processors.items()):
        if name.endswith("attn2.processor"):
            found[f"ip_adapter.{number}.to_k_ip.weight"] = processor.to_k_ip[0].weight
            found[f"ip_adapter.{number}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    return {n: p.detach().to("cpu", torch.float16).contiguous() for n, p in found.items()}


def save(folder: Path, unet: Any, tower: Any) -> Path:
    """Write `ip-adapter.safetensors` and `image_encoder/`, as `load_ip_adapter` reads them."""
    import copy

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(trained(unet), folder / WEIGHTS)
    copy.deepcopy(tower).to("cpu", torch.float16).save_pretrained(folder / "image_encoder")
    return folder


@torch.no_grad()
def _latents(vae: Any, scenes: list[Scene], kept: Path) -> Tensor:
    """Scaled latents, fp32 [N, 4, 16, 16], in a file for a run that goes on."""
    from safetensors.torch import load_file, save_file

    if kept.is_file():
        return load_file(kept)["latents"]
    parts = [scenes[s : s + 50] for s in range(0, len(scenes), 50)]
    z = torch.cat([vae.encode(render(part) * 2 - 1).latent_dist.mean for part in parts]) * vae.config.scaling_factor
    save_file({"latents": z.contiguous()}, kept)
    return z


def train(out: Path, device: str = "auto", steps: int | None = None) -> Path:
    """Train and write the folder `out/ip_adapter`."""
    plan = shorten(TOWER_PLAN, steps)
    torch.manual_seed(plan.seed)
    tower = image_encoder()
    fit("ip_tower", tower, tower_loss, plan, out, device=device, precision="no")
    tower.requires_grad_(False)

    pipe = load("shapes-sd")
    pool = POOL if steps is None else 64
    scenes = []
    for i in range(pool):
        g = rng("train", i, stream=72)
        scenes.append(scene(g, *hero(g)))
    z = _latents(pipe.vae, scenes, out / "ip_adapter_latents.safetensors")
    levels = pipe.scheduler.alphas_cumprod
    tokens = Batches(z, BATCH, stream=73).tokens
    model = Adapter(pipe)
    text_encoder, place_of_tower = pipe.text_encoder, next(tower.parameters()).device

    def loss(model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        g, t_g = rng("train", step, stream=73), torch.Generator().manual_seed(step)
        rows = g.integers(0, pool, BATCH)
        count = int(g.integers(1, MOST + 1))
        shown = [scenes[int(i)] for i in rows]
        others = [scene(g, s.objects[0].colour, s.objects[0].size, s.ground) for s in shown for _ in range(count)]
        draw = g.random(BATCH)
        texts = ["" if d < EMPTY else caption(s, g) for d, s in zip(draw, shown, strict=True)]
        for row in np.flatnonzero((draw >= EMPTY) & (draw < EMPTY + ALONE)):
            texts[row] = texts[row].replace(f"a {HERO}", f"a {shown[row].objects[0].colour} {HERO}")
        place = next(model.parameters()).device
        with torch.no_grad():
            codes = tower(seen(worn(render(others), t_g)).to(place_of_tower)).image_embeds.float()
            text = text_encoder(tokens(texts)).last_hidden_state
        codes = codes.view(BATCH, count, CODE) * torch.from_numpy(draw >= EMPTY + ALONE).float().view(-1, 1, 1)
        clean = z[torch.from_numpy(rows)]
        t = torch.randint(LEAST, 1000, (BATCH,), generator=t_g)
        noise = torch.randn(clean.shape, generator=t_g)
        a = levels[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        found = model(noisy.to(place), t.to(place), text.to(place), codes.to(place)).float()
        return (found - noise.to(place)).square().mean(), {}

    fit(
        "ip_adapter",
        model,
        loss,
        shorten(PLAN, steps),
        out,
        device=device,
        precision="no",
        preview=lambda m, s: save(out / "now", m.unet, tower),
    )
    return save(out / "ip_adapter", model.unet, tower)
