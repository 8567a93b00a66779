"""The table of the hosts on which the laws are run, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cases import HostCase
from .denoisers import tiny_denoiser, tiny_denoiser_inputs
from .pipelines import tiny_call, tiny_pipeline
from .transformers_models import tiny_transformers, tiny_transformers_inputs

LENGTH = 12
STEPS = 2


def _language(name: str, decoder: bool = True, padded: tuple[str, ...] = ("left", "right"), **has: bool) -> HostCase:
    def inputs(model: Any, batch: int, padding: str | None, seed: int) -> dict[str, Any]:
        side = None if padding == "full" else padding
        # A compiled model wraps the one that has the config.
        model = getattr(model, "_orig_mod", model)
        made = tiny_transformers_inputs(name, model, batch=batch, length=LENGTH, padding=side, seed=seed)
        return made if padding else {k: v for k, v in made.items() if k != "attention_mask"}

    def run(model: Any, inputs: dict[str, Any]) -> Tensor:
        out = model(**inputs)
        return out.logits if "logits" in out else out.last_hidden_state

    return HostCase(
        name, "transformers", lambda: tiny_transformers(name), inputs, run, decoder, padded, masked=True, **has
    )


def _denoiser(name: str) -> HostCase:
    return HostCase(
        name,
        "denoiser",
        lambda: tiny_denoiser(name),
        lambda model, batch, padding, seed: tiny_denoiser_inputs(name, getattr(model, "_orig_mod", model), batch, seed),
        lambda model, inputs: model(**inputs, return_dict=False)[0],
    )


def _pipeline(name: str) -> HostCase:
    return HostCase(
        f"{name}-pipeline",
        "pipeline",
        lambda: tiny_pipeline(name),
        lambda pipe, batch, padding, seed: tiny_call(name, batch=batch, steps=STEPS, seed=seed),
        lambda pipe, inputs: pipe(**inputs)[0],
    )


_DIFFUSION = ("sd", "sdxl", "sd3", "flux", "pixart", "sana", "wan")

HOSTS: dict[str, HostCase] = {
    host.name: host
    for host in (
        *(_language(name) for name in ("llama", "mistral", "qwen3", "gemma2", "gpt_oss", "gpt2", "falcon")),
        _language("llava", images=True),
        _language("bert", decoder=False),
        # BART counts padding in its learned positions, so a padded row is another input for it.
        _language("bart", decoder=False, padded=()),
        _language("t5", decoder=False),
        *(_denoiser(name) for name in _DIFFUSION),
        *(_pipeline(name) for name in _DIFFUSION),
    )
}
