"""The lazy attention map: masses, partial outputs, columns, rows of softmax(QK^T), and of what reweightings made of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .audit import mark_of, unchanged
from .edits import Reweight, Share
from .kernels import Attention

# Up to this many query rows (decoding), the rows themselves are cheaper than any identity.
FEW_ROWS = 4
# Beyond so many keys a second pass over a cache costs more than the operators around it.
SHORT_CACHE = 1024
# Up to so many scores in all a map is held once its columns were asked for: looking a second time would cost more.
SHORT_CALL = 1 << 22


class AttentionMap:
    """A lazy view of A = softmax(QK^T): ask for masses, partial outputs, columns, rows; nothing else is built.

    Every answer is exact (fp32 statistics), comes from the kernel's row log-sum-exp, and is cached for
    the duration of the call.
    """

    def __init__(
        self,
        att: Attention | Callable[[], Attention],
        base: Callable[[], Tensor] | None = None,
        fused: Callable[[], tuple[Tensor, Tensor] | None] | None = None,
        whole: Attention | None = None,
        heads: int | None = None,
        local: tuple[int, ...] | None = None,
        part: Callable[[slice], Tensor | None] | None = None,
    ):
        """`base` computes the output with the model's own kernel; `fused` gives that output and its lse, or
        None where that kernel has none to give; `part` that output of the query heads of some key heads, bit for bit, or None.

        `att` may be a function that builds it, from `heads` of the heads of `whole`, those of the numbers `local` (None: all): then
        edits that need no gathered q, k, v do without.
        """
        self._att = att
        self._whole, self._heads, self._local = whole, heads, local
        self._base = base
        self._fuse, self._part = fused, part
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._dense: Tensor | None = None
        self._sink: Tensor | None = None
        self._blocks: kernels.RowBlocks | None = None
        self._groups: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
        # Answers that are kept, each with what tells whether it was changed since.
        self._kept: list[tuple[Tensor, Any]] = []
        self._watched = False
        # The map that a reweighting made this one of.
        self.before: AttentionMap | None = None
        # The computation without the reweightings that are among the scores of `att`; None: there are none.
        self.unweighted_att: Attention | None = None

    @property
    def att(self) -> Attention:
        """The computation whose map this is."""
        if not isinstance(self._att, Attention):
            self._att = self._att()
        return self._att

    @property
    def gathered(self) -> bool:
        """Whether `att` is there already."""
        return isinstance(self._att, Attention)

    @property
    def ungathered(self) -> tuple[Attention, tuple[int, ...] | None]:
        """(a computation that holds this one, the numbers of this one's heads in it or None: all); nothing is gathered for it."""
        return (self.att, None) if self.gathered or self._whole is None else (self._whole, self._local)

    def values_at(self, at: Tensor) -> Tensor:
        """V of the keys `at` int [B, r] for each head, [B, H, r, dv]; no other key's is read."""
        att, heads = self.ungathered
        kv = kernels.key_heads(range(att.q.shape[1]) if heads is None else heads, att.groups, at.device)
        return att.v[torch.arange(len(at), device=at.device)[:, None, None], kv[:, None], at[:, None]]

    def _keep(self, answer: Tensor) -> Tensor:
        """An answer that will be given again."""
        if not torch.compiler.is_compiling():
            self._kept.append((answer, mark_of(answer, self._watched)))
        return answer

    def touched(self) -> bool:
        """Whether an answer of this map, or of one below it, was changed in place."""
        own = any(not unchanged(answer, marked) for answer, marked in self._kept)
        return own or (self.before is not None and self.before.touched())

    def watch(self, on: bool) -> None:
        """Whether copies of the answers are kept from now on, to compare with: what counts no version is noticed then too."""
        self._watched = on
        self._kept = [(t, mark_of(t, on)) for t, _ in self._kept]
        if self.before is not None:
            self.before.watch(on)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, n, m)."""
        if isinstance(self._att, Attention) or self._heads is None:
            return self.att.shape
        B, _, n, m = self._whole.shape
        return B, self._heads, n, m

    @property
    def stat_dtype(self) -> torch.dtype:
        """The dtype of statistics."""
        return (self.att if self._whole is None else self._whole).stat_dtype

    @property
    def device(self) -> torch.device:
        """Where the map is computed."""
        return (self.att if self._whole is None else self._whole).q.device

    @property
    def few(self) -> bool:
        """Whether the rows are so few that the map itself is the cheapest exact form."""
        return self._dense is not None or self._blocks is not None or self.att.shape[2] <= FEW_ROWS

    @property
    def path(self) -> str:
        """How edits of this map are computed: "rows" or "dense" from the map itself, "fused" from identities."""
        if self.att.shape[2] <= FEW_ROWS or self._blocks is not None:
            return "rows"
        return "dense" if self._dense is not None else "fused"

    @property
    def out(self) -> Tensor:
        """The attention output [B, H, n, dv] of the model's own kernel, in the model's dtype."""
        if self._out is None:
            self._out = self._keep(kernels.attend(self.att) if self._base is None else self._base())
        return self._out

    @property
    def lse(self) -> Tensor:
        """The row log-sum-exp [B, H, n], fp32; minus infinity for rows that see no key."""
        if self._lse is None:
            own = None if self._fuse is None else self._fuse()
            out, lse = kernels.attend_lse(self.att) if own is None else own
            self._lse = self._keep(lse)
            if self._out is None and (own is not None or self._base is None):
                self._out = self._keep(out)
        return self._lse

    def total(self) -> Tensor:
        """Row sums [B, H, n]: 1, less the share of a learned sink, 0 for rows that see no key."""
        return self.dense().sum(dim=-1) if self.few else self.att.visible_total(self.lse)

    def sink_share(self) -> Tensor:
        """What a learned sink takes of each row, [B, H, n]; zero where the model has none."""
        if not self.few:
            return self.att.sink_share(self.lse)
        self.dense()
        return self._sink

    def dense(self) -> Tensor:
        """The whole map [B, H, n, m], fp32, differentiable: the reference, not for the normal path."""
        if self._dense is None:
            if self._blocks is not None:
                A = self._blocks.dense()
                sink = A.new_zeros(()).expand(A.shape[:3]) if self.att.sinks is None else self.att.sink_share(self.lse)
            else:
                A, sink = kernels.dense_with_sink(self.att)
            self._dense, self._sink = self._keep(A), self._keep(sink)
        return self._dense

    def hold(self) -> bool:
        """Keep the map from here on if it is that of a short call; whether it is there."""
        if self._blocks is None and self._dense is None:
            B, H, n, m = self.shape
            if n <= FEW_ROWS or not 0 < B * H * n * m <= SHORT_CALL or torch.is_grad_enabled():
                return False
            self._blocks = kernels.RowBlocks.of(self.att, lambda: self.lse)
        return self._blocks is not None

    def mass(self, keys: Tensor) -> Tensor:
        """sum of A over `keys` (bool [B or 1, H or 1, m]), [B, H, n]."""
        if self.few and (torch.compiler.is_compiling() or _name(keys) not in self._groups):
            # Without the partial output: a decoding step should not read all values for it.
            return (self.dense() * keys[:, :, None]).sum(dim=-1)
        return self.partial(keys)[0]

    def outside(self, keys: Tensor) -> Tensor:
        """sum of A over all keys but `keys`, [B, H, n], exact also where nearly nothing is left."""
        if self.few:
            return self.dense().masked_fill(keys[:, :, None], 0.0).sum(dim=-1)
        return kernels.leftover(self.att, self.lse, keys, self.mass(keys))

    def partial(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(mass [B, H, n], sum_j A_ij v_j over `keys` [B, H, n, dv]), fp32."""
        compiling = torch.compiler.is_compiling()
        # Compiled code has no names for its tensors.
        name = len(self._groups) if compiling else _name(keys)
        found = self._groups.get(name) or self._equal_set(keys)
        if found is None:
            if self.few:
                p = self.dense() * keys[:, :, None]
                pair = p.sum(dim=-1), _apply(p, self.att)
            else:
                pair = kernels.partial(self.att, self.lse, keys)
            # The tensor is kept with its answer, so that its id cannot be reused meanwhile.
            found = self._groups[name] = (keys, *(self._keep(t) for t in pair))
        return found[1], found[2]

    def _equal_set(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The answer for another tensor with the same keys: pieces of several edits often are the same set."""
        if torch.compiler.is_compiling():
            return next((f for f in self._groups.values() if f[0] is keys), None)
        if keys.device.type != "cpu":
            # Comparing would wait for the device.
            return None
        # A set that was changed in place since is not the one that its answer belongs to.
        current = (found for name, found in self._groups.items() if _name(found[0]) == name)
        return next((f for f in current if f[0].shape == keys.shape and torch.equal(f[0], keys)), None)

    def column_mass(self, row_weight: Tensor | None = None) -> Tensor:
        """sum_i w_i A_ij, [B, H, m]; `row_weight` [B or 1, n] is 0 for rows to leave out."""
        if self.hold():
            return self._blocks.column_mass(row_weight)
        if self.few:
            A = self.dense()
            return A.sum(dim=2) if row_weight is None else torch.einsum("bhnm,bn->bhm", A, _full(row_weight, A))
        return kernels.column_mass(self.att, self.lse, row_weight)

    def seen_by(self, row_weight: Tensor) -> Tensor:
        """sum of `row_weight` [B or 1, n] over the rows that may see each key, whatever they give it, [B or 1, H or 1, m]."""
        return kernels.seen_by(self.att, row_weight)

    def keys_seen(self) -> Tensor:
        """How many keys each row may see, int64 [B or 1, H or 1, n]: causality, windows, padding, packing and biases counted."""
        return kernels.keys_seen(self.att)

    def scores(self, index: Tensor | None = None, keys: slice | None = None) -> Tensor:
        """The scores z [B, H, n, m], fp32, differentiable, of which the model's map is the softmax: scaled, soft-capped, with mask
        and the biases of earlier methods, minus infinity where a row does not see a key. Builds the whole of it, or the rows
        `index` [r] and the `keys` (explicit start and stop) alone; reweightings are not in it."""
        att = self.att if self.unweighted_att is None else self.unweighted_att
        att = att if index is None else att.take(index)
        _, _, n, m = att.shape
        return att.scores(slice(0, n), slice(0, m) if keys is None else keys)

    def rows(self, index: Tensor) -> Tensor:
        """The rows `index` [r] of the map, [B, H, r, m]."""
        return self.dense()[:, :, index] if self.few else kernels.rows(self.att, self.lse, index)

    def entropy(self) -> Tensor:
        """Row entropies in nats, -sum_j A_ij log A_ij, [B, H, n]."""
        return torch.special.entr(self.dense()).sum(dim=-1) if self.few else kernels.entropy(self.att, self.lse)

    def reweighted(self, edit: Reweight | Share) -> AttentionMap:
        """The map under `edit`: a view like this one, for the methods that come after."""
        return ReweightedMap(self, edit)

    def reweight(self, edit: Reweight | Share) -> Tensor:
        """The output [B, H, n, dv] under `edit`; rows whose weights are all one are `out` bit for bit."""
        return self.reweighted(edit).out

    def weights_of_share(self, edit: Share) -> Reweight:
        """A share as weights of the keys."""
        keys, m = edit.keys, self.shape[3]
        if keys.shape[-1] < m:
            keys = torch.nn.functional.pad(keys, (0, m - keys.shape[-1]))
        mass = self.mass(keys)
        new = edit.of(mass)
        if edit.scale_sinks:
            dead, one = (mass <= 0) | (mass >= 1), torch.ones_like(mass)
            weight = new * (1.0 - mass) / (mass * (1.0 - new)).masked_fill(dead, 1.0)
            # A share that stays is a weight of one to the bit, with its gradient.
            kept = kernels.held(one, weight) if weight.requires_grad else one
            return Reweight(((keys, torch.where(dead, one, torch.where(new == mass, kept, weight))),), grows=True)
        outside = self.outside(keys)
        # A mass that is subnormal has no reciprocal in the dtype, and counts as the zero that it rounds to.
        stays = (mass <= 0) | (outside <= torch.finfo(mass.dtype).tiny)
        inside = torch.where(stays, 1.0, new / mass.masked_fill(stays, 1.0))
        rest = torch.where(stays, 1.0, 1.0 + (mass - new) / outside.masked_fill(stays, 1.0))
        return Reweight(((keys, inside),), rest, normalise=False)

    def _factor(self, edit: Reweight) -> Tensor | float:
        """Weights that broadcast to [B, H, n, m]; a number where all keys have the same."""
        factor: Tensor | float = (
            edit.rest if isinstance(edit.rest, (int, float)) else self.weight_of(edit.rest)[..., None]
        )
        for keys, weight in edit.groups:
            keys = keys[:, :, None]
            if isinstance(weight, Tensor):
                factor = torch.where(keys, self.weight_of(weight)[..., None], factor)
            elif isinstance(factor, Tensor):
                shape = torch.broadcast_shapes(factor.shape, keys.shape)
                factor = (factor if factor.shape == shape else factor.expand(shape)).masked_fill(keys, weight)
            else:
                full = torch.full(keys.shape, factor, dtype=self.att.stat_dtype, device=keys.device)
                factor = full.masked_fill_(keys, weight)
        return factor

    def _scaled(self, edit: Reweight) -> tuple[Tensor, Tensor]:
        """(the map under `edit`, its rows' norm [B, H, n, 1]), from the map itself."""
        A, factor = self.dense(), self._factor(edit)
        if self._levels(edit):
            # Over the largest weight that a row meets, so that one whose keys all have the same weight keeps them to the last bit.
            if isinstance(factor, Tensor):
                top = ((A > 0) * (factor.detach() if factor.requires_grad else factor)).amax(dim=-1, keepdim=True)
                # A row that meets no weight above zero is kept below; any other scale does.
                factor = factor / top.clamp_min(1e-19)
            else:
                factor = 1.0
        new = A * factor
        if not edit.normalise:
            return new, A.new_ones(()).expand(*A.shape[:3], 1)
        norm = new.sum(dim=-1, keepdim=True)
        norm = norm if self.att.sinks is None else norm + self.sink_share()[..., None]
        # Rows that would keep no weight stay as they are.
        empty = norm <= 0
        if self.before is None and not norm.requires_grad:
            # Against the sum that rounding made of one, so that a row whose keys all keep their weight is the same to the last bit.
            total = A.sum(dim=-1, keepdim=True)
            total = total if self.att.sinks is None else total + self.sink_share()[..., None]
            norm = (norm / total).masked_fill(empty, 1.0)
            return torch.where(empty, A, new / norm), norm
        # So do those whose weights are all one, whatever their sum.
        one, same, norm = torch.ones_like(norm), self.unweighted(edit)[..., None], norm.masked_fill(empty, 1.0)
        stays = empty | same
        if not norm.requires_grad:
            return torch.where(stays, A, new / norm), torch.where(stays, one, norm)
        kept, new = torch.where(empty, A, kernels.held(A, new / norm)), new / norm
        return torch.where(stays, kept, new), torch.where(same, kernels.held(one, norm), norm)

    def _levels(self, edit: Reweight) -> bool:
        """Whether only the ratios of the weights matter, and that of the rest is not simply one."""
        plain = not isinstance(edit.rest, Tensor) and edit.rest == 1
        return edit.normalise and self.before is None and self.att.sinks is None and not plain and 0 not in self.shape

    def unweighted(self, edit: Reweight) -> Tensor:
        """bool [B, H, n]: the rows in which all weights of `edit` are one."""
        same = self.weight_of(edit.rest) == 1.0
        for _, weight in edit.groups:
            same = same & (self.weight_of(weight) == 1.0)
        return same

    def changed(self) -> Tensor:
        """0-d bool: whether the reweighting that made this map moves anything."""
        return self.moved().any()

    def moved(self) -> Tensor:
        """bool [B, H, n] or [B, H, n, ...]: where the reweighting that made this map moves anything."""
        if self.few or self.before.few:
            return self.dense() != self.before.dense()
        return self.out != self.before.out

    def distance(self) -> Tensor:
        """Total-variation distance per row between the map before the reweighting and this one, [B, H, n]."""
        return 0.5 * (self.dense() - self.before.dense()).abs().sum(dim=-1)

    def weight_of(self, weight: Tensor | float) -> Tensor:
        """A weight of an edit as a tensor [B, H, n] in the dtype of statistics."""
        return torch.as_tensor(weight, dtype=self.att.stat_dtype, device=self.att.q.device).expand(self.shape[:3])


class DenseMap(AttentionMap):
    """The map held explicitly: the reference that every other path is tested against."""

    def __init__(self, att: Attention, A: Tensor, sink_share: Tensor, out: Tensor):
        super().__init__(att)
        self._dense, self._sink, self._out = (self._keep(t) for t in (A, sink_share, out))

    @classmethod
    def of(cls, att: Attention, out: Tensor) -> DenseMap:
        """The map of this computation, whose output is `out`."""
        return cls(att, *kernels.dense_with_sink(att), out)

    @property
    def path(self) -> str:
        return "dense"

    @property
    def lse(self) -> Tensor:
        """Not defined: an explicit map may be no softmax of scores any more."""
        raise AttributeError("an explicit map has no log-sum-exp; ask for mass, partial, rows or dense")

    def reweighted(self, edit: Reweight | Share) -> DenseMap:
        edit = self.weights_of_share(edit) if isinstance(edit, Share) else edit
        new, norm = self._scaled(edit)
        changed = (new != self.dense()).any(dim=-1, keepdim=True)
        edited = _apply(new, self.att).to(self.out.dtype)
        out = torch.where(changed, edited, kernels.held(self.out, edited) if edited.requires_grad else self.out)
        made = DenseMap(self.att, new, self.sink_share() / norm[..., 0], out)
        made.before = self
        return made


class ReweightedMap(AttentionMap):
    """A map whose keys were given weights per row: A'_ij = c_{i,g(j)} A_ij, with `before` the map that was edited.

    Every answer is worked out from masses of the map below; a further edit acts on the common refinement of both
    partitions, so that any number of them is one reweighting of the model's own map.
    """

    def __init__(self, before: AttentionMap, edit: Reweight | Share):
        super().__init__(before.att)
        self.before, self._edit = before, edit
        # The model's own map, and the edits since.
        self.root: AttentionMap = before.root if isinstance(before, ReweightedMap) else before
        if self.root is not before:
            # Cells of several edits take many small operators, and gathering them reads back how many keys each has.
            self.root.hold()
        self._cells: list[tuple[Tensor, Tensor]] | None = None
        self._rest: Tensor | None = None
        self._norm: Tensor | None = None
        self._moved: Tensor | None = None
        self._parts: dict[Any, tuple[Tensor, list[Tensor], Tensor]] = {}

    @property
    def edit(self) -> Reweight:
        """What made this map of the one below, as weights."""
        if isinstance(self._edit, Share):
            self._edit = self.before.weights_of_share(self._edit)
        return self._edit

    @property
    def few(self) -> bool:
        return self.root.few

    @property
    def path(self) -> str:
        return self.root.path

    @property
    def out(self) -> Tensor:
        if self._out is None:
            if self._of_share():
                self._from_share()
            else:
                self._out = self._keep(self._from_rows() if self.few else self._merged())
        return self._out

    def _of_share(self) -> bool:
        """Whether this is a share on the model's own map that needs no weights, for which nothing has asked."""
        if self.before is not self.root or not isinstance(self._edit, Share) or torch.is_grad_enabled():
            return False
        if self.root._blocks is not None:
            return self.att.sinks is None or not self._edit.scale_sinks
        return self._edit.scale_sinks and not self.few

    def _from_share(self) -> None:
        keys, m = self._edit.keys, self.shape[3]
        if keys.shape[-1] < m:
            keys = torch.nn.functional.pad(keys, (0, m - keys.shape[-1]))
        if self.root._blocks is None:
            # Before the output: the log-sum-exp that they need comes with it, from one pass.
            parts = self.root.partial(keys)
            out, self._moved = kernels.lift(self.root.out, *parts, self._edit.of)
        else:
            before, after, out = self.root._blocks.share(keys, self._edit.of)
            kept = self.root.out
            self._moved = before != after
            out = torch.where(self._moved[..., None], out.to(kept.dtype), kept)
        self._out = self._keep(out)

    def _merged(self) -> Tensor:
        """One merge of the partial outputs of all cells of the root map."""
        groups, rest, normalise = self.edit.groups, self.edit.rest, self.edit.normalise
        if isinstance(self.before, ReweightedMap):
            (groups, rest), normalise = self.cells(), False
        parts = [(keys, weight, *self.root.partial(keys)) for keys, weight in groups]
        grows = self.edit.grows and self.before is self.root
        return kernels.reweight(self.att, self.root.out, self.root.lse, parts, rest, normalise, grows)

    def _from_rows(self) -> Tensor:
        """From the few rows of the map itself; rows that nothing changed are the model's own."""
        moved = self._moved_rows()
        cpu = moved.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.root._out is None and cpu and self.shape[3] > SHORT_CACHE:
            # Asking which heads moved costs less than a pass over the cache that none of them needs; not so elsewhere.
            found = self._by_heads(moved)
            if found is not None:
                return found
        edited, kept, changed = _apply(self.dense(), self.att), self.root.out, moved[..., None]
        edited = edited.to(kept.dtype)
        return torch.where(changed, edited, kernels.held(kept, edited) if edited.requires_grad else kept)

    def _by_heads(self, moved: Tensor) -> Tensor | None:
        """The output by runs of key heads: their rows of the map where some row moved, the model's own kernel where some row stays.

        None where that kernel is only to be had for all heads and would run in any case.
        """
        att, A = self.att, self.dense()
        by_head = moved.transpose(0, 1).reshape(att.k.shape[1], -1)
        moves, stays = by_head.any(dim=1).tolist(), by_head.logical_not().any(dim=1).tolist()
        if not any(stays):
            return _apply(A, att).to(att.v.dtype)
        if A.requires_grad or self.root._part is None:
            return None
        out = torch.empty((*self.shape[:3], att.v.shape[-1]), dtype=att.v.dtype, device=att.v.device)
        for kv in _runs(stays):
            kept = self.root._part(kv)
            if kept is None:
                return None
            out[:, att.heads(kv)] = kept
        for kv in _runs(moves):
            heads = att.heads(kv)
            edited = _apply(A[:, heads], att, kv).to(out.dtype)
            out[:, heads] = torch.where(moved[:, heads, :, None], edited, out[:, heads])
        return out

    def _moved_rows(self) -> Tensor:
        """bool [B, H, n]: the rows that are not those of the root map."""
        if self._moved is None and self._of_share():
            self._from_share()
        if self._moved is None:
            self._moved = kernels.any_last(self.dense() != self.root.dense())
        return self._moved

    @property
    def lse(self) -> Tensor:
        """With which A'_ij = exp(z_ij + log w_ij - lse): that of the map below plus the log of what it was divided by."""
        if self._lse is None:
            self._lse = self._keep(self.before.lse + self.norm().log())
        return self._lse

    def norm(self) -> Tensor:
        """What this edit divides each row by, [B, H, n]; one where it does not renormalise or changes no weight."""
        if self._norm is None:
            one = torch.ones(self.shape[:3], dtype=self.att.stat_dtype, device=self.att.q.device)
            if not self.edit.normalise:
                self._norm = one
                return one
            norm = self._sum()
            kept = torch.where(norm <= 0, one, kernels.held(one, norm)) if norm.requires_grad else one
            self._norm = torch.where(self.unweighted(self.edit) | (norm <= 0), kept, norm)
            self._stays = norm <= 0
        return self._norm

    def _sum(self) -> Tensor:
        """What the rows of the map below sum to with these weights, a learned sink included, [B, H, n]."""
        rest, groups = self.edit.rest, self.edit.groups
        sink = self.before.sink_share()
        numbers = all(not isinstance(w, Tensor) for w in (rest, *(w for _, w in groups)))
        if self.edit.grows or (numbers and all(w >= rest for _, w in groups)):
            # No group has less weight than the rest, so that the difference loses no digits of the sum.
            rest = self.weight_of(rest)
            total = sink + rest * self.before.total()
            for keys, weight in groups:
                total = total + (self.weight_of(weight) - rest) * self.before.mass(keys)
            return total
        total = sink + self.weight_of(rest) * self.before.outside(self.union())
        for keys, weight in groups:
            total = total + self.weight_of(weight) * self.before.mass(keys)
        return total

    def union(self) -> Tensor:
        """The keys of all groups of this edit, bool [B or 1, H or 1, m]."""
        found = None
        for keys, _ in self.edit.groups:
            found = keys if found is None else found | keys
        return torch.zeros(1, 1, self.shape[3], dtype=torch.bool, device=self.att.q.device) if found is None else found

    def coefficient(self, weight: Tensor | float) -> Tensor:
        """A weight of this edit divided by the row's norm; one in rows that would keep no weight at all."""
        norm, w = self.norm(), self.weight_of(weight)
        if not self.edit.normalise:
            return w
        return torch.where(self._stays, torch.ones_like(w), w / norm)

    def cells(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """([(keys, c)], c of the rest): the edits so far as one reweighting of the root map, not renormalised."""
        if self._cells is None:
            own, own_rest = [(k, self.coefficient(w)) for k, w in self.edit.groups], self.coefficient(self.edit.rest)
            if not isinstance(self.before, ReweightedMap):
                self._cells, self._rest = own, own_rest
                return self._cells, self._rest
            below, rest = self.before.cells()
            union = self.union()
            found = [(cell & ~union, c * own_rest) for cell, c in below]
            for keys, w in own:
                # The pieces that the edit itself asked the masses of, so that they are computed once.
                pieces, left = self.before.split(keys)
                found += [(piece, c * w) for piece, c in pieces]
                found.append((left, rest * w))
            self._cells, self._rest = found, rest * own_rest
        return self._cells, self._rest

    def split(self, keys: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """`keys` cut along the cells: [(keys and cell, c)], and the keys that are in no cell."""
        compiling = torch.compiler.is_compiling()
        name = len(self._parts) if compiling else _name(keys)
        found = self._parts.get(name)
        if compiling:
            found = next((f for f in self._parts.values() if f[0] is keys), None)
        cells, _ = self.cells()
        if found is None:
            left, pieces = keys, []
            for cell, _ in cells:
                pieces.append(keys & cell)
                left = left & ~cell
            # The tensor is kept with its pieces, so that its id cannot be reused meanwhile.
            found = self._parts[name] = (keys, pieces, left)
        return [(piece, c) for piece, (_, c) in zip(found[1], cells, strict=True)], found[2]

    def total(self) -> Tensor:
        if self.few:
            return super().total()
        if self.edit.normalise:
            self.norm()
            below, sink = self.before.total(), self.sink_share()
            return torch.where(self.unweighted(self.edit) | self._stays | (below <= 0), below, 1.0 - sink)
        return self.outside(torch.zeros_like(self.union()))

    def sink_share(self) -> Tensor:
        if self.att.sinks is None:
            return self.before.sink_share()
        return self.coefficient(1.0) * self.before.sink_share()

    def dense(self) -> Tensor:
        if self._dense is None:
            self._dense = self._keep(self.before._scaled(self.edit)[0])
        return self._dense

    def mass(self, keys: Tensor) -> Tensor:
        if self.few:
            return super().mass(keys)
        pieces, left = self.split(keys)
        total = self._rest * self.root.mass(left)
        for piece, c in pieces:
            total = total + c * self.root.mass(piece)
        return total

    def outside(self, keys: Tensor) -> Tensor:
        if self.few:
            return super().outside(keys)
        cells, rest = self.cells()
        union, found = keys, None
        for cell, c in cells:
            union = union | cell
            more = c * self.root.mass(cell & ~keys)
            found = more if found is None else found + more
        # The rest is what neither the cells nor `keys` hold: asked as a complement, since it is nearly all keys.
        left = rest * self.root.outside(union)
        return left if found is None else found + left

    def partial(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        if self.few:
            return super().partial(keys)
        pieces, left = self.split(keys)
        mass, out = self.root.partial(left)
        mass, out = self._rest * mass, self._rest[..., None] * out
        for piece, c in pieces:
            more = self.root.partial(piece)
            mass, out = mass + c * more[0], out + c[..., None] * more[1]
        return mass, out

    def hold(self) -> bool:
        """Only the model's own map is held; this one is worked out from it."""
        self.root.hold()
        return False

    def column_mass(self, row_weight: Tensor | None = None) -> Tensor:
        if not self.hold() and self.few:
            return super().column_mass(row_weight)
        cells, rest = self.cells()
        B, H, n, m = self.shape
        w = torch.ones(1, n, dtype=rest.dtype, device=rest.device) if row_weight is None else row_weight.to(rest.dtype)
        weights = torch.stack([w[:, None] * c for c in (rest, *(c for _, c in cells))], dim=2)
        columns = kernels.column_mass(self.att, self.root.lse, weights)
        found = columns[:, :, 0]
        for i, (keys, _) in enumerate(cells, start=1):
            found = torch.where(keys.expand(B, H, m), columns[:, :, i], found)
        return found

    def rows(self, index: Tensor) -> Tensor:
        if self.few:
            return super().rows(index)
        groups, rest = self.cells()
        A = self.root.rows(index)
        factor = rest[:, :, index, None].expand(A.shape)
        for keys, c in groups:
            factor = torch.where(keys[:, :, None], c[:, :, index, None], factor)
        return A * factor

    def entropy(self) -> Tensor:
        if self.few:
            return super().entropy()
        cells, rest = self.cells()
        return kernels.entropy(self.att, self.root.lse, cells, rest)

    def moved(self) -> Tensor:
        if not isinstance(self.before, ReweightedMap):
            return self._moved_rows() if self.few or self._of_share() else super().moved()
        if self.few:
            return super().moved()
        # Where the other keys have less than rounding, it is the groups that move, or nothing that shows.
        left, moved = self.before.total() - torch.finfo(self.att.stat_dtype).eps, None
        for keys, weight in self.edit.groups:
            mass = self.before.mass(keys)
            here, left = (self.coefficient(weight) != 1.0) & (mass > 0), left - mass
            moved = here if moved is None else moved | here
        rest = (self.coefficient(self.edit.rest) != 1.0) & (left > 0)
        return rest if moved is None else moved | rest

    def distance(self) -> Tensor:
        if self.few:
            return super().distance()
        moved = (self.coefficient(self.edit.rest) - 1.0).abs() * self.before.outside(self.union())
        for keys, weight in self.edit.groups:
            moved = moved + (self.coefficient(weight) - 1.0).abs() * self.before.mass(keys)
        return 0.5 * moved


def _apply(p: Tensor, att: Attention, kv: slice = slice(None)) -> Tensor:
    """p v with grouped values, [B, H, n, dv] in the dtype of p, for the query heads of some key heads."""
    b, h, n, m = p.shape
    folded = p.reshape(b, h // att.groups, att.groups * n, m)
    return torch.matmul(folded, att.v[:, kv].to(p.dtype)).reshape(b, h, n, -1)


def _runs(flags: list[bool]) -> list[slice]:
    """Where `flags` are set, as the longest slices."""
    ends = [i for i, (a, b) in enumerate(itertools.pairwise([False, *flags, False])) if a != b]
    return [slice(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)]


def _name(keys: Tensor) -> tuple[int, int]:
    """Under which what is known of a key set is kept: another one once it is changed in place."""
    return id(keys), 0 if keys.is_inference() else keys._version


def _full(row_weight: Tensor, A: Tensor) -> Tensor:
    return row_weight.to(A.dtype).expand(A.shape[0], A.shape[2])
