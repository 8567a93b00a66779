"""The arms of a recipe: the baseline, the method at zero strength, the method, and random heads in its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..recipe.arms import (
    Arm,
    allowed_heads,
    at_zero_strength,
    head_counts,
    methods_of,
    random_heads_of_all,
    with_other_spans,
    with_random_heads,
    with_random_spans,
)
from ..recipe.schema import Recipe, digest
from ..recipe.sweep import points
from ..site import Site

KINDS = ("baseline", "zero", "method", "random", "span")


@dataclass(frozen=True)
class Plan:
    """All arms of a recipe, and which of them each point of its sweep uses.

    Attributes:
        arms: each once. points: {"point", "values", "arms": {"baseline": id, "zero": id, "method": id, "random-1": id, ...}}.
    """

    arms: list[Arm]
    points: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """What `arms.json` holds."""
        return {"arms": [a.to_dict() for a in self.arms], "points": self.points}


def arms(recipe: Recipe, sites: Iterable[Site] | None = None, found: Mapping[str, Any] | None = None) -> list[Arm]:
    """The arms of a recipe; see `plan`."""
    return plan(recipe, sites, found).arms


def plan(recipe: Recipe, sites: Iterable[Site] | None = None, found: Mapping[str, Any] | None = None) -> Plan:
    """The arms of every point of a recipe; arms of equal content are one arm.

    Args:
        sites: of the loaded model, for how many heads a layer has; needed for random heads unless the head set knows.
        found: what the recipe's searches found, by `calibration_key`; see `attnsteer.run.recipe_calibration`.

    Raises:
        RecipeError: a method, parameter, selection or file that is not there; a control that the method does not allow.
    """
    sites = None if sites is None else list(sites)
    slots: list[tuple[int, str, Arm]] = []
    every = points(recipe)
    for point in every:
        slots += [(point.index, arm.id, arm) for arm in _arms(point.recipe, sites, found)]
    # Content -> the arm of a slot; a slot has several where points differ.
    contents: dict[str, dict[str, int]] = {}
    for index, slot, arm in slots:
        contents.setdefault(slot, {}).setdefault(_content(arm), index)
    named: dict[str, Arm] = {}
    places: list[dict[str, Any]] = [{"point": p.index, "values": p.values, "arms": {}} for p in every]
    for index, slot, arm in slots:
        first = contents[slot][_content(arm)]
        name = slot if len(contents[slot]) == 1 else f"{slot}@{first + 1}"
        named.setdefault(name, replace(arm, id=name))
        places[index]["arms"][slot] = name
    return Plan(list(named.values()), places)


def _content(arm: Arm) -> str:
    return digest({k: v for k, v in arm.to_dict().items() if k != "id"})


def _arms(recipe: Recipe, sites: list[Site] | None, found: Mapping[str, Any] | None) -> list[Arm]:
    """The arms of one point."""
    sizes = head_counts(sites, recipe.model.kind)
    decoding = dict(recipe.decoding)
    chosen = methods_of(recipe, found)
    out = [Arm("baseline", "baseline", (), {**decoding, **recipe.baseline})]
    if recipe.controls.zero:
        out.append(Arm("zero", "zero", at_zero_strength(recipe, chosen), decoding))
    out.append(Arm("method", "method", chosen, decoding))
    out += [
        Arm(f"span-{key}", "span", with_other_spans(chosen, key, f"controls.spans.{i}"), decoding)
        for i, key in enumerate(recipe.controls.spans)
    ]
    spans = range(1, recipe.controls.random_spans + 1)
    out += [Arm(f"random-spans-{n}", "random", with_random_spans(chosen, n), decoding) for n in spans]
    draws = range(1, recipe.controls.random_heads + 1)
    source = recipe.controls.random_from
    if source != "where":
        out += [Arm(f"random-{n}", "random", with_random_heads(chosen, sizes, n), decoding) for n in draws]
    if source == "layer" or not draws:
        return out
    allowed = [
        sizes if m.heads is None or sites is None else allowed_heads(m, sites, recipe.model.kind) for m in chosen
    ]
    name = "random-anywhere" if source == "both" else "random"
    for draw in draws:
        drawn = [
            m if m.heads is None else replace(m, heads=random_heads_of_all(m.heads, counts, draw, m.place))
            for m, counts in zip(chosen, allowed, strict=True)
        ]
        out.append(Arm(f"{name}-{draw}", "random", tuple(drawn), decoding))
    return out
