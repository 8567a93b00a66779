"""The vision-language cases: VAR in the prefill of a LLaVA-shaped prompt, VHR and others on images in its decode steps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attnsteer import ADHH, PAI, PAINT, VAR, VHR, Intervention, Where, steer
from attnsteer.steering import Steering
from benchmarks import dense
from benchmarks.measure import interleaved
from benchmarks.models import MARK, SINK, LlamaShape, llama, prompt, twin
from benchmarks.parts import TOLERANCE, Decoder, Gate, Outcome, Size, error

# The image begins behind a system prompt, as in LLaVA-1.5. The first token is a sink, and so are a few of the image's.
START, IMAGE, PROMPT, SINKS = 35, 576, 2048, 4
RHO, MASS, MOVE, ALPHA = 0.5, 0.2, 0.6, 1.5


def image_of(tokens: int) -> tuple[int, int]:
    """(start, stop) of the image: 576 tokens of 2,048, and the same share of other prompts."""
    start = min(START, tokens // 16)
    return start, start + round(tokens * IMAGE / PROMPT)


def reader(shape: LlamaShape, tokens: int) -> nn.Module:
    """The language model, whose config says that it is given images; `run.images` tells where they are."""
    model = llama(shape, tokens)
    # A token that no prompt has.
    model.config.image_token_id = shape.vocab
    return model


def picture(shape: LlamaShape, tokens: int) -> Tensor:
    """Token ids [1, tokens]."""
    ids = prompt(shape, tokens, 0)
    start, stop = image_of(tokens)
    ids[0, torch.linspace(start, stop - 1, SINKS).long()] = SINK
    return ids


def var(shape: LlamaShape) -> VAR:
    """VAR on every layer and head; the sinks of the benchmark's model are marked in one dimension of their embedding."""
    return VAR((MARK,), 0.2 * shape.hidden**0.5, RHO, MASS, MOVE, where=Where(layers=range(shape.layers)))


def vhr(shape: LlamaShape) -> VHR:
    """VHR on every layer."""
    return VHR(ALPHA, where=Where(layers=range(shape.layers)))


def _prefill(model: nn.Module, ids: Tensor, run: Steering | None = None, **options: Any) -> Any:
    with contextlib.nullcontext() if run is None else run.images([[image_of(ids.shape[1])]]):
        return model(ids, use_cache=True, **options)


# VAR.


class DenseVAR:
    """VAR for one unpadded prompt over the whole map, as an attention function of transformers."""

    def __init__(self, model: nn.Module, shape: LlamaShape, tokens: int):
        self.tau = 0.2 * shape.hidden**0.5
        self.start, self.stop = image_of(tokens)
        self.hidden: Tensor | None = None
        for layer in model.model.layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.hidden = args[0] if args else kwargs["hidden_states"]

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        n, groups = q.shape[2], q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        z = torch.matmul(q, k.transpose(-1, -2)) * scaling
        A = z.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)
        x = self.hidden[0]
        sink = x[:, MARK].abs() / (x.square().mean(dim=-1) + 1e-6).sqrt() > self.tau
        image = torch.zeros(n, dtype=torch.bool)
        image[self.start : self.stop] = True
        rest = image & ~sink
        on_image, on_rest = A[..., image].sum(dim=-1), A[..., rest].sum(dim=-1)
        edit = (on_image >= MASS) & (on_rest >= RHO * on_image) & (torch.arange(n) >= self.stop)
        budget = MOVE * A[..., sink].sum(dim=-1)
        edited = torch.where(sink, (1.0 - MOVE) * A, torch.where(rest, A * (1.0 + budget / on_rest)[..., None], A))
        A = torch.where(edit[..., None], edited, A)
        return torch.matmul(A, v).transpose(1, 2).contiguous(), None


@functools.lru_cache
def gate_var(shape: LlamaShape, tokens: int) -> Gate:
    """All logits of a shorter prompt: steered against our dense path and against the eager dense reference."""
    model, ids = reader(shape, tokens), picture(shape, tokens)
    plain = model(ids).logits
    with steer(model, var(shape)) as run:
        fast = _prefill(model, ids, run).logits
    with steer(model, var(shape), reference=True) as run:
        slow = _prefill(model, ids, run).logits
    try:
        other = twin(model)
        eager = dense.use(other, DenseVAR(other, shape, tokens))(ids).logits
    finally:
        dense.forget()
    worst = max(error(fast, slow), error(fast, eager))
    return Gate(worst, TOLERANCE, error(fast, plain), "steer(reference=True) and an eager dense VAR, all logits")


def measure_var(size: Size, threads: int) -> Outcome:
    """One prefill with VAR on every layer and head, beside the unsteered model."""
    plain, ids = reader(size.shape, size.tokens), picture(size.shape, size.tokens)
    with steer(twin(plain), var(size.shape)) as run:
        arms = {
            "unsteered": lambda: _prefill(plain, ids, logits_to_keep=1),
            "steered": lambda: _prefill(run.target, ids, run, logits_to_keep=1),
        }
        times = interleaved(arms, size.repeats, patience=size.patience)
    start, stop = image_of(size.tokens)
    more = {"image_keys": stop - start, "sinks_in_image": SINKS}
    return Outcome(times.ratio("steered", "unsteered"), [], {"prefill": times}, more)


# VHR.


def _tap(model: nn.Module, change: Callable[[int, Tensor], Tensor]) -> Callable[[], None]:
    """Pass the input of each output projection, [B, n, H, d], through `change`; returns the undo."""
    hooks = []
    for i, layer in enumerate(model.model.layers):
        size = layer.self_attn.head_dim

        def before(_: nn.Module, args: Any, i: int = i, size: int = size) -> tuple[Tensor]:
            heads = args[0].unflatten(-1, (-1, size))
            return (change(i, heads).flatten(-2),)

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(before))
    return lambda: [hook.remove() for hook in hooks]


@contextlib.contextmanager
def _reinforced(model: nn.Module, gates: dict[int, Tensor], seen: dict[int, Tensor]) -> Iterator[None]:
    def change(i: int, heads: Tensor) -> Tensor:
        seen[i] = heads[0, -1]
        return heads * gates[i][:, None] if i in gates else heads

    undo = _tap(model, change)
    try:
        yield
    finally:
        undo()


def choose(model: nn.Module, ids: Tensor) -> dict[int, Tensor]:
    """VHR's factors [H] by layer, from whole passes with and without the image for each layer in turn."""
    start, stop = image_of(ids.shape[1])
    text = torch.cat([ids[:, :start], ids[:, stop:]], dim=1)
    gates: dict[int, Tensor] = {}
    for i in range(len(model.model.layers)):
        with_image: dict[int, Tensor] = {}
        without: dict[int, Tensor] = {}
        with _reinforced(model, gates, with_image):
            model(ids)
        with _reinforced(model, gates, without):
            model(text)
        change, energy = (with_image[i] - without[i]).norm(dim=-1), without[i].square().sum(dim=-1)
        far = [x > x.mean() + x.std(correction=0) for x in (change, energy)]
        change = change.masked_fill(far[0] & far[1], 0.0)
        gates[i] = torch.where(change > change.quantile(0.5), ALPHA, 1.0)
    return gates


class Step(Decoder):
    """One more token at a time, over a prefill that chose VHR's heads."""

    def __init__(self, model: nn.Module, ids: Tensor, run: Steering | None = None):
        self.model, self.ids, self.next = model, ids, 0
        self.cache = _prefill(model, ids, run, logits_to_keep=1).past_key_values


@functools.lru_cache
def gate_vhr(shape: LlamaShape, tokens: int) -> Gate:
    """The logits of eight decoded tokens: steered against the model with its output projections fed by hand."""
    model, ids = reader(shape, tokens), picture(shape, tokens)
    steps = lambda step: torch.cat([step() for _ in range(8)])  # noqa: E731
    plain = steps(Step(model, ids))
    with steer(model, vhr(shape)) as run:
        ours = steps(Step(model, ids, run))
    with _reinforced(model, choose(model, ids), {}):
        theirs = steps(Step(model, ids))
    return Gate(error(ours, theirs), TOLERANCE, error(ours, plain), "gates chosen and applied at o_proj, eight steps")


def measure_vhr(size: Size, threads: int) -> Outcome:
    """One step over the cache with VHR on every layer, beside the unsteered model; the prefill as a further figure."""
    plain, ids = reader(size.shape, size.tokens), picture(size.shape, size.tokens)
    with steer(twin(plain), vhr(size.shape)) as run:
        arms = {"unsteered": Step(plain, ids), "steered": Step(run.target, ids, run)}
        times = interleaved(arms, size.repeats, warmup=2, calls=10, patience=size.patience)
    return Outcome(times.ratio("steered", "unsteered"), [], {"step": times}, {})


# The others.


def reweighting(shape: LlamaShape, tokens: int) -> dict[str, Intervention]:
    """The methods that act in every decode step, on every layer and head."""
    where = Where(layers=range(shape.layers), kinds="self")
    start, stop = image_of(tokens)
    patches = list(range(stop - start))
    return {
        "VAR": var(shape),
        "PAI": PAI(0.5, where=where),
        # A quarter of the patches as local ones, one in sixteen as a summary.
        "PAINT": PAINT([patches[::4]], [patches[1::16]], where=where),
        "ADHH": ADHH(None, 0.4, where=where),
    }


@functools.lru_cache
def gate_decode(shape: LlamaShape, tokens: int) -> Gate:
    """The logits of eight decoded tokens, each method against our dense path."""
    model, ids = reader(shape, tokens), picture(shape, tokens)
    steps = lambda step: torch.cat([step() for _ in range(8)])  # noqa: E731
    plain, worst, least = steps(Step(model, ids)), 0.0, float("inf")
    for method in reweighting(shape, tokens).values():
        with steer(model, method) as run:
            fast = steps(Step(model, ids, run))
        with steer(model, method, reference=True) as run:
            slow = steps(Step(model, ids, run))
        worst, least = max(worst, error(fast, slow)), min(least, error(fast, plain))
    return Gate(worst, TOLERANCE, least, "steer(reference=True), eight steps of VAR, PAI, PAINT and ADHH each")


def measure_decode(size: Size, threads: int) -> Outcome:
    """One step over the cache with each method, beside the unsteered model; the slowest counts."""
    plain, ids = reader(size.shape, size.tokens), picture(size.shape, size.tokens)
    runs = {name: steer(twin(plain), method) for name, method in reweighting(size.shape, size.tokens).items()}
    try:
        arms = {"unsteered": Step(plain, ids)} | {name: Step(run.target, ids, run) for name, run in runs.items()}
        times = interleaved(arms, size.repeats, warmup=2, calls=10, patience=size.patience)
    finally:
        for run in runs.values():
            run.remove()
    ratios = {name: times.ratio(name, "unsteered") for name in runs}
    return Outcome(max(ratios.values()), [], {"step": times}, {"ratios": ratios})
