"""The arms that a recipe makes: baseline, method, and its controls."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import AttnSteerError, RecipeError, listing
from ..heads import HeadSet
from ..intervention import Intervention
from ..registry import get_method
from ..site import Site
from .parameters import SPANS, ZERO, Method, Sample, check_names, is_sample, method, settable
from .schema import Recipe
from .search_specs import calibration_key


@dataclass(frozen=True)
class Arm:
    """One way to run the model over the samples.

    Attributes:
        id: unique in a run, such as "method" or "random-1". kind: of `KINDS`.
        interventions: what is applied, in order; none for the baseline. decoding: arguments of the model's call.
    """

    id: str
    kind: str
    interventions: tuple[Method, ...]
    decoding: dict[str, Any]

    def make(self, samples: Sequence[Sample], context: Any = None) -> list[Intervention]:
        """The interventions for one batch; see `Method.make`."""
        return [m.make(samples, context) for m in self.interventions]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "id": self.id,
            "kind": self.kind,
            "interventions": [m.to_dict() for m in self.interventions],
            "decoding": self.decoding,
        }


def methods_of(recipe: Recipe, found: Mapping[str, Any] | None = None) -> tuple[Method, ...]:
    """The interventions of a recipe without a sweep, with what its search found in place.

    Raises:
        RecipeError: see `plan`.
    """
    result = None
    if recipe.calibration is not None:
        key = calibration_key(recipe)
        if found is None or key not in found:
            raise RecipeError(
                "the recipe has a calibration, which has not run; attnsteer.run.recipe_calibration runs it."
            )
        result = found[key]
    heads = result if isinstance(result, HeadSet) else None
    out = []
    for index, spec in enumerate(recipe.interventions):
        place = f"interventions.{index}"
        if result is not None and heads is None:
            spec = _with_result(spec, recipe.calibration.into, result)
        out.append(method(spec, place, recipe.folder, recipe.model, heads))
    return tuple(out)


def _with_result(spec: Any, into: str, result: Any) -> Any:
    """An intervention with a parameter that a search found, where the method has it."""
    if into not in settable(get_method(spec.method)):
        return spec
    return spec.model_copy(update={"params": {**spec.params, into: list(result)}})


def at_zero_strength(recipe: Recipe, chosen: Sequence[Method]) -> tuple[Method, ...]:
    """The methods at zero strength.

    Raises:
        RecipeError: a method whose zero strength is not known and not given, or a parameter that it does not have.
    """
    out = []
    for spec, m in zip(recipe.interventions, chosen, strict=True):
        rest = spec.zero if spec.zero is not None else ZERO.get(m.name)
        if rest is None:
            raise RecipeError(
                f"{m.place}.zero: which parameters turn {m.name} off is not known; give them (zero: {{...}}), or leave the "
                "control out (controls: {zero: false})."
            )
        check_names(m.cls, m.name, rest, f"{m.place}.zero")
        out.append(replace(m, params={**m.params, **rest}))
    return tuple(out)


def head_counts(sites: Iterable[Site] | None, kind: str) -> dict[int, int] | None:
    """Heads by layer of the stack that recipes of this kind of model steer; None where sites are not known."""
    if sites is None:
        return None
    counts: dict[int, int] = {}
    for site in sites:
        # A vision-language model has layers of the same numbers in its vision tower.
        if site.modality == ("image" if kind == "image" else "text"):
            counts[site.layer] = min(site.heads, counts.get(site.layer, site.heads))
    return counts


def allowed_heads(method: Method, sites: Sequence[Site], kind: str) -> dict[int, int]:
    """Heads by layer of the sites that an intervention's `where` allows, whatever heads it has.

    Raises:
        RecipeError: the selection matches nothing.
    """
    modality = "image" if kind == "image" else "text"
    try:
        found = method.where.resolve(sites, (modality,), method.cls.kinds)
    except AttnSteerError as error:
        raise RecipeError(f"{method.place}.where: {error}") from error
    return head_counts([site for site, _ in found], kind) or {}


def with_random_heads(chosen: Sequence[Method], sizes: Mapping[int, int] | None, draw: int) -> tuple[Method, ...]:
    """The methods with random heads, as many in each layer as were chosen.

    Args:
        sizes: heads by layer; None: from the shape of the head set. draw: from 1; equal draws are equal heads.

    Raises:
        RecipeError: no method has heads, or how many heads a layer has is not known.
    """
    if not any(m.heads is not None for m in chosen):
        raise RecipeError("controls.random_heads: no intervention names heads, so there are none to draw at random.")
    return tuple(
        m if m.heads is None else replace(m, heads=random_heads(m.heads, sizes, draw, m.place)) for m in chosen
    )


def with_other_spans(chosen: Sequence[Method], key: str, place: str) -> tuple[Method, ...]:
    """The methods with another key of the samples as their spans.

    Raises:
        RecipeError: no method takes its spans from the samples, or they are this key already.
    """
    marked = [m for m in chosen if is_sample(m.params.get("spans"))]
    if not marked or any(m.params["spans"]["sample"] == key for m in marked):
        said = "no intervention has spans: {sample: KEY}" if not marked else f"that is what {marked[0].place} marks"
        raise RecipeError(f"{place}: {key!r} cannot stand in the place of spans: {said}.")
    return tuple(replace(m, params={**m.params, "spans": {"sample": key}}) if m in marked else m for m in chosen)


def with_random_spans(chosen: Sequence[Method], draw: int) -> tuple[Method, ...]:
    """The methods with other spans in place of the marked ones; see `attnsteer.recipe.parameters.random_spans`.

    Raises:
        RecipeError: no method has spans that each sample names.
    """
    if not any(is_sample(m.params.get(SPANS)) for m in chosen):
        raise RecipeError(
            "controls.random_spans: no intervention takes spans from each sample (params: {spans: {sample: KEY}}), so there are "
            "none to draw at random."
        )
    return tuple(replace(m, random_spans=draw) if is_sample(m.params.get(SPANS)) else m for m in chosen)


def random_heads(heads: HeadSet, sizes: Mapping[int, int] | None, draw: int, place: str = "heads") -> HeadSet:
    """As many heads of each layer as `heads` has, drawn from all heads of that layer by hash: no generator's state, and the
    same on every machine. Chosen heads may be drawn again."""
    if heads.towers:
        raise RecipeError(
            f"{place}: random heads are drawn for sets of one tower, and this one has {listing(heads.towers)}."
        )
    out: dict[int, list[int]] = {}
    for layer in heads.layers:
        size = (sizes or {}).get(layer) or (heads.shape[1] if heads.shape else None)
        if size is None:
            raise RecipeError(
                f"{place}: how many heads layer {layer} has is not known, so none can be drawn; load the model first."
            )
        wanted = len(heads[layer])
        if wanted > size:
            raise RecipeError(f"{place}: {wanted} heads are chosen in layer {layer}, which has {size}.")
        order = sorted(range(size), key=lambda h: hashlib.sha256(f"{draw}:{layer}:{h}".encode()).digest())
        out[layer] = sorted(order[:wanted])
    return HeadSet(out, shape=heads.shape, provenance={"random": draw})


def random_heads_of_all(heads: HeadSet, sizes: Mapping[int, int] | None, draw: int, place: str = "heads") -> HeadSet:
    """As many heads as `heads` has, drawn by hash from all heads of all layers in `sizes`."""
    if sizes is None:
        raise RecipeError(f"{place}: which heads there are is not known, so none can be drawn; load the model first.")
    if heads.towers:
        raise RecipeError(
            f"{place}: random heads are drawn for sets of one tower, and this one has {listing(heads.towers)}."
        )
    every = [(layer, h) for layer, size in sizes.items() for h in range(size)]
    if len(heads) > len(every):
        raise RecipeError(f"{place}: {len(heads)} heads are chosen, and there are {len(every)}.")
    order = sorted(every, key=lambda pair: hashlib.sha256(f"{draw}:{pair[0]}:{pair[1]}".encode()).digest())
    return HeadSet(sorted(order[: len(heads)]), shape=heads.shape, provenance={"random": draw})
