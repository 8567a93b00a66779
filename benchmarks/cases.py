"""The benchmark cases: each has a bar, a correctness gate that runs first, and sizes (full, quick, smoke)."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnsteer import ACT, PAG, AttendAndExcite, HeadSet, Intervention, SpotLight, Where, ZeroTuning, steer
from attnsteer.call import AttnCall, Share
from benchmarks import compose, dense, efficiency, guidance, short, vision
from benchmarks.measure import Times, interleaved, peak_memory
from benchmarks.models import (
    LlamaShape,
    MMDiTShape,
    UNetShape,
    excite_call,
    excite_pipelines,
    llama,
    prompt,
    twin,
    unet,
)
from benchmarks.parts import MODES, TOLERANCE, Case, Check, Decoder, Gate, Outcome, Size, error

# The column means of the planted sinks are 2 to 7 % (see `benchmarks.models`).
BETA, THRESHOLD, SINKS = 0.4, 0.02, 12


class CountedACT(ACT):
    """ACT that notes how many sinks each edited head had."""

    def weights(self, call: AttnCall) -> Share | None:
        """As ACT."""
        edit = super().weights(call)
        if edit is not None:
            COUNTS.extend(edit.keys.sum(dim=-1).flatten().tolist())
        return edit


COUNTS: list[int] = []


def share_of_heads(shape: LlamaShape, share: float, seed: int = 0) -> HeadSet:
    """About `share` of all heads, spread evenly over the layers and at random within them."""
    g = torch.Generator().manual_seed(seed)
    total, picked = round(share * shape.heads * shape.layers), {}
    for layer in range(shape.layers):
        count = (total * (layer + 1)) // shape.layers - (total * layer) // shape.layers
        picked[layer] = sorted(torch.randperm(shape.heads, generator=g)[:count].tolist())
    return HeadSet({layer: heads for layer, heads in picked.items() if heads})


def act(shape: LlamaShape, share: float, kind: type[ACT] = ACT, **options: Any) -> ACT:
    """ACT on a share of the heads, with the benchmark's settings."""
    return kind(share_of_heads(shape, share), BETA, THRESHOLD, **options)


# Prefill: ACT on a share of the heads.


@functools.lru_cache
def gate_prefill(shape: LlamaShape, tokens: int, share: float) -> Gate:
    """All logits of a shorter prompt: steered against our dense path and against the eager dense reference."""
    model, ids = llama(shape, tokens), prompt(shape, tokens, SINKS)
    plain = model(ids).logits
    with steer(model, act(shape, share)):
        fast = model(ids).logits
    with steer(model, act(shape, share), reference=True):
        slow = model(ids).logits
    try:
        eager = dense.use(model, _dense_act(shape, share), "eager")(ids).logits
        lean = dense.use(model, _dense_act(shape, share, lean=True))(ids).logits
    finally:
        dense.forget()
    worst = max(error(fast, slow), error(fast, eager), error(fast, lean))
    return Gate(worst, TOLERANCE, error(fast, plain), "steer(reference=True) and the eager dense reference, all logits")


def _dense_act(shape: LlamaShape, share: float, lean: bool = False) -> dense.DenseACT:
    heads = share_of_heads(shape, share)
    return dense.DenseACT({layer: list(heads[layer]) for layer in heads.layers}, BETA, THRESHOLD, lean)


def _prefill(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=True, logits_to_keep=1).logits


class Prefill:
    """A model without edits, a second one with ACT on a share of the heads, and a prompt that both read."""

    def __init__(self, size: Size, share: float):
        self.size, self.share = size, share
        self.plain = llama(size.shape, size.tokens)
        self.ids = prompt(size.shape, size.tokens, SINKS)
        self.run = steer(twin(self.plain), act(size.shape, share))

    def __enter__(self) -> Prefill:
        return self

    def __exit__(self, *_: Any) -> None:
        self.run.remove()
        dense.forget()

    def arm(self, model: nn.Module) -> Callable[[], Tensor]:
        """One prefill, with the logits of the last token."""
        return lambda: model(self.ids, use_cache=True, logits_to_keep=1).logits

    def times(self) -> Times:
        """Steered beside unsteered."""
        arms = {"unsteered": self.arm(self.plain), "steered": self.arm(self.run.target)}
        return interleaved(arms, self.size.repeats, patience=self.size.patience)

    def slow_times(self) -> Times:
        """Steered beside the dense references, eager and lean, our own dense path, and the model without its attention."""
        eager = dense.use(twin(self.plain), _dense_act(self.size.shape, self.share), "eager")
        lean = dense.use(twin(self.plain), _dense_act(self.size.shape, self.share, lean=True))
        rest = dense.use(twin(self.plain), dense.no_attention)
        with steer(twin(self.plain), act(self.size.shape, self.share), reference=True) as ours:
            models = {
                "steered": self.run.target,
                "eager dense": eager,
                "lean dense": lean,
                "reference=True": ours.target,
                "no attention": rest,
            }
            arms = {name: self.arm(model) for name, model in models.items()}
            return interleaved(arms, max(2, self.size.repeats // 2), patience=self.size.patience)

    def sinks(self) -> dict[str, Any]:
        """How much work there is: heads edited, and sinks found in them."""
        COUNTS.clear()
        with steer(twin(self.plain), act(self.size.shape, self.share, CountedACT)) as counted:
            self.arm(counted.target)()
        heads = share_of_heads(self.size.shape, self.share)
        return {
            "heads_steered": len(heads),
            "heads": self.size.shape.heads * self.size.shape.layers,
            "mean_sinks_per_head": sum(COUNTS) / max(1, len(COUNTS)),
            "sinks_range": [min(COUNTS), max(COUNTS)],
            "tau": THRESHOLD,
            "beta": BETA,
        }


def _memory(size: Size, share: float, threads: int) -> dict[str, Any]:
    request = {"shape": size.shape.to_dict(), "tokens": size.tokens, "share": share}
    arms = {arm: peak_memory(arm, request, threads) for arm in ("unsteered", "steered")}
    return {
        "ratio": arms["steered"]["bytes"] / arms["unsteered"]["bytes"],
        "time_ratio": arms["steered"]["seconds"] / arms["unsteered"]["seconds"],
        **{f"{name}_mib": round(a["bytes"] / 2**20, 1) for name, a in arms.items()},
        **{f"{name}_baseline_mib": round(a["baseline"] / 2**20, 1) for name, a in arms.items()},
        **{f"{name}_s": a["seconds"] for name, a in arms.items()},
        **{f"{name}_foreign_share": a["foreign"] for name, a in arms.items()},
        "finite": all(a["finite"] for a in arms.values()),
    }


def measure_act_20(size: Size, threads: int) -> Outcome:
    """ACT on a fifth of the heads: time, time of the dense references, peak memory."""
    with Prefill(size, 0.2) as prefill:
        more, times, slow = prefill.sinks(), prefill.times(), prefill.slow_times()
    rest, unsteered = slow.median("no attention"), times.median("unsteered")
    more["speedup_over_lean_dense"] = slow.ratio("lean dense", "steered")
    more["speedup_over_reference_true"] = slow.ratio("reference=True", "steered")
    # What no steering at all would reach, because the reference shares the projections and the MLP with it.
    more["speedup_at_most"] = slow.median("eager dense") / unsteered
    more["attention_over_unsteered"] = (times.median("steered") - rest) / (unsteered - rest)
    inside = (slow.median("eager dense") - rest) / (slow.median("steered") - rest)
    checks = [
        Check("speed-up over the eager dense reference", slow.ratio("eager dense", "steered"), 4.0, at_least=True),
        Check("the same, attention alone", inside, 4.0, at_least=True),
    ]
    if size.memory:
        more["memory"] = memory = _memory(size, 0.2, threads)
        checks.append(Check("peak memory over unsteered", memory["ratio"], 1.1))
    return Outcome(times.ratio("steered", "unsteered"), checks, {"prefill": times, "beside dense": slow}, more)


def measure_act_all(size: Size, threads: int) -> Outcome:
    """ACT on all heads."""
    with Prefill(size, 1.0) as prefill:
        more, times = prefill.sinks(), prefill.times()
    return Outcome(times.ratio("steered", "unsteered"), [], {"prefill": times}, more)


def measure_long_prefill(size: Size, threads: int) -> Outcome:
    """One long prefill per arm, each in its own process; the value is the ratio of peak memory."""
    memory = _memory(size, 0.2, threads)
    completes = Check("completes with finite logits", float(memory["finite"]), 1.0, at_least=True)
    return Outcome(memory["ratio"], [completes], {}, {"memory": memory})


# Decoding.


def _spotlight(tokens: int) -> SpotLight:
    return SpotLight([[(tokens // 8, tokens // 8 + tokens // 16)]], 0.3)


@functools.lru_cache
def gate_decode(shape: LlamaShape, tokens: int) -> Gate:
    """The logits of eight decoded tokens: steered against the dense path."""
    model, ids = llama(shape, tokens), prompt(shape, tokens, SINKS)
    outputs = []
    plain = _steps(model, ids)
    for method in (act(shape, 1.0), _spotlight(tokens)):
        with steer(model, method):
            fast = _steps(model, ids)
        with steer(model, method, reference=True):
            slow = _steps(model, ids)
        outputs.append((error(fast, slow), error(fast, plain)))
    worst, least = max(e for e, _ in outputs), min(m for _, m in outputs)
    return Gate(worst, TOLERANCE, least, "steer(reference=True), ACT frozen and SpotLight, eight steps")


def _steps(model: nn.Module, ids: Tensor, count: int = 8) -> Tensor:
    step = Decoder(model, ids)
    return torch.cat([step() for _ in range(count)])


def measure_decode(size: Size, threads: int) -> Outcome:
    """One step over the cache with a reweighting on every layer and head; the slower of two methods."""
    plain, ids = llama(size.shape, size.tokens), prompt(size.shape, size.tokens, SINKS)
    methods = {"ACT frozen": act(size.shape, 1.0), "SpotLight": _spotlight(size.tokens)}
    runs = {name: steer(twin(plain), method) for name, method in methods.items()}
    try:
        arms = {"unsteered": Decoder(plain, ids)} | {name: Decoder(run.target, ids) for name, run in runs.items()}
        times = interleaved(arms, size.repeats, warmup=2, calls=10, patience=size.patience)
    finally:
        for run in runs.values():
            run.remove()
    ratios = {name: times.ratio(name, "unsteered") for name in methods}
    return Outcome(max(ratios.values()), [], {"step": times}, {"ratios": ratios})


# Values per sample.

STRENGTHS = (0.2, 0.4, 0.5, 0.8)


def _per_sample(value: float | list[float], method: str, batch: int) -> Intervention:
    spans = [[(4, 12)]] * batch
    return ZeroTuning(None, value) if method == "ZeroTuning" else SpotLight(spans, value)


@functools.lru_cache
def gate_per_sample(shape: LlamaShape, tokens: int) -> Gate:
    """Each sample of a batch with strengths of its own is the sample alone with that strength."""
    model, ids = llama(shape, tokens), prompt(shape, tokens, SINKS, batch=len(STRENGTHS))
    worst, least = 0.0, float("inf")
    for name in ("ZeroTuning", "SpotLight"):
        plain = _steps(model, ids)
        with steer(model, _per_sample(list(STRENGTHS), name, len(ids))):
            together = _steps(model, ids)
        for b, strength in enumerate(STRENGTHS):
            with steer(model, _per_sample(strength, name, 1)):
                alone = _steps(model, ids[b : b + 1])
            worst = max(worst, error(together.unflatten(0, (8, -1))[:, b], alone))
        least = min(least, error(together, plain))
    return Gate(worst, TOLERANCE, least, "each sample alone, ZeroTuning and SpotLight, eight steps")


def measure_per_sample(size: Size, threads: int) -> Outcome:
    """One step over the cache with a strength per sample, over the same with one for all; the slower of two methods."""
    plain = llama(size.shape, size.tokens)
    ids = prompt(size.shape, size.tokens, SINKS, batch=len(STRENGTHS))
    ratios, measured = {}, {}
    for name in ("ZeroTuning", "SpotLight"):
        given = {"one": STRENGTHS[1], "each": list(STRENGTHS)}
        runs = {kind: steer(twin(plain), _per_sample(value, name, len(ids))) for kind, value in given.items()}
        try:
            arms = {kind: Decoder(run.target, ids) for kind, run in runs.items()}
            measured[name] = interleaved(arms, size.repeats, warmup=2, calls=10, patience=size.patience)
        finally:
            for run in runs.values():
                run.remove()
        ratios[name] = measured[name].ratio("each", "one")
    return Outcome(max(ratios.values()), [], measured, {"ratios": ratios})


# Idle.


@functools.lru_cache
def gate_idle(shape: LlamaShape, tokens: int) -> Gate:
    """An attached method that selects nothing at a call leaves it bit for bit as it was."""
    model, ids = llama(shape, tokens), prompt(shape, tokens, SINKS)
    steered = twin(model)
    idle_prefill = steer(steered, act(shape, 1.0, where=Where(phases="decode")), control=True)
    moved = error(model(ids).logits, steered(ids).logits)
    idle_prefill.remove()
    with steer(steered, HEADLESS, control=True):
        moved = max(moved, error(_steps(model, ids), _steps(steered, ids)))
    return Gate(moved, 0.0, moved, "the unsteered model, bit for bit")


# An edit of the prompt that changes nothing, so that the decoding after it can be compared bit for bit.
HEADLESS = ACT(beta=1.0, where=Where(phases="prefill"))


def measure_idle(size: Size, threads: int) -> Outcome:
    """Attached but not selected at this call: a prefill (phases="decode") and a decode step (phases="prefill")."""
    plain, ids = llama(size.shape, size.tokens), prompt(size.shape, size.tokens, SINKS)
    # A short prompt is the harder test: what an idle attachment costs does not grow with it.
    short = ids[:, : max(16, size.tokens // 8)]
    first = steer(twin(plain), act(size.shape, 1.0, where=Where(phases="decode")), control=True)
    second = steer(twin(plain), act(size.shape, 1.0, where=Where(phases="prefill")))
    try:
        models = {"unsteered": plain, "idle": first.target}
        arms = {name: functools.partial(m, short, use_cache=True, logits_to_keep=1) for name, m in models.items()}
        prefill = interleaved(arms, size.repeats, patience=size.patience)
        arms = {"unsteered": Decoder(plain, ids), "idle": Decoder(second.target, ids)}
        decode = interleaved(arms, 4 * size.repeats, warmup=2, calls=10, patience=size.patience)
    finally:
        first.remove()
        second.remove()
    times = {"prefill": prefill, "decode step": decode}
    ratios = {name: t.ratio("idle", "unsteered") for name, t in times.items()}
    return Outcome(max(ratios.values()), [], times, {"ratios": ratios, "prefill_tokens": short.shape[1]})


# Guidance.

SCALE = 3.0


def _denoiser_inputs(shape: UNetShape, side: int, rows: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, side, side, generator=g).expand(rows, -1, -1, -1).contiguous()
    text = torch.randn(2, 77, shape.text_dim, generator=g)
    text = torch.cat([text, text[1:].expand(rows - 2, -1, -1)])
    return {"sample": latent, "timestep": 500, "encoder_hidden_states": text, "return_dict": False}


def _with_pag_processors(model: nn.Module) -> nn.Module:
    """diffusers' own PAG: three rows (unconditional, conditional, perturbed), the perturbation in the mid block."""
    from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0

    for name, module in model.named_modules():
        if name.startswith("mid_block.") and name.endswith("attn1"):
            module.set_processor(PAGCFGIdentitySelfAttnProcessor2_0())
    return model


@functools.lru_cache
def gate_pag(shape: UNetShape, side: int) -> Gate:
    """Both guidance rows of one step: ours against three rows with diffusers' own PAG processor."""
    model = unet(shape)
    cfg = model(**_denoiser_inputs(shape, side, 2))[0]
    u, c, weak = _with_pag_processors(twin(model))(**_denoiser_inputs(shape, side, 3))[0].chunk(3)
    term = SCALE * (c - weak)
    with steer(model, PAG(SCALE)) as run, run.branches("uncond", "cond"):
        ours = model(**_denoiser_inputs(shape, side, 2))[0]
    return Gate(
        error(ours, torch.cat([u + term, c + term])),
        TOLERANCE,
        error(ours, cfg),
        "diffusers' PAG processor, three rows",
    )


def measure_pag(size: Size, threads: int) -> Outcome:
    """One denoiser step: CFG alone (two rows), CFG and PAG with prefix reuse, and three rows as without it."""
    plain = unet(size.shape)
    steered, naive = twin(plain), _with_pag_processors(twin(plain))
    two, three = (_denoiser_inputs(size.shape, size.tokens, rows) for rows in (2, 3))
    with steer(steered, PAG(SCALE)) as run, run.branches("uncond", "cond"):
        arms = {"CFG": lambda: plain(**two), "CFG + PAG": lambda: steered(**two), "three rows": lambda: naive(**three)}
        times = interleaved(arms, size.repeats, patience=size.patience)
    more = {"three_rows_ratio": times.ratio("three rows", "CFG")}
    return Outcome(times.ratio("CFG + PAG", "CFG"), [], {"step": times}, more)


# Latent optimisation: two words, one update before each step, no refinement, so that every step does the same work.
WORDS = [2, 5]


class Excite:
    """The Attend-and-Excite loss on a stock pipeline, beside diffusers' own pipeline."""

    def __init__(self, shape: UNetShape, side: int, steps: int):
        self.stock, self.official = excite_pipelines(unet(shape))
        self.call, self.steps = excite_call(shape, side, steps), steps
        self.method = AttendAndExcite.released_code([(w, w + 1) for w in WORDS], thresholds={}, until=steps)

    def built_in(self) -> Tensor:
        """diffusers' pipeline."""
        rule = {"token_indices": WORDS, "thresholds": {}, "max_iter_to_alter": self.steps, "attn_res": (16, 16)}
        with warnings.catch_warnings():
            # It calls torch.meshgrid in the old way.
            warnings.simplefilter("ignore")
            return self.official(**self.call, **rule)[0]

    def plain(self) -> Tensor:
        """The stock pipeline; where it is steered, the steered one."""
        return self.stock(**self.call)[0]


@functools.lru_cache
def gate_excite(shape: UNetShape, side: int) -> Gate:
    """The latents after one optimised step, in double precision."""
    arms = Excite(shape, side, 1)
    for pipe in (arms.stock, arms.official):
        pipe.unet.double()
    arms.call = {k: v.double() if isinstance(v, Tensor) else v for k, v in arms.call.items()}
    plain = arms.plain()
    with steer(arms.stock, arms.method):
        ours = arms.plain()
    return Gate(error(ours, arms.built_in()), 1e-8, error(ours, plain), "diffusers' own pipeline, one step in float64")


def measure_excite(size: Size, threads: int) -> Outcome:
    """One whole step: the gradient pass, its backward pass, the guided prediction, the scheduler."""
    arms = Excite(size.shape, size.tokens, 1)
    bare = copy.copy(arms)
    bare.stock = excite_pipelines(twin(arms.stock.unet))[0]
    with steer(arms.stock, arms.method):
        timed = {"built-in": arms.built_in, "steered": arms.plain, "without": bare.plain}
        times = interleaved(timed, size.repeats, patience=size.patience)
    more = {"over_a_step_without": times.ratio("steered", "without")}
    return Outcome(times.ratio("steered", "built-in"), [], {"step": times}, more)


FULL, QUICK = LlamaShape(), LlamaShape(hidden=512, heads=8, kv_heads=2, mlp=2048, vocab=256)
# Decoding is about reading weights: with too few of them the time is that of Python alone.
QUICK_DECODE = LlamaShape(hidden=1024, heads=16, kv_heads=4, mlp=4096, vocab=256)
SMOKE = LlamaShape(hidden=128, heads=4, kv_heads=2, head_dim=32, mlp=256, vocab=64)
# Attention alone, nearly: what a method takes would be lost in the noise of the rest.
ONE_LAYER = LlamaShape(layers=1, mlp=64, vocab=64)
# LLaVA-1.5's proportions at half of its width, where attention weighs twice as much; and the same, smaller.
LLAVA = LlamaShape(hidden=2048, heads=16, kv_heads=16, head_dim=128, mlp=5504)
SMALL_LLAVA = LlamaShape(hidden=512, heads=8, kv_heads=8, mlp=1376, vocab=256)
# With enough layers behind the second.
DEEP_LLAVA = LlamaShape(hidden=1024, heads=16, kv_heads=16, mlp=2752, layers=8)
DEEP_SMALL_LLAVA = LlamaShape(hidden=512, heads=8, kv_heads=8, mlp=1376, layers=6, vocab=256)
DEEP_SMOKE = LlamaShape(hidden=128, heads=4, kv_heads=4, head_dim=32, mlp=256, layers=4, vocab=64)
SMALL_UNET = UNetShape((80, 160, 320, 320), 192, 32)
TINY_UNET = UNetShape((32, 32, 64, 64), 32, 16)


def _sizes(full: Size, quick: Size, smoke: Size) -> dict[str, Size]:
    return dict(zip(MODES, (full, quick, smoke), strict=True))


CASES = {
    case.name: case
    for case in (
        Case(
            "act-20",
            "ACT on 20 % of the heads, prefill, over the unsteered SDPA model",
            1.15,
            lambda size: gate_prefill(size.shape, size.gate, 0.2),
            measure_act_20,
            _sizes(
                Size(FULL, 4096, 512, repeats=5, patience=400.0),
                Size(QUICK, 2048, 256, repeats=3),
                Size(SMOKE, 128, 64, repeats=2, memory=False),
            ),
        ),
        Case(
            "act-all",
            "ACT on all heads, prefill, over the unsteered SDPA model",
            1.6,
            lambda size: gate_prefill(size.shape, size.gate, 1.0),
            measure_act_all,
            _sizes(
                Size(FULL, 4096, 512, repeats=5, patience=400.0),
                Size(QUICK, 2048, 256, repeats=5),
                Size(SMOKE, 128, 64, repeats=2),
            ),
        ),
        Case(
            "decode",
            "a decode step over the cache, all layers and heads reweighted: the slower of ACT frozen and SpotLight",
            1.15,
            lambda size: gate_decode(size.shape, size.gate),
            measure_decode,
            _sizes(
                Size(FULL, 4096, 512, repeats=12, patience=240.0),
                Size(QUICK_DECODE, 2048, 256, repeats=5),
                Size(SMOKE, 128, 64, repeats=2),
            ),
        ),
        Case(
            "per-sample",
            "a decode step, a strength for each of four samples over one for all: the slower of ZeroTuning and SpotLight",
            1.02,
            lambda size: gate_per_sample(size.shape, size.gate),
            measure_per_sample,
            _sizes(
                Size(FULL, 1024, 256, repeats=12, patience=240.0),
                Size(QUICK_DECODE, 512, 128, repeats=8),
                Size(SMOKE, 128, 64, repeats=2),
            ),
        ),
        Case(
            "compose",
            "ZeroTuning and SpotLight on all heads, prefill: the time beyond the unsteered model, over the sum of both alone",
            compose.BAR,
            lambda size: compose.gate(size.shape, size.gate),
            compose.measure,
            _sizes(
                Size(ONE_LAYER, 2048, 256, repeats=9, patience=120.0),
                Size(ONE_LAYER, 1024, 128, repeats=3, memory=False),
                Size(SMOKE, 128, 64, repeats=2, memory=False),
            ),
        ),
        Case(
            "short",
            "short prompts and a decode step on many small layers: the slowest of ACT on a quarter of the heads and four others",
            1.10,
            lambda size: short.gate(size.shape, size.gate),
            short.measure,
            _sizes(
                Size(short.SMALL_LAYERS, 512, 128, repeats=15, patience=240.0),
                Size(short.FEW_SMALL_LAYERS, 512, 64, repeats=3),
                Size(SMOKE, 128, 64, repeats=2),
            ),
        ),
        Case(
            "idle",
            "attached but selecting nothing at this step: the worse of a prefill and a decode step",
            1.01,
            lambda size: gate_idle(size.shape, size.gate),
            measure_idle,
            _sizes(
                Size(FULL, 4096, 512, repeats=25, patience=240.0),
                Size(QUICK_DECODE, 1024, 256, repeats=4),
                Size(SMOKE, 128, 64, repeats=2),
            ),
        ),
        Case(
            "prefill-32k",
            "ACT on 20 % of the heads, prefill of 32,768 tokens: peak memory over the unsteered model",
            1.2,
            lambda size: gate_prefill(size.shape, size.gate, 0.2),
            measure_long_prefill,
            _sizes(Size(FULL, 32768, 512), Size(QUICK, 8192, 256), Size(SMOKE, 256, 64)),
        ),
        Case(
            "var",
            "VAR on every layer and head, prefill with 576 image keys in 2,048, over the unsteered SDPA model",
            1.2,
            lambda size: vision.gate_var(size.shape, size.gate),
            vision.measure_var,
            _sizes(
                Size(LLAVA, 2048, 512, repeats=5, patience=120.0),
                Size(SMALL_LLAVA, 2048, 512, repeats=5),
                Size(SMOKE, 128, 128, repeats=2),
            ),
        ),
        Case(
            "vhr",
            "a decode step over the cache with VHR on every layer, over the unsteered model",
            1.02,
            lambda size: vision.gate_vhr(size.shape, size.gate),
            vision.measure_vhr,
            _sizes(
                Size(LLAVA, 2048, 512, repeats=12, patience=120.0),
                Size(SMALL_LLAVA, 2048, 256, repeats=5),
                Size(SMOKE, 128, 128, repeats=2),
            ),
        ),
        Case(
            "vision-decode",
            "a decode step over the cache with 576 image keys in 2,048, all heads: the slowest of VAR, PAI, PAINT and ADHH",
            1.1,
            lambda size: vision.gate_decode(size.shape, size.gate),
            vision.measure_decode,
            _sizes(
                Size(LLAVA, 2048, 512, repeats=8, patience=120.0),
                Size(SMALL_LLAVA, 2048, 256, repeats=4),
                Size(SMOKE, 128, 128, repeats=2),
            ),
        ),
        Case(
            "block-mask",
            "BlockMask with a quarter of the blocks, attention alone, over full SDPA",
            0.45,
            lambda size: efficiency.gate_blocks(size.gate),
            efficiency.measure_blocks,
            _sizes(
                Size(FULL, 16384, 1024, repeats=3),
                Size(QUICK, 4096, 512, repeats=3),
                Size(SMOKE, 1024, 256, repeats=2),
            ),
        ),
        Case(
            "token-merge",
            "TokenMerge of half of the tokens, over the plain attention module",
            0.55,
            lambda size: efficiency.gate_merge(size.gate),
            efficiency.measure_merge,
            _sizes(
                Size(UNetShape(), 4096, 256, repeats=3),
                Size(SMALL_UNET, 4096, 256, repeats=3),
                Size(TINY_UNET, 256, 64, repeats=2),
            ),
        ),
        Case(
            "visual-tokens",
            "half of the image tokens dropped at layer 2 by exact scores, prefill, over the whole prompt",
            1.0,
            lambda size: efficiency.gate_visual(size.shape, size.gate),
            efficiency.measure_visual,
            _sizes(
                Size(DEEP_LLAVA, 656, 120, repeats=5),
                Size(DEEP_SMALL_LLAVA, 656, 120, repeats=3),
                Size(DEEP_SMOKE, 120, 120, repeats=2),
            ),
        ),
        Case(
            "cfg-pag",
            "CFG and mid-block PAG with prefix reuse, per denoiser step, over CFG alone",
            1.38,
            lambda size: gate_pag(size.shape, size.gate),
            measure_pag,
            _sizes(
                Size(UNetShape(), 64, 32, repeats=5, patience=400.0),
                Size(SMALL_UNET, 32, 16, repeats=5),
                Size(TINY_UNET, 16, 16, repeats=2),
            ),
        ),
        Case(
            "cfg-softpag",
            "CFG and mid-block SoftPAG, per denoiser step, over CFG alone, over what the count of operations allows",
            1.05,
            lambda size: guidance.gate_softpag(size.shape, size.gate),
            guidance.measure_softpag,
            _sizes(
                Size(UNetShape(), 64, 32, repeats=3),
                Size(SMALL_UNET, 32, 16, repeats=5),
                Size(TINY_UNET, 16, 16, repeats=2),
            ),
        ),
        Case(
            "cfg-slg",
            "CFG and SLG on an SD3 shape, one block left out, over CFG alone, over what the count of operations allows",
            1.05,
            lambda size: guidance.gate_slg(size.shape, size.gate),
            guidance.measure_slg,
            _sizes(
                Size(MMDiTShape(), 32, 16, repeats=7),
                Size(MMDiTShape(256, 4, 8, 32, 2), 32, 16, repeats=5),
                Size(MMDiTShape(64, 2, 4, 16, 1), 16, 8, repeats=2),
            ),
        ),
        Case(
            "nag",
            "NAG in every cross-attention, one row without CFG, per denoiser step, over the step without",
            1.15,
            lambda size: guidance.gate_nag(size.shape, size.gate),
            guidance.measure_nag,
            _sizes(
                Size(UNetShape(), 64, 32, repeats=3),
                Size(SMALL_UNET, 32, 16, repeats=5),
                Size(TINY_UNET, 16, 16, repeats=2),
            ),
        ),
        Case(
            "latent-step",
            "a step with one update along the Attend-and-Excite loss, over the same step of diffusers' own pipeline",
            0.75,
            lambda size: gate_excite(size.shape, size.gate),
            measure_excite,
            _sizes(
                Size(UNetShape(), 64, 32, repeats=3, patience=240.0),
                Size(SMALL_UNET, 32, 16, repeats=2),
                Size(TINY_UNET, 16, 16, repeats=2),
            ),
        ),
    )
}
