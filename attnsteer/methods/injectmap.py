"""InjectMap: puts given rows of attention in the place of the model's own: of a capture, tensors, a pattern, a drawing, a mask.

Our own primitive; what it reproduces: patterns found by people (Li et al., EMNLP 2022, arXiv 2112.05364; raymondzmc/
Attention-Pattern-Exploitation), attention of another model (Li et al., 2024; alexlioralexli/attention-transfer), a map redrawn by a
user (Alipour et al., 2020, arXiv 2003.00431; its normalisation is not known, so `share` is ours), and the mask of a layout model's
strongest keys (Skim-Attention, 2021; recitalAI/skim-attention). Where these codes add -10000 to the scores, rows without an allowed
key see padding; here such rows stay the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..attention_map import FEW_ROWS, DenseMap
from ..call import AttnCall
from ..captured import (
    OF_PROMPTS,
    Captured,
    blocks,
    checked_rows,
    chosen_rows,
    map_rows,
    needs_tokens,
    no_rows,
    picked,
    places,
)
from ..errors import CompositionError, SelectionError, brief
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import choice, is_all, number, parsed, plain, whole
from ..registry import register_method
from ..tokens import Tokens
from ._map_patterns import OF_IDS, checked_pattern, grouped, pattern_rows, seen_rows, sees_key, target_token
from ._sources import Tables, by_token, check_keys, check_length, checked_source, of_prompts
from ._spans import checked_spans, span_keys

# How far the sum of a given row may be from what is left by a learned sink, or one.
TOLERANCE = 1e-3
ROLES = ("first", "image", "prompt", "generated")


def _source(value: Any) -> Any:
    if isinstance(value, _OfKeys):
        return value
    if isinstance(value, str) and not Path(value).is_dir():
        checked_pattern(value)
        return value
    return checked_source(value)


def _keys(value: Any) -> Any:
    if isinstance(value, str):
        if value in ROLES:
            return value
        raise SelectionError(f"one of {ROLES}, or marked tokens: [{value!r}] is looked for in the text.")
    return checked_spans(value)


def head_pairs(value: Any) -> dict[tuple[int, int], tuple[int, int]]:
    """{(layer, head): (layer, head)}, checked."""
    if not isinstance(value, Mapping) or not value:
        raise SelectionError("give {(layer, head): (layer, head of the source)}.")
    pairs = {tuple(plain(k)): tuple(plain(v)) for k, v in value.items()}
    if any(len(p) != 2 or None in map(whole, p) for pair in pairs.items() for p in pair):
        raise SelectionError("give {(layer, head): (layer, head of the source)}, integers.")
    return pairs


def _ids(value: Any) -> tuple[int, ...]:
    given = plain(value)
    ids = [whole(i) for i in given] if isinstance(given, (list, tuple)) else [None]
    if None in ids:
        raise SelectionError("give a list of token ids, integers.")
    return tuple(ids)


@register_method
@dataclass(frozen=True)
class InjectMap(Intervention):
    """A'_i = (1 - s) A_i + s P_i for the rows of which the source has one; other rows stay.

    Args:
        source: what P is. A `Captured` with "map", or the folder of one: rows by token number, whatever the padding. One with
            "q" and "k": the map that these make, which is not built. A tensor of probabilities [n, m], [heads, n, m] or
            [samples, heads, n, m], by token number, or {layer or site path: tensor}. Or a pattern, the uniform distribution over
            the keys that a row sees and that it allows: "all", "previous", "next", "self", "first", "offset:N" (N tokens back),
            "block:N", "same_token" (with the row's own), "other_same_token" (without), "after_same_token" (an induction head's),
            "sentence", "span" (rows and keys of the same marked span).
        heads: the heads to edit; None: all that `where` selects.
        mode: "replace" as above. "mask": the model's own scores over the keys where P is not zero. "scores": the source holds
            scores, whose softmax over the keys that a row sees is P. "add": they are added, times s, to the model's own.
        strength: s, 0 to 1; 0 changes nothing.
        rows: the rows to edit (see `capture`); None: all that the source has.
        keys: edit the distribution inside a set of keys only, "image", "first", "prompt", "generated" or marked tokens; of P
            what is inside, renormalised. The set keeps the share that it has in each row.
        share: the share that the set of `keys` gets instead, 0 to 1; other keys shrink or grow in proportion.
        sums: rows of P that do not sum to one are an error ("refuse"), are brought to it ("renormalise"), or stay ("keep", for
            "mask" too).
        spans: of the pattern "span". sentence_ends: ids of the tokens that end a sentence. head_map: (layer, head) -> (layer,
            head) of a source that is another model's.
        tokenizer: for rows, keys or spans that are strings; not saved.

    It acts on head outputs, behind all reweightings, and is refused on heads that another method reweights too. Of outputs that a
    method before has edited, (1 - s) stay; what is worked out from the model's own map (`keys`, "mask", "add") is refused there.

    Raises (in a call):
        SelectionError: a source of other heads, another length, or negative, unnormalised or invisible weights.
        CompositionError: another method reweights the map of these heads.
    """

    source: Any = parsed(_source, "a Captured, its folder, tensors, or the name of a pattern")
    heads: HeadSet | None = head_set()
    mode: str = choice("replace", ("replace", "mask", "scores", "add"))
    strength: float = number(1.0, low=0, high=1, per_sample=True)
    rows: Any = parsed(checked_rows, "rows", None, kw_only=True)
    keys: Any = parsed(_keys, "a set of keys", None, kw_only=True)
    share: float | None = number(None, low=0, high=1, optional=True, kw_only=True)
    sums: str = choice("refuse", ("refuse", "renormalise", "keep"), kw_only=True)
    spans: Any = parsed(checked_spans, "marked tokens", None, kw_only=True)
    sentence_ends: tuple[int, ...] = parsed(_ids, "token ids", (), kw_only=True)
    head_map: Any = parsed(head_pairs, "{(layer, head): (layer, head)}", None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, repr=False, compare=False, metadata={"save": False})
    _tables: Tables = field(default_factory=Tables, init=False, repr=False, compare=False, metadata={"save": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = isinstance(self.source, str)
        if pattern and self.mode in ("scores", "add"):
            raise SelectionError(f"InjectMap(mode={self.mode!r}): a pattern has no scores; give a tensor of them.")
        if self._of_qk and (self.mode != "replace" or self.keys is not None):
            raise SelectionError(
                "InjectMap: a source of q and k replaces whole rows; capture what='map' to mask, or for some keys."
            )
        if isinstance(self.source, Captured) and not self._of_qk and "map" not in self.source.what:
            raise SelectionError(f"InjectMap: the capture has {self.source.what}; take 'map', or 'q' and 'k'.")
        if pattern and self.source == "span" and self.spans is None:
            raise SelectionError("InjectMap('span') needs spans=..., the marked tokens that look at themselves.")
        if pattern and self.source == "sentence" and not self.sentence_ends:
            raise SelectionError("InjectMap('sentence') needs sentence_ends=..., the ids of tokens that end one.")
        if self.share is not None and self.keys is None:
            raise SelectionError(f"InjectMap(share={self.share}) is the share of a set of keys; give keys=... too.")

    @classmethod
    def drawing(
        cls, drawn: Tensor, grid: tuple[int, int] | None = None, keys: Any = "image", **other: Any
    ) -> InjectMap:
        """A user's drawing as the distribution over the image, the same for all rows.

        Args:
            drawn: [h, w], not negative, with something in it. grid: (height, width) of the image in tokens; areas are averaged
                onto it; None: the drawing's own size.

        Raises:
            SelectionError: the drawing is empty or negative.
        """
        if drawn.ndim != 2 or bool((drawn < 0).any()) or not bool(drawn.sum() > 0):
            raise SelectionError(f"a drawing is [h, w], zero or more, and not all zero; this one is {brief(drawn)}.")
        size = tuple(drawn.shape) if grid is None else grid
        cells = torch.nn.functional.adaptive_avg_pool2d(drawn[None, None].float(), size).flatten()
        return cls(_OfKeys(cells / cells.sum()), keys=keys, **other)

    @classmethod
    def top_k(cls, probabilities: Tensor, k: int, **other: Any) -> InjectMap:
        """The mask of another model's strongest keys: each row keeps its own scores over the k keys with the most probability.

        Args:
            probabilities: [n, m], [heads, n, m] or [samples, heads, n, m].
        """
        k = min(k, probabilities.shape[-1])
        best = probabilities.topk(k, dim=-1).indices
        mask = torch.zeros_like(probabilities, dtype=torch.float32).scatter(-1, best, 1.0 / k)
        return cls(mask * (probabilities > 0), mode="mask", **other)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the source, the rows and the keys are read from."""
        pattern = self.source.partition(":")[0] if isinstance(self.source, str) else ""
        found = set()
        if pattern in (*OF_IDS, "span") or needs_tokens(self.rows) or isinstance(self.keys, tuple):
            found.add("tokens")
        if self.keys == "image":
            found.add("images")
        if isinstance(self.source, Captured) and any(t.step is not None for t in self.source.takes):
            found.add("steps")
        return tuple(sorted(found))

    @property
    def _of_qk(self) -> bool:
        return (
            isinstance(self.source, Captured) and "map" not in self.source.what and {"q", "k"} <= set(self.source.what)
        )

    @property
    def _mixes(self) -> bool:
        """Whether the outputs of whole rows of P are mixed with those that are there."""
        return self.mode in ("replace", "scores") and self.keys is None

    @property
    def steady(self) -> bool:  # type: ignore[override]
        """Rows behind those of the source stay: its prompts are as long as those it is put into, where the method saw these."""
        if self.where.phases is not None:
            return False
        given = isinstance(self.source, (Captured, dict)) and of_prompts(self.source)
        return self.rows in OF_PROMPTS or (self.rows is None and given)

    def check_tokens(self, tokens: Tokens) -> None:
        for spans in (self.rows if needs_tokens(self.rows) else None, self.keys, self.spans):
            if isinstance(spans, (list, tuple)):
                tokens.spans(spans, self.tokenizer)

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        if is_all(self.strength, 0.0):
            return None
        if call.map.before is not None or call.map.unweighted_att is not None:
            raise CompositionError(
                f"InjectMap at {call.site.path} gives rows of the map, and another method reweights them in the same heads; "
                "which comes first would be lost. Give them different heads or layers."
            )
        if no_rows(call, self.rows):
            return None
        if self._of_qk:
            return self._kernel(call, out, self._chosen(call))
        if not self._mixes and out is not call.map.out:
            raise CompositionError(
                f"InjectMap at {call.site.path} edits the model's own map (keys={brief(self.keys)}, mode={self.mode!r}), and a "
                "method before it edited the outputs of these heads, which would be lost. Put InjectMap first, or give other heads."
            )
        plain = isinstance(self.source, str) and self.mode == "replace" and self.keys is None
        # The dense path of `steer(reference=True)` writes its rows out.
        if plain and not call.packed and not isinstance(call.map, DenseMap):
            if target_token(*checked_pattern(self.source), call.rows.index) is not None:
                return self._of_one_key(call, out)
            return self._of_keys(call, out)
        if isinstance(self.source, (Captured, dict)):
            table = self._tables.of(call, self.source, "map", self.head_map)
            if table.ends_before(call.rows):
                return None
        at, there = places(self._chosen(call))
        if not at.shape[1]:
            return None
        B, H, n, m = call.map.shape
        # Places beyond the last row take what belongs to none.
        made = torch.nn.functional.pad(out, (0, 0, 0, 1))
        for block in blocks(at.shape[1], B * H * m):
            own, known = at[:, block], there[:, block]
            new, present = self._rows(call, own)
            kept = picked(out, own)
            values = call.map.att.expanded_values().to(new.dtype)
            edited = torch.matmul(new, values)
            edited = self._mixed(call, kept, edited) if self._mixes else edited.to(out.dtype)
            edited = torch.where(present[..., None], edited, kept)
            target = torch.where(known, own, n)[:, None, :, None].expand_as(edited)
            made = made.scatter(2, target, edited)
        return made[:, :, :n]

    def _chosen(self, call: AttnCall) -> Tensor:
        """bool [B, n]."""
        return chosen_rows(call, self.rows, self.tokenizer).expand(call.shape[0], -1)

    def _of_one_key(self, call: AttnCall, out: Tensor) -> Tensor:
        """The outputs of rows that look at one token alone: its values, without a map."""
        at, sees = call.once_masked("one key", lambda: self._looks(call))
        return torch.where(sees, self._mixed(call, out, call.map.values_at(at)), out)

    def _looks(self, call: AttnCall) -> tuple[Tensor, Tensor]:
        """(the place of the key that each row looks at, int [B, n]; which rows look at one, bool [B, 1 or H, n, 1])."""
        B, _, _, m = call.shape
        number = target_token(*checked_pattern(self.source), call.rows.index).expand(B, -1)
        track = call.keys
        if track.begins is not None:
            at = number - track.begins
            there = (at >= 0) & (at < m) & (number >= 0)
        else:
            # Numbers never fall along the slots, so that those of the keys are at most m - 1 above the first.
            low = track.index[:, :1]
            own = torch.where(track.valid & (track.index >= 0), track.index - low, m).expand(B, -1)
            place = torch.full((B, m + 1), -1, device=own.device)
            place.scatter_(1, own, torch.where(own < m, torch.arange(m, device=own.device), -1))
            wanted = number - low
            at = place.gather(1, torch.where((number >= 0) & (wanted >= 0) & (wanted < m), wanted, m))
            there = at >= 0
        at = torch.where(there, at, 0)
        return at, ((there & self._chosen(call))[:, None] & sees_key(call, at))[..., None]

    def _mixed(self, call: AttnCall, out: Tensor, new: Tensor) -> Tensor:
        """(1 - s) out + s new; a row in which both are the same keeps it, bit for bit."""
        if is_all(self.strength, 1.0):
            return new.to(out.dtype)
        s = call.each(self.strength)
        s = s[..., None] if isinstance(s, Tensor) else s
        return torch.lerp(out.to(call.map.stat_dtype), new.to(call.map.stat_dtype), s).to(out.dtype)

    def _of_keys(self, call: AttnCall, out: Tensor) -> Tensor | None:
        """The outputs of rows that spread evenly over the keys of a pattern: means of values, without scores."""
        B, _, n, m = call.shape
        if n <= FEW_ROWS:
            every = torch.arange(n, device=out.device).expand(B, -1)
            share, some = call.once_masked("keys", lambda: self._spread(call, every, self._chosen(call)))
            return torch.where(some, self._mixed(call, out, self._means(share, *self._values(call, False), 0)), out)
        found = call.once_masked("groups", lambda: self._groups(call))
        if found is not None:
            return self._of_groups(call, out, *found)
        at, there = call.once("places", lambda: places(self._chosen(call)))
        if not at.shape[1]:
            return None
        values, entry = self._values(call, True)
        # Places beyond the last row take what belongs to none.
        values, made = values.to(call.map.stat_dtype), torch.nn.functional.pad(out, (0, 0, 0, 1))
        for block in blocks(at.shape[1], B * m):
            own, known = at[:, block], there[:, block]
            share, some = self._spread(call, own, known)
            kept = picked(out, own)
            edited = torch.where(some, self._mixed(call, kept, self._means(share, values, entry, out.shape[3])), kept)
            target = torch.where(known, own, n)[:, None, :, None].expand_as(edited)
            made = made.scatter(2, target, edited)
        return made[:, :, :n]

    def _groups(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | None:
        """(an order of the keys in which those that a row looks at stand together, int [B or 1, m]; from where, up to where, of
        each row, [B or 1, n]); None: they do not, or what a row sees is not said by its place alone."""
        (att, _), rows, keys = call.map.ungathered, call.rows, call.keys
        in_a_row = rows.begins == keys.begins == 0 and not call.packed and not torch.compiler.is_compiling()
        if not in_a_row or att.mask is not None or att.key_bias is not None or att.v.device.type == "mps":
            return None
        groups = grouped(call, *checked_pattern(self.source), self.sentence_ends)
        if groups is None:
            return None
        (of_keys, of_rows), m, device = groups, keys.size, att.v.device
        place = torch.arange(m, device=device)
        # No two are the same, and those of a group are in the order of their places.
        ordered, order = (of_keys * m + place).sort(dim=1)
        last = torch.arange(rows.size, device=device).clamp_max(m - 1) if att.causal else m - 1
        start = torch.searchsorted(ordered, of_rows * m)
        stop = torch.searchsorted(ordered, of_rows * m + last, right=True)
        return order, start, stop

    def _of_groups(self, call: AttnCall, out: Tensor, order: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Means of values from their running sums in an order in which the keys of a row stand together; nothing is [n, m]."""
        att, heads = call.map.ungathered
        read = [head // att.groups for head in (range(att.q.shape[1]) if heads is None else heads)]
        B, n, own = len(out), out.shape[2], checked_pattern(self.source)[0] == "other_same_token"
        made: dict[int, Tensor] = {}
        at = lambda t, i: t.gather(1, i.expand(B, -1)[..., None].expand(-1, -1, t.shape[2]))  # noqa: E731
        for kv in sorted(set(read)):
            V = att.v[:, kv].double()
            sums = torch.nn.functional.pad(at(V, order), (0, 0, 1, 0)).cumsum(dim=1)
            made[kv] = at(sums, stop) - at(sums, start)
            if own:
                made[kv] = made[kv] - V[:, :n]
        count = stop - start - int(own)
        some = (count > 0).expand(B, -1) & self._chosen(call)
        new = torch.stack([made[kv] for kv in read], dim=1) / count.clamp_min(1)[:, None, :, None]
        return torch.where(some[:, None, :, None], self._mixed(call, out, new), out)

    def _spread(self, call: AttnCall, at: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(even weights on the keys of the pattern that rows `at` [B, r] see, [B, 1 or H, r, m]; which have some, [.., r, 1])."""
        kind, amount = checked_pattern(self.source)
        found = pattern_rows(call, kind, amount, at, self.spans, self.tokenizer, self.sentence_ends)
        found = found[:, None] & seen_rows(call, at)
        count = found.sum(dim=-1, keepdim=True)
        return found.to(call.map.stat_dtype) / count.clamp_min(1), (count > 0) & chosen[:, None, :, None]

    @staticmethod
    def _values(call: AttnCall, many: bool) -> tuple[Tensor, Tensor]:
        """(V of key heads, which of them each head reads); `many`: those alone that are read, the heads as so many columns."""
        att, heads = call.map.ungathered
        heads, groups, device = range(att.q.shape[1]) if heads is None else heads, att.groups, att.v.device
        if not many:
            return att.v, kernels.key_heads(heads, groups, device)
        read = sorted({head // groups for head in heads})
        values = att.v.index_select(1, kernels.key_heads(read, 1, device))
        return values.transpose(1, 2).flatten(2), kernels.key_heads([read.index(h // groups) for h in heads], 1, device)

    @staticmethod
    def _means(share: Tensor, values: Tensor, entry: Tensor, width: int) -> Tensor:
        """share V, [B, H, r, dv]."""
        if values.ndim == 4:
            values = values if share.shape[1] == 1 else values[:, entry]
            made = torch.matmul(share, values.to(share.dtype))
            return made if share.shape[1] > 1 else made[:, entry]
        if share.shape[1] == 1:
            return torch.matmul(share[:, 0], values).unflatten(-1, (-1, width)).transpose(1, 2)[:, entry]
        return torch.matmul(share, values.unflatten(-1, (-1, width)).transpose(1, 2)[:, entry])

    def _rows(self, call: AttnCall, at: Tensor) -> tuple[Tensor, Tensor]:
        """(the edited rows [B, H, r, m], which of them are other than the model's, bool [B, H, r])."""
        A = map_rows(call, at)
        P, present = self._given(call, at, A)
        inside = self._key_set(call)
        if inside is not None:
            new, full = self._inside(A, P, inside[:, :, None])
            present = present & full
        elif self.mode == "mask":
            kept = A * (P > 0)
            total = kept.sum(dim=-1, keepdim=True)
            present = present & (total[..., 0] > 0)
            new = (
                kept
                if self.sums == "keep"
                else kept * (A.sum(dim=-1, keepdim=True) / total.masked_fill(total <= 0, 1.0))
            )
        else:
            new = P
        present = present & (new != A).any(dim=-1)
        if not self._mixes and not is_all(self.strength, 1.0):
            s = call.each(self.strength)
            s = s[..., None] if isinstance(s, Tensor) else s
            new = (1.0 - s) * A + s * new
        return new, present

    def _given(self, call: AttnCall, at: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """(P [B, 1 or H, r, m], which rows have one, bool [B, 1 or H, r])."""
        seen = seen_rows(call, at)
        if isinstance(self.source, str):
            kind, amount = checked_pattern(self.source)
            found = pattern_rows(call, kind, amount, at, self.spans, self.tokenizer, self.sentence_ends)
            found = found[:, None] & seen
            count = found.sum(dim=-1, keepdim=True)
            return found.to(A.dtype) / count.clamp_min(1), count[..., 0] > 0
        number = call.rows.index.expand(len(at), -1).gather(1, at)
        keys = torch.where(call.keys.valid, call.keys.index, -1)
        if isinstance(self.source, _OfKeys):
            return self.source.rows(call, self._key_set(call), A), torch.ones_like(number, dtype=torch.bool)[:, None]
        table = self._tables.of(call, self.source, "map", self.head_map)
        if self.rows is None:
            check_length(call, table, "InjectMap")
        rows, there = table.at(call, number)
        P, there = by_token(rows, keys).to(A.dtype), there[:, None]
        if self.mode in ("scores", "add"):
            return self._of_scores(call, P, seen, A), there
        self._check(call, P, seen, there, A)
        if self.sums == "renormalise" and self.keys is None and self.mode == "replace":
            total = P.sum(dim=-1, keepdim=True)
            new = P * (A.sum(dim=-1, keepdim=True) / total.masked_fill(total <= 0, 1.0))
            P = torch.where((P == A).all(dim=-1, keepdim=True), P, new)
        return P, there

    def _of_scores(self, call: AttnCall, S: Tensor, seen: Tensor, A: Tensor) -> Tensor:
        if call.map.att.sinks is not None:
            raise SelectionError(
                f"InjectMap at {call.site.path}: scores beside a learned sink are not defined here; give a map."
            )
        z = S + A.clamp_min(torch.finfo(A.dtype).tiny).log() if self.mode == "add" else S
        blind = ~seen.any(dim=-1, keepdim=True)
        z = z.masked_fill(~seen, -torch.inf).masked_fill(blind, 0.0)
        return torch.softmax(z, dim=-1).masked_fill(blind, 0.0)

    def _check(self, call: AttnCall, P: Tensor, seen: Tensor, there: Tensor, A: Tensor) -> None:
        place = f"InjectMap at {call.site.path}"
        if bool((P < 0).any()) or not bool(P.isfinite().all()):
            raise SelectionError(
                f"{place}: the source has weights that are negative or not finite (least {float(P.min()):.4g})."
            )
        if self.mode == "mask":
            return
        hidden = (P * ~seen).sum(dim=-1) * there
        if bool((hidden > TOLERANCE).any()):
            raise SelectionError(
                f"{place}: a row of the source gives {float(hidden.max()):.4g} to keys that it does not see (later "
                "tokens, padding, or outside of a window). Set these to zero."
            )
        if self.sums != "refuse" or self.keys is not None:
            return
        wrong = (P.sum(dim=-1) - A.sum(dim=-1)).abs() * there
        if bool((wrong > TOLERANCE).any()):
            worst = float(P.sum(dim=-1).expand_as(wrong).flatten()[int(wrong.argmax())])
            raise SelectionError(
                f"{place}: a row of the source sums to {worst:.4g}; give rows that sum to one, or "
                "sums='renormalise' or 'keep'."
            )

    def _key_set(self, call: AttnCall) -> Tensor | None:
        if self.keys is None:
            return None
        if self.keys == "first":
            return call.first_key()
        if self.keys == "image":
            return call.image_keys()
        if self.keys == "prompt":
            return call.prompt_keys()
        if self.keys == "generated":
            return (call.keys.generated & call.keys.valid)[:, None]
        return span_keys(call, self.keys, self.tokenizer)

    def _inside(self, A: Tensor, P: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """(A with P's distribution inside a set of keys, rows in which both have something there)."""
        P = P * inside
        total, mass, whole_row = P.sum(dim=-1), (A * inside).sum(dim=-1), A.sum(dim=-1)
        full = (total > 0) & (mass > 0)
        target = P / total.masked_fill(total <= 0, 1.0)[..., None]
        share = mass if self.share is None else self.share * whole_row
        rest = whole_row - mass
        scale = torch.ones_like(mass) if self.share is None else (whole_row - share) / rest.masked_fill(rest <= 0, 1.0)
        return torch.where(inside, share[..., None] * target, A * scale[..., None]), full

    def _kernel(self, call: AttnCall, out: Tensor, chosen: Tensor) -> Tensor | None:
        """The rows of the map that the source's q and k make, over the values of this call."""
        found = kernel_of(call, self._tables, self.source, self.head_map)
        if found is None:
            return None
        att, present = found
        new = kernels.attend(att)
        s = call.each(self.strength, out)
        s = s[..., None] if isinstance(s, Tensor) else s
        new = new if is_all(self.strength, 1.0) else (1.0 - s) * out + s * new
        return torch.where((present & chosen)[:, None, :, None], new.to(out.dtype), out)


def kernel_of(
    call: AttnCall, tables: Tables, source: Captured, head_map: Any = None
) -> tuple[kernels.Attention, Tensor] | None:
    """(this call with the q and k of a source where it has them, which rows it has, bool [B, n]); None: it has none of them.

    Raises:
        SelectionError: a row of the source sees a token of which the source has no key.
    """
    B, att = call.shape[0], call.map.att
    q_of, k_of = (tables.of(call, source, what, head_map) for what in ("q", "k"))
    check_length(call, q_of, "The source")
    rows, present = q_of.of(call, call.rows)
    if rows is None:
        return None
    if present is not None and not bool(present.any()):
        return None
    keys, known = k_of.of(call, call.keys)
    check_keys(call, present, known, keys is None)
    present = torch.ones(B, call.rows.size, dtype=torch.bool, device=rows.device) if present is None else present
    if q_of.scale is not None and (rows.shape[3] != keys.shape[3]):
        raise SelectionError(
            f"{call.site.path}: q and k of the source have widths {rows.shape[3]} and {keys.shape[3]}."
        )
    if rows.shape[3] == att.q.shape[3]:
        rows = torch.where(present[:, None, :, None], rows.to(att.q.dtype), att.q)
    return (
        att.replace(
            q=rows.to(att.q.dtype),
            k=keys.to(att.q.dtype),
            v=att.expanded_values(),
            scale=q_of.scale,
            softcap=q_of.softcap,
        ),
        present,
    )


@dataclass(frozen=True)
class _OfKeys:
    """A distribution over the keys of a set, in their order; the same for all rows."""

    target: Tensor

    def rows(self, call: AttnCall, inside: Tensor, A: Tensor) -> Tensor:
        """[B, 1, 1, m]."""
        count = inside.sum(dim=-1)
        if bool((count != len(self.target)).any()):
            held = sorted(set(count.flatten().tolist()))
            raise SelectionError(
                f"InjectMap at {call.site.path}: the drawing has {len(self.target)} cells, and the keys are {held} "
                "tokens; give grid=(height, width) of the image in tokens, and prompts with one image."
            )
        number = inside.long().cumsum(dim=-1) - 1
        target = self.target.to(A.device, A.dtype)
        return (target[number.clamp_min(0)] * inside)[:, :, None]
