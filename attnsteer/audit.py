"""The audit: what each intervention saw, returned and changed, per site; kept without reading the device. And whether a tensor was
changed where it stands."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .account import Samples
from .errors import SelectionError

PHASES = ("prefill", "decode")
# From this many flags on they are summed, on the device.
MANY = 256
# Outputs up to so many numbers are kept for a later comparison.
SMALL = 1 << 14
# One for all counts: it is held for an instant, and compiled code, which makes records too, cannot make locks.
_GATHERING = threading.Lock()


Flag = Tensor | tuple[Tensor, Tensor]


def is_set(flag: Flag) -> Tensor:
    """Whether a flag is set, 0-d or [P]."""
    return flag if isinstance(flag, Tensor) else (flag[0] != flag[1]).any()


class Flags:
    """A count of calls in which a device flag was set, or of each of several; reading it is the only synchronisation.

    A flag is a bool tensor, 0-d or [P] for the parts of a batch, or two small tensors, and set where they differ: compared when
    somebody looks, not at each step.
    """

    def __init__(self) -> None:
        self._new: list[Flag] = []
        # Of the call before, for who wants to know of that one.
        self.last: Flag | None = None
        self._sum: dict[torch.device, Tensor] = {}
        # Counted by compiled code.
        self._more = 0

    def more(self, count: int) -> None:
        """So many flags more were set."""
        self._more += count

    def add(self, flag: Flag) -> None:
        """One call more."""
        self._new.append(flag)
        self.last = flag
        if len(self._new) > MANY:
            self._gather()

    def _gather(self) -> None:
        with _GATHERING:
            flags, self._new = [is_set(f) for f in self._new], []
            for device in {f.device for f in flags}:
                count = torch.stack([f.detach() for f in flags if f.device == device]).sum(dim=0)
                self._sum[device] = self._sum[device] + count if device in self._sum else count

    def count(self, part: int | None = None) -> int:
        """How many flags were set; those of one part, or of all."""
        self._gather()
        return self._more + sum(int(t.sum() if part is None else t[part]) for t in self._sum.values())


@dataclass
class Record:
    """Counts of one intervention at one site, apart for prefill and decode.

    Attributes:
        calls: attention calls seen while the selection held. edits: calls for which the method returned an edit.
        rows: query rows of the edited calls (batch times rows). heads: heads selected at this site.
        path: how the last edit was computed: "output", "inputs", "bias" (also of a reweighting whose weights do not depend on
            the row), "shares" (two calls of the kernel), "rows" (from the map's own rows: few, or of a short
            prompt), "fused" (from the kernel's log-sum-exp) or "dense" (from the whole map); joined by "+" where head groups
            went different ways.
            "read": the map was taken for a loss, and nothing edited.
        distance: mean total-variation distance between the map before and after, when measured.
        error: of methods that approximate, when measured: mean over calls of |O' - O| / |O| over sampled rows; O' left the heads,
            O is exact attention. kept: of methods that leave out, when measured: mean share of what they kept.
        part: this process computes a part of the site's heads (tensor parallelism); `heads` counts those of them.
        compiled: the site runs in compiled code for which no counts were placed on the device (see `place`), so that its calls
            are not counted.
    """

    calls_in: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    edits_in: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    flags_in: dict[str, Flags] = field(default_factory=lambda: {p: Flags() for p in PHASES})
    rows: int = 0
    heads: int = 0
    path: str = ""
    part: bool = False
    compiled: bool = False
    _moved: list[Tensor] = field(default_factory=list)
    _errors: list[Tensor] = field(default_factory=list)
    _kept: list[Tensor] = field(default_factory=list)
    # int64 [phases, 4]: calls, edits, calls in which something changed, rows; added to in place by compiled code.
    _placed: Tensor | None = None

    def place(self, device: torch.device) -> None:
        """Let compiled code count on this device: a count of Python would compile it anew at every call."""
        if device.type == "meta" or (self._placed is not None and self._placed.device == device):
            return
        self.fold()
        # Counted in training and inference alike.
        with torch.inference_mode(False):
            self._placed = torch.zeros(len(PHASES), 4, dtype=torch.long, device=device)
        # So that graphs of CUDA may change it.
        torch._dynamo.mark_static_address(self._placed)

    def fold(self) -> None:
        """Take over what compiled code has counted."""
        if self._placed is None or torch.compiler.is_compiling():
            return
        with _GATHERING, torch.no_grad():
            counts = self._placed.tolist()
            if any(map(any, counts)):
                self._placed.zero_()
        for phase, (calls, edits, changed, rows) in zip(PHASES, counts, strict=True):
            self.calls_in[phase] += calls
            self.edits_in[phase] += edits
            self.flags_in[phase].more(changed)
            self.rows += rows

    def _counted(self, phase: str, what: int, by: Any) -> bool:
        """Count in compiled code; False where there is nowhere to."""
        if self._placed is None:
            return False
        self._placed[PHASES.index(phase), what].add_(by)
        return True

    @property
    def calls(self) -> int:
        """Attention calls seen."""
        self.fold()
        return sum(self.calls_in.values())

    @property
    def edits(self) -> int:
        """Calls for which an edit was returned."""
        self.fold()
        return sum(self.edits_in.values())

    @property
    def changed(self) -> int:
        """Calls in which something changed: a score, a share of a visible key, a head's output."""
        self.fold()
        return sum(flags.count() for flags in self.flags_in.values())

    @property
    def distance(self) -> float | None:
        """Mean total-variation distance, or None when it was not measured."""
        return _mean(self._moved)

    @property
    def error(self) -> float | None:
        """Mean relative error against exact attention, or None when it was not measured."""
        return _mean(self._errors)

    @property
    def kept(self) -> float | None:
        """Mean share that was kept, or None when it was not measured."""
        return _mean(self._kept)

    def see(self, heads: int, phase: str) -> None:
        """Count one call with this many selected heads."""
        if torch.compiler.is_compiling():
            self.heads = heads
            if not self._counted(phase, 0, 1):
                self.compiled = True
            return
        self.calls_in[phase] += 1
        self.heads = max(self.heads, heads)

    def again(self, rows: int, path: str, flag: Flag | None) -> None:
        """Count one more decode step of as many heads, edited by `path` as the one before; `flag` None: not edited."""
        self.calls_in["decode"] += 1
        if flag is not None:
            self.edits_in["decode"] += 1
            self.path = path
            self.rows += rows
            self.flags_in["decode"].add(flag)

    def measure(self, mean: Tensor) -> None:
        """Add one call's mean distance, 0-d."""
        self._moved.append(mean.detach())

    def err(self, error: Tensor) -> None:
        """Add one call's relative error, 0-d."""
        self._errors.append(error.detach())

    def keep(self, share: Tensor) -> None:
        """Add the share that one call kept, 0-d."""
        self._kept.append(share.detach())

    def to_dict(self, part: int | None = None, parts: int = 1) -> dict[str, Any]:
        """JSON-able form.

        Args:
            part: of the batch, of so many `parts` (see `Audit.divide`); None: all of it.
        """
        self.fold()
        changed = {p: flags.count(part) for p, flags in self.flags_in.items()}
        phases = {
            p: {"calls": self.calls_in[p], "edits": self.edits_in[p], "changed": changed[p]}
            for p in PHASES
            if self.calls_in[p]
        }
        return {
            "calls": self.calls,
            "edits": self.edits,
            "changed": sum(changed.values()),
            "phases": phases,
            "rows": self.rows // parts,
            "heads": self.heads,
            "path": self.path,
            "distance": self.distance,
            **({} if self.error is None else {"error": self.error}),
            **({} if self.kept is None else {"kept": self.kept}),
            **({"compiled": True} if self.compiled else {}),
        }


def _mean(values: list[Tensor]) -> float | None:
    return float(torch.stack([t.cpu() for t in values]).mean()) if values else None


class Mark:
    """One intervention in one attention call: its head groups report here, the record counts the call once."""

    def __init__(self, record: Record, phase: str, rows: int, parts: Tensor | None = None):
        """`parts`: bool [P, B], the batch rows of each part that is counted apart; None: they are counted together."""
        self.record, self.phase, self.rows, self.parts = record, phase, rows, parts
        self.paths: tuple[str, ...] = ()
        self._flag: Flag | None = None

    def edited(self, path: str, *moved: Flag) -> None:
        """A head group was edited by `path`; none of `moved`: nothing can have moved.

        Args:
            moved: bool [B or 1, ...], where something moved, or 0-d, whether; or two tensors [B, ...], where they differ.
        """
        if torch.compiler.is_compiling():
            if not self.paths and self.record._counted(self.phase, 1, 1):
                self.record._counted(self.phase, 3, self.rows)
        elif not self.paths:
            self.record.edits_in[self.phase] += 1
            self.record.rows += self.rows
        if path not in self.paths:
            self.paths += (path,)
        self.record.path = "+".join(self.paths)
        for where in moved:
            if self.parts is not None:
                changed: Flag = self._in_parts(where[0] != where[1] if isinstance(where, tuple) else where)
            else:
                changed = where if isinstance(where, tuple) or where.ndim == 0 else where.any()
            self._flag = changed if self._flag is None else is_set(changed) | is_set(self._flag)

    def _in_parts(self, where: Tensor) -> Tensor:
        """bool [P]: the parts in which something moved."""
        where = where[:, None] if where.ndim == 1 else where
        return (self.parts & where.flatten(1).any(dim=1)).any(dim=1)

    @property
    def moved(self) -> Flag | None:
        """Whether something moved, so far."""
        return self._flag

    def close(self) -> None:
        """The call is over."""
        if self._flag is not None and torch.compiler.is_compiling():
            self.record._counted(self.phase, 2, is_set(self._flag).detach())
        elif self._flag is not None:
            self.record.flags_in[self.phase].add(self._flag)


@dataclass
class Audit:
    """Per intervention and site: what was seen, returned and changed. Prints as a table."""

    names: list[str]
    records: dict[tuple[int, str], Record] = field(default_factory=dict)
    extra: dict[int, dict[str, int]] = field(default_factory=dict)
    _around: dict[int, Flags] = field(default_factory=dict)
    parts: int | None = None
    _of_parts: dict[Any, Tensor] = field(default_factory=dict)

    def divide(self, parts: int) -> None:
        """Count apart what changes in each of so many parts of the batch, before the first call.

        The parts are equal numbers of samples, one part after the other: a method that was given other values in each (see
        `PerSample`) is then seen as so many methods. Only changes are told apart; the calls and edits are those of all.
        """
        self.parts = parts

    def of_parts(self, samples: Samples | None, batch: int, device: torch.device) -> Tensor:
        """bool [P, B]: the rows of each part.

        Raises:
            SelectionError: the batch cannot be divided into so many parts.
        """
        samples = Samples.plain(batch) if samples is None else samples
        count = next(iter(samples.of_row))
        if count % self.parts:
            raise SelectionError(f"{samples} cannot be divided into {self.parts} equal parts, which are counted apart.")
        of_row = samples.rows(count, batch)
        found = self._of_parts.get((of_row, device))
        if found is None:
            part = torch.tensor(of_row, device=device) * self.parts // count
            found = part == torch.arange(self.parts, device=device)[:, None]
            self._of_parts[of_row, device] = found
        return found

    def record(self, index: int, path: str) -> Record:
        """The record of intervention number `index` at the site `path`."""
        found = self.records.get((index, path))
        if found is None:
            found = self.records.setdefault((index, path), Record())
        return found

    def _seen(self, index: int) -> dict[str, Record]:
        """The records of intervention number `index`, by site; of sites that ran."""
        return {path: r for (i, path), r in self.records.items() if i == index and (r.calls or r.compiled)}

    def count(self, index: int, what: str, by: int = 1) -> None:
        """Count an event that belongs to no site, such as weak-branch passes."""
        counts = self.extra.setdefault(index, {})
        counts[what] = counts.get(what, 0) + by

    def moved(self, index: int, flag: Tensor) -> None:
        """An `around` method gave a prediction, or moved a latent; `flag`: 0-d bool, whether it differs."""
        self._around.setdefault(index, Flags()).add(flag)

    def saw(self, index: int) -> bool:
        """Whether intervention number `index` was asked at all: at a site, or around the model."""
        if any(r.calls or r.compiled for (i, _), r in self.records.items() if i == index):
            return True
        return bool(self.extra.get(index, {}).get("guided calls"))

    def elsewhere(self, index: int) -> bool:
        """Whether other processes hold heads of intervention number `index` that this one lacks (tensor parallelism)."""
        return any(r.part for (i, _), r in self.records.items() if i == index)

    def absent(self, index: int) -> bool:
        """Whether this process holds no head of intervention number `index` at all."""
        own = [r for (i, _), r in self.records.items() if i == index]
        return self.elsewhere(index) and not any(r.heads for r in own)

    def changed(self, index: int) -> int:
        """Calls in which intervention number `index` changed something; for an `around` method, of the model as a whole."""
        if index in self._around:
            return self._around[index].count()
        return sum(r.changed for (i, _), r in self.records.items() if i == index)

    def fired(self, index: int) -> bool:
        """Whether intervention number `index` changed anything; in compiled code that does not count, whether it ran."""
        return bool(self.changed(index)) or any(r.compiled for (i, _), r in self.records.items() if i == index)

    def to_dict(self, part: int | None = None) -> dict[str, Any]:
        """JSON-able form: a list of interventions with their sites; of one part of the batch (see `divide`), or of all."""
        out, parts = [], 1 if part is None else self.parts
        for index, name in enumerate(self.names):
            sites = {path: r.to_dict(part, parts) for path, r in self._seen(index).items()}
            around = {"changed": self.changed(index)} if index in self._around else {}
            out.append({"intervention": name, "sites": sites, **self.extra.get(index, {}), **around})
        return {"interventions": out}

    def __str__(self) -> str:
        lines = ["calls seen / edits returned / calls in which something changed"]
        for index, name in enumerate(self.names):
            own = self._seen(index)
            extra = "".join(f", {n} {what}" for what, n in self.extra.get(index, {}).items())
            if index in self._around:
                extra += f", {self.changed(index)} changed"
            total = tuple(
                sum(values) for values in zip(*((r.calls, r.edits, r.changed) for r in own.values()), strict=True)
            )
            calls, edits, changed = total or (0, 0, 0)
            lines.append(f"{name}: {calls} / {edits} / {changed} at {len(own)} sites{extra}")
            for path, r in own.items():
                parts = [
                    f"{p} {r.calls_in[p]} / {r.edits_in[p]} / {r.flags_in[p].count()}" for p in PHASES if r.calls_in[p]
                ]
                moved = "" if r.distance is None else f", moved {r.distance:.4f}"
                moved += "" if r.error is None else f", error {r.error:.4f}"
                moved += "" if r.kept is None else f", kept {r.kept:.3f}"
                moved += ", compiled: calls not counted" if r.compiled else ""
                lines.append(f"  {path}: {', '.join(parts)}; {r.rows} rows x {r.heads} heads, {r.path or '-'}{moved}")
        return "\n".join(lines)


def mark_of(tensor: Tensor, values: bool) -> Any:
    """What `unchanged` compares with: the tensor's version.

    Args:
        values: whether to copy the tensor as well: those of inference mode count no versions, and what is written through
            `.data`, or through an array of NumPy over the same memory, counts none either.
    """
    version = None if tensor.is_inference() else tensor._version
    return (version, tensor.detach().clone()) if values and not tensor.is_meta else version


def unchanged(tensor: Tensor, marked: Any) -> bool:
    """Whether a tensor is as it was when it was marked."""
    if marked is None:
        return True
    version, copy = marked if isinstance(marked, tuple) else (marked, None)
    if version is not None and tensor._version != version:
        return False
    if copy is None or torch.equal(tensor, copy):
        return True
    # NaN, as in rows of a model that see no key, equals nothing.
    same = tensor.is_floating_point() and tensor.shape == copy.shape
    return same and torch.allclose(tensor, copy, rtol=0.0, atol=0.0, equal_nan=True)
