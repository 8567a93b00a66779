"""The tables that drive the laws: every method, every host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from attnsteer import (
    ACT,
    PAG,
    PASTA,
    SEG,
    VAR,
    VHR,
    AttendAndExcite,
    AttentionRefocusing,
    HeadGate,
    HeadSet,
    SoftPAG,
    SpotLight,
    Where,
    ZeroTuning,
)
from attnsteer.site import Site
from attnsteer.testing import (
    tiny_call,
    tiny_denoiser,
    tiny_denoiser_inputs,
    tiny_pipeline,
    tiny_transformers,
    tiny_transformers_inputs,
)
from attnsteer.testing.laws import HostCase, MethodCase

SPAN = [(1, 3), (4, 5)]


def chosen(pool: Sequence[Site]) -> tuple[HeadSet, Where]:
    """Half of the heads of the middle layer, and a Where that keeps to the pool's stack and kinds."""
    layers = sorted({s.layer for s in pool})
    layer = layers[len(layers) // 2]
    heads = min(s.heads for s in pool if s.layer == layer)
    patterns = [s.path.replace(".", r"\.") for s in pool]
    kinds = tuple({s.kind for s in pool})
    return HeadSet({layer: list(range(0, heads, 2)) or [0]}), Where(modules=patterns, kinds=kinds)


def heads_case(
    name: str, act: Callable[[HeadSet, Where, int], Any], rest: Callable[[HeadSet, Where, int], Any]
) -> MethodCase:
    return MethodCase(
        name,
        lambda pool, batch: act(*chosen(pool), batch),
        lambda pool, batch: rest(*chosen(pool), batch),
    )


METHODS = [
    heads_case(
        "HeadGate",
        lambda heads, where, b: HeadGate({p: -0.5 for p in heads}, where=where),
        lambda heads, where, b: HeadGate({p: 1.0 for p in heads}, where=where),
    ),
    heads_case(
        "ACT",
        lambda heads, where, b: ACT(heads, 0.4, 0.12, where=where),
        lambda heads, where, b: ACT(heads, 1.0, 0.12, where=where),
    ),
    heads_case(
        "ZeroTuning",
        lambda heads, where, b: ZeroTuning(heads, 6.0, where=where),
        lambda heads, where, b: ZeroTuning(heads, 1.0, where=where),
    ),
    heads_case(
        "SpotLight",
        lambda heads, where, b: SpotLight([SPAN] * b, 0.6, where=where & Where(heads=heads)),
        lambda heads, where, b: SpotLight([SPAN] * b, 0.0, where=where & Where(heads=heads)),
    ),
    heads_case(
        "PASTA",
        lambda heads, where, b: PASTA([SPAN] * b, heads, 0.02, where=where),
        lambda heads, where, b: PASTA([SPAN] * b, heads, 1.0, where=where),
    ),
]
# On hosts whose prompts have images.
VISION = [
    heads_case(
        "VAR",
        lambda heads, where, b: VAR((3, 17), 1.6, 0.2, 0.2, 0.6, where=where & Where(heads=heads)),
        lambda heads, where, b: VAR((3, 17), 1.6, 0.2, 0.2, 0.0, where=where & Where(heads=heads)),
    ),
    heads_case(
        "VHR",
        lambda heads, where, b: VHR(1.7, where=where & Where(heads=heads)),
        lambda heads, where, b: VHR(1.0, where=where & Where(heads=heads)),
    ),
]
GUIDANCE = [
    heads_case("PAG", lambda heads, where, b: PAG(2.0, where=where), lambda heads, where, b: PAG(0.0, where=where)),
    heads_case(
        "SoftPAG",
        lambda heads, where, b: SoftPAG(2.0, 0.5, heads=heads, where=where),
        lambda heads, where, b: SoftPAG(0.0, 0.5, heads=heads, where=where),
    ),
    heads_case("SEG", lambda heads, where, b: SEG(2.0, where=where), lambda heads, where, b: SEG(0.0, where=where)),
]
# Moves of the latent, with words as positions, because the prompts are embeddings; two steps.
LATENT = [
    heads_case(
        "AttendAndExcite",
        # A milder softmax than the published one, whose gradient vanishes on some of these random maps.
        lambda heads, where, b: AttendAndExcite(
            [(2, 3), (4, 5)], {}, compete="all", sharpness=20.0, where=where & Where(heads=heads)
        ),
        lambda heads, where, b: AttendAndExcite([(2, 3), (4, 5)], step_size=0.0, where=where & Where(heads=heads)),
    ),
    heads_case(
        "AttentionRefocusing",
        lambda heads, where, b: AttentionRefocusing(BOXES, compete="all", schedule=[(0.0, 0.5, 4.0, 2)], where=where),
        lambda heads, where, b: AttentionRefocusing(BOXES, step_size=0.0, where=where),
    ),
]
BOXES = {(2, 4): (0.0, 0.0, 0.5, 0.5), (5, 6): (0.25, 0.5, 1.0, 1.0)}


def language(name: str, decoder: bool, padded: tuple[str, ...] = ("left", "right")) -> HostCase:
    def run(model: Any, inputs: dict[str, Any]) -> Tensor:
        out = model(**inputs)
        return out.logits if "logits" in out else out.last_hidden_state

    return HostCase(
        name,
        "transformers",
        lambda: tiny_transformers(name),
        lambda model, batch, padding, seed: tiny_transformers_inputs(
            name, getattr(model, "_orig_mod", model), batch=batch, length=12, padding=padding, seed=seed
        ),
        run,
        decoder,
        padded,
    )


def denoiser(name: str) -> HostCase:
    return HostCase(
        name,
        "denoiser",
        lambda: tiny_denoiser(name),
        lambda model, batch, padding, seed: tiny_denoiser_inputs(name, getattr(model, "_orig_mod", model), batch, seed),
        lambda model, inputs: model(**inputs, return_dict=False)[0],
    )


def pipeline(name: str) -> HostCase:
    return HostCase(
        f"{name}-pipeline",
        "pipeline",
        lambda: tiny_pipeline(name),
        lambda pipe, batch, padding, seed: tiny_call(name, batch=batch, steps=2, seed=seed),
        lambda pipe, inputs: pipe(**inputs)[0],
    )


LANGUAGE = [
    *(language(n, True) for n in ("llama", "mistral", "qwen3", "gemma2", "gpt_oss", "gpt2", "falcon", "llava")),
    language("bert", False),
    # BART counts padding in its learned positions, so a padded row is another input for it.
    language("bart", False, ()),
    language("t5", False),
]
DENOISERS = [denoiser(n) for n in ("sd", "sdxl", "sd3", "flux", "pixart", "sana", "wan")]
LATENT_PIPELINES = [pipeline(n) for n in ("sd", "sdxl", "sd3", "flux")]
PIPELINES = [pipeline(n) for n in ("sd", "sdxl", "sd3", "flux", "pixart", "sana", "wan")]
