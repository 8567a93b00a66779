"""Feature caches beside guidance: weak passes have a cache state of their own, exactly as in a second model with a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import PAG, AttendAndExcite, SoftPAG, Where, steer
from attnsteer.errors import UnsupportedHost
from attnsteer.testing import tiny_call, tiny_pipeline
from tests.hosts.diffusers.common import denoiser, relative
from tests.reference.guidance_loops import Edit, edited

STEPS = 5
SITES = {
    "flux": "single_transformer_blocks.1.attn",
    "wan": "blocks.1.attn1",
    "sd": "mid_block.attentions.0.transformer_blocks.0.attn1",
}


def config(kind: str) -> Any:
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

    if kind == "first block":
        return FirstBlockCacheConfig(threshold=10.0)
    if kind == "taylor":
        return TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)
    if kind == "mag":
        ratios = torch.linspace(0.9, 1.1, STEPS)
        return MagCacheConfig(0.5, max_skip_steps=2, retention_ratio=0.1, num_inference_steps=STEPS, mag_ratios=ratios)
    skips = {f"{name}_attention_block_skip_range": 2 for name in ("spatial", "cross")}
    times = {f"{name}_attention_timestep_skip_range": (-1, 2000) for name in ("spatial", "cross")}
    return PyramidAttentionBroadcastConfig(**skips, **times, current_timestep_callback=lambda: 500)


def put_on(model: nn.Module, kind: str, how: str = "enable") -> None:
    from diffusers import hooks

    names = {
        "first block": "first_block_cache",
        "taylor": "taylorseer_cache",
        "mag": "mag_cache",
        "broadcast": "pyramid_attention_broadcast",
    }
    if how == "enable":
        model.enable_cache(config(kind))
    else:
        getattr(hooks, f"apply_{names[kind]}")(model, config(kind))


def call_of(name: str) -> dict[str, Any]:
    return tiny_call(name, steps=STEPS, **({"true_cfg_scale": 2.0} if name == "flux" else {}))


def run(pipe: Any, name: str) -> Tensor:
    with torch.no_grad():
        return pipe(**call_of(name))[0]


@contextlib.contextmanager
def by_hand(pipe: Any, name: str, put: Callable[[nn.Module], None], scale: float) -> Iterator[None]:
    """The denoiser with a weak pass on the conditional rows, of a second model with a cache of its own."""
    import inspect

    model, other = denoiser(name, pipe), denoiser(name, tiny_pipeline(name))
    put(other)
    strong, weak, state = model.forward, other.forward, {"term": None, "context": None}
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    if hasattr(model, "cache_context"):
        entered = model.cache_context

        @contextlib.contextmanager
        def both(context: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            state["context"] = context
            with entered(context, *args, **kwargs), other.cache_context(context, *args, **kwargs):
                yield

        model.cache_context = both

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        out = strong(**{**given, "return_dict": False})[0]
        rows = slice(len(out) // 2, None) if name == "sd" else slice(None)
        if state["context"] != "uncond":
            cut = {
                k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == len(out) else v for k, v in given.items()
            }
            with edited(other, [SITES[name]], Edit(), (8, 8)):
                state["term"] = scale * (out[rows] - weak(**{**cut, "return_dict": False})[0])
        return (out + torch.cat([state["term"]] * (2 if name == "sd" else 1)),)

    model.forward = forward
    yield


LONG = pytest.mark.long
RUNS = [
    pytest.param("flux", "first block", "enable"),
    pytest.param("flux", "broadcast", "apply", marks=LONG),
    pytest.param("flux", "taylor", "apply", marks=LONG),
    pytest.param("wan", "mag", "enable", marks=LONG),
    pytest.param("wan", "broadcast", "enable"),
    pytest.param("wan", "first block", "apply", marks=LONG),
    pytest.param("sd", "broadcast", "apply"),
]


@pytest.mark.parametrize(("name", "kind", "how"), RUNS)
def test_a_weak_pass_beside_a_cache(name: str, kind: str, how: str) -> None:
    put = lambda model: put_on(model, kind, how)  # noqa: E731
    where = Where(modules=SITES[name].replace(".", r"\."))
    joint = {"joint": "joint_identity"} if name == "flux" else {}

    def fresh() -> Any:
        # A UNet's cache lasts from run to run, and a cache that comes late is not told the context: diffusers' own.
        pipe = tiny_pipeline(name)
        put(denoiser(name, pipe))
        return pipe

    cached = run(fresh(), name)
    assert relative(cached, run(tiny_pipeline(name), name)) > 1e-3
    # A term of nearly nothing: what the strong passes remember is their own.
    pipe = fresh()
    with steer(pipe, PAG(1e-30, where=where, **joint), control=True):
        assert torch.equal(run(pipe, name), cached)
    pipe = fresh()
    with steer(pipe, PAG(2.0, where=where, **joint)) as handle:
        ours = run(pipe, name)
        again = ours if name == "sd" else run(pipe, name)
    assert torch.equal(ours, again)
    # The broadcast leaves the UNet's middle block alone, so that the weak map is computed each time.
    answered = handle.audit.to_dict()["interventions"][0].get("answered from a cache", 0)
    assert (answered > 0) == (name != "sd")
    second = tiny_pipeline(name)
    put(denoiser(name, second))
    with by_hand(second, name, put, 2.0):
        expected = run(second, name)
    assert relative(ours, expected) < 5e-6
    assert relative(ours, cached) > 1e-2


def test_a_cache_that_counts_wants_every_step() -> None:
    pipe = tiny_pipeline("wan")
    put_on(pipe.transformer, "mag")
    where = Where(modules=SITES["wan"], steps=[0, 2, 3])
    with pytest.raises(UnsupportedHost, match="counting passes"), steer(pipe, PAG(2.0, where=where)):
        run(pipe, "wan")


def test_gradients_are_refused_beside_a_cache() -> None:
    pipe = tiny_pipeline("sd")
    put_on(pipe.unet, "broadcast", "apply")
    with pytest.raises(UnsupportedHost, match="disable_cache"):
        steer(pipe, AttendAndExcite(["red"], where=Where(kinds="cross")))


def test_whatever_else_skips_blocks_is_noticed() -> None:
    """A wrapper that answers every second call of a block from the one before."""
    pipe = tiny_pipeline("wan")
    block, kept = pipe.transformer.blocks[1], []
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kept.append(plain(*args, **kwargs) if len(kept) % 2 == 0 else kept[-1])
        return kept[-1]

    block.forward = forward
    for site in ("blocks.1.attn1", "blocks.2.attn1"):
        with (
            pytest.raises(UnsupportedHost, match="keeps outputs"),
            steer(pipe, PAG(2.0, where=Where(modules=["blocks.1.attn1", site]))),
        ):
            run(pipe, "wan")


def test_a_weak_pass_leaves_the_keys_of_the_prefix_alone() -> None:
    """Qwen-Image 2.1 keeps the prompt's keys and values of a run's first call in an object that it is given."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    from attnsteer.testing.sweep.diffusers import build, forward

    model, inputs = build("QwenImage21Transformer2DModel")

    def kept(*methods: Any) -> tuple[list[Tensor], Any]:
        cache = QwenImage21KVCache(2)
        with contextlib.ExitStack() as stack:
            if methods:
                stack.enter_context(stack.enter_context(steer(model, *methods)).branches("cond"))
            forward(model, {**inputs, "kv_cache": cache, "kv_cache_mode": "extract"})
            later = forward(model, {**inputs, "kv_cache": cache, "kv_cache_mode": "cached"})[0]
        return [t for layer in cache.layer_caches for t in (layer.k, layer.v)], later

    (plain, last), (steered, guided) = kept(), kept(SoftPAG(2.0, target="zero", where=Where(layers=[0])))
    assert all(torch.equal(a, b) for a, b in zip(plain, steered, strict=True))
    assert relative(guided, last) > 1e-3
