"""What happens at one steered site: the active methods, head group by head group (`head_group.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from .audit import Audit, Mark
from .bound import Bound, Heads
from .call import AttnCall
from .errors import CompositionError, UnsupportedHost
from .forms import WholeForms
from .head_group import HeadGroup, SiteAttention, local_heads
from .intervention import Intervention
from .kernels import Attention
from .shards import Pool, Shards
from .shared_rows import Rows
from .site import Site
from .steady import Count, Step


class Run(Protocol):
    """What the engine asks of a steering."""

    audit: Audit
    measure: bool
    reference: bool
    branch: str | None
    opened: list[int]

    def is_open(self, bound: Bound) -> bool:
        """Whether the inside edits of `bound` act now."""

    def inside(self, method: Intervention) -> AbstractContextManager[None]:
        """Switch the inside edits of an `around` method on for the model calls in this block."""


def _casts(kind: str) -> bool:
    """Whether an autocast is on for this kind of device."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class SiteRuntime:
    """The interventions bound to one site; called by the host in place of the attention primitive."""

    def __init__(
        self,
        run: Run,
        site: Site,
        entries: list[tuple[Bound, Heads | None]],
        together: bool = True,
        rows: Mapping[int, Rows] | None = None,
    ):
        """
        Args:
            together: whether all entries act in one call; those of different requests do not.
            rows: by `id` of each entry's bound, the batch rows that it acts on, where requests chose differently.
        """
        self.rows = rows
        self.run = run
        self.site = site
        self.entries = entries
        # (intervention, door, phase, heads) whose edits were looked at: the first of each is.
        self.checked: set[tuple[int, str, str, Heads]] = set()
        # Those whose first call was compared with copies of what it was shown.
        self.copied: set[tuple[int, str, str, Heads]] = set()
        self._partitions: dict[tuple[int, ...], list[tuple[Heads | None, list[Bound]]]] = {}
        self._by_methods: dict[tuple[int, ...], list[int]] = {}
        self._indices: dict[tuple[Heads, torch.device], Tensor] = {}
        # All of them, where each acts in every call; whether some read the map, by which act.
        self._always = None if any(b.guides or b.timed for b, _ in entries) else tuple(range(len(entries)))
        self._reads: dict[tuple[int, ...], bool] = {}
        self.late = _late(entries)
        for head in range(site.heads):
            key = tuple(
                i for i, (_, heads) in enumerate(entries) if i not in self.late and (heads is None or head in heads)
            )
            self._by_methods.setdefault(key, []).append(head)
        if together:
            self._check_whole()
        self.shards = Shards.of(site.module)

    def _check_whole(self) -> None:
        for i, (bound, _) in enumerate(self.entries):
            whole = bound.method.whole_heads or bound.method.pools_heads
            if whole and sum(i in key for key in self._by_methods) > 1:
                others = {j for key in self._by_methods for j in key} - {i}
                names = [self.entries[j][0].name for j in sorted(others)]
                raise CompositionError(
                    f"{self.site.path}: {bound.name} compares all of its heads with each other, and "
                    f"{', '.join(names)} acts on some of them only. Give both the same heads at this layer, or different layers."
                )

    def active(self, phase: str | None, step: int | None, steps: int | None, mixed: bool = False) -> tuple[int, ...]:
        """Positions in `entries` of the interventions that act in this call; `mixed`: rows of both phases are in it."""
        if self._always is not None:
            return self._always
        return tuple(
            i
            for i, (bound, _) in enumerate(self.entries)
            if (not bound.guides or bound.index in self.run.opened)
            and (not bound.timed or bound.where.active(None if mixed else phase, step, steps))
        )

    def reads_map(self, active: tuple[int, ...]) -> bool:
        """Whether some active method is more than an edit of head outputs, which is exact whatever made them."""
        found = self._reads.get(active)
        if found is None:
            found = self._reads[active] = not all(self.entries[i][0].method.linear for i in active)
        return found

    def check_device(self, tensor: Tensor) -> None:
        """Raise on the meta device, where nothing can be looked at."""
        if tensor.device.type == "meta":
            raise UnsupportedHost(
                f"{self.site.path} runs on the meta device, which computes nothing; steer the model with its weights."
            )

    def check_dropout(self, active: tuple[int, ...], rate: float) -> None:
        """Raise where a method edits a map that dropout goes over; edits of head outputs take what the model's kernel gave."""
        if rate and self.reads_map(active):
            raise UnsupportedHost(
                f"{self.site.path} runs with attention dropout {rate}; an exact edit of its map is not defined there. Call "
                "model.eval() first. Edits of head outputs (HeadGate) are defined."
            )

    def __call__(
        self,
        att: Attention,
        base: Callable[[], Tensor],
        call: AttnCall,
        active: tuple[int, ...],
        same_kernel: Callable[[], bool] | None = None,
        maps: list[tuple[Heads | None, Tensor]] | None = None,
        sdpa: bool = False,
        packs: bool = False,
        forms: Any = None,
        steps: dict[str, Step] | None = None,
    ) -> Tensor:
        """The site's output [B, H, n, dv] with the active interventions applied.

        Args:
            att: the call in the model's terms. base: computes the output with the model's own kernel.
            call: what the host knows of it. active: which interventions act.
            same_kernel: whether `kernels.attend_lse` would run that very kernel (so it can replace it); asked where a method
                needs the lse. None: it never would.
            maps: filled with (heads of this process or None, edited map), where the host hands out attention weights.
            sdpa: whether `base` is torch's SDPA on this very `att`. packs: see `WholeForms`. forms: a host's own in its place.
            steps: filled with what does this decode step again for the next token, where its methods answer the same then.
        """
        self.check_device(att.q)
        if call.packed:
            _check_apart(self.site, att, call)
        kind = att.q.device.type
        if not torch.compiler.is_compiling() and _casts(kind) and att.q.dtype == torch.get_autocast_dtype(kind):
            # Operators on scores would be cast to half precision too; the model's own kernel runs as it did.
            def cast() -> Tensor:
                with torch.autocast(kind, dtype=att.q.dtype):
                    return base()

            with torch.autocast(kind, enabled=False):
                return self(att, cast, call, active, same_kernel, maps, sdpa, packs, forms, steps)
        whole = SiteAttention(att, base, same_kernel)
        offset = self._offset(att.q.shape[1], active)
        marks = self._seen(active, offset, att.q, call)
        if forms is None and sdpa and maps is None and self._takes_forms(att):
            forms = WholeForms(att, call.memo, packs)
        edited: list[tuple[Heads | None, Tensor]] = []
        for heads, bounds in self.partition(active):
            local = local_heads(heads, offset, att.q.shape[1])
            if local == ():
                continue
            out = HeadGroup(self, whole, heads, offset, call, marks, forms).run(bounds, maps)
            if out is not None:
                edited.append((local, out))
        if edited and edited[0][0] is None:
            result = edited[0][1]
        else:
            result = None if forms is None else forms.out()
            result = whole.out() if result is None else result
            for local, out in edited:
                result = result.index_copy(1, self.index(local, result.device), out.to(result.dtype))
        before = result
        for i in self.late:
            if i in active:
                result = self._scaled_heads(*self.entries[i], whole, result, offset, call, marks)
        for mark in marks.values():
            mark.close()
        if steps is not None and not edited and self._is_steady(active):
            step = self._step(active, forms, att, before, result, offset, call, marks)
            if step is not None:
                steps[self.site.path] = step
        return result

    def _is_steady(self, active: tuple[int, ...]) -> bool:
        """Whether each active method answers in the next decode step as in this one."""
        if self.rows is not None:
            return False
        for i in active:
            bound = self.entries[i][0]
            learned = any(value.learned for value in bound.method.sample_values.values())
            chosen = bound.where.rows is not None or bound.where.branches is not None
            if bound.guides or learned or chosen or not bound.method.steady:
                return False
        return True

    def _step(
        self,
        active: tuple[int, ...],
        forms: WholeForms | None,
        att: Attention,
        out: Tensor,
        result: Tensor,
        offset: int,
        call: AttnCall,
        marks: dict[int, Mark],
    ) -> Step | None:
        """What does this decode step again, whose edits all heads took together.

        Args:
            out, result: before and after those of head outputs.
        """
        if forms is not None and forms.shared is not None and (forms.divided is None or forms.own_key_in_set()):
            return None
        late = [self.entries[i] for i in self.late if i in active]
        # Of marked tokens the row's own is the last, and those that come are not.
        if len(late) > 1 or (call.gives("tokens") and call.tokens.ends_marked()):
            return None
        factor = None
        for bound, heads in late:
            local = local_heads(heads, offset, out.shape[1])
            if local == ():
                continue
            own = out if local is None else out.index_select(1, self.index(local, out.device))
            factor = HeadGroup(self, SiteAttention(att, lambda: out, None), heads, offset, call, marks).factor(
                bound, own
            )
            if factor is not None and local is not None:
                whole = factor.new_ones(len(factor), out.shape[1], 1, 1)
                factor = whole.index_copy(1, self.index(local, out.device), factor)
        scaled = out if factor is None else out * factor
        if scaled.dtype != result.dtype or not torch.equal(scaled, result):
            # The factor is not what the method does: one of a base class, or none given.
            return None
        counts, edited = [], set() if factor is None else {bound.index for bound, _ in late}
        for index, mark in marks.items():
            what = "output" if index in edited else mark.paths[0] if mark.paths else None
            if len(mark.paths) > 1 or what not in (None, "bias", "shares", "output"):
                return None
            counts.append(Count(mark.record, mark.rows, what, mark.moved if what == "bias" else None))
        return Step(forms, factor, counts, att)

    def _scaled_heads(
        self,
        bound: Bound,
        heads: Heads | None,
        whole: SiteAttention,
        out: Tensor,
        offset: int,
        call: AttnCall,
        marks: dict[int, Mark],
    ) -> Tensor:
        """`out` [B, H, n, dv] with the outputs of some heads edited by a method that reads nothing else."""
        local = local_heads(heads, offset, out.shape[1])
        if local == ():
            return out
        own = out if local is None else out.index_select(1, self.index(local, out.device))
        edited = HeadGroup(self, whole, heads, offset, call, marks).output(bound, own)
        if edited is None or edited is own:
            return out
        if local is None:
            return edited
        return out.index_copy(1, self.index(local, out.device), edited)

    def _takes_forms(self, att: Attention) -> bool:
        """Whether heads that are not edited come out bit for bit where the kernel gets a mask of zeros for them."""
        return (
            att.q.device.type == "cpu"
            # Of other widths (multi-head latent attention) the fused kernel takes none.
            and att.q.shape[3] == att.v.shape[3]
            and att.softcap is None
            and att.sinks is None
            and att.key_bias is None
            and self.rows is None
            and not (self.run.reference or self.run.measure)
        )

    def index(self, local: Heads, device: torch.device) -> Tensor:
        """These heads as a tensor, made once."""
        if torch.compiler.is_compiling():
            # A memory that grows would be compiled for anew.
            return torch.tensor(local, device=device)
        key = (local, device)
        found = self._indices.get(key)
        if found is None:
            # Of inference mode it could not be used for a gradient later.
            with torch.inference_mode(False):
                found = self._indices[key] = torch.tensor(local, device=device)
        return found

    def _seen(self, active: tuple[int, ...], offset: int, q: Tensor, call: AttnCall) -> dict[int, Mark]:
        """Count this call once for each active intervention, however many head groups it falls into."""
        marks, shape, audit = {}, q.shape, self.run.audit
        parts = None if audit.parts is None else audit.of_parts(call.samples, shape[0], q.device)
        every = (
            (*owner, heads) for b, heads in (self.entries[i] for i in active) for owner in self._owners(b, shape[0])
        )
        for index, batch, heads in every:
            record = audit.record(index, self.site.path)
            local = local_heads(heads, offset, shape[1])
            record.see(shape[1] if local is None else len(local), call.phase)
            if shape[1] != self.site.heads:
                record.part = True
            marks[index] = Mark(record, call.phase, batch * shape[2], parts)
        return marks

    def _owners(self, bound: Bound, batch: int) -> list[tuple[int, int]]:
        """[(number of an intervention behind `bound`, its batch rows)]."""
        if self.rows is None:
            return [(bound.index, batch)]
        own = self.rows[id(bound)]
        return [(index, own.size[i]) for i, index in enumerate(own.owners)]

    def _offset(self, local: int, active: tuple[int, ...]) -> int:
        """Global index of this process's first head (tensor parallelism shards heads)."""
        heads = self.site.heads
        if local == heads:
            return 0
        if self.shards is None or len(self.shards.ranks) * local != heads:
            raise UnsupportedHost(
                f"{self.site.path} was listed with {heads} heads but computes {local}, and which ones is not to be read from its "
                "parameters (DTensors that split the output projection over a device mesh of ascending ranks). Steer the model "
                'after it is loaded and sharded, by tp_plan="auto" or torch\'s parallelize_module.'
            )
        # Asked on every process, also where none of the selected heads is, so that none waits for the others.
        for bound in (self.entries[i][0] for i in active):
            if bound.method.whole_heads:
                raise UnsupportedHost(
                    f"{bound.name} at {self.site.path}: this process has {local} of {heads} heads (tensor parallelism), and its "
                    "statistics over a part of the heads are others. Load the model unsharded."
                )
            learned = [name for name, value in bound.method.sample_values.items() if value.learned]
            if learned and torch.is_grad_enabled():
                # A process without a selected head has no part in the backward pass, so that none can wait for a sum.
                raise UnsupportedHost(
                    f"{bound.name} at {self.site.path}: {', '.join(learned)} needs a gradient, and this process has {local} of "
                    f"{heads} heads (tensor parallelism), so that its gradient would be of these alone. Train with the model "
                    "unsharded, or under FSDP2 or DistributedDataParallel."
                )
        return self.shards.place * local

    def pool(self, heads: Heads | None, local: int) -> Pool:
        """That of a head group, where this process holds `local` heads of the site."""
        if local == self.site.heads:
            return Pool(local if heads is None else len(heads))
        return self.shards.pool(heads, local)

    def partition(self, active: tuple[int, ...]) -> list[tuple[Heads | None, list[Bound]]]:
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


def _check_apart(site: Site, att: Attention, call: AttnCall) -> None:
    """Raise where rows see keys of another request of their batch row: each would be counted from the wrong token."""
    rows, keys = call.rows, call.keys
    n, m = att.shape[2:]
    other = (rows.request[:, :, None] != keys.request[:, None]) & rows.valid[:, :, None] & keys.valid[:, None]
    if att.causal:
        other = other & torch.ones(n, m, dtype=torch.bool, device=other.device).tril()
    mask = att.additive(att.stat_dtype)
    seen = other[:, None] if mask is None else other[:, None] & ~mask.isneginf()
    if bool(seen.any()):
        raise UnsupportedHost(
            f"{site.path}: the call packs several sequences into a row, but this model lets them see each other. Pass a mask "
            "[B, 1, n, n] that keeps them apart, or put each in a batch row of its own."
        )


def _late(entries: list[tuple[Bound, Heads | None]]) -> tuple[int, ...]:
    """Those at the end that edit head outputs and read no map (methods for linear attention): no heads are divided for them."""
    found: list[int] = []
    for i in reversed(range(len(entries))):
        bound = entries[i][0]
        if bound.method.linear and bound.doors == {"output"}:
            found.append(i)
        elif "output" in bound.doors:
            break
    return tuple(reversed(found))
