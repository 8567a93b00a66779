"""Which rows of a step belong to which request, and what acts on them: the one file that knows vLLM's two model runners.

A plan is drawn up once for each step and travels on the step's attention metadata, from which each layer reads it. A row's phase is
its own, not the step's: a request that was preempted computes its prompt and what it had generated again in one piece.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...audit import Audit
from ...batches import SHORT, Group, Joint, Piece, Request, cuts, grouped
from ...choices import Choice, Order
from ...engine import SiteRuntime
from ...errors import CompositionError, listing
from ...shards import Shards
from ...site import Site
from . import wire
from .menu import Menu

logger = logging.getLogger("vllm.attnsteer")


@dataclass(eq=False)
class Tracked(Request):
    """A request in the workers.

    Attributes:
        id, prompt: its id, and the tokens of its prompt. ids: gives its tokens so far.
        edits: attention calls that were edited. changed: whether that changed an output: False until it is known to have.
        begun: how often it began anew. stack: the states of a batch of which it is the first, see `Batch.states`.
    """

    id: str = ""
    prompt: int = 0
    ids: Callable[[], list[int]] = list
    edits: int = 0
    changed: bool | Tensor = False
    begun: int = 0
    stack: tuple[Any, dict[Any, dict[str, Any]]] | None = None

    @cached_property
    def settles(self) -> bool:
        """Whether what its methods keep moves no more when its prompt is over, and is a key set: then it shares batches."""
        bounds = [p.bound for p in self.choice.parts]
        return all(b.where.rows != "last" and (b.method.row_local or b.method.frozen_keys is not None) for b in bounds)

    def begin(self) -> None:
        """Its first token is computed, again perhaps."""
        self.states.clear()
        self.begun += 1
        self.stack = None


@dataclass(frozen=True, eq=False)
class Rows(Piece):
    """Rows of one request, with its place among the requests of the step."""

    index: int = 0


class Batch(Group):
    """Rows of some requests that are edited together."""

    host = "vllm"

    @property
    def states(self) -> dict[Any, dict[str, Any]]:
        """As in `Group`; of several requests that settled, the key sets of all, padded as the batch is."""
        first = self.pieces[0].request
        if len(self.pieces) == 1 or first.choice.row_local:
            return super().states
        key = [(p.request, p.request.begun, self.length - p.length) for p in self.pieces]  # type: ignore[attr-defined]
        # The same while these requests go on together.
        if first.stack is None or first.stack[0] != key:  # type: ignore[attr-defined]
            first.stack = key, self._stacked()  # type: ignore[attr-defined]
        return first.stack[1]  # type: ignore[attr-defined, no-any-return]

    def _stacked(self) -> dict[Any, dict[str, Any]]:
        first, found = self.pieces[0].request, {}
        names = {p.bound.index: p.bound.method.frozen_keys for p in first.choice.parts}
        for place in first.states:
            name = names[place[0]]
            sets = [p.request.states.get(place, {}).get(name) for p in self.pieces]
            if all(own is not None for own in sets):
                found[place] = {name: self._padded(sets)}
        return found

    def _padded(self, sets: list[Tensor]) -> Tensor:
        """Key sets [1, h, t] by slot of each request as one, [B, h, T]."""
        pads = [self.length - p.length for p in self.pieces]
        size = max(pad + own.shape[-1] for pad, own in zip(pads, sets, strict=True))
        out = sets[0].new_zeros(len(sets), sets[0].shape[1], size)
        for b, (pad, own) in enumerate(zip(pads, sets, strict=True)):
            out[b, :, pad : pad + own.shape[-1]] = own[0]
        return out

    @cached_property
    def index(self) -> Tensor:
        """int64 [B], the places of the requests."""
        return torch.tensor([p.index for p in self.pieces], device=self.device)  # type: ignore[attr-defined]

    @cached_property
    def packed(self) -> Tensor:
        """int64 [B], the packed row of each request in a batch of decode rows."""
        return torch.tensor([p.row for p in self.pieces], device=self.device)

    @cached_property
    def pads(self) -> Tensor:
        """int64 [B], the slots of padding before each request."""
        return torch.tensor([self.length - p.length for p in self.pieces], device=self.device)

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [B], the tokens of each request so far."""
        return torch.tensor([p.length for p in self.pieces], device=self.device)

    @cached_property
    def real(self) -> tuple[Tensor, Tensor] | None:
        """(places among the batch's rows [B * n], packed rows) of what is no padding; None: there is none."""
        if all(p.new == self.new for p in self.pieces):
            return None
        own = [b * self.new + i for b, p in enumerate(self.pieces) for i in range(self.new - p.new, self.new)]
        packed = [p.row + i for p in self.pieces for i in range(p.new)]
        return torch.tensor(own, device=self.device), torch.tensor(packed, device=self.device)

    def mask(self, window: int) -> tuple[Tensor | None, bool]:
        """(mask [B, 1, n, m] or None, causal flag) of these rows; `window`: keys that a row sees, 0 for all."""
        found = self.memo.get(("mask", window))
        if found is None:
            found = self.memo["mask", window] = self._mask(window)
        return found

    def _mask(self, window: int) -> tuple[Tensor | None, bool]:
        n, m = self.new, self.length
        windowed = 0 < window < m
        if n == 1 and not windowed:
            return None if self.valid is None else self.valid[:, None, None], False
        if m == n and self.valid is None and not windowed:
            return None, True
        row = torch.arange(m - n, m, device=self.device)[:, None]
        key = torch.arange(m, device=self.device)[None]
        seen = (key <= row) & (key > row - window) if windowed else key <= row
        return (seen[None, None] if self.valid is None else seen & self.valid[:, None, None]), False


@dataclass(eq=False)
class Plan:
    """What is edited in one step."""

    batches: list[Batch]

    @cached_property
    def rows(self) -> int:
        """How many rows it has."""
        return sum(p.new for batch in self.batches for p in batch.pieces)


class SharedHeads(Joint):
    """Joined methods of processes that hold a part of each layer's heads."""

    def __init__(self, run: Any, rank: int, size: int):
        super().__init__(run)
        self._shards = Shards(None, tuple(range(size)), rank) if size > 1 else None

    def _made(self, order: Order, device: torch.device) -> dict[str, SiteRuntime]:
        found = super()._made(order, device)
        for runtime in found.values():
            runtime.shards = self._shards
        return found


@dataclass(eq=False)
class _Checked:
    """What of a site's first edits was looked at."""

    checked: set[Any] = field(default_factory=set)


class Armed:
    """The steering of a worker: a `Run` for the engine of edits. Methods have the number of their form, by which they join."""

    measure = reference = False
    branch = None

    def __init__(self, menu: Menu):
        self.menu = menu
        self.sites: list[Site] = menu.sites
        self.runtimes = {site.path: _Checked() for site in self.sites}
        self.audit = Audit([])
        self.opened: list[int] = []
        self._numbers: dict[bytes, int] = {}
        self._known: dict[str, Choice] = {}

    def is_open(self, bound: Any) -> bool:
        """No method of an engine calls the model."""
        return True

    def inside(self, method: Any) -> Any:
        """As above."""
        raise CompositionError("an engine runs its model once for each step.")

    def choice(self, given: Any) -> Choice:
        """What travelled with a request, its methods numbered.

        Raises:
            CompositionError: it was not resolved at the door.
        """
        if not isinstance(given, Mapping) or wire.RESOLVED not in given:
            raise CompositionError(
                f"{wire.KEY}: a request that asks for steering reached a worker without having been checked: the plug-in was not "
                "loaded in the process that took it. Look for its error in that process's log, and at VLLM_PLUGINS."
            )
        text = wire.canonical(given["methods"])
        found = self._known.get(text)
        if found is None:
            if len(self._known) >= 4096:
                self._known.clear()
            parts = []
            for item in given["methods"]:
                method = wire.restored(item)
                form = self.menu.part(0, method).form
                number = self._numbers.setdefault(form, len(self._numbers))
                if number == len(self.audit.names):
                    self.audit.names.append(type(method).__name__)
                parts.append(self.menu.part(number, method))
            found = self._known[text] = Choice(tuple(parts))
        return found


class Ledger:
    """The steered requests of a worker, and the plan of each step.

    Args:
        run: the worker's steering. device: of its tensors. rank, size: of this process among those that share heads.
    """

    def __init__(self, run: Armed, device: torch.device, rank: int = 0, size: int = 1):
        self.run, self.device, self.size = run, device, size
        self.joint = SharedHeads(run, rank, size)
        self.requests: dict[str, Tracked | None] = {}
        self.finished = self.silent = self.steps = 0

    def enter(self, id: str, params: Any, prompt: int, ids: Callable[[], list[int]]) -> Tracked | None:
        """A request that is there now; None: it is not steered. One that comes again after preemption keeps what it had."""
        known = self.requests.get(id, False)
        if known is not False:
            return known
        extra = getattr(params, "extra_args", None) or {}
        found = None
        if extra.get(wire.KEY) is not None:
            choice = self.run.choice(extra[wire.KEY])
            found = Tracked(choice, id=id, prompt=wire.prompt_of(params, prompt), ids=ids)
        self.requests[id] = found
        return found

    def leave(self, id: str) -> None:
        """A request that is done."""
        request = self.requests.pop(id, None)
        if request is None:
            return
        self.finished += 1
        names = listing(type(p.bound.method).__name__ for p in request.choice.parts)
        if bool(request.changed):
            logger.info("request %s: %s edited %d attention calls.", id, names, request.edits)
        elif self.size == 1 and request.edits:
            self.silent += 1
            logger.warning("request %s: %s edited %d attention calls and changed nothing.", id, names, request.edits)

    def plan(self, steps: Iterable[tuple[str, int, int, int, int]]) -> Plan | None:
        """The plan of a step; None where nobody is steered.

        Args:
            steps: of each request in it (id, its place, its first packed row, rows, tokens before them).
        """
        pieces: list[Rows] = []
        for id, index, row, n, past in steps:
            request = self.requests.get(id)
            if request is None or n == 0:
                continue
            if past == 0:
                request.begin()
            borders = cuts(past, n, request.prompt, request.choice)
            for start, stop in itertools.pairwise(borders):
                pieces.append(
                    Rows(
                        request, row + start - past, stop - start, start, request.prompt, request.ids,
                        whole=past + n >= request.prompt, index=index,
                    )
                )  # fmt: skip
        self.steps += 1
        if not pieces:
            return None
        return Plan(grouped(self.joint, pieces, self.device, kind, Batch))  # type: ignore[arg-type]


def kind(i: int, piece: Piece) -> Any:
    """What pieces have in common that make one batch: methods that can be joined, and rows that need little padding."""
    choice = piece.request.choice
    settled = piece.new == 1 and piece.phase == "decode" and piece.request.settles  # type: ignore[attr-defined]
    if piece.new > SHORT or not (choice.row_local or settled):
        return i
    forms = tuple(part.form for part in choice.parts)
    return (forms, piece.phase, piece.new) if piece.past else (forms, piece.phase, "first", piece.whole)


def put(metadata: Any, plan: Plan | None) -> None:
    """Let a step's plan travel on its attention metadata: a mapping of layers, or one for each micro-batch."""
    if plan is None:
        return
    for layers in metadata if isinstance(metadata, list) else [metadata]:
        for own in {id(m): m for m in layers.values()}.values():
            own.attnsteer = plan


def follow(runner: Any, ledger: Ledger) -> None:
    """Let a model runner draw up a plan for each of its steps."""
    if hasattr(runner, "input_batch"):
        _follow_first(runner, ledger)
    else:
        _follow_second(runner, ledger)


def _follow_first(runner: Any, ledger: Ledger) -> None:
    """Model runner V1: its batch and its requests are read when it builds the metadata of a step."""
    build = runner._build_attention_metadata

    def built(*args: Any, **kwargs: Any) -> Any:
        metadata, rest = build(*args, **kwargs)
        batch = runner.input_batch
        for id in [id for id in ledger.requests if id not in runner.requests]:
            ledger.leave(id)
        # Dummy batches, of profiling and warming up, are of no request.
        if batch.num_reqs and kwargs.get("num_scheduled_tokens") is not None:
            starts, steps = runner.query_start_loc.np, []
            for i, id in enumerate(batch.req_ids[: batch.num_reqs]):
                state = runner.requests[id]
                if (
                    ledger.enter(id, state.sampling_params, int(batch.num_prompt_tokens[i]), _tokens_of(state))
                    is not None
                ):
                    first, stop = int(starts[i]), int(starts[i + 1])
                    steps.append((id, i, first, stop - first, int(batch.num_computed_tokens_cpu[i])))
            put(metadata, ledger.plan(steps))
        return metadata, rest

    runner._build_attention_metadata = built


def _tokens_of(state: Any) -> Callable[[], list[int]]:
    return lambda: [*(state.prompt_token_ids or ()), *state.output_token_ids]


def _follow_second(runner: Any, ledger: Ledger) -> None:
    """Model runner V2: it tells its model state of requests that come and go, and has it prepare the metadata."""
    state = runner.model_state
    add, prepare, finish = state.add_request, state.prepare_attn, runner.finish_requests

    def add_request(slot: int, request: Any) -> Any:
        ids = list(request.prefill_token_ids or ())
        ledger.enter(request.req_id, request.sampling_params, request.prompt_len, lambda: ids)
        return add(slot, request)

    def finish_requests(output: Any) -> Any:
        # Preempted requests leave the runner too, and come back.
        for id in output.finished_req_ids:
            ledger.leave(id)
        return finish(output)

    def prepare_attn(batch: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = prepare(batch, *args, **kwargs)
        if not kwargs.get("for_capture"):
            starts, past = batch.query_start_loc_np, batch.num_computed_tokens_np
            steps = [
                (id, i, int(starts[i]), int(starts[i + 1] - starts[i]), int(past[i]))
                for i, id in enumerate(batch.req_ids)
            ]
            put(metadata, ledger.plan(steps))
        return metadata

    state.add_request, state.prepare_attn, runner.finish_requests = add_request, prepare_attn, finish_requests
