"""What is injected: rows of one sample by token number, from a capture or from tensors, brought to the rows and keys of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..account import Track
from ..call import AttnCall
from ..captured import Captured
from ..errors import SelectionError, brief, listing
from ._map_patterns import seen_rows

Head = tuple[int, int]


@dataclass(frozen=True)
class Table:
    """Rows of one site for S samples, on a device.

    Attributes:
        rows: [S, H, R, ...], zeros behind the last row of a sample. place: int64 [S, N], where the row of each token number is, -1
            where there is none. straight: how many tokens each
            sample has, where all have as many, in order and without a gap; else None.
        prompt: how many prompt tokens each sample had where all of them are there, else None. heads: of the H entries.
        scale, softcap: of the scores that they were taken from.
    """

    rows: Tensor
    place: Tensor
    prompt: tuple[int, ...] | None
    heads: tuple[int, ...]
    scale: float | None = None
    softcap: float | None = None
    straight: int | None = None

    @property
    def samples(self) -> int:
        """S."""
        return len(self.place)

    def at(self, call: AttnCall, number: Tensor) -> tuple[Tensor, Tensor]:
        """(rows of the tokens `number` [B or 1, r] in the samples of a call, [B, H, r, ...]; which there are, bool [B, r])."""
        B = call.shape[0]
        sample = self.of_rows(call)
        number = number.expand(B, -1)
        place = self.place[sample]
        known = (number >= 0) & (number < place.shape[1])
        found = torch.where(known, place.gather(1, number.clamp(0, place.shape[1] - 1)), -1)
        there = found >= 0
        rows = self.rows[sample[:, None], :, found.clamp_min(0)]
        return rows.transpose(1, 2), there

    def ends_before(self, track: Track) -> bool:
        """Whether it is known without looking that all tokens of a `track` come behind those of all samples."""
        return track.begins is not None and track.begins >= self.place.shape[1]

    def of(self, call: AttnCall, track: Track) -> tuple[Tensor | None, Tensor | None]:
        """(rows of the tokens of a `track` of a call, [B, H, size, ...]; which there are, bool [B, size], None: all).

        (None, None) where it is known without looking that there are none; where all are there in order, the rows are a view.
        """
        first = track.begins
        if first is not None and self.straight is not None and not torch.compiler.is_compiling():
            stop = first + track.size
            if first >= self.straight or stop <= 0:
                return None, None
            if first >= 0 and stop <= self.straight:
                B, sample = call.shape[0], self._numbers(call)
                rows = self.rows if sample == tuple(range(B)) and self.samples == B else None
                if rows is None:
                    same = self.samples == 1
                    rows = self.rows.expand(B, *self.rows.shape[1:]) if same else self.rows[self.of_rows(call)]
                return rows[:, :, first:stop], None
        return self.at(call, torch.where(track.valid, track.index, -1))

    def of_rows(self, call: AttnCall) -> Tensor:
        """int [B], the sample of this table that each batch row of a call is."""
        return torch.tensor(self._numbers(call), device=self.place.device)

    def _numbers(self, call: AttnCall) -> tuple[int, ...]:
        B = call.shape[0]
        if self.samples == 1:
            return (0,) * B
        try:
            return call._samples(B).rows(self.samples, B)
        except SelectionError:
            raise SelectionError(
                f"{call.site.path}: the source has {self.samples} samples, and this call {B} rows that are none of them; "
                "capture the samples of this batch, or one for all."
            ) from None


def of_prompts(source: Any) -> bool:
    """Whether a source, a whole `Captured` or tensors, has rows of prompts alone."""
    if not isinstance(source, Captured):
        return True
    return not source.open and all(take.phase == "prefill" for take in source.takes)


def by_token(rows: Tensor, keys: Tensor) -> Tensor:
    """Columns by token number, [B, H, r, T], at keys with the numbers `keys` [B or 1, m], [B, H, r, m]; zero where T has none."""
    B, H, r, T = rows.shape
    at = keys.expand(B, -1)
    inside = (at >= 0) & (at < T)
    index = at.clamp(0, T - 1)[:, None, None].expand(B, H, r, -1)
    return rows.gather(3, index) * inside[:, None, None]


class Tables:
    """The tables of a source by site, made at the first call of each; shared by all calls until the source has grown."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[int, Table]] = {}

    def of(self, call: AttnCall, source: Any, what: str, head_map: Mapping[Head, Head] | None = None) -> Table:
        """That of a call's site, with an entry for each of the call's heads.

        Args:
            source: a `Captured`, or tensors (see `checked_source`). what: "map", "output", "q", "k" or "v".
            head_map: (layer, head) -> (layer, head) of the source; others are those of the same number.
        """
        key = (call.site.path, call.heads, call.step, call.branch, what, call.map.device)
        size = len(source.takes) if isinstance(source, Captured) else 0
        before, found = self._made.get(key, (size, None))
        if found is None or before != size:
            with torch.inference_mode(False), torch.no_grad():
                if isinstance(source, Captured):
                    found = _of_capture(call, source, what, head_map or {})
                else:
                    found = _of_tensors(call, source)
            self._made[key] = (size, found)
        return found


def checked_source(source: Any) -> Any:
    """A `Captured`; the folder of one is read; a tensor or {layer or site path: tensor} is kept.

    Raises:
        SelectionError: it is none of these, or a tensor has no form of a map.
    """
    if isinstance(source, (str, Path)):
        return Captured.load(source)
    if isinstance(source, Captured):
        if not source.takes and not source.open:
            raise SelectionError("the source is a capture in which nothing was taken.")
        return source
    tensors = source if isinstance(source, Mapping) else {None: source}
    if not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise SelectionError(
            f"source={brief(source)}: give a Captured, the folder of one, a tensor, or {{layer or site path: tensor}}."
        )
    for tensor in tensors.values():
        if tensor.is_meta or tensor.layout != torch.strided or not 2 <= tensor.ndim <= 4:
            raise SelectionError(
                f"source={brief(source)}: give tensors with values, [rows, keys], [heads, rows, keys] or "
                "[samples, heads, rows, keys]."
            )
    return dict(tensors)


def _of_capture(call: AttnCall, source: Captured, what: str, head_map: Mapping[Head, Head]) -> Table:
    layer = call.site.layer
    if not head_map:
        _check_own(call, source, what)
    wanted = [head_map.get((layer, h), (layer, h)) for h in call.heads]
    tables = {n: _of_layer(call, source, what, n) for n in dict.fromkeys(n for n, _ in wanted)}
    picked = []
    for at, head in wanted:
        table, groups = tables[at]
        entry = head // groups if what in ("k", "v") else head
        if entry not in table.heads:
            kind = "key head" if what in ("k", "v") else "head"
            raise SelectionError(
                f"{call.site.path}: {kind} {entry} of layer {at} is not in the source, which has {listing(table.heads)}. "
                "Capture it; or, if the source is another model, say which of its heads stands for each: "
                "head_map={(layer, head): (layer, head of the source)}."
            )
        picked.append(table.rows[:, table.heads.index(entry)])
    first = tables[wanted[0][0]][0]
    if len({t.place.shape for t, _ in tables.values()}) > 1 or len({p.shape for p in picked}) > 1:
        raise SelectionError(f"{call.site.path}: the layers of the source were captured at different rows.")
    straight = first.straight if len({t.straight for t, _ in tables.values()}) == 1 else None
    return replace(first, rows=torch.stack(picked, dim=1), heads=call.heads, straight=straight)


def _check_own(call: AttnCall, source: Captured, what: str) -> None:
    """Raise where the source has more heads at this site than this model, so that it is another one."""
    take, site = next((t for t in source.takes if t.site == call.site.path), None), call.site
    if take is None:
        return
    heads = 1 + max((take.kv_heads if what in ("k", "v") else take.heads), default=0)
    own = site.kv_heads if what in ("k", "v") else site.heads
    if heads > own or (what in ("k", "v") and take.groups != site.heads // site.kv_heads):
        raise SelectionError(
            f"{site.path}: the source has {heads} heads or more in groups of {take.groups} there, this model {own} in groups of "
            f"{site.heads // site.kv_heads}: it is another model. Capture a run of this one; or say which of its heads stand for "
            "these (InjectMap, PatchHeads): head_map={(layer, head): (layer, head of the source)}."
        )


def _of_layer(call: AttnCall, source: Captured, what: str, layer: int) -> tuple[Table, int]:
    """(all that was taken of one layer, query heads that read one key head)."""
    takes = _takes(call, source, layer)
    tokenless = takes[0].kind == "cross" and what in ("k", "v")
    size = max(int((t.keys if tokenless else t.rows).max()) for t in takes) + 1
    parts: list[Tensor | None] = []
    places = []
    for b in range(len(takes[0].rows)):
        numbers = sorted({n for t in takes for n in t.rows[b].tolist() if n >= 0})
        numbers = list(range(size)) if tokenless else numbers
        place = torch.full((max(size, 1),), -1, dtype=torch.long)
        place[numbers] = torch.arange(len(numbers))
        parts.append(Captured._of_sample(takes, what, b) if numbers else None)
        places.append(place)
    some = next((p for p in parts if p is not None), None)
    if some is None:
        raise SelectionError(f"{call.site.path}: no row of layer {layer} was taken by the source.")
    full = [some[:, :0] if p is None else p for p in parts]
    R, T = max(p.shape[1] for p in full), max(p.shape[2] for p in full)
    padded = [torch.nn.functional.pad(p, (0, T - p.shape[2], 0, R - p.shape[1])) for p in full]
    device, take = call.map.device, takes[0]
    straight = {len(p) if bool((p == torch.arange(len(p))).all()) else None for p in places}
    table = Table(
        torch.stack(padded).to(device),
        torch.stack(places).to(device),
        _prompt(takes),
        take.kv_heads if what in ("k", "v") else take.heads,
        take.scale,
        take.softcap,
        straight.pop() if len(straight) == 1 else None,
    )
    return table, take.groups


def _takes(call: AttnCall, source: Captured, layer: int) -> list[Any]:
    """The takes of the source that stand for a call: of its site, or of a layer and the same kind in another model."""
    site = call.site
    named = site.path in source.sites and layer == site.layer
    paths = {t.site for t in source.takes if t.layer == layer and t.kind == site.kind}
    if not named and len(paths) != 1:
        raise SelectionError(
            f"{site.path}: the source has no take of this site, and {len(paths)} sites of layer {layer} and kind {site.kind!r}; it "
            f"has {listing(source.sites, 4)}."
        )
    path = site.path if named else next(iter(paths))
    steps = {t.step for t in source.takes if t.site == path}
    takes = source.of(path, step=call.step if len(steps) > 1 else None)
    source.check_joined(takes)
    if len({t.step for t in takes}) > 1:
        raise SelectionError(f"{path}: the source has several steps, and this call says none; capture one of them.")
    return takes


def _prompt(takes: list[Any]) -> tuple[int, ...] | None:
    """Prompt tokens of each sample, where the takes have all of their rows; None where they have a part."""
    counts = []
    for b in range(len(takes[0].rows)):
        numbers = {n for t in takes if t.phase == "prefill" for n in t.rows[b].tolist() if n >= 0}
        if numbers != set(range(len(numbers))):
            return None
        last = max((int(t.keys[0 if len(t.keys) == 1 else b].max()) for t in takes if t.phase == "prefill"), default=-1)
        if takes[0].kind != "cross" and last + 1 != len(numbers):
            return None
        counts.append(len(numbers))
    return tuple(counts)


def _of_tensors(call: AttnCall, source: Mapping[Any, Tensor]) -> Table:
    site, H = call.site, len(call.heads)
    tensor = next((source[k] for k in (site.path, site.layer, None) if k in source), None)
    if tensor is None:
        raise SelectionError(
            f"{site.path}: the source has tensors for {listing(source)}; give one for this layer or site."
        )
    given = tensor[(None,) * (4 - tensor.ndim)] if tensor.ndim < 4 else tensor
    if given.ndim != 4 or given.shape[1] not in (1, H, site.heads):
        raise SelectionError(
            f"{site.path}: the source has shape {list(tensor.shape)}; give [rows, keys], [heads, rows, keys] or "
            f"[samples, heads, rows, keys] with 1, {H} (the selected) or {site.heads} (all) heads."
        )
    if given.shape[1] == site.heads and site.heads != H:
        given = given[:, list(call.heads)]
    given = given.detach().to(call.map.device, call.map.stat_dtype).expand(-1, H, -1, -1)
    S, _, R, _ = given.shape
    place = torch.arange(R, device=given.device).expand(S, -1)
    return Table(given, place, (R,) * S, call.heads)


def check_length(call: AttnCall, table: Table, name: str) -> None:
    """Raise where a source with a row for each token of its prompt is for prompts of another length.

    Asked of calls that end their prompts; a longer source (one with rows of generated tokens) counts its prompt's tokens.
    """
    if table.prompt is not None and call.phase != "decode":
        call.once(("length", table.prompt), lambda: _check_length(call, table, name) or True)


def _check_length(call: AttnCall, table: Table, name: str) -> None:
    B = call.shape[0]
    if call.gives("tokens"):
        if call.tokens.more_to_come:
            return
        counts = call.tokens.count(call.tokens.prompt)
        counts = [int(n) for n in counts.expand(B)] if len(counts) in (1, B) else [int(counts[0])] * B
    else:
        counts = [int(n) for n in call.rows.valid.sum(dim=-1).expand(B)]
    of = table.of_rows(call).tolist()
    wrong = [(b, counts[b], table.prompt[of[b]]) for b in range(B) if counts[b] != table.prompt[of[b]]]
    if wrong:
        b, live, own = wrong[0]
        raise SelectionError(
            f"{name} at {call.site.path}: the source has {own} rows, and sample {b} has {live} tokens. Give a source of the "
            "same length; a capture of some rows (rows=...) is put at the same tokens of prompts of any length."
        )


def check_keys(call: AttnCall, present: Tensor | None, known: Tensor | None, none: bool) -> None:
    """Raise where a row that a source has (None: all) sees a key that it has not (None: it has all; `none`: it has none)."""
    if known is None and not none:
        return
    B, n, m = call.shape[0], call.rows.size, call.shape[3]
    rows = torch.ones(B, n, dtype=torch.bool, device=call.map.device) if present is None else present
    needed = seen_rows(call, torch.arange(n, device=rows.device).expand(B, -1)) & rows[:, None, :, None]
    unknown = torch.ones(B, m, dtype=torch.bool, device=rows.device) if known is None else ~known
    if bool((needed.any(dim=2) & unknown[:, None]).any()):
        raise SelectionError(
            f"{call.site.path}: rows of the source see tokens whose keys it has not; capture q and k of all tokens of the prompt."
        )
