"""What maps say of heads: readings of blocks of rows, reduced at once, and the patterns that they are compared with.

Which of them `head_profile` makes a column of, and after whom: see `profile.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError, brief
from ..intervention import Intervention

Pattern = Callable[["Block"], Tensor]
# Above this an entry counts as high attention, and fewer counted pairs than that say nothing (the shipped scripts of ProVis).
THETA, COUNT = 0.3, 100
# Of attention sinks (Gu et al. 2025), in column means; a column needs so many rows.
SINK, SINK_ROWS = 0.3, 4
TOP = 5
ROWS = 256


@dataclass
class Block:
    """Some rows of a map, for patterns: 0-based indices in the request, and the tokens.

    Attributes:
        i: [B, r, 1] index of each row. j: [B, 1, m] of each key. rows: token ids of the rows [B, r, 1], or None. keys: [B, 1, m].
        before: token ids of the token before each key [B, 1, m], -1 before the first. seen: bool [B, r, m], keys that rows see.
    """

    i: Tensor
    j: Tensor
    rows: Tensor | None
    keys: Tensor | None
    before: Tensor | None
    seen: Tensor


def _ids(name: str, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    if block.rows is None:
        raise SelectionError(f"the pattern {name!r} compares tokens, and this call has no input_ids.")
    return block.rows, block.keys, block.before


def _duplicate(b: Block) -> Tensor:
    rows, keys, _ = _ids("duplicate", b)
    return (rows == keys) & (b.j < b.i)


def _induction(b: Block) -> Tensor:
    rows, _, before = _ids("induction", b)
    return (before == rows) & (b.j <= b.i) & (b.j >= 1)


# f(i, j): row i should look at key j.
PATTERNS: dict[str, Pattern] = {
    "first": lambda b: (b.j == 0) & (b.i >= 0),
    "self": lambda b: b.j == b.i,
    "previous": lambda b: b.j == b.i - 1,
    "duplicate": _duplicate,
    "induction": _induction,
}


@dataclass
class _Sums:
    """Sums over the rows of one input by reading: name -> (numerators [B, H], denominators [B, H])."""

    found: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, name: str, top: Tensor, bottom: Tensor) -> None:
        a, b = self.found.get(name, (0.0, 0.0))
        self.found[name] = (a + top.double(), b + bottom.double().expand_as(top))


@dataclass(frozen=True)
class Profiled(Intervention):
    """Reduces the rows of each site; edits nothing.

    Attributes:
        found: site path -> of each call, name -> (numerators [B, H], denominators [B, H]).
        last: site path -> of each call, the map, values and output of the last valid row of each input.
    """

    patterns: Mapping[str, Pattern] = field(default_factory=dict, compare=False, repr=False)
    theta: float | None = THETA
    spans: Mapping[str, Sequence[Sequence[tuple[int, int]]]] = field(default_factory=dict, compare=False, repr=False)
    tokens: bool = True
    images: bool = False
    grid: tuple[int, int] | None = None
    ahead: int = 0
    rows: str = "applicable"
    found: dict[str, list[dict[str, tuple[Tensor, Tensor]]]] = field(default_factory=dict, compare=False, repr=False)
    last: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict, compare=False, repr=False)

    observes = True
    needs = property(lambda self: (("tokens",) if self.tokens else ()) + (("images",) if self.images else ()))

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Reduce all valid rows of this call."""
        A_map, sums = call.map, _Sums()
        B, H, n, m = A_map.shape
        seen_keys = A_map.keys_seen().expand(B, -1, n)[:, 0]
        valid = call.row_valid.expand(B, n) & (seen_keys >= 2)
        key_valid = call.key_valid.expand(B, m)
        i, j = call.rows.index.expand(B, n), call.keys.index.expand(B, m)
        ids = call.tokens.ids if self.tokens else None
        slot = call.rows.slot
        keys = before = row_ids = None
        if ids is not None and ids.shape[1] >= m:
            ids = ids.to(A_map.device)
            keys = ids[:, call.keys.slot].expand(B, m)
            row_ids = ids[:, slot].expand(B, n)
            before = torch.cat([keys.new_full((B, 1), -1), keys[:, :-1]], dim=1).masked_fill(j < 1, -1)
        spans = {name: call.span_keys(given)[:, 0].expand(B, m) for name, given in self.spans.items()}
        if self.images:
            spans["image"] = call.image_keys()[:, 0].expand(B, m)
        # Causal stacks see what is at or before them; windows and packing are in `keys_seen` and in the map's zeros.
        for start in range(0, n, ROWS):
            at = torch.arange(start, min(n, start + ROWS), device=A_map.device)
            A = A_map.rows(at).float()
            w = valid[:, at].float()
            block = Block(
                i[:, at, None],
                j[:, None],
                None if row_ids is None else row_ids[:, at, None],
                None if keys is None else keys[:, None],
                None if before is None else before[:, None],
                _visible(call, A, i[:, at], j, key_valid),
            )
            self._block(sums, A, w, block, spans, seen_keys[:, at].float())
        self._columns(call, sums, valid)
        self.found.setdefault(call.site.path, []).append({k: (a.cpu(), b.cpu()) for k, (a, b) in sums.found.items()})
        self._last_row(call, out)

    def _block(
        self, sums: _Sums, A: Tensor, w: Tensor, block: Block, spans: Mapping[str, Tensor], visible: Tensor
    ) -> None:
        """A [B, H, r, m] of rows with weight w [B, r]."""
        count = w.sum(dim=1)[:, None].expand(A.shape[:2])
        mean = lambda name, x: sums.add(name, torch.einsum("bhr,br->bh", x, w), count)  # noqa: E731
        total = A.sum(dim=-1)
        entropy = torch.special.entr(A).sum(dim=-1)
        mean("entropy", entropy)
        mean("eff", entropy.exp())
        mean("dispersion", entropy.exp() / visible[:, None].clamp_min(1))
        squares, cubes = A.pow(2).sum(dim=-1), A.pow(3).sum(dim=-1)
        mean("sensitivity", (squares - 2 * cubes + squares.pow(2)).clamp_min(0).sqrt())
        mean(f"top_mass_{TOP}", A.topk(min(TOP, A.shape[-1]), dim=-1).values.sum(dim=-1))
        if self.grid is None:
            mean("distance", (A * (block.i - block.j).abs()[:, None]).sum(dim=-1))
        else:
            self._rings(sums, A)
        for name, keys in spans.items():
            inside = A * keys[:, None, None]
            share = inside.sum(dim=-1)
            mean(f"mass_{name}", share)
            size = keys.sum(dim=-1).float()[:, None, None]
            spread = torch.special.entr(inside / share.clamp_min(1e-30)[..., None]).sum(dim=-1) / size.log().clamp_min(
                1e-6
            )
            known = (share > 1e-12).float() * w[:, None] * (size[..., 0] > 1)[..., None].float()
            sums.add(f"concentration_{name}", ((1 - spread) * known).sum(dim=-1), known.sum(dim=-1))
            sums.add(
                f"chance_mass_{name}",
                ((block.seen * keys[:, None]).sum(-1) / visible.clamp_min(1) * w).sum(1)[:, None],
                count[:, :1],
            )
        for name, pattern in self.patterns.items():
            found = pattern(block)
            if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape[1:] != block.seen.shape[1:]:
                raise SelectionError(
                    f"the pattern {name!r} gave {brief(found)}; give bool [B or 1, {', '.join(map(str, block.seen.shape[1:]))}], "
                    "which keys each row of the block looks at."
                )
            P = (found & block.seen).float()
            rows = w if self.rows == "all" else w * (P.sum(dim=-1) > 0)
            hit = (A * P[:, None]).sum(dim=-1)
            sums.add(name, torch.einsum("bhr,br->bh", hit, rows), torch.einsum("bhr,br->bh", total, rows))
            base = (P.sum(dim=-1) / block.seen.sum(dim=-1).clamp_min(1) * rows).sum(dim=1)[:, None]
            sums.add(f"chance_{name}", base, rows.sum(dim=1)[:, None])
            if self.theta is not None:
                high = (self.theta <= A).float() * w[:, None, :, None]
                sums.add(f"agreement_{name}", (high * P[:, None]).sum(dim=(2, 3)), high.sum(dim=(2, 3)))
                base = (P * w[..., None]).sum(dim=(1, 2))[:, None]
                sums.add(f"chance_agreement_{name}", base, (block.seen * w[..., None]).sum(dim=(1, 2))[:, None])

    def _rings(self, sums: _Sums, A: Tensor) -> None:
        """Mean attention by Chebyshev distance on the patch grid, and to what stands before it (CLS, registers)."""
        height, width = self.grid
        if A.shape[-1] != self.ahead + height * width or A.shape[2] != A.shape[-1]:
            raise SelectionError(
                f"grid={self.grid} and ahead={self.ahead} make {self.ahead + height * width} tokens; the map is of "
                f"{A.shape[2]} by {A.shape[-1]} (in blocks of {ROWS} rows)."
            )
        patches = A[:, :, self.ahead :]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        place = torch.stack([y.flatten(), x.flatten()], dim=1).to(A.device)
        gap = (place[:, None] - place[None]).abs()
        ring, straight = gap.amax(dim=-1), gap.double().pow(2).sum(dim=-1).sqrt().to(A.dtype)
        inner = patches[..., self.ahead :]
        count = torch.full(A.shape[:2], float(patches.shape[2]), device=A.device)
        sums.add("to_first", patches[..., : self.ahead].sum(dim=(2, 3)), count)
        sums.add("distance", (inner * straight).sum(dim=(2, 3)), count)
        for k in range(min(4, max(height, width))):
            here = ring == k
            sums.add(f"ring_{k}", (inner * here).sum(dim=(2, 3)), count)
            size = here.sum(dim=-1)
            some = size > 0
            density = ((inner * here).sum(dim=-1) / size.clamp_min(1))[:, :, some].sum(dim=-1)
            sums.add(f"ring_density_{k}", density, torch.full_like(count, float(some.sum())))

    def _columns(self, call: AttnCall, sums: _Sums, valid: Tensor) -> None:
        """Column means by the causal divisor: how much each key gets from the rows that see it."""
        weight = call.row_valid.expand(valid.shape).float()
        alpha, share = column_means(call, weight)
        first = call.keys.first.expand(len(alpha), -1)[:, None]
        one = torch.ones(alpha.shape[:2], device=alpha.device)
        sums.add("sink_first", (alpha * first).sum(dim=-1), one)
        known = share.expand_as(alpha) >= SINK_ROWS
        most = torch.where(known, alpha, -1.0).amax(dim=-1).clamp_min(0)
        sums.add("sink_largest", most, one)
        sums.add("sinks", ((alpha > SINK) & known).sum(dim=-1).float(), one)

    def _last_row(self, call: AttnCall, out: Tensor) -> None:
        """The last valid row of each input: its map, values and output, for readings of what the head writes there."""
        B, H, n, m = call.map.shape
        end = call.row_valid.expand(B, n).float().cumsum(dim=1).argmax(dim=1)
        kept = {"out": out.detach()[torch.arange(B, device=out.device), :, end].float().cpu()}
        A = torch.stack([call.map.rows(end[b : b + 1])[b, :, 0] for b in range(B)])
        kept["map"] = A.float().cpu()
        # Of long contexts the values would be all that this keeps.
        kept["values"] = call.values.float().cpu() if m <= 2048 else None
        self.last.setdefault(call.site.path, []).append(kept)


def _visible(call: AttnCall, A: Tensor, i: Tensor, j: Tensor, key_valid: Tensor) -> Tensor:
    """bool [B, r, m]: keys that rows may see; of windows, those that some head gives anything."""
    seen = key_valid[:, None] & torch.ones(1, i.shape[1], 1, dtype=torch.bool, device=A.device)
    if call.site.causal and call.site.kind == "self":
        seen = seen & (j[:, None] <= i[..., None])
    return seen & (A > 0).any(dim=1)


def column_means(call: AttnCall, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha [B, H, m]: mean share that a key gets from the rows that see it, how many rows that are [B or 1, H or 1, m])."""
    seen = call.map.seen_by(weight)
    alpha = call.map.column_mass(weight) / seen.clamp_min(1e-9)
    return alpha.masked_fill(seen <= 0, 0.0), seen
