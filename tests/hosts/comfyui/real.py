"""The real ComfyUI on a CPU, where a checkout is there: its modules with the weights of small diffusers models.

Set ATTNSTEER_COMFYUI to a work tree of Comfy-Org/ComfyUI (read at a125cd8), and have einops, torchsde, trampoline, av and
sentencepiece on the path (ATTNSTEER_COMFYUI_SITE may name a folder of them).
"""

from __future__ import annotations

import functools
import importlib.machinery
import os
import sys
import types
from typing import Any

import torch

CHECKOUT = os.environ.get("ATTNSTEER_COMFYUI")


class _Stub(types.ModuleType):
    """Stands for torchvision and torchaudio, which the modules import and do not use here."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@functools.cache
def comfy() -> types.ModuleType:
    """Its `comfy` package, imported for the CPU."""
    import transformers  # noqa: F401  (looks for torchvision when it is imported, so it comes first)

    for name in (
        "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.models", "torchvision.io",
        "torchvision.ops", "torchvision.transforms.v2", "torchaudio", "torchaudio.transforms", "torchaudio.functional",
    ):  # fmt: skip
        if name not in sys.modules:
            module = _Stub(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    sys.path[:0] = [p for p in (CHECKOUT, os.environ.get("ATTNSTEER_COMFYUI_SITE")) if p]
    argv, sys.argv = sys.argv, ["comfyui", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.ldm.flux.model
        import comfy.ldm.modules.diffusionmodules.mmdit
        import comfy.ldm.modules.diffusionmodules.openaimodel
        import comfy.model_base
        import comfy.model_patcher
        import comfy.ops
        import comfy.samplers
        import comfy.supported_models
        import comfy.utils
    finally:
        sys.argv = argv
    return comfy


def conds(context: torch.Tensor, extra: dict[str, Any] | None = None, **more: Any) -> list[list[Any]]:
    """A conditioning as nodes hand it on: [[tensor, dict]]."""
    return [[context, {**(extra or {}), **more}]]


def unet(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A `ModelPatcher` with the weights of a diffusers UNet (one layer per block, cross-attention in the first of two levels)."""
    c = comfy()
    config = dict(
        image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2], num_heads=4,
        use_spatial_transformer=True, transformer_depth=[1, 0], transformer_depth_output=[1, 1, 0, 0], transformer_depth_middle=1,
        context_dim=16, use_linear_in_transformer=False, legacy=False, dtype=dtype, use_checkpoint=False,
    )  # fmt: skip
    made = c.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **config, operations=c.ops.disable_weight_init, device="cpu"
    ).eval()
    names = c.utils.unet_to_diffusers(config)
    made.load_state_dict({names[k]: v.to(dtype) for k, v in model.state_dict().items()})
    held = c.supported_models.SD15({**config, "disable_unet_model_creation": True})
    held.unet_config = {**config, "disable_unet_model_creation": True}
    base = c.model_base.BaseModel(held, device="cpu")
    base.diffusion_model = made
    return c.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def renamed(model: Any, made: Any, names: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a diffusers model by the program's own table of names: name, or (name, slice, function)."""
    out = {k: torch.zeros_like(v) for k, v in made.state_dict().items()}
    for key, value in model.state_dict().items():
        target = names[key]
        if isinstance(target, str):
            out[target] = value
            continue
        value = target[2](value) if len(target) > 2 and target[2] is not None else value
        if target[1] is None:
            out[target[0]] = value
        else:
            out[target[0]].narrow(*target[1]).copy_(value)
    return out


def sd3(model: Any) -> Any:
    """A `ModelPatcher` with the weights of a diffusers SD3 of two blocks of two heads of 64, the first with a second attention."""
    c = comfy()
    config = dict(
        in_channels=4, out_channels=4, depth=2, patch_size=2, adm_in_channels=12, pos_embed_max_size=16, num_patches=256,
        pos_embed_scaling_factor=None, qk_norm="rms", x_block_self_attn_layers=[0],
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}},
    )  # fmt: skip
    made = c.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper(
        input_size=None, dtype=torch.float32, device="cpu", operations=c.ops.disable_weight_init, **config
    ).eval()
    made.load_state_dict(renamed(model, made, c.utils.mmdit_to_diffusers(config)))
    held = c.supported_models.SD3({**config, "disable_unet_model_creation": True})
    held.unet_config = {**config, "disable_unet_model_creation": True, "dtype": torch.float32}
    base = c.model_base.SD3(held, device="cpu")
    base.diffusion_model = made
    return c.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def flux(model: Any) -> Any:
    """A `ModelPatcher` with the weights of a diffusers Flux of two double and two single blocks."""
    c = comfy()
    config = dict(
        in_channels=4, out_channels=4, vec_in_dim=12, context_in_dim=24, hidden_size=32, mlp_ratio=4.0, num_heads=2, depth=2,
        depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False,
    )  # fmt: skip
    made = c.ldm.flux.model.Flux(
        image_model="flux", dtype=torch.float32, device="cpu", operations=c.ops.disable_weight_init, **config
    ).eval()
    names = c.utils.flux_to_diffusers(config, output_prefix="")
    made.load_state_dict(renamed(model, made, names))
    held = c.supported_models.Flux({**config, "image_model": "flux", "disable_unet_model_creation": True})
    held.unet_config = {**config, "image_model": "flux", "disable_unet_model_creation": True, "dtype": torch.float32}
    base = c.model_base.Flux(held, device="cpu")
    base.diffusion_model = made
    return c.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def sample(
    model: Any,
    noise: torch.Tensor,
    positive: Any,
    negative: Any,
    cfg: float = 7.0,
    steps: int = 3,
    sampler: str = "euler",
    denoise_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The latent after a few steps of its own guider."""
    s = comfy().samplers
    guider = s.CFGGuider(model)
    guider.set_cfg(cfg)
    guider.set_conds(positive, negative)
    out = guider.sample(
        noise,
        torch.zeros_like(noise),
        s.sampler_object(sampler),
        sigmas(model, steps),
        denoise_mask=denoise_mask,
        disable_pbar=True,
        seed=0,
    )
    # As the sampler left it, not as the decoder takes it.
    return model.model.process_latent_in(out)


def sigmas(model: Any, steps: int) -> torch.Tensor:
    """Its own schedule."""
    return comfy().samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


def start(model: Any, noise: torch.Tensor, schedule: torch.Tensor) -> torch.Tensor:
    """The latent from which a sampler starts."""
    return model.model.model_sampling.noise_scaling(schedule[0], noise, torch.zeros_like(noise), True)
