"""One forward of continuous batching: the rows of many requests packed into one, over paged caches.

The rows are taken apart again into batches (`attnsteer.batches`), each of which is edited as by `generate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ...attention_map import FEW_ROWS
from ...batches import (
    UNSTEERED,
    Group,
    Joint,
    Piece,
    Request,
    check_stateless,
    cuts,
    grouped,
    index_of,
    places_of,
    used,
)
from ...engine import SiteRuntime
from ...errors import UnsupportedHost
from ..sdpa.host import same_kernel
from .attention_function import check_exact, plain_function, problem
from .outer_calls import Prepared

__all__ = ["CARRIER", "UNSTEERED", "Joint", "Packed", "Request", "pieces"]

# Under which a request's `Request` travels with it through the library's scheduler.
CARRIER = "steer"
# Arguments of a paged call that say nothing once its keys are there.
PAGED = (
    "cache", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "read_index", "write_index", "block_table",
    "logits_indices", "logits_processor_args",
)  # fmt: skip


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
        borders = cuts(past, n, prompt, request.choice)
        ids = partial(_all_ids, state)
        for start, stop in itertools.pairwise(borders):
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


class PackedGroup(Group):
    """A batch of packed rows, with the keys and the mask of each."""

    host = "transformers"

    @cached_property
    def _layouts(self) -> dict[str, tuple[Tensor | slice, Tensor]]:
        return {}

    def layout(self, layer_type: str, mask: Tensor) -> tuple[Tensor | slice, Tensor]:
        """(packed keys of the batch's keys, int [B * m] or a slice; the mask [B, 1, n, m] of these rows and keys)."""
        found = self._layouts.get(layer_type)
        if found is None:
            places = [p.place(layer_type) for p in self.pieces]
            size = max(m for _, m in places)
            keys = places_of(places, size, self.device)
            if isinstance(keys, slice) and isinstance(self.rows, slice):
                own = mask[:, :, self.rows, keys]
            else:
                rows, columns = (index_of(t, self.device).view(self.batch, -1) for t in (self.rows, keys))
                own = mask[0, 0][rows[:, :, None], columns[:, None]]
                known = used([m for _, m in places], size, self.device)
                own = own.masked_fill(~known[:, None], torch.finfo(mask.dtype).min)[:, None]
            found = self._layouts[layer_type] = (keys, own)
        return found


class Packed(Prepared):
    """One forward of packed requests under one steering. It stands in the place of a `Forward`."""

    def __init__(self, joint: Joint, pieces: list[Piece], device: torch.device, exact: set[int]):
        self.joint, self.device, self.exact = joint, device, exact
        self.pieces = pieces
        self.rows = sum(p.new for p in pieces)
        self.groups: list[PackedGroup] = grouped(joint, pieces, device, make=PackedGroup)  # type: ignore[assignment]

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
        self,
        group: PackedGroup,
        path: str,
        active: tuple[int, ...],
        layer_type: str,
        whole: _Whole,
        options: dict[str, Any],
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
            check_stateless(runtime, states)
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
