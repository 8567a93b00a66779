"""A decode step of one site whose methods answer as in the step before: recorded once, and done again without asking them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_map import SHORT_CACHE
from .audit import SMALL, Flag, Record
from .forms import STEP, WholeForms
from .kernels import Attention


@dataclass(frozen=True)
class Count:
    """What the audit counts of one method in each step.

    Attributes:
        record: its record at the site. rows: of a call. what: how the step edits: "bias", "shares" or "output"; None: not.
        moves: of a bias, whether it moves anything: as in the first step, since keys that come stand where its last one stood.
    """

    record: Record
    rows: int
    what: str | None
    moves: Flag | None = None


class Step:
    """One row of each sequence over a cache that grows, under no mask: all heads as in the step that it was recorded from."""

    def __init__(self, forms: WholeForms | None, factor: Tensor | None, counts: list[Count], att: Attention):
        """
        Args:
            forms: the edits that all heads take together, or None. factor: of the outputs, [B or 1, H, 1, 1], or None.
            att: the call of the step, one row.
        """
        q, v, self.scale = att.q, att.v, att.scale
        self.factor, self.counts = factor, counts
        self.kind = q.dtype, v.dtype, q.shape, v.shape[1]
        self.longest = None
        self._bias, self._divided, self._keeps_none = None, None, False
        # Batch rows that see all of their keys in the second call, [B, 1, 1, 1] and [B, 1, 1].
        self._spared: tuple[Tensor, Tensor] | None = None
        if forms is not None:
            self._divided = forms.divided
            if forms.biased:
                self._bias = _grown(forms.log_weights()[:, :, None])
            if self._divided is not None:
                chosen = self._divided[2]
                self._spared = None if chosen is None else (~chosen[..., None], ~chosen)
                few = self._divided[0].parts_of(*q.shape[:2], v.shape[1], v.shape[2]).few
                self.longest = SHORT_CACHE if few is None else None
                # A set that has nothing gets nothing, without being told.
                self._keeps_none = not bool(self._divided[1].of(torch.zeros((*q.shape[:2], 1))).any())

    def takes(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> bool:
        """Whether the call is one more such step; `scale` None: that of the head width."""
        return (
            (q.shape[3] ** -0.5 if scale is None else scale) == self.scale
            and (q.dtype, v.dtype, q.shape, v.shape[1]) == self.kind
            and k.dtype == q.dtype
            and q.stride(3) == k.stride(3) == v.stride(3) == 1
            and (self.longest is None or k.shape[2] <= self.longest)
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, base: Callable[[], Tensor]) -> Tensor:
        """The outputs [B, H, 1, dv]; `base` computes the model's own."""
        m = k.shape[2]
        flags: dict[str | None, Flag] = {}
        if self._bias is not None:
            if self._bias.shape[-1] < m:
                self._bias = _grown(self._bias)
            mask = self._bias.narrow(-1, 0, m)
            out = torch._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=mask, scale=self.scale
            )[0]
        elif self._divided is not None:
            split, edit, _ = self._divided
            parts = split.parts_of(*q.shape[:2], k.shape[1], m)
            few = parts.few
            inside = (k, v) if few is None else (k[few], v[few])
            flash = torch._scaled_dot_product_flash_attention_for_cpu
            out_in, lse_in = flash(q, *inside, 0.0, False, attn_mask=parts.inside, scale=self.scale)
            outside = parts.outside if self._spared is None else parts.outside.masked_fill(self._spared[0], 0.0)
            out, lse = flash(q, k, v, 0.0, False, attn_mask=outside, scale=self.scale)
            if few is None:
                lse_in = lse_in.masked_fill(parts.empty, -torch.inf)
            if parts.full is not False:
                lse = lse.masked_fill(parts.full, -torch.inf)
            before, after = pair = parts.shares(lse_in, lse, edit, few is not None and self._keeps_none)
            if self._spared is not None:
                before, after = pair = tuple(t.masked_fill(self._spared[1], 0.0) for t in pair)
            if out.dtype != after.dtype:
                out, out_in = out.to(after.dtype), out_in.to(after.dtype)
            out = torch.lerp(out, out_in, after[..., None]).to(v.dtype)
            flags["shares"] = pair
        else:
            out = base()
        if self.factor is not None:
            edited = out * self.factor
            flags["output"] = (edited, out) if out.numel() <= SMALL else (edited != out).any()
            out = edited
        for count in self.counts:
            count.record.again(count.rows, count.what or "", flags.get(count.what, count.moves))
        return out


def _grown(bias: Tensor) -> Tensor:
    """`bias` [..., m] for more keys, which have what the last one has."""
    more = bias[..., -1:].expand(*bias.shape[:-1], STEP)
    return torch.cat([bias, more], dim=-1)


__all__ = ["Count", "Step"]
