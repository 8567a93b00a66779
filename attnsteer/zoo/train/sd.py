"""shapes-sd: a Stable-Diffusion-type pipeline of 64x64 images of shapes.

An AutoencoderKL to 16x16x4, a UNet with cross-attention at 16x16 and 8x8, a CLIP text encoder of one layer trained with
it, noise prediction, classifier-free guidance from one empty caption in ten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..tokenizers import clip_tokenizer
from .diffusion import Batches, latents, sheet, text_encoder, train_autoencoder
from .loop import Plan, fit, shorten

BATCH = 32
PLAN = Plan(steps=5000, lr=1e-3, warmup=200)
PROMPTS = (
    "a red circle",
    "a blue star",
    "a red circle and a blue square",
    "a green cross and a yellow diamond",
    "a large cyan star and a small purple triangle",
    "two red squares and a green star",
    "a purple diamond , a yellow circle and a red cross",
    "",
)


class Model(nn.Module):
    """UNet and text encoder as one module to train."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.unet = text_encoder(), unet()

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The predicted noise."""
        return self.unet(noisy, t, self.text(tokens).last_hidden_state).sample


def unet() -> Any:
    """The denoiser, 4 M parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,  # the number of heads, by the library's old name
        norm_num_groups=16,
    )


def scheduler() -> Any:
    """The scheduler of the pipeline; training uses its noise levels."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def train(out: Path, device: str = "auto", steps: int | None = None) -> Path:
    """Train and write the model folder `out/shapes-sd`."""
    from .publish import publish

    vae, vae_curve = train_autoencoder(out, device, steps)
    batches = Batches(latents(vae, out / "vae", 64 if steps else 40_000), BATCH, stream=2)
    levels = scheduler().alphas_cumprod

    def loss(model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        z, tokens = batches(step)
        g = torch.Generator().manual_seed(step)
        t = torch.randint(0, 1000, (len(z),), generator=g)
        noise = torch.randn(z.shape, generator=g)
        a = levels[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        place = next(model.parameters()).device
        found = model(noisy.to(place), t.to(place), tokens.to(place)).float()
        return (found - noise.to(place)).square().mean(), {}

    def preview(model: nn.Module, step: int) -> None:
        images = sample(vae, model, batches.tokens([p for p in PROMPTS for _ in range(4)]), batches.tokens([""]))
        sheet(images, out / "sd" / "look.png", 8)

    plan = shorten(PLAN, steps)
    torch.manual_seed(plan.seed)
    model = Model()
    curve = fit("sd", model, loss, plan, out, device=device, preview=preview)
    return publish(
        "shapes-sd",
        {"": pipeline(vae, model)},
        {},
        out,
        {"vae": vae_curve, "sd": curve},
    )


def pipeline(vae: Any, model: Model) -> Any:
    """The parts as a StableDiffusionPipeline."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text,
        tokenizer=clip_tokenizer(),
        unet=model.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def sample(vae: Any, model: Model, tokens: Tensor, empty: Tensor, scale: float = 4.0, steps: int = 25) -> Tensor:
    """Images in [0, 1] of tokens [B, L] with guidance; a plain loop that shows how training goes."""
    place = next(model.parameters()).device
    s = scheduler()
    s.set_timesteps(steps)
    x = torch.randn(len(tokens), 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(place)
    both = torch.cat([empty.expand(len(tokens), -1), tokens]).to(place)
    text = model.text(both).last_hidden_state
    for t in s.timesteps:
        free, led = model.unet(torch.cat([x, x]), t, text).sample.float().chunk(2)
        x = s.step(free + scale * (led - free), t, x).prev_sample
    return (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).cpu()
