"""`AttnCall`: what a method sees of one attention call, and its lazy attention map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .kernels import Attention
from .site import Site

# Up to this many query rows (decoding), the rows themselves are cheaper than any identity.
FEW_ROWS = 4


@dataclass(frozen=True)
class KeyBias:
    """An additive score bias per key, [B or 1, H or 1, m], the same for all query rows."""

    bias: Tensor


@dataclass(frozen=True)
class Reweight:
    """Weights per row for disjoint sets of keys: A'_ij = w_{i,g(j)} A_ij.

    Attributes:
        groups: pairs (keys bool [B or 1, H or 1, m], weight broadcastable to [B, H, n]).
        rest: weight of all other keys, broadcastable to [B, H, n].
        normalise: divide each row by its new sum (what adding log w to the scores would do).
    """

    groups: tuple[tuple[Tensor, Tensor | float], ...]
    rest: Tensor | float = 1.0
    normalise: bool = True


class AttentionMap:
    """A lazy view of A = softmax(QK^T): ask for masses, partial outputs, columns, rows; nothing else is built.

    Every answer is exact (fp32 statistics), comes from the kernel's row log-sum-exp, and is cached for
    the duration of the call.
    """

    def __init__(
        self,
        att: Attention | Callable[[], Attention],
        base: Callable[[], Tensor] | None = None,
        fused: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ):
        """`base` computes the output with the model's own kernel; `fused` gives that output and its lse.

        `att` may be a function that builds it: head-output edits then need no gathered q, k, v.
        """
        self._att = att
        self._base = base
        self._fuse = fused
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._dense: Tensor | None = None
        self._groups: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def att(self) -> Attention:
        """The computation whose map this is."""
        if not isinstance(self._att, Attention):
            self._att = self._att()
        return self._att

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, n, m)."""
        return self.att.shape

    @property
    def few(self) -> bool:
        """Whether the rows are so few that the map itself is the cheapest exact form."""
        return self._dense is not None or self.att.shape[2] <= FEW_ROWS

    @property
    def out(self) -> Tensor:
        """The attention output [B, H, n, dv] of the model's own kernel, in the model's dtype."""
        if self._out is None:
            self._out = self._base() if self._base is not None else self._both()[0]
        return self._out

    @property
    def lse(self) -> Tensor:
        """The row log-sum-exp [B, H, n], fp32; minus infinity for rows that see no key."""
        if self._lse is None:
            out, self._lse = self._both()
            if self._out is None and self._fuse is not None:
                self._out = out
        return self._lse

    def _both(self) -> tuple[Tensor, Tensor]:
        return self._fuse() if self._fuse is not None else kernels.attend_lse(self.att)

    def total(self) -> Tensor:
        """Row sums [B, H, n]: 1, less the share of a learned sink, 0 for rows that see no key."""
        return self.dense().sum(dim=-1) if self.few else self.att.visible_total(self.lse)

    def dense(self) -> Tensor:
        """The whole map [B, H, n, m], fp32, differentiable: the reference, not for the normal path."""
        if self._dense is None:
            self._dense = kernels.dense(self.att)
        return self._dense

    def mass(self, keys: Tensor) -> Tensor:
        """sum of A over `keys` (bool [B or 1, H or 1, m]), [B, H, n]."""
        if self.few and id(keys) not in self._groups:
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
        found = self._groups.get(id(keys))
        if found is None:
            if self.few:
                p = self.dense() * keys[:, :, None]
                pair = p.sum(dim=-1), _apply(p, self.att)
            else:
                pair = kernels.partial(self.att, self.lse, keys)
            # The tensor is kept with its answer, so that its id cannot be reused meanwhile.
            found = self._groups[id(keys)] = (keys, *pair)
        return found[1], found[2]

    def column_mass(self, row_weight: Tensor | None = None) -> Tensor:
        """sum_i w_i A_ij, [B, H, m]; `row_weight` [B or 1, n] is 0 for rows to leave out."""
        if self.few:
            A = self.dense()
            return A.sum(dim=2) if row_weight is None else torch.einsum("bhnm,bn->bhm", A, _full(row_weight, A))
        return kernels.column_mass(self.att, self.lse, row_weight)

    def rows(self, index: Tensor) -> Tensor:
        """The rows `index` [r] of the map, [B, H, r, m]."""
        return self.dense()[:, :, index] if self.few else kernels.rows(self.att, self.lse, index)

    def entropy(self) -> Tensor:
        """Row entropies in nats, [B, H, n]."""
        return torch.special.entr(self.dense()).sum(dim=-1) if self.few else kernels.entropy(self.att, self.lse)

    def reweight(self, edit: Reweight) -> Tensor:
        """The output [B, H, n, dv] under `edit`; rows whose weights are all one are `out` bit for bit."""
        if self.few:
            return self._few_reweight(edit)
        groups = [(keys, weight, *self.partial(keys)) for keys, weight in edit.groups]
        return kernels.reweight(self.att, self.out, self.lse, groups, edit.rest, edit.normalise)

    def _few_reweight(self, edit: Reweight) -> Tensor:
        A = self.dense()
        factor = self._factor(edit)
        new = A * factor
        total = A.sum(dim=-1, keepdim=True)
        if edit.normalise:
            norm = new.sum(dim=-1, keepdim=True) + self._sink(total)
            new = torch.where(norm > 0, new / norm.clamp_min(1e-37), A)
        changed = (factor != 1.0).any(dim=-1, keepdim=True) & (total > 0)
        edited = _apply(new, self.att)
        if self._out is None and changed.device.type == "cpu" and bool(changed.all()):
            # No row keeps its output, so the model's own kernel need not run (elsewhere asking would cost more than it).
            return edited.to(self.att.v.dtype)
        return torch.where(changed, edited.to(self.out.dtype), self.out)

    def _factor(self, edit: Reweight) -> Tensor:
        """Weights as a full [B, H, n, m] tensor."""
        B, H, n, m = self.shape
        like = {"dtype": self.att.stat_dtype, "device": self.att.q.device}
        factor = torch.as_tensor(edit.rest, **like).expand(B, H, n)[..., None].expand(B, H, n, m)
        for keys, weight in edit.groups:
            factor = torch.where(keys[:, :, None], torch.as_tensor(weight, **like).expand(B, H, n)[..., None], factor)
        return factor

    def edited_dense(self, edit: Reweight) -> Tensor:
        """The edited map [B, H, n, m]: the path for several reweightings of the same heads."""
        A = self.dense()
        new = A * self._factor(edit)
        if not edit.normalise:
            return new
        norm = new.sum(dim=-1, keepdim=True) + self._sink(A.sum(dim=-1, keepdim=True))
        return torch.where(norm > 0, new / norm.clamp_min(1e-37), A)

    def _sink(self, total: Tensor) -> Tensor:
        """What a learned sink takes of rows with these sums; exactly zero where the model has none."""
        if self.att.sinks is None:
            return torch.zeros_like(total)
        return torch.where(total > 0, 1.0 - total, torch.zeros_like(total))

    def distance(self, edit: Reweight) -> Tensor:
        """Total-variation distance per row between the map and its edit, [B, H, n]."""
        B, H, n, _ = self.shape
        like = {"dtype": self.att.stat_dtype, "device": self.att.q.device}
        total = self.total()
        rest = torch.as_tensor(edit.rest, **like).expand(B, H, n)
        weights = [torch.as_tensor(w, **like).expand(B, H, n) for _, w in edit.groups]
        masses = [self.mass(keys) for keys, _ in edit.groups]
        left = (total - sum(masses, torch.zeros_like(total))).clamp_min(0.0)
        norm = torch.ones_like(total)
        if edit.normalise:
            norm = self._sink(total) + rest * left + sum(w * m for w, m in zip(weights, masses, strict=True))
            norm = norm.masked_fill(norm <= 0, 1.0)
        moved = (rest / norm - 1.0).abs() * left
        moved = moved + sum((w / norm - 1.0).abs() * m for w, m in zip(weights, masses, strict=True))
        return 0.5 * moved


class DenseMap(AttentionMap):
    """A map that an earlier reweighting has already changed: held explicitly."""

    def __init__(self, att: Attention, A: Tensor, out: Tensor):
        super().__init__(att)
        self._dense = A
        self._out = out

    @property
    def lse(self) -> Tensor:
        """Not defined: the edited map is not a softmax of scores any more."""
        raise AttributeError("an edited map has no log-sum-exp; ask for mass, partial, rows or dense")


def _apply(p: Tensor, att: Attention) -> Tensor:
    """p v with grouped values, [B, H, n, dv] in the dtype of p."""
    b, h, n, m = p.shape
    folded = p.reshape(b, h // att.groups, att.groups * n, m)
    return torch.matmul(folded, att.v.to(p.dtype)).reshape(b, h, n, -1)


def _full(row_weight: Tensor, A: Tensor) -> Tensor:
    return row_weight.to(A.dtype).expand(A.shape[0], A.shape[2])


@dataclass
class AttnCall:
    """One attention call, restricted to the heads that a method selects.

    Shapes: q [B, H, n, d], k and v [B, Hkv, m, d]; H counts the selected heads only.

    Attributes:
        site: the `Site`. heads: global indices [H] of the selected heads.
        map: the lazy attention map (edits of earlier methods included).
        phase: "prefill" or "decode". step: denoising step or None. branch: None or the running branch.
        row_valid: bool [B or 1, n], False for padding rows. key_valid: bool [B or 1, m].
        row_position: int [n], absolute position of each row. key_position: int [m], of each key.
        segments: role -> slice of the rows (and of the keys of a self or joint call): "image", "text".
        grid: (height, width) of the image rows in tokens, where the host knows it.
        state: a dict of this method at this site for this sequence; survives from prefill to decode.
        frozen: True where statistics must not move (a continuation is being scored).
        context: what else the host provides, by name (see `Intervention.needs`).
        branch_rows: branch name -> bool [B], where `where` selects branches and the host can tell the rows apart.
    """

    site: Site
    heads: tuple[int, ...]
    map: AttentionMap
    phase: str = "prefill"
    step: int | None = None
    branch: str | None = None
    row_valid: Tensor | None = None
    key_valid: Tensor | None = None
    row_position: Tensor | None = None
    key_position: Tensor | None = None
    segments: dict[str, slice] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    context: dict[str, Any] = field(default_factory=dict)
    branch_rows: dict[str, Tensor] | None = None

    @property
    def q(self) -> Tensor:
        """[B, H, n, d], after positional encoding."""
        return self.map.att.q

    @property
    def k(self) -> Tensor:
        """[B, Hkv, m, d], after positional encoding and cache."""
        return self.map.att.k

    @property
    def v(self) -> Tensor:
        """[B, Hkv, m, d]."""
        return self.map.att.v

    @property
    def values(self) -> Tensor:
        """V per selected query head, [B, H, m, d]."""
        return self.map.att.expanded_values()

    def key_index(self) -> Tensor:
        """Number of each key counted from the sample's first valid token, [B or 1, m]; negative for left padding."""
        tokens = self.context.get("tokens")
        if tokens is None:
            return self.key_position[None]
        return self.key_position[None] - tokens.first().to(self.key_position.device)[:, None]

    def first_key(self) -> Tensor:
        """The first valid token of each row as a key set [B or 1, 1, m]; empty once it has left a window cache."""
        return (self.key_index() == 0)[:, None]

    def span_keys(self, spans: list[list[tuple[int, int]]]) -> Tensor:
        """Token ranges per sample, as a key set [B, 1, m] of this call (absolute positions)."""
        position = self.key_position
        keys = torch.zeros(len(spans), position.shape[-1], dtype=torch.bool, device=position.device)
        for b, ranges in enumerate(spans):
            for start, stop in ranges:
                keys[b] |= (position >= start) & (position < stop)
        return keys[:, None]
