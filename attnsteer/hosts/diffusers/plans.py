"""Processors that compute several attentions in one call: what the rows and keys of each are, and which of them a method means.

Their parts are listed in `Site.parts`, and `Where(parts=...)` selects among them. A processor that makes several calls and has no
plan is steered by gates on head outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...bound import Bound
from ...errors import UnsupportedHost
from ...site import Site

PICTURE = "image prompt"


@dataclass(frozen=True)
class Plan:
    """The attention calls of a processor.

    Attributes:
        parts: their names, in order. main: those that an edit of the map means where `Where(parts=...)` names none.
        part: (number of a call from 1, calls before the last of a sequence in blocks) -> name of its part.
        together: what becomes of their outputs: "sum"; "rows": each is of some rows of one sequence; "difference" of two maps.
        kind: that of the site, where the main part is of another than the processor's name says; "" where it is not.
        own: part -> where the rows' own keys stand in it, "first" or "last", among further ones.
    """

    parts: tuple[str, ...]
    main: tuple[str, ...]
    part: Callable[[int, int], str]
    together: str = "sum"
    kind: str = ""
    own: Mapping[str, str] = field(default_factory=dict)


def plan_of(module: nn.Module, processor: Any) -> Plan | None:
    """The plan of a processor in an attention module; None where it makes one call, or has none."""
    name = type(processor).__name__
    if "IPAdapter" in name:
        # Of a joint sequence the first call is all of it; the image prompt's is of image rows over themselves and the picture.
        first = "joint" if "Joint" in name or "Flux" in name else "text"
        return Plan(
            (first, PICTURE), (first,), _in_turn(first, PICTURE), own={PICTURE: "first"} if "Joint" in name else {}
        )
    made = _PLANS.get(name)
    return None if made is None else made(module)


def always_one(processor: Any) -> bool:
    """Whether the code names several calls, of which one runs."""
    return type(processor).__name__ in ("WanAnimate2AttnProcessor", "QwenImage21FlexAttnProcessor")


def check_plan(site: Site, plan: Plan, bound: Bound) -> None:
    """Raise an UnsupportedHost where what a method does is not defined over the parts of a site."""
    method = bound.method
    meant = (PICTURE,) if "image_prompt" in method.needs else plan.main
    reads = set(method.needs) & {"image_prompt", "contrast", "latent", "prompt"}
    if reads and bound.where.parts is not None and set(bound.where.parts) & set(plan.parts) != set(meant):
        raise UnsupportedHost(
            f"{site.path}: {bound.name} is about {' and '.join(meant)}, not about {' and '.join(bound.where.parts)}, which "
            "Where(parts=) names. Leave parts out."
        )
    if plan.together != "difference" or (method.linear and bound.doors == {"output"}):
        return
    if bound.doors <= {"weights", "bias"} and not method.observes and "prompt" not in method.needs:
        return
    raise UnsupportedHost(
        f"{site.path} subtracts one attention map from another, and {bound.name} is not defined on a difference: each map is a "
        "softmax, their difference is none. Weights and biases of keys act in both maps, gates on the output. Leave this site out "
        "of Where."
    )


def _in_turn(*names: str) -> Callable[[int, int], str]:
    """The parts by the number of the call, the last one for all that follow."""
    return lambda number, blocks: names[min(number, len(names)) - 1]


def _wan(module: nn.Module) -> Plan | None:
    """Image keys, where there are any, come first (models/transformers/transformer_wan.py)."""
    if getattr(module, "add_k_proj", None) is None:
        return None
    return Plan((PICTURE, "text"), ("text",), _in_turn(PICTURE, "text"))


def _text_first(projection: str) -> Callable[[nn.Module], Plan | None]:
    def plan(module: nn.Module) -> Plan | None:
        if getattr(module, projection, None) is None:
            return None
        return Plan(("text", PICTURE), ("text",), _in_turn("text", PICTURE))

    return plan


def _differential(module: nn.Module) -> Plan | None:
    if not getattr(module, "use_differential", False):
        return None
    both = ("first map", "second map")
    return Plan(both, both, _in_turn(*both), together="difference")


def _segments(module: nn.Module) -> Plan:
    """Blocks of a prefix (causal text, a picture), each over what is before it and itself; then the image over everything.

    Steps over a cached prefix have the image's call alone.
    """

    part = lambda number, blocks: "image" if number > blocks else "prefix"  # noqa: E731
    return Plan(("prefix", "image"), ("image",), part, together="rows", kind="self", own={"image": "last"})


def _pathways(module: nn.Module) -> Plan:
    """Text rows over the text before them, then generated rows over the text and themselves."""
    return Plan(
        ("text", "image"), ("image",), _in_turn("text", "image"), together="rows", kind="self", own={"image": "last"}
    )


_PLANS: dict[str, Callable[[nn.Module], Plan | None]] = {
    "WanAttnProcessor": _wan,
    "SkyReelsV2AttnProcessor": _wan,
    "WanAnimate2CrossAttnProcessor": _text_first("add_k_proj"),
    "CosmosAttnProcessor2_5": _text_first("q_img"),
    "StableAudio3SelfAttnProcessor": _differential,
    "StableAudio3CrossAttnProcessor": _differential,
    "QwenImage21AttnProcessor": _segments,
    "Cosmos3AttnProcessor": _pathways,
}
