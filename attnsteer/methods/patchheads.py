"""PatchHeads: head outputs, or q, k or v, of another prompt or model in the place of the run's own; or their low-rank part.

Activation patching as in Lieberum et al., "Does Circuit Analysis Interpretability Scale?" (2023, arXiv 2307.09458), by heads and
rows. Its text was not readable: what a low-rank replacement is there (three dimensions for four labels) is from the authors'
summary, and the two subspaces of `subspace` are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..account import Track
from ..call import AttnCall
from ..captured import OF_PROMPTS, Captured, checked_rows, chosen_rows, in_order, needs_tokens, no_rows
from ..errors import SelectionError, brief, listing
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import choice, is_all, number, parsed, whole
from ..registry import register_method
from ..tokens import Tokens
from ._sources import Tables, check_length, checked_source, of_prompts
from .injectmap import head_pairs

Basis = dict[tuple[int, int], tuple[Tensor, Tensor]]


def _captured(value: Any) -> Captured:
    found = checked_source(value)
    if not isinstance(found, Captured):
        raise SelectionError("give a Captured, or the folder of one.")
    return found


def _basis(value: Any) -> Basis:
    if not isinstance(value, Mapping) or not value:
        raise SelectionError("give {(layer, head): (mean [d], basis [d, r])}, e.g. of subspace(...).")
    for pair, item in value.items():
        mean, basis = item
        if basis.ndim != 2 or mean.shape != basis.shape[:1]:
            raise SelectionError(
                f"{pair}: mean {list(mean.shape)} and basis {list(basis.shape)}; expected [d] and [d, r]."
            )
        if not torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-4):
            raise SelectionError(f"{pair}: the columns of the basis are not orthonormal.")
    return {(int(layer), int(head)): item for (layer, head), item in value.items()}


@register_method
@dataclass(frozen=True)
class PatchHeads(Intervention):
    """x_i <- (1 - s) x_i + s x_i^donor for rows of head outputs, q, k or v; with a basis, its part in a subspace alone.

    Args:
        source: the donor, a `Captured` with `what`, or its folder; None: nothing is put in, and `basis` alone acts.
        heads: the heads to patch; None: all that `where` selects. Of k and v those are query heads: the others that share a key
            head keep it.
        what: "output" (before the output projection), "q", "k" or "v".
        rows: the rows to patch (see `capture`), in order those that were captured: as many of each sample as the donor has. None:
            by token number, of prompts of one length where the donor has all rows.
        strength: s, 0 to 1; 0 changes nothing.
        basis: (layer, head) -> (mean mu [d], orthonormal columns V [d, r]). With P = V V^T: without a source x <- mu + P (x - mu),
            what lies outside held at its mean; with one x <- x + P (x^donor - x).
        head_map: (layer, head) -> (layer, head) of a donor that is another model.
        tokenizer: for rows that are strings; not saved.

    q and k are those behind the rotary embedding: patch rows at the positions that they were captured at. Several patches in one
    run act together. Rows of generated tokens are patched where the donor has them; patched keys and values are those of the rows,
    seen by all later tokens, the cache itself being left as it is.

    Raises (in a call):
        SelectionError: the donor has other heads, widths or numbers of rows.
    """

    source: Any = parsed(_captured, "a Captured, or its folder", None)
    heads: HeadSet | None = head_set()
    what: str = choice("output", ("output", "q", "k", "v"))
    rows: Any = parsed(checked_rows, "rows", None, kw_only=True)
    strength: float = number(1.0, low=0, high=1, per_sample=True, kw_only=True)
    basis: Any = parsed(_basis, "{(layer, head): (mean, basis)}", None, kw_only=True)
    head_map: Any = parsed(head_pairs, "{(layer, head): (layer, head)}", None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, repr=False, compare=False, metadata={"save": False})
    _tables: Tables = field(default_factory=Tables, init=False, repr=False, compare=False, metadata={"save": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is None and self.basis is None:
            raise SelectionError("PatchHeads needs a source, a basis, or both.")
        if self.source is not None and self.what not in self.source.what:
            raise SelectionError(f"PatchHeads(what={self.what!r}): the source has {self.source.what}.")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the rows are read from; denoisers have a donor of each step."""
        steps = self.source is not None and any(t.step is not None for t in self.source.takes)
        return (*(("steps",) if steps else ()), *(("tokens",) if needs_tokens(self.rows) else ()))

    @property
    def steady(self) -> bool:  # type: ignore[override]
        """Rows behind the donor's stay: its prompts are as long as those that it is put into, where the method saw these."""
        if self.what != "output" or self.where.phases is not None:
            return False
        return self.rows in OF_PROMPTS or (self.rows is None and self.source is not None and of_prompts(self.source))

    def doors(self) -> set[str]:
        """That of what is patched."""
        return {"output"} if self.what == "output" else {"inputs"}

    def check_tokens(self, tokens: Tokens) -> None:
        if needs_tokens(self.rows) and isinstance(self.rows, list):
            tokens.spans(self.rows, self.tokenizer)

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | None:
        if is_all(self.strength, 0.0):
            return None
        q, k, v = call.q, call.k, call.v
        own = {"q": q, "k": k, "v": v}[self.what]
        if self.what != "q" and own.shape[1] != len(call.heads):
            own = own.repeat_interleave(len(call.heads) // own.shape[1], dim=1)
        new = self._patched(call, own, of_keys=self.what != "q")
        if new is None or torch.equal(new, own):
            # Put in place, the same numbers would be those of another kernel where the model's own is none of ours.
            return None
        if self.what == "q":
            return new, k, v
        if k.shape[1] != new.shape[1]:
            # All heads of the site are patched: those that share a key head must agree in it.
            new = new[:, :: new.shape[1] // k.shape[1]]
        return (q, new, v) if self.what == "k" else (q, k, new)

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        if is_all(self.strength, 0.0) or no_rows(call, self.rows):
            return None
        return self._patched(call, out, of_keys=False)

    def _patched(self, call: AttnCall, own: Tensor, of_keys: bool) -> Tensor | None:
        """`own` [B, H, n or m, d] with the donor's rows in it; None: it has none of them."""
        track = call.keys if of_keys else call.rows
        # Rows with a new value; None: all of them.
        there: Tensor | None = None
        donor = own
        if self.rows is not None:
            choose = lambda: self._keys(call) if of_keys else chosen_rows(call, self.rows, self.tokenizer)  # noqa: E731
            there = call.once("rows", choose).expand(len(own), -1)
        elif self.source is None:
            there = track.valid & (track.index >= 0)
        if self.source is not None:
            table = self._tables.of(call, self.source, self.what, self.head_map)
            if table.rows.shape[-1] != own.shape[-1]:
                raise SelectionError(
                    f"PatchHeads at {call.site.path}: the donor's {self.what} have width {table.rows.shape[-1]}, those here "
                    f"{own.shape[-1]}."
                )
            if self.rows is None:
                check_length(call, table, "PatchHeads")
                donor, there = table.of(call, track)
                if donor is None:
                    return None
            else:
                donor = self._in_order(call, table, track, there)
        donor = donor.to(own.dtype)
        new = self._in_subspace(call, own, donor) if self.basis is not None else donor
        if not is_all(self.strength, 1.0):
            s = call.each(self.strength, own)
            s = s[..., None] if isinstance(s, Tensor) else s
            new = (1.0 - s) * own + s * new
        new = new.to(own.dtype)
        return new.clone() if there is None else torch.where(there[:, None, :, None], new, own)

    def _keys(self, call: AttnCall) -> Tensor:
        """bool [B, m]: the rows of this choice as keys: those of this call, and of earlier ones by their numbers."""
        if not isinstance(self.rows, (tuple, list)):
            raise SelectionError(
                f"PatchHeads(what={self.what!r}, rows={self.rows!r}): keys stay behind their call, so give them by number: "
                "(start, stop), a list of tokens, or ranges for each sample."
            )
        keys = call.replace(make_rows=call.make_keys)
        return chosen_rows(keys, self.rows, self.tokenizer).expand(call.map.shape[0], -1)

    def _in_order(self, call: AttnCall, table: Any, track: Track, there: Tensor) -> Tensor:
        """The donor's rows at the chosen places, the first at the first."""
        of = table.of_rows(call)
        held = (table.place >= 0).sum(dim=1)[of]
        order, count = in_order(call, self.rows, track, there, self.tokenizer)
        numbered = not isinstance(self.rows, str) or self.rows == "prompt"
        more = numbered and call.gives("tokens") and call.tokens.more_to_come
        wrong = ((count > held) if more else (count != held)) & there.any(dim=1)
        if bool(wrong.any()):
            b = int(wrong.long().argmax())
            raise SelectionError(
                f"PatchHeads at {call.site.path}: {int(count[b])} rows of sample {b} are chosen, and the donor has {int(held[b])}; "
                "capture as many (the same rows=...)."
            )
        donor = table.rows[of]
        order = order.clamp(0, max(donor.shape[2] - 1, 0))[:, None, :, None]
        return donor.gather(2, order.expand(-1, donor.shape[1], -1, donor.shape[3]))

    def _in_subspace(self, call: AttnCall, own: Tensor, donor: Tensor) -> Tensor:
        layer = call.site.layer
        missing = [h for h in call.heads if (layer, h) not in self.basis]
        if missing:
            raise SelectionError(
                f"PatchHeads at {call.site.path}: no basis for heads {missing} of layer {layer}; there are "
                f"{listing(self.basis, 6)}."
            )
        parts = []
        for i, head in enumerate(call.heads):
            mean, basis = (t.to(own.device, own.dtype) for t in self.basis[layer, head])
            if len(mean) != own.shape[-1]:
                raise SelectionError(
                    f"PatchHeads at {call.site.path}: the basis of head {head} is of width {len(mean)}, {self.what} of "
                    f"{own.shape[-1]}."
                )
            x = own[:, i]
            if self.source is None:
                parts.append(mean + (x - mean) @ basis @ basis.T)
            else:
                parts.append(x + (donor[:, i] - x) @ basis @ basis.T)
        return torch.stack(parts, dim=1)


def subspace(
    captured: Captured, rank: int | None = None, labels: Sequence[Any] | None = None, what: str | None = None
) -> Basis:
    """(mean, basis) of each captured head: of all its rows, or between the means of labelled samples.

    Args:
        captured: head outputs, q, k or v of prompts, all rows alike. rank: r; with labels at most their number less one, and that
            by default. labels: one of each sample: the subspace is that of the centred means of each label's rows.
        what: what was captured, where there is more than one.

    Raises:
        SelectionError: too few rows or labels.
    """
    if not isinstance(captured, Captured) or (rank is not None and whole(rank) is None):
        raise SelectionError(f"subspace({brief(captured)}, rank={brief(rank)}): give a capture and a whole number.")
    found: Basis = {}
    for path in captured.sites:
        take = captured.of(path)[0]
        name = captured._one(what)
        heads = take.kv_heads if name in ("k", "v") else take.heads
        rows = [captured.get(path, name, sample=b).double() for b in range(len(take.rows))]
        if labels is not None and len(labels) != len(rows):
            raise SelectionError(f"subspace: {len(labels)} labels for {len(rows)} samples.")
        for i, head in enumerate(heads):
            every = torch.cat([r[i] for r in rows])
            mean = every.mean(dim=0)
            if labels is None:
                points, most = every - mean, min(every.shape)
            else:
                kinds = list(dict.fromkeys(labels))
                means = [
                    torch.cat([r[i] for r, own in zip(rows, labels, strict=True) if own == k]).mean(dim=0)
                    for k in kinds
                ]
                points = torch.stack(means) - torch.stack(means).mean(dim=0)
                most = len(kinds) - 1
            size = most if rank is None else rank
            if not 0 < size <= most:
                raise SelectionError(f"subspace(rank={brief(rank)}): {most} dimensions can be found at {path}.")
            basis = torch.linalg.svd(points, full_matrices=False).Vh[:size].T
            for query in range(head * take.groups, (head + 1) * take.groups) if name in ("k", "v") else (head,):
                found[take.layer, query] = (mean.float(), basis.float())
    return found
