"""One forward of continuous batching: the rows of many requests packed into one, over paged caches.

The rows are taken apart again: requests that the same methods act on, with values of their own, become the rows of a batch that is
padded on the left, as `generate` would have it. So an edit sees what it sees when the request runs alone.

    packed rows    a3 | b0 b1 b2 | c7          a and c go on, b begins; a and b are steered, c is not
    groups         [a3]   [b0 b1 b2]   [c7]    keys: all of the request's, or those of its window
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ...account import Account, Track
from ...attention_map import FEW_ROWS
from ...call import AttnCall
from ...choices import Choice, Order, joined
from ...engine import SiteRuntime
from ...errors import ContractError, UnsupportedHost
from ...shared_rows import Rows
from ...tokens import Tokens
from ..sdpa.host import same_kernel
from .attention_function import check_exact, plain_function, problem
from .outer_calls import Prepared

# Under which a request's `Request` travels with it through the library's scheduler.
CARRIER = "steer"
# Arguments of a paged call that say nothing once its keys are there.
PAGED = (
    "cache", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "read_index", "write_index", "block_table",
    "logits_indices", "logits_processor_args",
)  # fmt: skip
# Joined methods of the last batches are kept: a batch stays the same over many steps.
KEPT = 64
# Prompts of up to so many tokens are one batch, whatever padding that takes: another batch costs more.
SHORT = 64


@dataclass(eq=False)
class Request:
    """What a steering keeps of one request; a sequence that forks from it has a copy.

    Attributes:
        choice: what acts on it. states: of each method at each site, as in `Sequence`.
    """

    choice: Choice
    states: dict[Any, dict[str, Any]] = field(default_factory=dict)


UNSTEERED = Request(Choice())


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of one request that belong together: all of its prompt, or all generated.

    Attributes:
        row: where they begin among the packed rows. new: how many. past: tokens of the request before them. prompt: of its prompt.
        ids: gives the token ids of the request, to the last of these rows or further. behind: rows of the request in this forward
            that come after these. whole: whether the prompt ends in this forward, or has.
    """

    request: Request
    row: int
    new: int
    past: int
    prompt: int
    ids: Callable[[], list[int]]
    keys: Mapping[str, tuple[int, int]]
    behind: int = 0
    whole: bool = True

    @property
    def length(self) -> int:
        """Tokens of the request so far."""
        return self.past + self.new

    @property
    def phase(self) -> str:
        """ "prefill" or "decode"."""
        return "decode" if self.past >= self.prompt else "prefill"

    def place(self, layer_type: str) -> tuple[int, int]:
        """(first, number) of its keys among the packed ones of a layer type; those of later rows are left out."""
        start, size = self.keys[layer_type]
        return start, size - self.behind


def pieces(requests: Sequence[Any], seqlen_k: Mapping[str, Callable[[int, int], int]]) -> list[Piece]:
    """The rows of a forward.

    Args:
        requests: the library's `FutureRequestState`s in packed order, after it has counted their rows as done.
        seqlen_k: layer type -> (past, rows) -> keys of a request.
    """
    found, row, first = [], 0, dict.fromkeys(seqlen_k, 0)
    for item in requests:
        state, n = item.state, item.query_length
        past = state.position_offset - n
        request = state.logit_processor_kwargs.get(CARRIER, UNSTEERED)
        # After a reset under memory pressure the tokens that were generated stand behind the prompt, to be computed again.
        prompt = state._true_initial_tokens or len(state.initial_tokens)
        keys = {}
        for kind, size in seqlen_k.items():
            keys[kind] = (first[kind], size(past, n))
            first[kind] += keys[kind][1]
        if past == 0:
            request.states.clear()
        cuts = _cuts(past, n, prompt, request.choice)
        ids = partial(_all_ids, state)
        for start, stop in itertools.pairwise(cuts):
            found.append(
                Piece(
                    request, row + start - past, stop - start, start, prompt, ids, keys,
                    behind=past + n - stop, whole=past + n >= prompt,
                )
            )  # fmt: skip
        row += n
    return found


def _all_ids(state: Any) -> list[int]:
    return state.initial_tokens + state.generated_tokens


def _cuts(past: int, n: int, prompt: int, choice: Choice) -> list[int]:
    """Where rows past .. past + n are cut: prompt from generated, and, where each row moves a method's state, row by row."""
    stop = past + n
    border = min(max(prompt, past), stop)
    steps = any(not p.bound.method.follows_crop for p in choice.parts)
    behind = range(border, stop) if steps else [border] if border < stop else []
    return ([past] if border > past else []) + [*behind, stop]


class Group:
    """Pieces that make one batch: left-padded, with the same methods acting on all."""

    def __init__(self, pieces: list[Piece], methods: Mapping[str, SiteRuntime], device: torch.device):
        self.pieces, self.runtimes, self.device = pieces, methods, device
        self.batch = len(pieces)
        self.new = max(p.new for p in pieces)
        self.length = max(p.length for p in pieces)
        self.phase = pieces[0].phase
        self._layouts: dict[str, tuple[Tensor | slice, Tensor]] = {}

    @cached_property
    def valid(self) -> Tensor | None:
        """bool [B, T], or None without padding."""
        pads = [self.length - p.length for p in self.pieces]
        if not any(pads):
            return None
        return torch.arange(self.length, device=self.device) >= torch.tensor(pads, device=self.device)[:, None]

    @cached_property
    def account(self) -> Account:
        """Whose token each row and key is."""
        borders = [self.length - p.length + p.prompt for p in self.pieces]
        prompt = borders[0] if len(set(borders)) == 1 else torch.tensor(borders, device=self.device)
        return Account(
            self.batch, self.length - self.new, self.new, self.device,
            valid=self.valid, prompt=prompt, phase=self.phase,
        )  # fmt: skip

    @cached_property
    def tokens(self) -> Tokens:
        """Roles of the tokens so far."""
        return _Tokens(self)

    @cached_property
    def rows(self) -> Tensor | slice:
        """The packed rows of the batch's rows, int [B * n] or a slice; of padding, some row of the request."""
        return _places([(p.row, p.new) for p in self.pieces], self.new, self.device)

    def layout(self, layer_type: str, mask: Tensor) -> tuple[Tensor | slice, Tensor]:
        """(packed keys of the batch's keys, int [B * m] or a slice; the mask [B, 1, n, m] of these rows and keys)."""
        found = self._layouts.get(layer_type)
        if found is None:
            places = [p.place(layer_type) for p in self.pieces]
            size = max(m for _, m in places)
            keys = _places(places, size, self.device)
            if isinstance(keys, slice) and isinstance(self.rows, slice):
                own = mask[:, :, self.rows, keys]
            else:
                rows, columns = (_index(t, self.device).view(self.batch, -1) for t in (self.rows, keys))
                own = mask[0, 0][rows[:, :, None], columns[:, None]]
                used = _used([m for _, m in places], size, self.device)
                own = own.masked_fill(~used[:, None], torch.finfo(mask.dtype).min)[:, None]
            found = self._layouts[layer_type] = (keys, own)
        return found

    @property
    def states(self) -> dict[Any, dict[str, Any]]:
        """Where the methods keep what they remember: with the request; those that remember nothing share a batch."""
        request = self.pieces[0].request
        return {} if request.choice.row_local else request.states

    def call(self, runtime: SiteRuntime, keys: int, states: dict[Any, dict[str, Any]]) -> AttnCall:
        """The call of one site with `keys` keys."""
        return AttnCall(
            runtime.site,
            lambda: self.account.rows,
            partial(self._keys, keys),
            host="transformers",
            phase=self.phase,
            past=self.length - self.new,
            states=states,
            facts={"tokens": self.tokens},
        )

    def _keys(self, keys: int) -> Track:
        return self.account.keys(keys)


class _Tokens(Tokens):
    """Tokens of a batch of requests; ids are put together when something reads them."""

    def __init__(self, group: Group):
        self._group = group
        prompts = {group.length - p.length + min(p.prompt, p.length) for p in group.pieces}
        self._prompt = next(iter(prompts)) if len(prompts) == 1 else None
        super().__init__(batch=group.batch, length=group.length, valid=group.valid)
        self.more_to_come = not group.pieces[0].whole

    @property
    def ids(self) -> Tensor:  # type: ignore[override]
        """int [B, T], zeros for padding."""
        rows = [[0] * (self.length - p.length) + p.ids()[: p.length] for p in self._group.pieces]
        return torch.tensor(rows, device=self._group.device)

    @ids.setter
    def ids(self, value: Any) -> None:
        pass

    @property
    def prompt(self) -> int | None:  # type: ignore[override]
        """Slots of the prompt so far.

        Raises:
            ContractError: the requests of the batch have prompts that end at different slots.
        """
        if self._prompt is None:
            raise ContractError(
                "call.tokens.prompt is one number for a batch, and the prompts of these requests end at different slots. Read "
                "call.rows.generated and call.keys.generated."
            )
        return self._prompt

    @prompt.setter
    def prompt(self, value: Any) -> None:
        pass

    @property
    def prompt_known(self) -> bool:
        """Always: requests say what their prompt is."""
        return True

    def generated(self) -> Tensor:
        """bool [B, T]: tokens behind the prompt."""
        return self._group.account.keys(self.length).generated.expand(self.batch, -1)


def _places(places: list[tuple[int, int]], size: int, device: torch.device) -> Tensor | slice:
    """Packed positions of `size` columns for each (first, number), right-aligned, int [B * size]; a slice for one alone."""
    if len(places) == 1:
        return slice(places[0][0], places[0][0] + places[0][1])
    first, number = (torch.tensor(t, device=device)[:, None] for t in zip(*places, strict=True))
    column = torch.arange(size, device=device) - (size - number)
    return (first + column.clamp_min(0)).reshape(-1)


def _used(numbers: list[int], size: int, device: torch.device) -> Tensor:
    """bool [B, size]: the columns that are no padding."""
    return torch.arange(size, device=device) >= size - torch.tensor(numbers, device=device)[:, None]


def _index(places: Tensor | slice, device: torch.device) -> Tensor:
    return torch.arange(places.start, places.stop, device=device) if isinstance(places, slice) else places


class Joint:
    """The methods of the last batches, joined by site."""

    def __init__(self, run: Any):
        self.run = run
        self._known: OrderedDict[tuple[bytes, ...], dict[str, SiteRuntime]] = OrderedDict()

    def of(self, order: Order, choices: list[Choice], device: torch.device) -> Mapping[str, SiteRuntime]:
        """Site path -> what acts there on requests with these choices, in this order."""
        key = tuple(c.identity for c in choices) + tuple(order.parts)
        found = self._known.pop(key, None)
        if found is None:
            found = self._made(order, device)
            while len(self._known) >= KEPT:
                self._known.popitem(last=False)
        self._known[key] = found
        return found

    def _made(self, order: Order, device: torch.device) -> dict[str, SiteRuntime]:
        bounds = [(joined(own, order.size), own) for own in order.parts.values()]
        rows = None
        if not order.uniform:
            rows = {
                id(bound): Rows.make({i: p.bound.index for i, p in own.items()}, order.size, device)
                for bound, own in bounds
            }
        made = {}
        for site in self.run.sites:
            firsts = [(bound, next(iter(own.values())).sites) for bound, own in bounds]
            entries = [(bound, sites[site.path]) for bound, sites in firsts if site.path in sites]
            if entries:
                runtime = made[site.path] = SiteRuntime(self.run, site, entries, together=rows is None, rows=rows)
                # The first act of each method at a site was looked at, whoever's request it was.
                runtime.checked = self.run.runtimes[site.path].checked
        return made


class Packed(Prepared):
    """One forward of packed requests under one steering. It stands in the place of a `Forward`."""

    def __init__(self, joint: Joint, pieces: list[Piece], device: torch.device, exact: set[int]):
        self.joint, self.device, self.exact = joint, device, exact
        self.pieces = pieces
        self.rows = sum(p.new for p in pieces)
        batches: dict[Any, list[tuple[Order, list[Piece]]]] = {}
        for i, piece in enumerate(pieces):
            known = batches.setdefault(_kind(i, piece), [])
            for order, own in known:
                if order.take(piece.request.choice):
                    own.append(piece)
                    break
            else:
                order = Order()
                order.take(piece.request.choice)
                known.append((order, [piece]))
        self.groups = [
            Group(own, joint.of(order, [p.request.choice for p in own], device), device)
            for known in batches.values()
            for order, own in known
        ]

    @cached_property
    def order(self) -> Tensor | None:
        """Where each packed row is among the rows of all groups, one group after the other; None: they are in order."""
        places, start = [0] * self.rows, 0
        for group in self.groups:
            for b, piece in enumerate(group.pieces):
                first = start + (b + 1) * group.new - piece.new
                places[piece.row : piece.row + piece.new] = range(first, first + piece.new)
            start += group.batch * group.new
        if places == list(range(start)):
            return None
        return torch.tensor(places, device=self.device)

    def layer(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer: nothing of it is needed."""
        return inner(*args, **kwargs)

    def attend(
        self,
        runtime: SiteRuntime,
        name: str,
        base: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of one layer, edited for the requests that ask for it: [1, N, H, dv]."""
        path = runtime.site.path
        acting = [g.runtimes[path].active(g.phase, None, None) if path in g.runtimes else () for g in self.groups]
        if not any(acting):
            return base(module, query, key, value, mask, **options)
        if not isinstance(mask, Tensor) or mask.ndim != 4 or options.get("block_table") is not None:
            raise UnsupportedHost(f"{path}: this paged attention call has no mask, which says what a row sees.")
        allocator = options["cache"].layer_to_allocator[module.layer_idx]
        key, value = options["cache"].update(key, value, module.layer_idx, options)
        plain = {k: v for k, v in options.items() if k not in PAGED}
        whole = _Whole(name, base, module, query, key, value, mask, options)
        outs, edited = [], False
        for group, active in zip(self.groups, acting, strict=True):
            out, changed = self._group(group, path, active, allocator.layer_type, whole, plain)
            outs.append(out.transpose(1, 2).flatten(0, 1))
            edited = edited or changed
        if not edited:
            # All strengths were neutral: what the model itself computes, to the last bit.
            return whole.out, None
        packed = torch.cat(outs) if len(outs) > 1 else outs[0]
        packed = packed if self.order is None else packed.index_select(0, self.order)
        return packed[None].contiguous(), None

    def _group(
        self, group: Group, path: str, active: tuple[int, ...], layer_type: str, whole: _Whole, options: dict[str, Any]
    ) -> tuple[Tensor, bool]:
        """(the output [B, H, n, dv] of one group, whether anything was edited)."""
        keys, mask = group.layout(layer_type, whole.mask)
        q, k, v = (
            taken(t, at, group.batch) for t, at in ((whole.query, group.rows), (whole.key, keys), (whole.value, keys))
        )
        made: list[Tensor] = []

        def run_base() -> Tensor:
            if not made:
                made.append(whole.plain(q, k, v, mask, options))
            return made[0]

        if not active:
            return run_base(), False
        runtime = group.runtimes[path]
        att = problem(whole.module, whole.name, q, k, v, mask, options)
        if id(whole.module) not in self.exact:
            own = taken(whole.out.transpose(1, 2), group.rows, group.batch)
            check_exact(runtime.site, att, lambda index: own.index_select(2, index))
            self.exact.add(id(whole.module))
        states = group.states
        same = partial(same_kernel, att) if whole.name == "sdpa" and group.new > FEW_ROWS else None
        out = runtime(att, run_base, group.call(runtime, k.shape[2], states), active, same)
        if states is not group.pieces[0].request.states:
            _check_stateless(runtime, states)
        return out, not (made and out is made[0])


class _Whole:
    """The packed attention call of one layer, its keys read from the cache."""

    def __init__(
        self,
        name: str,
        base: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        options: dict[str, Any],
    ):
        self.name = "eager" if name == "paged|eager" else name
        self.base, self.module, self.query, self.key, self.value, self.mask = base, module, query, key, value, mask
        self._options = {**options, "cache": _Read(key, value)} if self.name == "eager" else {**options, "cache": None}
        self._function = plain_function(module, self.name)

    @cached_property
    def out(self) -> Tensor:
        """[1, N, H, dv], what the model computes for all rows together."""
        return self.base(self.module, self.query, self.key, self.value, self.mask, **self._options)[0]

    def plain(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
        """[B, H, n, dv], the model's own function on a batch."""
        return self._function(self.module, q, k, v, mask, **options)[0].transpose(1, 2)


class _Read:
    """Stands in for a cache whose keys were read already: reading a window's again would find what has been written since."""

    def __init__(self, key: Tensor, value: Tensor):
        self.key, self.value = key, value

    def update(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What was read."""
        return self.key, self.value


def taken(t: Tensor, at: Tensor | slice, batch: int) -> Tensor:
    """[1, H, N, d] at packed positions, as [B, H, n, d]."""
    if isinstance(at, slice):
        return t[:, :, at]
    found = t[0].transpose(0, 1).index_select(0, at)
    return found.view(batch, -1, *found.shape[1:]).transpose(1, 2)


def _kind(i: int, piece: Piece) -> Any:
    """What pieces have in common that make one batch."""
    choice = piece.request.choice
    if not choice.row_local:
        # Its state is that of one request.
        return i
    # Beginnings are padded to at most twice their length, short ones to `SHORT`; what goes on has no padding among its rows.
    rows = ("first", (max(piece.new, SHORT) - 1).bit_length()) if piece.past == 0 else ("next", piece.new)
    return rows, piece.phase, piece.whole


def _check_stateless(runtime: SiteRuntime, states: dict[Any, dict[str, Any]]) -> None:
    for (index, *_), state in states.items():
        if state:
            name = next(b.name for b, _ in runtime.entries if b.index == index)
            raise ContractError(
                f"{name} at {runtime.site.path} declares row_local, and keeps {sorted(state)} in call.state. Set row_local = False."
            )
