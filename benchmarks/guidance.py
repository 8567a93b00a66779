"""A denoiser step with SoftPAG and SLG, beside what the count of operations allows, and with NAG, beside a plain step."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attnsteer import NAG, SLG, SoftPAG, Where, steer
from benchmarks.measure import interleaved
from benchmarks.models import MMDiTShape, UNetShape, mmdit, twin, unet
from benchmarks.parts import TOLERANCE, Gate, Outcome, Size, error

SCALE, STRENGTH = 3.0, 0.7


def unet_inputs(shape: UNetShape, side: int, rows: int) -> dict[str, Any]:
    """One latent, as many rows of it, and a text for each row."""
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, side, side, generator=g).expand(rows, -1, -1, -1).contiguous()
    text = torch.randn(rows, 77, shape.text_dim, generator=g)
    return {"sample": latent, "timestep": 500, "encoder_hidden_states": text, "return_dict": False}


def mmdit_inputs(shape: MMDiTShape, side: int, rows: int) -> dict[str, Any]:
    """The same for the transformer."""
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, side, side, generator=g).expand(rows, -1, -1, -1).contiguous(),
        "encoder_hidden_states": torch.randn(rows, 77, shape.width, generator=g),
        "pooled_projections": torch.randn(rows, shape.width, generator=g),
        "timestep": torch.full((rows,), 500.0),
        "return_dict": False,
    }


def operations(model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
    """Multiplications and additions of one call, by child of the model, and "all"."""
    # The fused attention of CPUs is not counted; the written one is.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counter = FlopCounterMode(display=False, depth=3)
        with counter:
            model(**inputs)
    counts = counter.get_flop_counts()
    name = type(model).__name__
    found = {
        key.removeprefix(f"{name}."): float(sum(by.values())) for key, by in counts.items() if key.startswith(name)
    }
    return {**found, "all": float(counter.get_total_flops())}


def middle() -> SoftPAG:
    """SoftPAG in the middle block, the published place."""
    return SoftPAG(SCALE, STRENGTH, where=Where(modules=r".*mid_block.*attn1"))


def softpag_bound(shape: UNetShape, side: int) -> float:
    """Of CFG's two rows and one weak row from the middle block on, over the two rows."""
    count = operations(unet(shape), unet_inputs(shape, side, 2))
    whole = ("mid_block", "conv_norm_out", "conv_out")
    again = sum(v for k, v in count.items() if k in whole or (k.startswith("up_blocks.") and k.count(".") == 1))
    return 1 + 0.5 * again / count["all"]


def slg(shape: MMDiTShape) -> SLG:
    """One block left out, at every step."""
    return SLG(SCALE, start=None, stop=None, where=Where(layers=[shape.skipped]))


def slg_bound(shape: MMDiTShape, side: int) -> float:
    """Of CFG's two rows and one weak row of the blocks behind the one that is left out."""
    count = operations(mmdit(shape), mmdit_inputs(shape, side, 2))
    blocks = {
        int(k.split(".")[1]): v for k, v in count.items() if k.startswith("transformer_blocks.") and k.count(".") == 1
    }
    behind = sum(v for i, v in blocks.items() if i > shape.skipped)
    return 1 + 0.5 * (behind + count.get("proj_out", 0.0)) / count["all"]


@functools.lru_cache
def gate_softpag(shape: UNetShape, side: int) -> Gate:
    """Against the same method with nothing reused: prefix reuse does not change the prediction.

    The guided sum (1 + s) eps_c - s eps_w carries the roundings of its passes 1 + 2 s times, so the error is taken over that. One
    pass of the SD1.5 shape is 4e-6 to 6e-6 from the same pass in float64, whose batch of two and single row differ as much.
    """
    return _gate(unet(shape), unet_inputs(shape, side, 2), middle())


@functools.lru_cache
def gate_slg(shape: MMDiTShape, side: int) -> Gate:
    """Against a model without the block."""
    model, inputs = mmdit(shape), mmdit_inputs(shape, side, 2)
    plain = model(**inputs)[0]
    other = twin(model)
    del other.transformer_blocks[shape.skipped]
    weak = other(**inputs)[0][1:]
    with steer(model, slg(shape)) as run, run.branches("uncond", "cond"):
        ours = model(**inputs)[0]
    term = SCALE * (plain[1:] - weak)
    return Gate(error(ours, plain + term), TOLERANCE, error(ours, plain), "a model without the block")


def _gate(model: nn.Module, inputs: dict[str, Any], method: SoftPAG) -> Gate:
    plain = model(**inputs)[0]
    row = {k: v[1:] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    weak = twin(model)
    for name, module in weak.named_modules():
        if name.startswith("mid_block.") and name.endswith("attn1"):
            module.to_out[0].register_forward_pre_hook(_towards_values(module))
    with steer(model, method) as run, run.branches("uncond", "cond"):
        ours = model(**inputs)[0]
    term = SCALE * (plain[1:] - weak(**row)[0])
    passes = 1 + 2 * SCALE
    return Gate(
        error(ours, plain + term) / passes,
        TOLERANCE / 2,
        error(ours, plain),
        "O' = (1 - u) O + u V by hooks, all blocks run; over 1 + 2 s",
    )


def _towards_values(module: nn.Module) -> Any:
    kept: list[Tensor] = []
    module.to_v.register_forward_hook(lambda _, args, out: kept.append(out))
    return lambda _, args: (torch.lerp(args[0], kept.pop(), STRENGTH),)


def measure_softpag(size: Size, threads: int) -> Outcome:
    """One step of CFG, and of CFG and SoftPAG, over what the count of operations allows."""
    plain, inputs = unet(size.shape), unet_inputs(size.shape, size.tokens, 2)
    return _measured(plain, inputs, middle(), softpag_bound(size.shape, size.tokens), size)


def measure_slg(size: Size, threads: int) -> Outcome:
    """One step of CFG, and of CFG and SLG, over what the count of operations allows."""
    plain, inputs = mmdit(size.shape), mmdit_inputs(size.shape, size.tokens, 2)
    return _measured(plain, inputs, slg(size.shape), slg_bound(size.shape, size.tokens), size)


def _measured(plain: nn.Module, inputs: dict[str, Any], method: Any, bound: float, size: Size) -> Outcome:
    steered = twin(plain)
    with steer(steered, method) as run, run.branches("uncond", "cond"):
        arms = {"CFG": lambda: plain(**inputs), "steered": lambda: steered(**inputs)}
        times = interleaved(arms, size.repeats, patience=size.patience)
    ratio = times.ratio("steered", "CFG")
    return Outcome(ratio / bound, [], {"step": times}, {"ratio": ratio, "bound": bound})


def negative(shape: UNetShape) -> NAG:
    """A negative text of its own, in every cross-attention."""
    text = torch.randn(1, 77, shape.text_dim, generator=torch.Generator().manual_seed(1))
    return NAG({"encoder_hidden_states": text}, 4.0, alpha=0.375)


@functools.lru_cache
def gate_nag(shape: UNetShape, side: int) -> Gate:
    """Against hooks that run each cross-attention twice and put the official arithmetic behind it."""
    model, inputs = unet(shape), unet_inputs(shape, side, 1)
    plain, method = model(**inputs)[0], negative(shape)
    other, text = twin(model), method.negative["encoder_hidden_states"]
    for name, module in other.named_modules():
        if name.endswith("attn2"):
            module.to_out[0].register_forward_pre_hook(_led_away(module, text))
    with steer(model, method) as run, run.branches("cond"):
        ours = model(**inputs)[0]
    return Gate(error(ours, other(**inputs)[0]), TOLERANCE, error(ours, plain), "each cross-attention twice, by hooks")


def _led_away(module: nn.Module, text: Tensor) -> Any:
    """Z+ enters the output projection; Z- is computed from the same queries."""
    queries: list[Tensor] = []
    module.to_q.register_forward_hook(lambda _, args, out: queries.append(out))

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q, positive = queries.pop(), args[0]
        split = lambda t: t.unflatten(-1, (module.heads, -1)).transpose(1, 2)  # noqa: E731
        k, v = text @ module.to_k.weight.T, text @ module.to_v.weight.T
        Z = torch.nn.functional.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)
        led = positive + 4.0 * (positive - Z)
        ratio = led.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
        led = led * ratio.clamp(max=2.5) / ratio
        return (0.375 * led + 0.625 * positive,)

    return before


def measure_nag(size: Size, threads: int) -> Outcome:
    """One step of one row, without and with NAG: no classifier-free guidance, as few-step models run."""
    plain, inputs = unet(size.shape), unet_inputs(size.shape, size.tokens, 1)
    steered = twin(plain)
    with steer(steered, negative(size.shape)) as run, run.branches("cond"):
        arms = {"plain": lambda: plain(**inputs), "NAG": lambda: steered(**inputs)}
        times = interleaved(arms, size.repeats, patience=size.patience)
    return Outcome(times.ratio("NAG", "plain"), [], {"step": times})
