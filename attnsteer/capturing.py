"""`capture()`: rows of maps, masses, head outputs, queries, keys and values, taken as a model's calls pass; nothing is edited."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .call import AttnCall
from .captured import (
    WHAT,
    Captured,
    Take,
    blocks,
    checked_rows,
    chosen_rows,
    file_name,
    map_rows,
    needs_tokens,
    new_folder,
    picked,
    places,
)
from .errors import CaptureTooLarge, SelectionError, UnsupportedHost, brief, did_you_mean
from .intervention import Intervention
from .methods._spans import checked_spans, span_keys
from .parameters import whole
from .steering import find_host, steer
from .tokens import Tokens
from .where import Where

# Key sets that are named by what they are.
KEYS = ("first", "self", "previous", "image", "prompt", "generated")


@contextlib.contextmanager
def capture(
    target: Any,
    where: Where | None = None,
    *interventions: Intervention,
    rows: Any = None,
    what: str | Sequence[str] = "map",
    keys: Any = None,
    to: str | Path | None = "cpu",
    gradients: bool = False,
    limit: int | None = None,
    tokenizer: Any = None,
) -> Iterator[Captured]:
    """Take rows of maps, head outputs, q, k or v from all calls of a model or pipeline inside the block; outputs stay as they are.

    Works for forwards, `generate` and pipelines. No map is built: for k of n rows the memory is that of k rows.

        with capture(model, Where(layers=[3]), rows="last") as seen:
            model(**inputs)
        seen.get(3)                 # [B, H, 1, m]
        seen.get(3, sample=0)       # [H, 1, T], without padding

    Args:
        target: as of `steer`; it must not be steered already. where: sites, heads, phases, steps and branches to take from; all
            main sites by default.
        interventions: methods to apply; what is taken has their edits in it, those of head outputs in "output" only.
        rows: which rows of each call. None: all. "last": the last of each call. "prompt", "prompt_end" (each prompt's last
            token), "generated". A role of a denoiser's rows ("image", "text"). A tuple (start, stop) or a list of token numbers,
            for all samples. For each sample a list of (start, stop) ranges or strings. Numbers count from the sample's first
            token that is not padding.
        what: one or several of "map" (probabilities over the keys), "mass" (of `keys`), "output" (head outputs before the output
            projection), "q", "k", "v" (as they enter the attention, after positional encoding). "k" and "v" are those of the
            tokens of these rows, in cross-attention of all keys.
        keys: for "mass": "first", "self", "previous", "image", "prompt", "generated", or marked tokens as in `PASTA(spans=...)`.
        to: "cpu" (the default) or another device to keep the tensors on; a new folder to stream them to (safetensors); None:
            where they are computed.
        gradients: keep the graph; then nothing is moved, and calls without gradients are refused.
        limit: bytes that may be held; by default what is free on that device or disk.
        tokenizer: for rows or keys that are strings.

    Yields:
        A `Captured`, filled call by call.

    Raises:
        SelectionError: a selection has no such form, or no call in the block has such rows.
        CaptureTooLarge: what the calls would take does not fit; the message says how much it needs.
        UnsupportedHost: gradients are asked of a call under `inference_mode` or `no_grad` (as all of `generate` is), or several
            sequences are packed into a row.
        NeverFired: nothing was called inside the block.
    """
    recorder = Recorder.make(target, where, rows, what, keys, to, gradients, limit, tokenizer)
    # Each base has a run of the model of its own.
    recorder.store.found.mixed = any(len(getattr(m, "bases", ())) > 1 for m in interventions)
    with steer(target, *interventions, recorder) as run:
        recorder.store.sites = len(recorder.sites_of(run))
        recorder.store.found.open = True
        try:
            yield recorder.store.found
        finally:
            recorder.store.found.open = False
            recorder.store.close()
        if not recorder.store.found.takes and recorder.store.longest:
            raise SelectionError(
                f"capture(rows={brief(rows)}): no call in the block had any of these rows; their tokens were numbered from 0 to "
                f"{recorder.store.longest - 1}."
            )


class _Store:
    """Where takes go, and how much of them fits."""

    def __init__(self, what: Sequence[str], to: str | Path | None, limit: int | None):
        self.folder = self.device = None
        if isinstance(to, Path) or (isinstance(to, str) and not _is_device(to)):
            self.folder = new_folder("capture", to)
        elif to is not None:
            self.device = torch.device(to)
        self.limit = limit
        self.found = Captured(what, self.folder)
        self.sites = 1
        # Of the sequences that were seen, in tokens.
        self.longest = 0
        self.written = 0
        self.lock = threading.Lock()
        # The take that other heads of the same call are added to, by thread.
        self.open: dict[int, Take] = {}
        self._seen: set[str] = set()

    def check(self, call: AttnCall, size: int, device: torch.device) -> None:
        """Refuse before anything is allocated where this round of calls does not fit.

        `size`: bytes that this call takes.
        """
        with self.lock:
            if call.site.path in self._seen:
                self._seen.clear()
            left = self.sites - len(self._seen)
            self._seen.add(call.site.path)
        held = self.written if self.folder is not None else self.found.bytes
        free = self._room(device) if self.limit is None else self.limit - held
        if free is None or size * left <= free:
            return
        B, H, n, m = call.map.shape
        where = str(self.folder) if self.folder is not None else str(self.device or device)
        raise CaptureTooLarge(
            f"capture: this call of {call.site.path} ({B} samples, {H} heads, {n} rows, {m} keys) takes {_size(size)}, and the "
            f"{left} sites of it that are left {_size(size * left)}; {_size(held)} are held, and {_size(max(free, 0))} may be on "
            f"{where}. Choose rows=..., layers or heads, or stream to a disk with room: to='folder'."
        )

    def _room(self, device: torch.device) -> int | None:
        if self.folder is not None:
            return shutil.disk_usage(self.folder).free
        kind = device if self.device is None else self.device
        if kind.type == "cuda":
            return torch.cuda.mem_get_info(kind)[0]
        return free_memory() if kind.type == "cpu" else None

    def add(self, take: Take) -> None:
        """Keep one take, or the heads that it adds to the running one."""
        with self.lock:
            here = threading.get_ident()
            last = self.open.get(here)
            if last is not None and _same_call(last, take):
                _join(last, take)
                return
            self.flush(here)
            self.open[here] = take
            self.found.takes.append(take)

    def flush(self, here: int) -> None:
        """The call that this thread recorded last is over."""
        last = self.open.pop(here, None)
        if last is not None and self.folder is not None:
            number = next(i for i, t in enumerate(self.found.takes) if t is last)
            self.written += last.bytes
            last.write(self.folder / file_name(number))

    def close(self) -> None:
        """No more calls."""
        with self.lock:
            for here in list(self.open):
                self.flush(here)
            if self.folder is not None:
                self.found._index(self.folder)


def _same_call(last: Take, new: Take) -> bool:
    """Whether `new` has other heads of the call that `last` has."""
    if (last.site, last.step, last.branch, last.phase) != (new.site, new.step, new.branch, new.phase):
        return False
    if last.rows.shape != new.rows.shape or last.keys.shape != new.keys.shape:
        return False
    return not set(last.heads) & set(new.heads)


def _join(last: Take, new: Take) -> None:
    # Groups of heads that other methods edit apart come one after the other.
    fresh = [i for i, g in enumerate(new.kv_heads) if g not in last.kv_heads]
    order = sorted(range(len(last.heads) + len(new.heads)), key=(last.heads + new.heads).__getitem__)
    kv = last.kv_heads + tuple(new.kv_heads[i] for i in fresh)
    kv_order = sorted(range(len(kv)), key=kv.__getitem__)
    for name, tensor in new.tensors.items():
        own = tensor[:, fresh] if name in ("k", "v") else tensor
        both = torch.cat([last.tensors[name], own], dim=1)
        last.tensors[name] = both[:, kv_order if name in ("k", "v") else order]
    last.heads = tuple(sorted(last.heads + new.heads))
    last.kv_heads = tuple(sorted(kv))


@dataclass(frozen=True)
class Recorder(Intervention):
    """Takes what passes at its sites; edits nothing."""

    rows: Any = None
    what: tuple[str, ...] = ("map",)
    keys: Any = None
    gradients: bool = False
    tokenizer: Any = field(default=None, kw_only=True, repr=False, compare=False)
    store: Any = field(default=None, kw_only=True, repr=False, compare=False)
    asks: tuple[str, ...] = field(default=(), kw_only=True, repr=False, compare=False)

    observes = True

    @staticmethod
    def make(
        target: Any,
        where: Where | None,
        rows: Any,
        what: str | Sequence[str],
        keys: Any,
        to: str | Path | None,
        gradients: bool,
        limit: int | None,
        tokenizer: Any,
    ) -> Recorder:
        """That of a call of `capture`, its arguments checked."""
        where = Where() if where is None else where
        if not isinstance(where, Where):
            raise SelectionError(f"capture(where={brief(where)}): give a Where, e.g. Where(layers=[0]).")
        if where.rows is not None:
            raise SelectionError(f"{where}: give the rows to capture itself, rows={where.rows!r}.")
        if not isinstance(what, (str, list, tuple)):
            raise SelectionError(f"capture(what={brief(what)}): one or several of {WHAT}.")
        if to is not None and not isinstance(to, (str, Path)):
            raise SelectionError(f"capture(to={brief(to)}): give a device such as 'cpu', a new folder, or None.")
        names = (what,) if isinstance(what, str) else tuple(what)
        wrong = [name for name in names if name not in WHAT]
        if wrong or not names:
            hint = did_you_mean(wrong[0], WHAT) if wrong else ""
            raise SelectionError(f"capture(what={brief(what)}): one or several of {WHAT}.{hint}")
        if ("mass" in names) != (keys is not None):
            raise SelectionError("capture: keys=... says of which keys the mass is taken; give it with what='mass'.")
        if isinstance(keys, str) and keys not in KEYS:
            raise SelectionError(
                f"capture(keys={keys!r}): one of {KEYS}, or marked tokens: [{keys!r}] is looked for in the text."
                f"{did_you_mean(keys, KEYS)}"
            )
        if keys is not None and not isinstance(keys, str):
            try:
                keys = checked_spans(keys)
            except SelectionError as error:
                raise SelectionError(f"capture(keys={brief(keys)}): one of {KEYS}; or {error}") from error
        if limit is not None and (whole(limit) is None or limit < 0):
            raise SelectionError(f"capture(limit={brief(limit)}): give a number of bytes.")
        if gradients and to not in (None, "cpu"):
            raise SelectionError("capture(gradients=True) keeps tensors where they are computed; leave `to` out.")
        rows = checked_rows(rows)
        provides = find_host(target).provides
        wanted = {"steps", "segments", "grid", "tokens"} & provides
        if keys == "image":
            wanted.add("images")
        elif needs_tokens(rows) or isinstance(keys, tuple):
            wanted.add("tokens")
        store = _Store(names, None if gradients else to, limit)
        asks = tuple(sorted(wanted))
        return Recorder(rows, names, keys, gradients, where=where, tokenizer=tokenizer, store=store, asks=asks)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What its rows and keys are read from, and what the target can say of a call."""
        return self.asks

    def sites_of(self, run: Any) -> list[Any]:
        """The sites that it is at."""
        return [p for p, r in run.runtimes.items() if any(b.method is self for b, _ in r.entries)]

    def check_tokens(self, tokens: Tokens) -> None:
        """Spans are looked up before any layer runs."""
        for spans in (self.rows if needs_tokens(self.rows) else None, self.keys):
            if isinstance(spans, (list, tuple)):
                tokens.spans(spans, self.tokenizer)

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        """Take what is asked; the outputs go on as they came."""
        self._take(call, out)
        return out

    def _take(self, call: AttnCall, out: Tensor) -> None:
        self._check(call)
        chosen = self._rows(call)
        if chosen is None:
            return
        at, there = places(chosen)
        r = at.shape[1]
        if not r:
            if self.store.longest <= call.past + call.map.shape[2]:
                self.store.longest = int(call.rows.index.max()) + 1
            return
        B, H, _, m = call.map.shape
        if not self.gradients:
            self.store.check(call, sum(self._bytes(call, name, r, out) for name in self.what), call.map.device)
        att = call.map.att
        groups = call.site.heads // call.site.kv_heads
        kv = tuple(dict.fromkeys(h // groups for h in call.heads))
        keys = torch.where(call.keys.valid, call.keys.index, -1)
        tensors = {name: self._tensor(call, name, at, there, kv, out) for name in self.what}
        take = Take(
            call.site.path,
            call.site.layer,
            call.site.kind,
            call.heads,
            kv,
            groups,
            call.phase,
            call.step,
            call.branch,
            att.scale,
            att.softcap,
            torch.where(there, call.rows.index.expand(B, -1).gather(1, at), -1).cpu(),
            keys.cpu(),
            int(call.keys.slot[0]) if m else 0,
            tensors,
            segments={name: (part.start, part.stop) for name, part in call.segments.items()} or None,
            grid=call.facts.get("grid"),
        )
        if _in_backward():
            # A checkpointed layer that runs again has to compute what it did, and was taken before.
            return
        self.store.add(take)
        self._remember_ids(call)

    def _check(self, call: AttnCall) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedHost(
                f"{call.site.path} runs in compiled code, which keeps nothing of a call; capture the uncompiled model."
            )
        if call.packed:
            raise UnsupportedHost(
                f"{call.site.path}: several sequences are packed into a row; capture takes rows by sequence, so put each into a "
                "batch row of its own."
            )
        if not self.gradients:
            return
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
            raise UnsupportedHost(
                f"capture(gradients=True): this call of {call.site.path} runs under torch.{mode}, as all of `generate` does, so "
                "what is taken has no gradient. Call the model's forward with gradients enabled."
            )

    def _rows(self, call: AttnCall) -> Tensor | None:
        """bool [B, n] of the rows to take; None: no row of this call is."""
        chosen = chosen_rows(call, self.rows, self.tokenizer).expand(call.map.shape[0], -1)
        if self.where.branches is None:
            return chosen
        if call.branch_rows is None:
            raise UnsupportedHost(
                f"{call.site.path}: which rows of the batch are conditional is not known. Steer the pipeline rather than its "
                'model, or enter run.branches("uncond", "cond") around the calls.'
            )
        own = [call.branch_rows[b] for b in self.where.branches if b in call.branch_rows]
        return chosen & torch.stack(own).any(dim=0)[:, None] if own else None

    def _bytes(self, call: AttnCall, name: str, r: int, out: Tensor) -> int:
        B, H, n, m = call.map.shape
        stat = torch.finfo(call.map.stat_dtype).bits // 8
        if name == "map":
            return B * H * r * m * stat
        if name == "mass":
            return B * H * r * stat
        if name == "output":
            return B * H * r * out.shape[3] * out.element_size()
        tensor = getattr(call.map.att, name)
        heads = H if name == "q" else max(1, H * call.site.kv_heads // call.site.heads)
        return (
            B
            * heads
            * (m if name != "q" and call.site.kind == "cross" else r)
            * tensor.shape[3]
            * tensor.element_size()
        )

    def _tensor(self, call: AttnCall, name: str, at: Tensor, there: Tensor, kv: tuple[int, ...], out: Tensor) -> Tensor:
        if name in ("map", "mass"):
            return self._map(call, name, at, there)
        if name in ("output", "q"):
            return self._kept(picked(out if name == "output" else call.q, at) * there[:, None, :, None])
        tensor = call.k if name == "k" else call.v
        if tensor.shape[1] != len(kv):
            # One for each query head: the first that reads each key head.
            groups = call.site.heads // call.site.kv_heads
            read = [h // groups for h in call.heads]
            tensor = tensor[:, [read.index(g) for g in kv]]
        if call.site.kind == "cross":
            return self._kept(tensor.clone() if not self.gradients else tensor)
        # Rows of self-attention are keys too, at their slots.
        place = call.rows.slot[at] - call.keys.slot[0]
        return self._kept(picked(tensor, place.clamp_min(0)) * there[:, None, :, None])

    def _map(self, call: AttnCall, name: str, at: Tensor, there: Tensor) -> Tensor:
        B, H, _, m = call.map.shape
        inside = None if name == "map" else self._key_set(call)
        made: Tensor | None = None
        for block in blocks(at.shape[1], B * H * m) if not self.gradients else [slice(0, at.shape[1])]:
            own = at[:, block]
            found = map_rows(call, own) * there[:, None, block, None]
            if inside is not None:
                found = (found * (inside(own) if callable(inside) else inside[:, :, None])).sum(dim=-1)
            if found.shape[2] == at.shape[1]:
                return self._kept(found)
            if made is None:
                device = found.device if self.store.device is None else self.store.device
                device = torch.device("cpu") if self.store.folder is not None else device
                made = torch.empty(B, H, at.shape[1], *found.shape[3:], dtype=found.dtype, device=device)
            made[:, :, block] = found
        return made

    def _kept(self, tensor: Tensor) -> Tensor:
        if self.gradients:
            if not tensor.requires_grad:
                raise UnsupportedHost(
                    "capture(gradients=True): nothing that this call was computed from requires a gradient; set requires_grad on "
                    "the inputs or the parameters."
                )
            return tensor
        tensor = tensor.detach()
        device = torch.device("cpu") if self.store.folder is not None else self.store.device
        return tensor if device is None else tensor.to(device)

    def _key_set(self, call: AttnCall) -> Any:
        """bool [B or 1, 1, m], or a function of the rows that gives [B, 1, r, m]."""
        keys = self.keys
        if keys == "first":
            return call.first_key()
        if keys == "image":
            return call.image_keys()
        if keys == "prompt":
            return call.prompt_keys()
        if keys == "generated":
            return (call.keys.generated & call.keys.valid)[:, None]
        if keys in ("self", "previous"):
            back = 0 if keys == "self" else 1
            B = call.map.shape[0]
            index = torch.where(call.keys.valid, call.keys.index, -2)[:, None]
            rows = call.rows.index.expand(B, -1)
            return lambda at: (index == (rows.gather(1, at) - back)[..., None])[:, None]
        return span_keys(call, keys, self.tokenizer)

    def _remember_ids(self, call: AttnCall) -> None:
        tokens = call.facts.get("tokens")
        ids = None if tokens is None or call.site.kind != "self" else tokens.ids
        if ids is None:
            # Embeddings: beams alone are known to move.
            self.store.found.mixed |= tokens is not None and tokens.moved
            return
        found, known = self.store.found, self.store.found.ids_of.get(call.site.path)

        def listed() -> list[list[int]]:
            valid = torch.ones_like(ids, dtype=torch.bool) if tokens.valid is None else tokens.valid.to(ids.device)
            valid = valid.expand(len(ids), -1)
            return [row[keep][tokens.virtual :].tolist() for row, keep in zip(ids, valid, strict=True)]

        # One list for all layers of a stack.
        own = call.once("ids", listed)
        if known is not None:
            found.mixed = (
                found.mixed or len(known) != len(own) or call.once("mixed", lambda: _of_another(call, own, known))
            )
            if not found.mixed:
                own = call.once(
                    "joined", lambda: [row + before[len(row) :] for row, before in zip(own, known, strict=True)]
                )
            elif max(map(len, known)) >= max(map(len, own)):
                return
        found.ids_of[call.site.path] = own
        if found.ids is None or found.ids is known or max(map(len, found.ids)) < max(map(len, own)):
            found.ids = own


def _of_another(call: AttnCall, own: list[list[int]], known: list[list[int]]) -> bool:
    """Whether the tokens of a call, `own`, or of those with a past the ones before it, are others than the batch rows had."""
    counts = call.tokens.count(call.past).tolist() if call.past else [len(row) for row in own]
    return any(
        row[: min(n, len(before))] != before[: min(n, len(row))]
        for row, before, n in zip(own, known, counts, strict=True)
    )


def _in_backward() -> bool:
    """Whether this thread computes a gradient."""
    return torch._C._current_graph_task_id() != -1


def free_memory() -> int | None:
    """Bytes that this process may still take, of the machine's and of its control group's; None where that is not known."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        if most.isdecimal():
            found.append(int(most) - int((group / "memory.current").read_text(encoding="ascii")))
    except OSError:
        pass
    if not found and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None


def _is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
