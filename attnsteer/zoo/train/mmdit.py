"""shapes-mmdit: an SD3-type pipeline of 64x64 images of shapes, trained by flow matching.

The autoencoder of shapes-sd, an SD3Transformer2DModel over 8x8 patches of the latent, two CLIP text encoders.

Without a T5 the pipeline appends zeros in place of its tokens, 256 by default. They have no positions, so they stay
identical through all blocks, and n of them act like one whose attention score is raised by log n. Training takes one
and draws n, so that the model serves any `max_sequence_length`.

A transformer without convolutions is slow to learn what a shape is. While it trains, a linear layer names shape and colour
of each patch from the states in the middle, after the idea of REPA (Yu et al. 2025, 2410.06940), which aligns them with
a vision model; here the renderer knows the answer. The layer is thrown away.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnsteer.hosts.sdpa.rebind import SDPA

from ..shapes.world import COLOUR_NAMES, SHAPES
from ..tokenizers import clip_tokenizer
from .diffusion import Batches, latents, sheet, text_encoder, train_autoencoder
from .loop import Plan, fit, shorten
from .lvlm import labels
from .precision import exchange, sdpa_in_fp32
from .sd import PROMPTS

BATCH, WIDTH, TEXT = 32, 144, 48
PLAN = Plan(steps=13_000, lr=1.5e-3, warmup=300)
# A second stage teaches what the empty caption stands for, above all scenes of one object: without it three in four unguided
# pictures of the empty prompt have a shape that is none. An empty prompt with a meaning of its own makes the default guidance
# spoil more of the guided pictures, so the weights of both stages are averaged (Wortsman et al. 2022, 2109.01903).
EMPTY_PLAN = Plan(steps=4000, lr=1e-3, warmup=100)
EMPTY, SINGLE, SECOND = (0.5, 0.05, 0.05, 0.05, 0.05), 1 / 3, 0.6
FILLERS = (1, 32, 256)
# Of the six blocks, the one whose image states are read, and the weight of that loss.
READ, READING = 3, 0.1


class Model(nn.Module):
    """Transformer and both text encoders as one module to train."""

    def __init__(self) -> None:
        super().__init__()
        self.text = text_encoder(TEXT, layers=2, projection=True)
        self.text_2 = text_encoder(TEXT, layers=2, projection=True)
        self.transformer = transformer()
        self.reader = nn.Linear(WIDTH, len(SHAPES) + 1 + len(COLOUR_NAMES) + 1)
        self.states: list[Tensor] = []
        self.transformer.transformer_blocks[READ].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if self.training:
            self.states[:] = [output[1]]

    def read(self) -> tuple[Tensor, Tensor]:
        """Logits [B, 64, classes] of shape and colour of each patch, from the last training pass."""
        return self.reader(self.states.pop()).float().split((len(SHAPES) + 1, len(COLOUR_NAMES) + 1), dim=-1)

    def words(self, tokens: Tensor, fillers: int) -> tuple[Tensor, Tensor]:
        """What the pipeline makes of tokens [B, L]: states [B, L + fillers, C] and the pooled vector."""
        states, pooled = [], []
        for encoder in (self.text, self.text_2):
            found = encoder(tokens, output_hidden_states=True)
            states.append(found.hidden_states[-2])
            pooled.append(found.text_embeds)
        text = torch.cat(states, dim=-1)
        return nn.functional.pad(text, (0, 0, 0, fillers)), torch.cat(pooled, dim=-1)

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor, fillers: int = 1) -> Tensor:
        """The predicted velocity, noise minus image."""
        text, pooled = self.words(tokens, fillers)
        return self.transformer(noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample


def transformer() -> Any:
    """Six joint blocks with six heads."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=6,
        attention_head_dim=WIDTH // 6,
        num_attention_heads=6,
        joint_attention_dim=2 * TEXT,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def scheduler() -> Any:
    """Euler steps along the flow, shifted towards noise as Stable Diffusion 3's are."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def train(out: Path, device: str = "auto", steps: int | None = None) -> Path:
    """Train and write the model folder `out/shapes-mmdit`."""
    from .publish import publish

    vae, vae_curve = train_autoencoder(out, device, steps)
    z = latents(vae, out / "vae", 64 if steps else 40_000)
    batches = Batches(z, BATCH, stream=4)
    raised = torch.zeros(())

    def weighted(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        assert attn_mask is None
        bias = nn.functional.pad(raised.to(key.device).view(1, 1, 1, 1), (key.shape[2] - 1, 0))
        return sdpa_in_fp32(query, key, value, bias, **options)

    def loss(batches: Batches, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        z, tokens = batches(step)
        g = torch.Generator().manual_seed(step)
        raised.fill_(math.log(FILLERS[int(torch.randint(len(FILLERS), (1,), generator=g))]))
        sigma = torch.randn(len(z), generator=g).sigmoid()
        noise = torch.randn(z.shape, generator=g)
        s = sigma.view(-1, 1, 1, 1)
        place = next(model.parameters()).device
        found = model(((1 - s) * z + s * noise).to(place), (sigma * 1000).to(place), tokens.to(place)).float()
        flow = (found - (noise - z).to(place)).square().mean()
        named = reading(model.read(), labels(batches.scenes(step)).to(place), (1 - sigma).to(place))
        return flow + READING * named, {"flow": flow.item(), "reading": named.item()}

    def preview(model: nn.Module, step: int) -> None:
        raised.fill_(math.log(FILLERS[-1]))
        images = sample(vae, model, batches.tokens([p for p in PROMPTS for _ in range(4)]), batches.tokens([""]))
        sheet(images, out / "mmdit" / "look.png", 8)

    plan = shorten(PLAN, steps)
    torch.manual_seed(plan.seed)
    model = Model()
    exchange(model, {SDPA: weighted})
    compiled = () if steps else tuple(model.transformer.transformer_blocks)
    curves = {"vae": vae_curve}
    curves["mmdit"] = fit(
        "mmdit", model, partial(loss, batches), plan, out, device=device, preview=preview, compiled=compiled
    )
    first = [p.detach().clone() for p in model.parameters()]
    batches, plan = Batches(z, BATCH, 5, EMPTY, SINGLE), shorten(EMPTY_PLAN, steps)
    curves["mmdit-empty"] = fit(
        "mmdit-empty", model, partial(loss, batches), plan, out, device=device, preview=preview, compiled=compiled
    )
    with torch.no_grad():
        for one, p in zip(first, model.parameters(), strict=True):
            p.copy_(one.lerp(p, SECOND))
    return publish("shapes-mmdit", {"": pipeline(vae, model)}, {}, out, curves)


def reading(logits: tuple[Tensor, Tensor], wanted: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of shape and colour; patches with objects count as much as empty ones, clearer images more.

    Args:
        logits: [B, 64, classes] each. wanted: [B, 64, >= 2], class 0 for none. weight: of each image [B].
    """
    full = wanted[..., 0] > 0
    each = torch.where(full, (~full).sum() / full.sum().clamp(min=1), 1.0) * weight[:, None]
    parts = [
        nn.functional.cross_entropy(f.transpose(1, 2), wanted[..., i], reduction="none") for i, f in enumerate(logits)
    ]
    return sum((p * each).mean() for p in parts)


def pipeline(vae: Any, model: Model) -> Any:
    """The parts as a StableDiffusion3Pipeline without T5."""
    from diffusers import StableDiffusion3Pipeline

    vae.register_to_config(shift_factor=0.0)
    fresh = transformer()
    fresh.load_state_dict(model.transformer.state_dict())
    return StableDiffusion3Pipeline(
        transformer=fresh,
        scheduler=scheduler(),
        vae=vae,
        text_encoder=model.text,
        tokenizer=clip_tokenizer(),
        text_encoder_2=model.text_2,
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


@torch.no_grad()
def sample(vae: Any, model: Model, tokens: Tensor, empty: Tensor, scale: float = 4.0, steps: int = 25) -> Tensor:
    """Images in [0, 1] of tokens [B, L] with guidance; a plain loop that shows how training goes."""
    place = next(model.parameters()).device
    s = scheduler()
    s.set_timesteps(steps)
    x = torch.randn(len(tokens), 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(place)
    both = torch.cat([empty.expand(len(tokens), -1), tokens]).to(place)
    for t in s.timesteps:
        free, led = model(torch.cat([x, x]), t.expand(2 * len(x)).to(place), both).float().chunk(2)
        x = s.step(free + scale * (led - free), t, x).prev_sample
    return (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).cpu()
