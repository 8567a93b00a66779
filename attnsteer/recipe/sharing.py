"""Arms that can answer in one batch: the same methods under other values, each sample repeated once for each arm.

A method takes one value per sample for its strengths and its heads (see `PerSample`), and None where it leaves a sample alone, so
baseline, zero strength, method, random heads and the strengths of a sweep are rows of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from ..errors import RecipeError
from ..heads import takes_sets
from ..intervention import Intervention
from ..parameters import Number, PerSample, declared
from .arms import Arm
from .parameters import Method, Sample, is_sample, settable, value

# Texts are written greedily, each row by itself; of other decoding (sampling, beams, look-up) rows are not known to be.
DECODING = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "pad_token_id",
)


def groups(arms: Sequence[Arm], sample: Sample, context: Any = None) -> list[list[Arm]]:
    """The arms, those together that can share a batch; in order, each in the first group that it fits.

    Args:
        sample: one that they will answer. context: see `Method.make`.
    """
    found: list[list[Arm]] = []
    for arm in arms:
        group = next((g for g in found if fits([*g, arm], sample, context)), None)
        if group is None:
            found.append([arm])
        else:
            group.append(arm)
    return found


def fits(arms: Sequence[Arm], sample: Sample, context: Any = None) -> bool:
    """Whether these arms can share a batch, each with the answers that it gives by itself."""
    decoding = arms[0].decoding
    if any(a.decoding != decoding for a in arms) or set(decoding) - set(DECODING) or decoding.get("do_sample"):
        return False
    acting = [a.interventions for a in arms if a.interventions]
    if len({len(own) for own in acting}) > 1:
        return False
    try:
        return all(_exact(m) for m in make(arms, [sample], context))
    except RecipeError:
        return False


def _exact(method: Intervention) -> bool:
    """Whether rows of one batch do not see each other's values: statistics over the heads of all arms would."""
    own = isinstance(getattr(method, "heads", None), PerSample)
    return "around" not in method.doors() and not (own and (method.whole_heads or method.pools_heads))


def make(arms: Sequence[Arm], samples: Sequence[Sample], context: Any = None) -> list[Intervention]:
    """The interventions of a batch that has the samples once for each arm, one arm after the other.

    Raises:
        RecipeError: the arms differ in more than values that a method takes per sample; see `Method.make`.
    """
    count = max(len(a.interventions) for a in arms)
    each = [[a.interventions[i] if a.interventions else None for a in arms] for i in range(count)]
    return [_together(methods, samples, context) for methods in each]


def _together(methods: Sequence[Method | None], samples: Sequence[Sample], context: Any) -> Intervention:
    """One intervention for all; None among `methods`: an arm that it leaves alone."""
    first = next(m for m in methods if m is not None)
    acting = [m for m in methods if m is not None]
    if any((m.cls, m.where, m.place) != (first.cls, first.where, first.place) for m in acting):
        raise RecipeError(f"{first.place}: arms of other methods or selections do not share a batch.")
    if any(m.random_spans for m in acting):
        raise RecipeError(f"{first.place}: an arm with random spans does not share a batch.")
    rests = len(acting) < len(methods)
    names = {name for m in acting for name in m.params}
    values = {}
    for name in names:
        given = [_given(m, name) for m in acting]
        same = all(g == given[0] for g in given)
        # What is a value for each sample already: spans, and numbers.
        if same and (not is_sample(given[0]) or not _number(first, name)):
            values[name] = value(given[0], list(samples) * len(methods), f"{first.place}.params.{name}")
            continue
        if not _number(first, name):
            raise RecipeError(f"{first.place}.params.{name}: {first.name} takes one value for all samples.")
        of = iter(given)
        values[name] = [v for m in methods for v in _values(given[0] if m is None else next(of), name, samples, first)]
    heads: Any = first.heads
    if any(m.heads != heads for m in acting):
        # No set is all heads to an arm, and none at all in a list of sets.
        if not takes_sets(first.cls) or any(m.heads is None for m in acting):
            raise RecipeError(f"{first.place}.heads: {first.name} takes one set for all samples.")
        heads = [None if m is None else m.heads for m in methods for _ in samples]
    if rests:
        _rest(first, methods, values, len(samples))
    return first.built(values, context, heads)


def _rest(first: Method, methods: Sequence[Method | None], values: dict[str, Any], count: int) -> None:
    """Let a strength be None for the samples of the arms that are left alone."""
    name = next((f.name for f in settable(first.cls).values() if _number(first, f.name, optional=False)), None)
    if name is None:
        raise RecipeError(f"{first.place}: {first.name} has no strength that can leave samples alone.")
    given = values.get(name, _given(first, name))
    given = given if isinstance(given, list) else [given] * (len(methods) * count)
    alone = [m is None for m in methods for _ in range(count)]
    values[name] = [None if rest else v for v, rest in zip(given, alone, strict=True)]


def _number(method: Method, name: str, optional: bool | None = None) -> bool:
    """Whether a parameter takes one number per sample; with `optional`: and whether None is a value of it as well."""
    form = declared(method.cls, name)
    return isinstance(form, Number) and form.per_sample and optional in (None, form.optional)


def _given(method: Method, name: str) -> Any:
    """A parameter as the recipe has it, or its default."""
    if name in method.params:
        return method.params[name]
    (own,) = (f for f in fields(method.cls) if f.name == name)
    if own.default is MISSING:
        raise RecipeError(f"{method.place}.params.{name}: not given in every arm.")
    return own.default


def _values(given: Any, name: str, samples: Sequence[Sample], method: Method) -> list[Any]:
    """One value for each sample."""
    found = value(given, samples, f"{method.place}.params.{name}")
    return found if is_sample(given) else [found] * len(samples)
