"""ACT: shrinks attention to sinks other than the first token and hands the freed mass to the other tokens.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks" (ICML 2024, arXiv 2406.15765); official code
GATECH-EIC/ACT, models/llama_modelling_aug.py at a267af7. The equations are the code's; the paper's threshold
alpha / N is known from secondary sources only (unverified). The official code handles batch one, counts padding
rows, drops the first *hit* instead of the first token, and miscomputes cached decoding: see `released_code`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..call import AttnCall, Reweight
from ..errors import SelectionError, UnsupportedHost
from ..heads import HeadSet
from ..intervention import Intervention
from ..site import Site
from ..where import Where

MODES = ("frozen", "running", "prefill_only")
# `signal in range(2, 31)`: where the official evaluation asks its list of heads.
OFFICIAL_LAYERS = range(2, 31)


@dataclass(frozen=True)
class ACT(Intervention):
    """Attention calibration of hidden sinks.

    With c_j the mean of column j over the rows that can see it, the sinks are S = {j : c_j > tau} without the first
    token; then A'_ij = beta A_ij on S, and the others grow in proportion so that each row keeps its sum.

    Args:
        heads: the heads to calibrate (`HeadSet` or `{layer: [head, ...]}`); None: all that `where` selects.
        beta: factor on the sinks' attention, 0 to 1; 1 changes nothing.
        threshold: absolute tau on the column mean. alpha: tau = alpha / N instead, N the valid tokens seen;
            give one of the two (threshold 0.1 when neither is given).
        decode: what happens to tokens after the prompt: "frozen" keeps the prompt's sinks, "running" moves the
            means with each new row, "prefill_only" edits nothing (all published numbers).
        min_rows: a column needs this many rows behind its mean. exclude: "first_token", or "first_hit" as in
            the official code; then, without heads and `where`, its layers as well (see `released_code`).

    The statistics look ahead: a later prompt token can move an earlier row. In a chunked prefill each chunk uses
    the rows seen so far. Without a cache every call is a prompt of its own. A row whose mass lies on sinks alone has nothing
    that could grow and stays as it is (NaN in the official code).
    """

    heads: HeadSet | None = None
    beta: float = 0.4
    threshold: float | None = None
    alpha: float | None = None
    decode: str = "frozen"
    min_rows: int = 1
    exclude: str = field(default="first_token", kw_only=True)

    kinds = ("self",)
    needs = ("tokens",)
    looks_ahead = True
    causal_only = True

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", HeadSet(self.heads))
        if self.threshold is not None and self.alpha is not None:
            raise SelectionError(f"ACT got threshold={self.threshold} and alpha={self.alpha}; give one of the two.")
        if self.threshold is None and self.alpha is None:
            object.__setattr__(self, "threshold", 0.1)
        tau = self.threshold if self.alpha is None else self.alpha
        if not 0.0 <= self.beta <= 1.0 or not (math.isfinite(tau) and tau >= 0):
            raise SelectionError(f"ACT(beta={self.beta}, threshold or alpha={tau}): beta is 0 to 1, the other >= 0.")
        if self.decode not in MODES:
            raise SelectionError(f"ACT(decode={self.decode!r}): one of {MODES}.")
        if self.min_rows < 1 or self.exclude not in ("first_token", "first_hit"):
            raise SelectionError(
                f"ACT(min_rows={self.min_rows}, exclude={self.exclude!r}): min_rows >= 1, exclude 'first_token' or 'first_hit'."
            )

    @classmethod
    def released_code(
        cls, heads: HeadSet | None = None, beta: float = 0.4, threshold: float = 0.1, **other: object
    ) -> ACT:
        """The official function on a square prefill map: the first hit is spared, and decoding is not edited.

        Without heads it acts on layers 2 to 30 of those that exist, the range of the official loop on 32 layers (scripts
        for other models say 2 to 31); heads are taken as given, in any layer, as by the official calibration function.
        """
        return cls(heads, beta, threshold, decode="prefill_only", exclude="first_hit", **other)

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        if self.exclude != "first_hit":
            return None
        layers = sorted({s.layer for s in sites if s.modality == "text" and s.kind == "self"})
        kept = [layer for layer in layers if layer in OFFICIAL_LAYERS]
        if not kept:
            raise SelectionError(
                f"ACT(exclude='first_hit') acts on layers {OFFICIAL_LAYERS[0]} to {OFFICIAL_LAYERS[-1]} as the official code "
                f"does; the model has layers {layers}. Name heads, or layers with where=Where(layers=...)."
            )
        return Where(layers=kept, kinds="self")

    @property
    def follows_crop(self) -> bool:  # type: ignore[override]
        """Sums over rows that a cache crop removes cannot be taken back."""
        return self.decode != "running"

    def weights(self, call: AttnCall) -> Reweight | None:
        if self.beta == 1.0 or (call.phase == "decode" and self.decode == "prefill_only"):
            return None
        sinks = self._sinks(call)
        if not bool(sinks.any()):
            return None
        mass, outside = call.map.mass(sinks), call.map.outside(sinks)
        # Where nothing else is seen there is nothing to hand the freed mass to: 0 / 0, NaN in the official code.
        edit = outside > 0
        rest = 1.0 + (1.0 - self.beta) * mass / outside.masked_fill(~edit, 1.0)
        # A mass outside that is subnormal has no reciprocal in the dtype, and counts as the zero that it rounds to.
        edit = edit & rest.isfinite()
        if call.row_valid is not None:
            edit = edit & call.row_valid[:, None]
        one = torch.ones_like(mass)
        return Reweight(
            ((sinks, torch.where(edit, self.beta * one, one)),), torch.where(edit, rest, one), normalise=False
        )

    def _sinks(self, call: AttnCall) -> Tensor:
        """S as a key set [B, H, m] of this call."""
        state, length = call.state, int(call.key_position[-1]) + 1
        moving = call.phase == "prefill" or (self.decode == "running" and not call.frozen)
        if not moving and "sinks" not in state:
            raise UnsupportedHost(
                f"ACT(decode={self.decode!r}) at {call.site.path}: the cache was filled before steering began, so the prompt's "
                "sinks are not known. Run the prefill inside the steering context."
            )
        if moving:
            self._update(call, length)
        sinks = _grown(state["sinks"], length)
        # Positions increase, so as many keys as slots are all of them, in order.
        return sinks if len(call.key_position) == length else sinks[..., call.key_position]

    def _update(self, call: AttnCall, length: int) -> None:
        state = call.state
        column = call.map.column_mass(call.row_valid)
        B, H, _ = column.shape
        rows = (
            torch.ones(B, call.q.shape[2], device=column.device) if call.row_valid is None else call.row_valid.float()
        )
        total = _grown(state["sum"], length).clone() if "sum" in state else column.new_zeros(B, H, length)
        total[..., call.key_position] += column
        seen = _grown(state["rows"], length).clone() if "rows" in state else column.new_zeros(B, length)
        seen += _rows_that_see(rows, call.row_position, length, call.site.causal).to(column.dtype)
        valid = (
            _grown(state["valid"], length).clone()
            if "valid" in state
            else torch.zeros(B, length, dtype=torch.bool, device=column.device)
        )
        valid[:, call.key_position] = True if call.key_valid is None else call.key_valid.expand(B, -1)
        state.update(sum=total, rows=seen, valid=valid, sinks=self._flagged(total, seen, valid))

    def _flagged(self, total: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
        mean = total / rows.clamp_min(1.0)[:, None]
        if self.alpha is None:
            tau = torch.as_tensor(self.threshold, dtype=mean.dtype, device=mean.device)
        else:
            tau = (self.alpha / valid.sum(dim=-1).clamp_min(1).to(mean.dtype))[:, None, None]
        hits = (mean > tau) & valid[:, None] & (rows >= self.min_rows)[:, None]
        if self.exclude == "first_token":
            spared = _first(valid)[:, None].expand_as(hits)
        else:
            spared = _first(hits)
        return hits & ~spared


def _first(mask: Tensor) -> Tensor:
    """One-hot of the first True along the last axis (nothing where there is none)."""
    return mask & (mask.to(torch.int32).cumsum(dim=-1) == 1)


def _grown(t: Tensor, length: int) -> Tensor:
    """Zero-extended along the last axis to `length`, or cut to it after the cache was cut."""
    if t.shape[-1] >= length:
        return t[..., :length]
    return torch.nn.functional.pad(t, (0, length - t.shape[-1]))


def _rows_that_see(rows: Tensor, position: Tensor, length: int, causal: bool) -> Tensor:
    """Number of valid rows of this call that can see each position, [B, length]."""
    if not causal:
        return rows.sum(dim=-1, keepdim=True).expand(-1, length)
    at = torch.zeros(rows.shape[0], length, dtype=rows.dtype, device=rows.device)
    at[:, position] = rows
    return at.flip(-1).cumsum(dim=-1).flip(-1)
