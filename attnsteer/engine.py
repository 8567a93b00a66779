"""What happens at one steered site: the active methods, stage by stage, head group by head group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import kernels
from .audit import Mark
from .bound import Bound, Heads
from .call import AttentionMap, AttnCall, DenseMap, KeyBias, Reweight
from .errors import CompositionError, SelectionError, UnsupportedHost
from .kernels import Attention
from .site import Site

if TYPE_CHECKING:
    from .steering import Steering


@dataclass
class CallContext:
    """What a host knows about one attention call; the fields are those of `AttnCall`."""

    phase: str = "prefill"
    step: int | None = None
    steps: int | None = None
    branch_rows: dict[str, Tensor] | None = None
    row_valid: Tensor | None = None
    key_valid: Tensor | None = None
    row_position: Tensor | None = None
    key_position: Tensor | None = None
    segments: dict[str, slice] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    states: dict[Any, dict[str, Any]] = field(default_factory=dict)
    frozen: bool = False
    context: dict[str, Any] = field(default_factory=dict)
    # Filled with (local heads or None, edited map) where the host must also hand out attention weights.
    maps: list[tuple[Heads | None, Tensor]] | None = None


class Whole:
    """The site's own attention, computed once, by the model's kernel or by the same kernel with its lse."""

    def __init__(self, att: Attention, base: Callable[[], Tensor], same_kernel: bool):
        self.att = att
        self._base = base
        self.same_kernel = same_kernel
        self._pair: tuple[Tensor, Tensor] | None = None
        self._out: Tensor | None = None

    def out(self) -> Tensor:
        """[B, H, n, dv]."""
        if self._out is None:
            self._out = self._base()
        return self._out

    def pair(self) -> tuple[Tensor, Tensor]:
        """(out, lse) from one call of the kernel that the model itself would use."""
        if self._pair is None:
            self._pair = kernels.attend_lse(self.att)
            if self._out is None:
                self._out = self._pair[0]
        return self._pair


class SiteRuntime:
    """The interventions bound to one site; called by the host in place of the attention primitive."""

    def __init__(self, run: Steering, site: Site, entries: list[tuple[Bound, Heads | None]]):
        self.run = run
        self.site = site
        self.entries = entries
        self._partitions: dict[tuple[int, ...], list[tuple[Heads | None, list[Bound]]]] = {}
        self._by_methods: dict[tuple[int, ...], list[int]] = {}
        for head in range(site.heads):
            key = tuple(i for i, (_, heads) in enumerate(entries) if heads is None or head in heads)
            self._by_methods.setdefault(key, []).append(head)
        self._check_whole()

    def _check_whole(self) -> None:
        for i, (bound, _) in enumerate(self.entries):
            if bound.method.whole_heads and sum(i in key for key in self._by_methods) > 1:
                others = {j for key in self._by_methods for j in key} - {i}
                names = [type(self.entries[j][0].method).__name__ for j in sorted(others)]
                raise CompositionError(
                    f"{self.site.path}: {type(bound.method).__name__} compares all of its heads with each other, and "
                    f"{', '.join(names)} acts on some of them only. Give both the same heads at this layer, or different layers."
                )

    def active(self, ctx_phase: str | None, step: int | None, steps: int | None) -> tuple[int, ...]:
        """Positions in `entries` of the interventions that act in this call."""
        return tuple(
            i
            for i, (bound, _) in enumerate(self.entries)
            if self.run.is_open(bound) and bound.where.active(ctx_phase, step, steps)
        )

    def __call__(
        self,
        att: Attention,
        base: Callable[[], Tensor],
        ctx: CallContext,
        active: tuple[int, ...],
        same_kernel: bool = False,
    ) -> Tensor:
        """The site's output [B, H, n, dv] with the active interventions applied.

        Args:
            att: the call in the model's terms. base: computes the output with the model's own kernel.
            same_kernel: whether `kernels.attend_lse` would run that very kernel (so it can replace it).
        """
        whole = Whole(att, base, same_kernel)
        offset = self._offset(att.q.shape[1])
        groups = self._partition(active)
        marks = self._seen(active, offset, att.shape)
        result: Tensor | None = None
        for heads, bounds in groups:
            local = _local(heads, offset, att.q.shape[1])
            if local == ():
                continue
            out = self._group(whole, local, bounds, ctx, offset, marks)
            if out is None:
                continue
            if local is None:
                return out
            if result is None:
                result = whole.out().clone()
            result[:, list(local)] = out
        return whole.out() if result is None else result

    def _seen(self, active: tuple[int, ...], offset: int, shape: tuple[int, int, int, int]) -> dict[int, Mark]:
        """Count this call once for each active intervention, however many head groups it falls into."""
        marks = {}
        for bound, heads in (self.entries[i] for i in active):
            record = self.run.audit.record(bound.index, self.site.path)
            local = _local(heads, offset, shape[1])
            record.see(shape[1] if local is None else len(local))
            marks[bound.index] = Mark(record, shape[0] * shape[2])
        return marks

    def _offset(self, local: int) -> int:
        """Global index of this process's first head (tensor parallelism shards heads)."""
        if local == self.site.heads:
            return 0
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and self.site.heads % local == 0:
            return (torch.distributed.get_rank() % (self.site.heads // local)) * local
        raise UnsupportedHost(
            f"{self.site.path} was listed with {self.site.heads} heads but computes {local}; "
            "heads cannot be matched. Steer the model after it is loaded and sharded."
        )

    def _partition(self, active: tuple[int, ...]) -> list[tuple[Heads | None, list[Bound]]]:
        """Heads that share the same methods, so that each group is edited as a whole."""
        found = self._partitions.get(active)
        if found is None:
            # By all methods, also those that do not act now: a group keeps its state under its heads, and must find it
            # again when another phase or step brings other methods in.
            acting = {key: [self.entries[i][0] for i in key if i in active] for key in self._by_methods}
            found = [
                (None if len(heads) == self.site.heads else tuple(heads), acting[key])
                for key, heads in self._by_methods.items()
                if acting[key]
            ]
            self._partitions[active] = found
        return found

    def _group(
        self,
        whole: Whole,
        heads: Heads | None,
        bounds: list[Bound],
        ctx: CallContext,
        offset: int,
        marks: dict[int, Mark],
    ) -> Tensor | None:
        pick = (lambda t: t) if heads is None else (lambda t: t[:, list(heads)])
        if self.run.reference and not self.site.linear:
            sub = whole.att.select(heads)
            view = DenseMap(sub, kernels.dense(sub), pick(whole.out()))
        else:
            fused = (lambda: tuple(pick(t) for t in whole.pair())) if whole.same_kernel else None
            view = AttentionMap(lambda: whole.att.select(heads), base=lambda: pick(whole.out()), fused=fused)
        own = tuple(range(whole.att.q.shape[1])) if heads is None else heads
        stage = _Stage(self, bounds, ctx, tuple(h + offset for h in own), view, whole.att.shape, marks)
        stage.inputs()
        stage.bias()
        stage.weights()
        if ctx.maps is not None and (stage.touched or stage.edited_map is not None):
            ctx.maps.append((heads, stage.map.dense() if stage.edited_map is None else stage.edited_map))
        return stage.output()


class _Stage:
    """The four inside doors of the methods of one head group, in order."""

    def __init__(
        self,
        runtime: SiteRuntime,
        bounds: list[Bound],
        ctx: CallContext,
        heads: Heads,
        view: AttentionMap,
        shape: tuple[int, int, int, int],
        marks: dict[int, Mark],
    ):
        self.runtime, self.bounds, self.ctx, self.heads, self.map = runtime, bounds, ctx, heads, view
        self.out: Tensor | None = None
        self.edited_map: Tensor | None = None
        self.touched = False
        self.shape, self.marks = shape, marks

    def call(self, bound: Bound) -> AttnCall:
        ctx = self.ctx
        return AttnCall(
            site=self.runtime.site,
            heads=self.heads,
            map=self.map,
            phase=ctx.phase,
            step=ctx.step,
            branch=self.runtime.run.branch,
            row_valid=ctx.row_valid,
            key_valid=ctx.key_valid,
            row_position=ctx.row_position,
            key_position=ctx.key_position,
            segments=ctx.segments,
            grid=ctx.grid,
            state=ctx.states.setdefault((bound.index, self.runtime.site.path, self.heads), {}),
            frozen=ctx.frozen,
            context=ctx.context,
            branch_rows=ctx.branch_rows,
        )

    def mark(self, bound: Bound, path: str) -> None:
        self.marks[bound.index].edited(path)

    def chosen(self, bound: Bound) -> Tensor | None:
        """bool [B or 1, 1, n or 1]: the rows and batch rows that `where` selects; None for all."""
        where, mask = bound.where, None
        if where.rows is not None:
            mask = self._row_choice(where.rows, self.shape[2], self.map.att.q.device)[None, None]
        if where.branches is not None:
            rows = self._branch_choice(where.branches)[:, None, None]
            mask = rows if mask is None else mask & rows
        return mask

    def _row_choice(self, rows: Any, n: int, device: torch.device) -> Tensor:
        if rows == "last":
            return torch.arange(n, device=device) == n - 1
        if isinstance(rows, str):
            if rows not in self.ctx.segments:
                known = sorted(self.ctx.segments) or "none"
                raise SelectionError(f"Where(rows={rows!r}): {self.runtime.site.path} has row roles {known}.")
            mask = torch.zeros(n, dtype=torch.bool, device=device)
            mask[self.ctx.segments[rows]] = True
            return mask
        position = self.ctx.row_position
        position = torch.arange(n, device=device) if position is None else position
        return (position >= rows[0]) & (position < rows[1])

    def _branch_choice(self, branches: tuple[str, ...]) -> Tensor:
        known = self.ctx.branch_rows
        if known is None:
            raise SelectionError(
                f"Where(branches={branches}): which rows of the batch are conditional is not known here. Steer the "
                'pipeline rather than its model, or enter run.branches("uncond", "cond") around the calls.'
            )
        found = [known[b] for b in branches if b in known]
        if not found:
            some = next(iter(known.values()))
            return torch.zeros_like(some)
        return torch.stack(found).any(dim=0)

    def inputs(self) -> None:
        for bound in self.bounds:
            if "inputs" not in bound.doors:
                continue
            edited = bound.method.inputs(self.call(bound))
            if edited is None:
                continue
            att, mask = self.map.att, self.chosen(bound)
            q, k, v = edited
            if mask is not None:
                if mask.shape[-1] > 1 and (k is not att.k or v is not att.v):
                    raise CompositionError(
                        f"{type(bound.method).__name__} edits k or v: Where(rows=...) cannot split that."
                    )
                q = torch.where(mask[..., None], q, att.q)
                k, v = (torch.where(mask[:, :, :1, None], new, old) for new, old in ((k, att.k), (v, att.v)))
            self.map = AttentionMap(att.replace(q=q, k=k, v=v))
            self.touched = True
            self.mark(bound, "inputs")

    def bias(self) -> None:
        for bound in self.bounds:
            if "bias" not in bound.doors:
                continue
            term = bound.method.bias(self.call(bound))
            if term is None:
                continue
            att, mask = self.map.att, self.chosen(bound)
            if isinstance(term, KeyBias) and mask is None:
                old = att.key_bias
                self.map = AttentionMap(att.replace(key_bias=term.bias if old is None else old + term.bias))
            else:
                full = term.bias[:, :, None] if isinstance(term, KeyBias) else term
                full = full if mask is None else torch.where(mask[..., None], full, torch.zeros_like(full))
                self.map = AttentionMap(_with_bias(att, full))
            self.touched = True
            self.mark(bound, "bias")

    def weights(self) -> None:
        used = False
        for bound in self.bounds:
            if "weights" not in bound.doors:
                continue
            edit = bound.method.weights(self.call(bound))
            if edit is None:
                continue
            mask = self.chosen(bound)
            if mask is not None:
                edit = _masked(edit, mask, self.map.att.stat_dtype)
            if self.runtime.run.measure:
                valid = self.ctx.row_valid
                moved = self.map.distance(edit)
                keep = torch.ones_like(moved) if valid is None else valid[:, None].expand_as(moved).to(moved.dtype)
                self.marks[bound.index].record.measure(float((moved * keep).sum().detach() / keep.sum().clamp_min(1.0)))
            more = any("weights" in b.doors for b in self.bounds if b.index > bound.index)
            if used or more:
                # Two reweightings have no common closed form; these heads take the explicit map.
                A = self.edited_map = self.map.edited_dense(edit)
                self.out = _values(A, self.map.att).to(self.map.att.v.dtype)
                self.map = DenseMap(self.map.att, A, self.out)
                self.mark(bound, "dense")
            else:
                self.out = self.map.reweight(edit)
                if self.ctx.maps is not None:
                    self.edited_map = self.map.edited_dense(edit)
                self.mark(bound, "rows" if self.map.few else "fused")
            used = True

    def output(self) -> Tensor | None:
        out = self.out
        if out is None and self.touched:
            out = kernels.attend(self.map.att)
        for bound in self.bounds:
            if "output" not in bound.doors:
                continue
            before = self.map.out if out is None else out
            edited = bound.method.output(self.call(bound), before)
            if edited is None:
                continue
            if edited is before:
                # It has read the map and leaves the output as it is.
                self.mark(bound, "read")
                continue
            mask = self.chosen(bound)
            edited = edited.to(before.dtype)
            out = edited if mask is None else torch.where(mask[..., None], edited, before)
            self.mark(bound, "output")
        return out


def _local(heads: Heads | None, offset: int, size: int) -> Heads | None:
    if heads is None:
        return None
    return tuple(h - offset for h in heads if offset <= h < offset + size)


def _values(A: Tensor, att: Attention) -> Tensor:
    b, h, n, m = A.shape
    folded = A.reshape(b, h // att.groups, att.groups * n, m)
    return torch.matmul(folded, att.v.to(A.dtype)).reshape(b, h, n, -1)


def _masked(edit: Reweight, mask: Tensor, dtype: torch.dtype) -> Reweight:
    """Weight one outside the selected rows."""
    keep = lambda w: torch.where(mask, torch.as_tensor(w, dtype=dtype, device=mask.device), 1.0)  # noqa: E731
    return Reweight(tuple((keys, keep(w)) for keys, w in edit.groups), keep(edit.rest), edit.normalise)


def _with_bias(att: Attention, bias: Tensor) -> Attention:
    _, _, n, m = att.shape
    mask = att.additive(att.stat_dtype)
    if att.causal:
        # A mask and the causal flag do not go together in any kernel.
        lower = torch.ones(n, m, dtype=torch.bool, device=bias.device).tril()
        mask = bias.new_zeros((), dtype=att.stat_dtype).masked_fill(~lower, -torch.inf)[None, None]
    total = bias.to(att.stat_dtype) if mask is None else mask + bias.to(att.stat_dtype)
    return att.replace(mask=total, causal=False)
