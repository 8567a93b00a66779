"""`Where`: which sites, heads, phases, steps, branches and query rows an intervention acts on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import SelectionError, did_you_mean, listing
from .heads import HeadSet
from .site import Site

KINDS = ("self", "cross", "joint")
PHASES = ("prefill", "decode")
BRANCHES = ("cond", "uncond")
MODALITIES = ("text", "vision", "audio", "image")
ROWS = ("last", "image", "text")


@dataclass(frozen=True, repr=False)
class Where:
    """A selection; every field that is None selects all.

    Args:
        layers: 0-based layer indices within their stack: an int, a range, an iterable, or a string such as
            `"8-24,30"` (inclusive). Negative ints count from the end of the stack.
        heads: query heads: an int, an iterable of ints (the same in each layer), or a `HeadSet`
            (then only its layers are selected).
        kinds: "self", "cross" and/or "joint".
        modules: regular expressions that must match a whole module path (see `attnsteer.sites`).
        phases: "prefill" and/or "decode" (language models).
        steps: denoising steps, 0-based: an int, a range or an iterable of ints, or a pair of floats
            `(start, stop)` as fractions of the schedule, start included, stop excluded.
        branches: "cond" and/or "uncond": the guidance rows of a diffusion batch.
        rows: query rows: "last" (of each call), "image" or "text" (roles), or a pair of ints
            `(start, stop)` of absolute token positions.
        modalities: "text", "vision", "audio", "image". None selects the host's main one: the language
            tower of a vision-language model, the denoiser of a pipeline.

    Raises:
        SelectionError: a value is of the wrong form, at construction; or nothing matches, when resolved.
    """

    layers: Any = None
    heads: Any = None
    kinds: Any = None
    modules: Any = None
    phases: Any = None
    steps: Any = None
    branches: Any = None
    rows: Any = None
    modalities: Any = None

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("layers", _integers("layers", self.layers, negative=True))
        if isinstance(self.heads, Mapping):
            put("heads", HeadSet(self.heads))
        elif not isinstance(self.heads, HeadSet):
            put("heads", _integers("heads", self.heads))
        put("kinds", _words("kinds", self.kinds, KINDS))
        put("phases", _words("phases", self.phases, PHASES))
        put("branches", _words("branches", self.branches, BRANCHES))
        put("modalities", _words("modalities", self.modalities, MODALITIES))
        put("modules", _patterns(self.modules))
        put("steps", _steps(self.steps))
        put("rows", _rows(self.rows))

    def __and__(self, other: Where) -> Where:
        """Both selections at once; a field that both name must agree or be None in one of them."""
        merged = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if mine is not None and theirs is not None and mine != theirs:
                raise SelectionError(
                    f"two selections name {f.name}: {mine!r} and {theirs!r}; give it in one place only."
                )
            merged[f.name] = theirs if mine is None else mine
        return Where(**merged)

    def resolve(self, sites: Sequence[Site], main: Sequence[str]) -> list[tuple[Site, tuple[int, ...] | None]]:
        """The selected sites, each with its heads (None: all).

        Args:
            sites: what the target has.
            main: the modalities that `modalities=None` stands for.

        Raises:
            SelectionError: nothing matches, or a named layer, head, kind or module does not exist.
        """
        wanted = self.modalities or tuple(main)
        pool = [s for s in sites if s.modality in wanted]
        if not pool:
            found = sorted({s.modality for s in sites})
            raise SelectionError(f"{self} selects modality {wanted}, the target has {found or 'no attention sites'}.")
        if self.kinds is not None:
            pool = self._keep(pool, [s for s in pool if s.kind in self.kinds], "kinds", {s.kind for s in pool})
        if self.modules is not None:
            kept = [s for s in pool if any(re.fullmatch(p, n) for p in self.modules for n in (s.name, s.path))]
            pool = self._keep(pool, kept, "modules (a pattern matches the whole path)", [s.path for s in pool])
        if self.layers is not None:
            pool = self._layers(pool)
        return [(site, heads) for site, heads in ((s, self._heads(s, pool)) for s in pool) if heads != ()]

    def _keep(self, pool: list[Site], kept: list[Site], field: str, found: Iterable[object]) -> list[Site]:
        if not kept:
            raise SelectionError(f"{self} matches nothing by {field}; what exists: {listing(found)}.")
        return kept

    def _layers(self, pool: list[Site]) -> list[Site]:
        depth: dict[tuple[str, str, str], int] = {}
        for s in pool:
            key = (s.component, s.modality, s.stack)
            depth[key] = max(depth.get(key, 0), s.layer + 1)
        kept, missing = [], set(self.layers)
        for s in pool:
            size = depth[(s.component, s.modality, s.stack)]
            hit = {i for i in self.layers if (i if i >= 0 else i + size) == s.layer}
            missing -= hit
            if hit:
                kept.append(s)
        if missing:
            have = sorted({s.layer for s in pool})
            raise SelectionError(f"{self} names layers {sorted(missing)}; the selected sites have layers {have}.")
        return kept

    def _heads(self, site: Site, pool: list[Site]) -> tuple[int, ...] | None:
        if self.heads is None:
            return None
        if isinstance(self.heads, HeadSet):
            self._check_head_set(pool)
            chosen = self.heads[site.layer]
        else:
            chosen = self.heads
        wrong = [h for h in chosen if h >= site.heads]
        if wrong:
            raise SelectionError(
                f"heads {wrong} of layer {site.layer} do not exist: {site.path} has {site.heads} heads "
                f"(0 to {site.heads - 1}). Were they found on another model?"
            )
        return tuple(chosen)

    def _check_head_set(self, pool: list[Site]) -> None:
        layers = {s.layer for s in pool}
        if not len(self.heads):
            raise SelectionError("the HeadSet is empty; give at least one head.")
        missing = [layer for layer in self.heads.layers if layer not in layers]
        if missing:
            raise SelectionError(
                f"the HeadSet names layers {missing}; the selected sites have layers {sorted(layers)}. "
                "Was it found on another model?"
            )
        if self.heads.shape is not None:
            shape = (max(layers) + 1, max(s.heads for s in pool))
            # A narrower Where may hide the deeper layers, so only the width and too few layers are decisive.
            if self.heads.shape[1] != shape[1] or self.heads.shape[0] < shape[0]:
                raise SelectionError(
                    f"the HeadSet was found on a model of shape {self.heads.shape} (layers, heads); "
                    f"this one has {shape}. Use a HeadSet of this model."
                )

    def active(self, phase: str | None, step: int | None, steps: int | None) -> bool:
        """Whether the selection holds in this phase and at this denoising step."""
        if self.phases is not None and phase is not None and phase not in self.phases:
            return False
        if self.steps is None or step is None:
            return True
        if isinstance(self.steps[0], float):
            total = steps or 1
            return self.steps[0] * total <= step < self.steps[1] * total
        return step in self.steps

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, JSON-able; a `HeadSet` stays an object."""
        out = {k: v for k, v in asdict(self).items() if v is not None}
        if isinstance(self.heads, HeadSet):
            out["heads"] = self.heads
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) is not None
        )
        return f"Where({shown})"


def _integers(field: str, value: Any, negative: bool = False) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = _parse_ranges(field, value)
    if isinstance(value, int):
        value = (value,)
    try:
        items = tuple(value)
    except TypeError:
        items = (None,)
    wrong = [v for v in items if isinstance(v, bool) or not isinstance(v, int) or (v < 0 and not negative)]
    if wrong or not items:
        raise SelectionError(
            f"Where({field}={value!r}): give an int, a range, a non-empty iterable of ints"
            f"{'' if negative else ' (not negative)'}, or a string like '2-5,9'."
        )
    return tuple(sorted(set(items)))


def _parse_ranges(field: str, text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise SelectionError(f"Where({field}={text!r}): {part!r} is not 'N' or 'FIRST-LAST'.")
        found.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(found)


def _words(field: str, value: Any, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = (value,) if isinstance(value, str) else tuple(value)
    for item in items:
        if item not in allowed:
            raise SelectionError(f"Where({field}={item!r}): one of {allowed}.{did_you_mean(item, allowed)}")
    if not items:
        raise SelectionError(f"Where({field}=()): name at least one of {allowed}, or leave it out.")
    return tuple(w for w in allowed if w in items)


def _patterns(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = (value,) if isinstance(value, str) else tuple(value)
    for item in items:
        try:
            re.compile(item)
        except (re.error, TypeError) as error:
            raise SelectionError(f"Where(modules={item!r}) is not a regular expression: {error}.") from error
    return items


def _steps(value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, (tuple, list)) and value and all(isinstance(v, float) for v in value):
        if len(value) != 2 or not 0.0 <= value[0] < value[1] <= 1.0:
            raise SelectionError(f"Where(steps={value!r}): fractions are a pair 0 <= start < stop <= 1.")
        return tuple(value)
    return _integers("steps", value)


def _rows(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value in ROWS):
        return value
    if (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(v, int) and v >= 0 for v in value)
        and value[0] < value[1]
    ):
        return tuple(value)
    raise SelectionError(f"Where(rows={value!r}): one of {ROWS} or a pair (start, stop) of token positions.")
