"""`Where`: which sites, heads, phases, steps, branches and query rows an intervention acts on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any

from .errors import SelectionError, UnsupportedHost, brief, did_you_mean, listing
from .heads import HeadSet
from .parameters import Named, plain, whole
from .patterns import pattern
from .site import Site

KINDS = ("self", "cross", "joint")
PHASES = ("prefill", "decode")
BRANCHES = ("cond", "uncond")
MODALITIES = ("text", "vision", "audio", "image")
ROWS = ("last", "image", "text")
# A range string names at most this many numbers: "0-9999999999" is a typing error, not a request.
LONGEST = 100_000


@dataclass(frozen=True, repr=False)
class Where(Named):
    """A selection; every field that is None selects all. Numbers may be of NumPy, or integer arrays and tensors.

    Args:
        layers: 0-based layer indices within their stack: an int, a range, an iterable, or a string such as
            `"8-24,30"` (inclusive). Negative ints count from the end of the stack.
        heads: query heads: an int, an iterable of ints (the same in each layer), or a `HeadSet`
            (then only its layers are selected; of its towers where it names any, whatever their modality).
        kinds: "self", "cross" and/or "joint".
        modules: regular expressions that must match a whole module path (see `attnsteer.sites`); without look-around,
            back-references, word boundaries and flags, so that none takes long (see `attnsteer.patterns`).
        phases: "prefill" and/or "decode" (language models).
        steps: denoising steps, 0-based: an int, a range or an iterable of ints, or a pair of floats
            `(start, stop)` as fractions of the schedule, start included, stop excluded.
        branches: "cond" and/or "uncond": the guidance rows of a diffusion batch.
        rows: query rows: "last" (of each call), "image" or "text" (roles), or a pair of ints
            `(start, stop)` of absolute token positions.
        parts: of a module that computes several attentions in one call (`Site.parts`), those to act in, such as "image prompt".
            None: gates act in all, edits of the map in the one that is meant (docs/architecture.md). Only sites with such parts
            are selected.
        modalities: "text", "vision", "audio", "image". None selects the host's main one: the language
            tower of a vision-language model, the denoiser of a pipeline.

    What cannot be steered is left out, and raises where a module or a layer is named that has nothing else.

    Raises:
        UnsupportedHost: a site that cannot be steered is named, or nothing else is selected, when resolved.
        SelectionError: a value is of the wrong form, at construction; nothing matches, when resolved; or fractions
            of a schedule whose length is not known, when asked.
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
    parts: Any = None

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
        put("parts", _parts(self.parts))
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

    def resolve(
        self, sites: Sequence[Site], main: Sequence[str], kinds: Sequence[str] = KINDS
    ) -> list[tuple[Site, tuple[int, ...] | None]]:
        """The selected sites, each with its heads (None: all).

        Args:
            sites: all that the target has; sizes of stacks are taken from them.
            main: the modalities that `modalities=None` stands for.
            kinds: the kinds that `kinds=None` stands for.

        Raises:
            SelectionError: nothing matches, or a named layer, head, kind or module does not exist.
        """
        towers = self.heads.towers if isinstance(self.heads, HeadSet) else ()
        wanted = self.modalities or (sorted({s.modality for s in sites}) if towers else tuple(main))
        pool = [s for s in sites if s.modality in wanted]
        if not pool:
            found = sorted({s.modality for s in sites})
            raise SelectionError(f"{self} selects modality {wanted}, the target has {found or 'no attention sites'}.")
        kinds = self.kinds or kinds
        pool = self._keep([s for s in pool if s.kind in kinds], f"kinds {kinds}", sorted({s.kind for s in pool}))
        if self.modules is not None:
            wanted = [pattern(p) for p in self.modules]
            kept = [s for s in pool if any(p.matches(n) for p in wanted for n in (s.name, s.path))]
            pool = self._keep(kept, "modules (a pattern matches the whole path)", [s.path for s in pool])
        if self.parts is not None:
            kept = [s for s in pool if set(self.parts) & set(s.parts)]
            there = sorted({p for s in pool for p in s.parts}) or ["none: each module of the selection attends once"]
            pool = self._keep(kept, "parts", there)
        shapes = _shapes(sites)
        if self.layers is not None:
            pool = self._layers(pool, shapes)
        if isinstance(self.heads, HeadSet):
            pool = self._of_towers(pool, shapes) if towers else self._of_head_set(pool, shapes)
        refused, pool = [s for s in pool if s.refused], [s for s in pool if not s.refused]
        by_layer = self.layers is not None or isinstance(self.heads, HeadSet)
        alone = by_layer and {s.layer for s in refused} - {s.layer for s in pool}
        if refused and (self.modules is not None or alone or not pool):
            raise UnsupportedHost(
                f"{self} selects {listing(s.path for s in refused)}, which cannot be steered: {refused[0].refused}. Select "
                "the others, by layers, modules, kinds or modalities; attnsteer.sites(target) lists them."
            )
        return [(site, heads) for site, heads in ((s, self._heads(s)) for s in pool) if heads != ()]

    def _keep(self, kept: list[Site], field: str, found: Iterable[object]) -> list[Site]:
        if not kept:
            raise SelectionError(f"{self} matches nothing by {field}; what exists: {listing(found)}.")
        return kept

    def _layers(self, pool: list[Site], shapes: Mapping[Stack, tuple[int, int]]) -> list[Site]:
        kept, missing = [], set(self.layers)
        for s in pool:
            size = shapes[_stack(s)][0]
            hit = {i for i in self.layers if (i if i >= 0 else i + size) == s.layer}
            missing -= hit
            if hit:
                kept.append(s)
        if missing:
            have = sorted({s.layer for s in pool})
            raise SelectionError(f"{self} names layers {sorted(missing)}; the selected sites have layers {have}.")
        return kept

    def _heads(self, site: Site) -> tuple[int, ...] | None:
        if self.heads is None:
            return None
        chosen = self.heads.of(site) if isinstance(self.heads, HeadSet) else self.heads
        wrong = [h for h in chosen if h >= site.heads]
        if wrong:
            raise SelectionError(
                f"heads {wrong} of layer {site.layer} do not exist: {site.path} has {site.heads} heads "
                f"(0 to {site.heads - 1}). Were they found on another model?"
            )
        return tuple(chosen)

    def _of_head_set(self, pool: list[Site], shapes: Mapping[Stack, tuple[int, int]]) -> list[Site]:
        layers = {s.layer for s in pool}
        if not len(self.heads):
            raise SelectionError("the HeadSet is empty; give at least one head.")
        missing = [layer for layer in self.heads.layers if layer not in layers]
        if missing:
            raise SelectionError(
                f"the HeadSet names layers {missing}; the selected sites have layers {sorted(layers)}. "
                "Was it found on another model?"
            )
        self._check_towers(pool, shapes)
        _check_shape(self.heads.shape, {shapes[_stack(s)] for s in pool if not s.refused})
        return [s for s in pool if not s.refused or s.layer in self.heads.layers]

    def _of_towers(self, pool: list[Site], shapes: Mapping[Stack, tuple[int, int]]) -> list[Site]:
        """The sites of the layers that a set of several towers names, each tower for itself."""
        kept: dict[str, tuple[Site, str]] = {}
        for name in self.heads.towers:
            own, heads = [s for s in pool if s.in_tower(name)], self.heads.tower(name)
            # The same set, asked about one tower.
            alone = Where(heads=heads)
            if not own:
                there = listing(sorted({s.tower for s in pool}))
                raise SelectionError(
                    f"the HeadSet names the tower {name!r}; the selected sites are of {there}. A tower is called by a part of "
                    "these, or by a part of the path of its modules (attnsteer.sites)."
                )
            try:
                found = alone._of_head_set(own, shapes)
            except SelectionError as error:
                raise SelectionError(f"the tower {name!r}: {error}") from error
            for site in (s for s in found if s.layer in heads.layers):
                if site.path in kept:
                    raise SelectionError(
                        f"the HeadSet has {site.path} in the tower {kept[site.path][1]!r} and in {name!r}; call it one or the "
                        "other."
                    )
                kept[site.path] = site, name
        return [s for s in pool if s.path in kept]

    def _check_towers(self, pool: list[Site], shapes: Mapping[Stack, tuple[int, int]]) -> None:
        """Refuse numbers that mean other layers in each of several towers: a text model's and its vision tower's, a prior's and a
        denoiser's. Towers built alike, as two experts of one pipeline, share them."""
        found: dict[int, dict[tuple[str, str], tuple[int, int]]] = {}
        for s in pool:
            if s.layer in self.heads.layers and not s.refused:
                found.setdefault(s.layer, {})[s.component, s.modality] = shapes[_stack(s)]
        for layer, towers in sorted(found.items()):
            if len(towers) > 1 and (len({m for _, m in towers}) > 1 or len(set(towers.values())) > 1):
                raise SelectionError(
                    f"the HeadSet names layer {layer}, of which there is one in each of "
                    f"{listing(' '.join(filter(None, tower)) for tower in towers)}. Name the towers, HeadSet({{tower: {{layer: "
                    "[head, ...]}}), or narrow the selection down to one by Where(modalities=...) or Where(modules=...)."
                )

    def active(self, phase: str | None, step: int | None, steps: int | None) -> bool:
        """Whether the selection holds in this phase and at this denoising step."""
        if self.phases is not None and phase is not None and phase not in self.phases:
            return False
        if self.steps is None or step is None:
            return True
        if isinstance(self.steps[0], float):
            if steps is None:
                raise SelectionError(
                    f"{self}: fractions need the length of the schedule, which is not known here. Steer the pipeline "
                    "rather than its model, or give step numbers."
                )
            return self.steps[0] * steps <= step < self.steps[1] * steps
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


def _check_shape(shape: tuple[int, int] | None, found: set[tuple[int, int]]) -> None:
    if shape is not None and shape not in found:
        raise SelectionError(
            f"the HeadSet was found on a model of shape {shape} (layers, heads per layer); "
            f"this one has {listing(sorted(found))}. Use a HeadSet of this model."
        )


Stack = tuple[str, str, str]


def _stack(site: Site) -> Stack:
    return site.component, site.modality, site.stack


def tower_names(sites: Iterable[Site]) -> dict[str, str]:
    """Path of each site -> the name of its tower, the modality where that tells them apart; all empty where there is one tower."""
    sites = list(sites)
    towers = {s.tower: s.modality for s in sites}
    if len(towers) < 2:
        return {s.path: "" for s in sites}
    short = len(set(towers.values())) == len(towers)
    return {s.path: s.modality if short else s.tower for s in sites}


def shapes_of(chosen: Iterable[Site], sites: Iterable[Site]) -> Any:
    """The `shape` of a `HeadSet` of heads in chosen sites: (layers, heads), or that of each of several towers by name."""
    chosen = list(chosen)
    names, sizes = tower_names(chosen), _shapes(sites)
    found = {names[s.path]: sizes[_stack(s)] for s in chosen}
    return found if any(found) else next(iter(found.values()))


def stack_shape(site: Site, sites: Iterable[Site]) -> tuple[int, int]:
    """(layers, heads of the widest layer) of the stack that `site` belongs to: the `shape` of a `HeadSet` for it."""
    return _shapes(sites)[_stack(site)]


def _shapes(sites: Iterable[Site]) -> dict[Stack, tuple[int, int]]:
    """(layers, heads of the widest layer) of each stack."""
    shapes: dict[Stack, tuple[int, int]] = {}
    for site in (s for s in sites if not s.refused):
        depth, width = shapes.get(_stack(site), (0, 0))
        shapes[_stack(site)] = max(depth, site.layer + 1), max(width, site.heads)
    return shapes


def _integers(field: str, value: Any, negative: bool = False) -> tuple[int, ...] | None:
    if value is None:
        return None
    value = plain(value)
    if isinstance(value, str):
        value = _parse_ranges(field, value)
    if isinstance(value, int):
        value = (value,)
    items = tuple(whole(v) for v in islice(value, LONGEST + 1)) if _several(value) else (None,)
    if len(items) > LONGEST:
        raise SelectionError(f"Where({field}={brief(value)}) names more than {LONGEST} numbers.")
    if not items or any(v is None or (v < 0 and not negative) for v in items):
        raise SelectionError(
            f"Where({field}={brief(value)}): give an int, a range, a non-empty iterable of ints"
            f"{'' if negative else ' (not negative)'}, or a string like '2-5,9'."
        )
    return tuple(sorted(set(items)))


def _parse_ranges(field: str, text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise SelectionError(f"Where({field}={brief(text)}): {brief(part)} is not 'N' or 'FIRST-LAST'.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first + len(found) >= LONGEST:
            raise SelectionError(f"Where({field}={text!r}) names more than {LONGEST} numbers.")
        found.extend(range(first, last + 1))
    return tuple(found)


def _words(field: str, value: Any, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = _items(field, value)
    for item in items:
        if not isinstance(item, str) or item not in allowed:
            raise SelectionError(f"Where({field}={brief(item)}): one of {allowed}.{did_you_mean(item, allowed)}")
    if not items:
        raise SelectionError(f"Where({field}=()): name at least one of {allowed}, or leave it out.")
    return tuple(w for w in allowed if w in items)


def _patterns(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = _items("modules", value)
    if not items:
        raise SelectionError("Where(modules=()): give at least one pattern, or leave it out.")
    for item in items:
        pattern(item)
    return items


def _parts(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = _items("parts", value)
    if not items or not all(isinstance(item, str) and item for item in items):
        raise SelectionError(f"Where(parts={brief(value)}): name at least one part, as attnsteer.sites lists them.")
    return items


def _several(value: Any) -> bool:
    """Whether there is something to go through."""
    return (
        isinstance(value, Iterable)
        and not isinstance(value, (bytes, bytearray, Mapping))
        # A tensor of which `plain` has made no numbers.
        and not hasattr(value, "ndim")
    )


def _items(field: str, value: Any) -> tuple[Any, ...]:
    value = plain(value)
    if not _several(value):
        raise SelectionError(f"Where({field}={brief(value)}): give a string or several.")
    return (value,) if isinstance(value, str) else tuple(islice(value, LONGEST))


def _steps(value: Any) -> tuple[Any, ...] | None:
    value = plain(value)
    if isinstance(value, (tuple, list)) and value and all(isinstance(plain(v), float) for v in value):
        value = tuple(float(plain(v)) for v in value)
        if len(value) != 2 or not 0.0 <= value[0] < value[1] <= 1.0:
            raise SelectionError(f"Where(steps={value!r}): fractions are a pair 0 <= start < stop <= 1.")
        return value
    return _integers("steps", value)


def _rows(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value in ROWS):
        return value
    value = plain(value)
    pair = tuple(whole(v) for v in value) if isinstance(value, (tuple, list)) and len(value) == 2 else ()
    if pair and None not in pair and 0 <= pair[0] < pair[1]:
        return pair
    raise SelectionError(f"Where(rows={brief(value)}): one of {ROWS} or a pair (start, stop) of token positions.")
