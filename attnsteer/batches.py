"""Rows of many requests in one forward, taken apart into batches: for hosts that pack requests over paged caches.

Requests that the same methods act on, with values of their own, become the rows of a batch that is padded on the left, as
`generate` would have it. So an edit sees what it sees when the request runs alone.

    packed rows    a3 | b0 b1 b2 | c7          a and c go on, b begins; a and b are steered, c is not
    groups         [a3]   [b0 b1 b2]   [c7]    keys: all of the request's, or those of its window
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .account import Account, Track
from .call import AttnCall
from .choices import Choice, Order, joined
from .engine import SiteRuntime
from .errors import ContractError
from .shared_rows import Rows
from .tokens import Tokens

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
    keys: Mapping[str, tuple[int, int]] = field(default_factory=dict)
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


def cuts(past: int, n: int, prompt: int, choice: Choice) -> list[int]:
    """Where rows past .. past + n are cut: prompt from generated, and, where each row moves a method's state, row by row."""
    stop = past + n
    border = min(max(prompt, past), stop)
    steps = any(not p.bound.method.follows_crop for p in choice.parts)
    behind = range(border, stop) if steps else [border] if border < stop else []
    return ([past] if border > past else []) + [*behind, stop]


class Group:
    """Pieces that make one batch: left-padded, with the same methods acting on all."""

    host = "this host"

    def __init__(self, pieces: list[Piece], methods: Mapping[str, SiteRuntime], device: torch.device):
        self.pieces, self.runtimes, self.device = pieces, methods, device
        self.batch = len(pieces)
        self.new = max(p.new for p in pieces)
        self.length = max(p.length for p in pieces)
        self.phase = pieces[0].phase
        # What is the same for all layers of this forward.
        self.memo: dict[Any, Any] = {}

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
        return places_of([(p.row, p.new) for p in self.pieces], self.new, self.device)

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
            host=self.host,
            phase=self.phase,
            past=self.length - self.new,
            states=states,
            facts={"tokens": self.tokens},
            memo=self.memo,
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


def places_of(places: list[tuple[int, int]], size: int, device: torch.device) -> Tensor | slice:
    """Packed positions of `size` columns for each (first, number), right-aligned, int [B * size]; a slice for one alone."""
    if len(places) == 1:
        return slice(places[0][0], places[0][0] + places[0][1])
    first, number = (torch.tensor(t, device=device)[:, None] for t in zip(*places, strict=True))
    column = torch.arange(size, device=device) - (size - number)
    return (first + column.clamp_min(0)).reshape(-1)


def used(numbers: list[int], size: int, device: torch.device) -> Tensor:
    """bool [B, size]: the columns that are no padding."""
    return torch.arange(size, device=device) >= size - torch.tensor(numbers, device=device)[:, None]


def index_of(places: Tensor | slice, device: torch.device) -> Tensor:
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


def kind_of(i: int, piece: Piece) -> Any:
    """What pieces have in common that make one batch."""
    choice = piece.request.choice
    if not choice.row_local:
        # Its state is that of one request.
        return i
    # Beginnings are padded to at most twice their length, short ones to `SHORT`; what goes on has no padding among its rows.
    rows = ("first", (max(piece.new, SHORT) - 1).bit_length()) if piece.past == 0 else ("next", piece.new)
    return rows, piece.phase, piece.whole


def grouped(
    joint: Joint,
    pieces: Sequence[Piece],
    device: torch.device,
    kind: Callable[[int, Piece], Any] | None = None,
    make: type[Group] | None = None,
) -> list[Group]:
    """The batches of a forward.

    Args:
        kind: what pieces have in common that make one batch, of (number, piece). make: the class of the batches.
    """
    batches: dict[Any, list[tuple[Order, list[Piece]]]] = {}
    for i, piece in enumerate(pieces):
        known = batches.setdefault((kind or kind_of)(i, piece), [])
        for order, own in known:
            if order.take(piece.request.choice):
                own.append(piece)
                break
        else:
            order = Order()
            order.take(piece.request.choice)
            known.append((order, [piece]))
    return [
        (make or Group)(own, joint.of(order, [p.request.choice for p in own], device), device)
        for known in batches.values()
        for order, own in known
    ]


def check_stateless(runtime: SiteRuntime, states: dict[Any, dict[str, Any]]) -> None:
    for (index, *_), state in states.items():
        if state:
            name = next(b.name for b, _ in runtime.entries if b.index == index)
            raise ContractError(
                f"{name} at {runtime.site.path} declares row_local, and keeps {sorted(state)} in call.state. Set row_local = False."
            )
