"""First-order: heads' own output changes times the gradient at their outputs, all heads from one backward pass."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost, brief
from ..intervention import Intervention
from ..parameters import whole
from ..steering import Steering
from .alone import EachHeadAlone, Edit, Script
from .samples import Choice, choices, padded, split_digest
from .state import digest

# What a sample's value is: of choice samples by their candidates, of model inputs by their own tokens.
CHOICE_METRICS = ("log_likelihood", "choice", "difference")
TEXT_METRICS = ("log_likelihood",)
Metric = str | Callable[[Any, Mapping[str, Any]], Tensor]


@dataclass
class Leaves:
    """The head outputs of one forward that gradients are taken at, and the changes that they are multiplied with.

    Attributes:
        open: whether the next forward is for gradients. outputs: a head's change is its output itself, as a gate has it.
        changes: else site path -> changes [methods, B, H, n, dv], H all heads of the site.
        record: the number of the method whose changes are made in the same forward; None: all are in `changes`.
        by_row: a product for each row of tokens.
        taken: (site path, its number of heads, heads, output in the graph, changes [methods, B, h, n, dv]).
    """

    open: bool = False
    outputs: bool = False
    changes: dict[str, Tensor] = field(default_factory=dict)
    record: int | None = None
    by_row: bool = False
    taken: list[tuple[str, int, tuple[int, ...], Tensor, Tensor]] = field(default_factory=list)

    def take(self, call: AttnCall, out: Tensor, changes: Tensor) -> Tensor:
        """`out` as it goes on, a place of the graph of its own."""
        if not bool(call.row_valid.all()):
            # What a padding row holds may be anything, also no number.
            changes = changes.masked_fill(~call.row_valid[None, :, None, :, None], 0.0)
        # Below the first head nothing needs a gradient. A tensor of its own, which is what goes on: the same one back is no edit.
        out = out.view_as(out) if out.requires_grad else out.detach().requires_grad_(True)
        self.taken.append((call.site.path, call.site.heads, call.heads, out, changes))
        return out


@dataclass(frozen=True)
class Tap(Intervention):
    """Takes each head's output as a place for gradients; changes nothing."""

    leaves: Leaves = field(compare=False, repr=False)

    observes = True

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        """The same output."""
        leaves, path = self.leaves, call.site.path
        if not leaves.open or not (leaves.outputs or path in leaves.changes):
            return None
        if leaves.outputs:
            return leaves.take(call, out, out.detach()[None])
        changes = leaves.changes[path]
        return leaves.take(
            call, out, changes if len(call.heads) == changes.shape[2] else changes[:, :, list(call.heads)]
        )


@dataclass(frozen=True)
class Noted(EachHeadAlone):
    """`EachHeadAlone`, where other methods may divide the heads of a site; it also notes in the forward that gradients are of.

    There the method sees q, k and v without their graph, so that none of its statistics enters the graph, and the model goes on
    with its own kernel's output.
    """

    leaves: Leaves = field(default_factory=Leaves, compare=False, repr=False)
    number: int = 0

    def key(self, call: AttnCall) -> Any:
        return call.site.path, call.heads

    @property
    def joined(self) -> bool:
        """Whether this forward is also the one for gradients."""
        return self.leaves.open and self.leaves.record == self.number

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | None:
        if not self.joined:
            return super().inputs(call)
        self.script.edits[self.key(call)] = Edit(call.heads, call.map.out)
        if self.inner.doors() <= {"output"}:
            return None
        with torch.no_grad():
            q, k, v = self.inner.inputs(call) or (call.q, call.k, call.v)
        return q.detach(), k.detach(), v.detach()

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        if not self.joined:
            return super().output(call, out)
        plain = self.script.edits.pop(self.key(call)).plain
        with torch.no_grad():
            new = self.inner.output(call, out.detach())
            change = (out.detach() if new is None else new).to(plain.dtype) - plain.detach()
        return self.leaves.take(call, plain, change[None])


@dataclass
class Batch(abc.ABC):
    """Samples that are computed at once.

    Attributes:
        count: of the samples. rows: which sample each batch row belongs to.
    """

    count: int = field(init=False)
    rows: list[int] = field(init=False)
    # Whether the rows computed with gradients on are those in which a method would act.
    whole = True

    @abc.abstractmethod
    def values(self, model: nn.Module, run: Steering | None = None) -> Tensor:
        """The metric of each sample [count], with its graph where gradients are on."""

    def changes(self, model: nn.Module, run: Steering, script: Script) -> dict[Any, Edit]:
        """What a method would make of each site's outputs, of the rows that `values` computes with gradients on."""
        return noted(script, lambda: self.values(model, run))


def noted(script: Script, call: Callable[[], Any]) -> dict[Any, Edit]:
    """The edits that a method would make in one call, by (site path, heads); none is made."""
    script.recording, script.edits = True, {}
    try:
        call()
    finally:
        script.recording = False
    return script.edits


@dataclass
class _Inputs(Batch):
    """Keyword arguments of the model; the metric is a function of its output, or the text's own log-likelihood."""

    inputs: Mapping[str, Any]
    metric: Metric

    def __post_init__(self) -> None:
        self.count = len(next(v for v in self.inputs.values() if isinstance(v, Tensor)))
        self.rows = list(range(self.count))

    def values(self, model: nn.Module, run: Steering | None = None) -> Tensor:
        outputs = model(**self.inputs)
        found = (
            self.metric(outputs, self.inputs) if callable(self.metric) else mean_log_likelihood(outputs, self.inputs)
        )
        if not isinstance(found, Tensor) or found.shape != (self.count,):
            raise SelectionError(
                f"metric gave {tuple(getattr(found, 'shape', ()))} for {self.count} samples; give one value for each, "
                f"[{self.count}]."
            )
        return found.float()


@dataclass
class _Short(Batch):
    """Choices whose candidates are single tokens, padded on the right, where a causal model cannot see it."""

    samples: list[Choice]
    metric: str

    def __post_init__(self) -> None:
        self.count, self.rows = len(self.samples), list(range(len(self.samples)))

    def values(self, model: nn.Module, run: Steering | None = None) -> Tensor:
        device = next(model.parameters()).device
        lengths = torch.tensor([len(s.prompt) for s in self.samples], device=device)
        shortest, longest = int(lengths.min()), int(lengths.max())
        given: dict[str, Any] = {"input_ids": padded([s.prompt for s in self.samples], device)}
        if shortest < longest:
            given["attention_mask"] = (torch.arange(longest, device=device) < lengths[:, None]).long()
        # Of the last rows only, where the model offers it.
        logits = model(**given, use_cache=False, **last_rows(model, longest - shortest + 1)).logits
        at = lengths - 1 - (longest - logits.shape[1])
        p = logits[torch.arange(self.count, device=device), at].float().log_softmax(-1)
        totals = [p[i, [c[0] for c in s.candidates]] for i, s in enumerate(self.samples)]
        return torch.stack([_value(t, s.answer, self.metric) for t, s in zip(totals, self.samples, strict=True)])


@dataclass
class _Long(Batch):
    """One choice with candidates of several tokens: a row for each, behind the prompt.

    With gradients on it is one forward, else one over the prompt's cache whose statistics are frozen: a candidate moves none.
    """

    sample: Choice
    metric: str
    whole = False

    def __post_init__(self) -> None:
        right = self.metric == "log_likelihood"
        self.candidates = [self.sample.candidates[self.sample.answer]] if right else list(self.sample.candidates)
        self.answer = 0 if right else self.sample.answer
        self.count, self.rows = 1, [0] * len(self.candidates)

    def _ids(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        device = next(model.parameters()).device
        # A candidate of one token is fed too, so that there is a row; what it predicts is not read.
        fed = padded([c[:-1] or c for c in self.candidates], device)
        return torch.tensor([self.sample.prompt], device=device), fed

    def values(self, model: nn.Module, run: Steering | None = None) -> Tensor:
        prompt, fed = self._ids(model)
        if torch.is_grad_enabled():
            ids = torch.cat([prompt.expand(len(fed), -1), fed], dim=1)
            logits = model(input_ids=ids, use_cache=False).logits[:, prompt.shape[1] - 1 :]
        else:
            first = model(input_ids=prompt, use_cache=True)
            rest = self._rest(model, run, first.past_key_values, fed)
            logits = torch.cat([first.logits[:, -1:].expand(len(fed), -1, -1), rest], dim=1)
        p = logits.float().log_softmax(-1)
        totals = torch.stack([p[i, range(len(c)), list(c)].sum() for i, c in enumerate(self.candidates)])
        return _value(totals, self.answer, self.metric)[None]

    def _rest(self, model: nn.Module, run: Steering | None, cache: Any, fed: Tensor) -> Tensor:
        cache.batch_repeat_interleave(len(fed))
        with contextlib.nullcontext() if run is None else run.freeze():
            return model(input_ids=fed, past_key_values=cache, use_cache=True).logits

    def changes(self, model: nn.Module, run: Steering, script: Script) -> dict[Any, Edit]:
        prompt, fed = self._ids(model)
        caches = []
        first = noted(script, lambda: caches.append(model(input_ids=prompt, use_cache=True).past_key_values))
        rest = noted(script, lambda: self._rest(model, run, caches[0], fed))
        found = {}
        for key in {**first, **rest}:
            # A selection of phases leaves out the one or the other.
            a, b = first.get(key), rest.get(key)
            known = a or b
            sizes = (prompt.shape[1], fed.shape[1])
            parts = [
                [_part(e, name, known.plain, len(fed), n) for e, n in zip((a, b), sizes, strict=True)]
                for name in ("plain", "edited")
            ]
            found[key] = Edit(known.heads, torch.cat(parts[0], dim=2), torch.cat(parts[1], dim=2))
        return found


def _part(edit: Edit | None, name: str, like: Tensor, batch: int, rows: int) -> Tensor:
    """Outputs of an edit for all batch rows; zeros where there is none, which change nothing."""
    if edit is None:
        return like.new_zeros(batch, like.shape[1], rows, like.shape[3])
    return getattr(edit, name).expand(batch, -1, -1, -1)


def batches(samples: Iterable[Any], metric: Metric, size: int) -> tuple[list[tuple[Batch, list[int]]], dict[str, Any]]:
    """Samples in batches, each with the places of its samples, and JSON-able facts about them.

    Args:
        samples: `Choice` objects (or mappings with their names), or keyword arguments of the model, each with a batch of its
            own. metric: one of `CHOICE_METRICS`, of `TEXT_METRICS` for the second kind, or `metric(outputs, inputs)` -> [B].
        size: samples at once, of choices.

    Raises:
        SelectionError: no samples, or a metric that is not theirs.
    """
    samples = as_list(samples)
    if whole(size) is None or size < 1 or not samples:
        raise SelectionError(f"{len(samples)} samples in batches of {brief(size)}: give at least one of each.")
    if any(_is_inputs(s) for s in samples):
        if not all(_is_inputs(s) for s in samples):
            raise SelectionError("give choice samples or model inputs, not both.")
        if not callable(metric) and metric not in TEXT_METRICS:
            raise SelectionError(f"metric={metric!r}: of model inputs it is one of {TEXT_METRICS}, or a function.")
        found, count = [], 0
        for inputs in samples:
            batch = _Inputs(inputs, metric)
            found.append((batch, list(range(count, count + batch.count))))
            count += batch.count
        return found, {"samples": count, "split": digest([_told(s) for s in samples])}
    split = choices(samples)
    if callable(metric) or metric not in CHOICE_METRICS:
        raise SelectionError(f"metric={described(metric)!r}: of choice samples it is one of {CHOICE_METRICS}.")
    long = [i for i, s in enumerate(split) if any(len(c) > 1 for c in s.candidates)]
    # Prompts of about one length together, so that little is padding.
    short = sorted(set(range(len(split))) - set(long), key=lambda i: len(split[i].prompt))
    found: list[tuple[Batch, list[int]]] = [(_Long(split[i], metric), [i]) for i in long]
    for some in (short[i : i + size] for i in range(0, len(short), size)):
        found.append((_Short([split[i] for i in some], metric), some))
    return found, {"samples": len(split), "split": split_digest(split)}


def as_list(samples: Any) -> list[Any]:
    """The samples of an iterable.

    Raises:
        SelectionError: it is none, or one sample by itself.
    """
    if not isinstance(samples, Iterable) or isinstance(samples, (str, Mapping, Tensor)):
        raise SelectionError(f"samples={brief(samples)}: give a list, of one sample or batch too.")
    return list(samples)


def keys(samples: Iterable[Any]) -> list[str]:
    """Hashes of samples, to compare splits by."""
    samples = list(samples)
    return [digest(_told(s)) if _is_inputs(s) else c.key() for s, c in zip(samples, _as_choices(samples), strict=True)]


def _as_choices(samples: list[Any]) -> list[Any]:
    return samples if samples and _is_inputs(samples[0]) else choices(samples)


def _is_inputs(sample: Any) -> bool:
    return isinstance(sample, Mapping) and any(isinstance(v, Tensor) for v in sample.values())


def _told(inputs: Mapping[str, Any]) -> Any:
    tensors = {k: v for k, v in sorted(inputs.items()) if isinstance(v, Tensor)}
    return {
        k: [list(v.shape), hashlib.sha256(v.cpu().contiguous().numpy().tobytes()).hexdigest()]
        for k, v in tensors.items()
    }


def mean_log_likelihood(outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Mean log p of each sequence's next tokens, in nats, [B]; padding neither predicts nor is predicted."""
    ids = inputs.get("input_ids")
    if ids is None or ids.shape[1] < 2:
        raise SelectionError(
            "the log-likelihood of model inputs needs input_ids of two tokens or more; give a metric function."
        )
    p = outputs.logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    mask = inputs.get("attention_mask")
    known = torch.ones_like(p) if mask is None else (mask[:, 1:] * mask[:, :-1]).to(p.dtype)
    return (p * known).sum(dim=1) / known.sum(dim=1).clamp_min(1)


def last_rows(model: nn.Module, count: int) -> dict[str, int]:
    """The argument with which a model gives the logits of the last rows only, where it has one."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}


def _value(totals: Tensor, answer: int, metric: str) -> Tensor:
    """Of the candidates' log-likelihoods [C]: the right one's; log of its share of the candidates; its lead over the best foil."""
    if metric == "choice":
        totals = totals.log_softmax(-1)
    elif metric == "difference":
        foils = torch.arange(len(totals), device=totals.device) != answer
        return totals[answer] - totals[foils].max()
    return totals[answer]


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients on, dropout off, and none for the weights, so that no activation is kept for them.

    Raises:
        UnsupportedHost: inference mode, or weights made in it: what is computed there has no gradient.
    """
    weights = list(model.parameters())
    if torch.is_inference_mode_enabled() or any(w.is_inference() for w in weights):
        raise UnsupportedHost(
            "gradients under inference_mode: leave torch.inference_mode() (torch.no_grad() may stay), and load the model outside "
            "of it."
        )
    wanted = [w for w in weights if w.requires_grad]
    training = [m for m in model.modules() if m.training]
    model.eval()
    for w in wanted:
        w.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for w in wanted:
            w.requires_grad_(True)
        for m in training:
            m.training = True


def slopes(model: nn.Module, batch: Batch, leaves: Leaves, run: Steering) -> tuple[Tensor, dict[str, Tensor]]:
    """Values of a batch [count], and by site path <change, gradient>: [methods, count, H], or by row [methods, count, H, n].

    Args:
        run: a steering with a `Tap` or a `Noted` that has these leaves.
    """
    leaves.open, leaves.taken = True, []
    try:
        values = batch.values(model, run)
    finally:
        leaves.open = False
    taken, leaves.taken = leaves.taken, []
    if not taken or not values.requires_grad:
        raise UnsupportedHost(
            f"the values of {type(model).__name__} have no gradient at its heads: none of the selected sites lies before them, or "
            "the metric cuts the graph (accuracy and argmax have none)."
        )
    gradients = torch.autograd.grad(values.sum(), [out for *_, out, _ in taken], allow_unused=True)
    rows = torch.tensor(batch.rows)
    found: dict[str, Tensor] = {}
    for (path, count, heads, _, changes), gradient in zip(taken, gradients, strict=True):
        if gradient is None:
            continue
        product = torch.einsum("mbhnd,bhnd->mbhn", changes.float(), gradient.float())
        product = product if leaves.by_row else product.sum(dim=-1)
        shape = (len(product), batch.count, count, *product.shape[3:])
        own = found.setdefault(path, product.new_zeros(shape))
        whole = product if len(heads) == count else product.new_zeros(len(product), len(rows), count, *shape[3:])
        if len(heads) < count:
            whole[:, :, list(heads)] = product
        own.index_add_(1, rows.to(own.device), whole)
    return values.detach(), found


def described(metric: Any) -> str:
    """The name of a metric, for a provenance."""
    return metric if isinstance(metric, str) else getattr(metric, "__qualname__", type(metric).__qualname__)
