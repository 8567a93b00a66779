"""ACT: shrinks attention to sinks other than the first token and hands the freed mass to the other tokens.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks" (ICML 2024, arXiv 2406.15765); official code
GATECH-EIC/ACT, models/llama_modelling_aug.py at a267af7. The equations are the code's; the paper's threshold
alpha / N is known from secondary sources only (unverified). The official code handles batch one, counts padding
rows, drops the first *hit* instead of the first token, and miscomputes cached decoding: see `released_code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import AttnCall, Share
from ..errors import SelectionError, UnsupportedHost
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import PerSample, choice, integer, number
from ..registry import register_method
from ..site import Site
from ..where import Where
from ._prompt import prompt_unseen

MODES = ("frozen", "running", "prefill_only")
EXCLUDED = ("first_token", "first_hit")
# `signal in range(2, 31)`: where the official evaluation asks its list of heads.
OFFICIAL_LAYERS = range(2, 31)


@register_method
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
            means with each new row (one in a call), "prefill_only" edits nothing (all published numbers).
        min_rows: a column needs this many rows behind its mean. exclude: "first_token", or "first_hit" as in
            the official code; then, without heads and `where`, its layers as well (see `released_code`).

    The statistics look ahead: a later prompt token can move an earlier row. In a chunked prefill each chunk uses
    the rows seen so far. Without a cache every call is a prompt of its own. A row whose mass lies on sinks alone has nothing
    that could grow and stays as it is (NaN in the official code).
    """

    heads: HeadSet | None = head_set()
    beta: float = number(0.4, low=0, high=1, per_sample=True, learnable=True)
    threshold: float | None = number(None, low=0, per_sample=True)
    alpha: float | None = number(None, low=0, per_sample=True)
    decode: str = choice("frozen", MODES)
    min_rows: int = integer(1, low=1)
    exclude: str = choice("first_token", EXCLUDED, kw_only=True)

    kinds = ("self",)
    needs = ("tokens",)
    looks_ahead = True
    causal_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and self.alpha is not None:
            raise SelectionError(f"ACT got threshold={self.threshold} and alpha={self.alpha}; give one of the two.")
        if self.threshold is None and self.alpha is None:
            object.__setattr__(self, "threshold", 0.1)
        tau = self.alpha if self.threshold is None else self.threshold
        if isinstance(tau, PerSample) and tau.rests:
            raise SelectionError(
                "ACT got a threshold without a number for some sample; use None in beta for samples that it leaves alone."
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

    @property
    def steady(self) -> bool:  # type: ignore[override]
        """Frozen sinks are those of every step."""
        return self.decode == "frozen"

    @property
    def frozen_keys(self) -> str | None:  # type: ignore[override]
        """Frozen sinks are all that a row behind the prompt asks for."""
        return None if self.decode == "running" else "sinks"

    def weights(self, call: AttnCall) -> Share | None:
        # With values per sample, neutral ones come out as shares of exactly the same.
        if self.beta == 1.0 or (call.phase == "decode" and self.decode == "prefill_only"):
            return None
        # A row that sees nothing else has nobody to hand the freed mass to: 0 / 0, NaN in the official code. It stays.
        sinks, beta = self._sinks(call), call.each(self.beta)
        if call.mixed and self.decode == "prefill_only":
            spared = call.generates[:, None]
            return Share(sinks, lambda share: torch.where(spared, share, beta * share))
        return Share(sinks, lambda share: beta * share)

    def _sinks(self, call: AttnCall) -> Tensor:
        """S as a key set [B, H, m] of this call."""
        state, (_, _, n, m) = call.state, call.shape
        length = call.past + n
        running = self.decode == "running" and not call.frozen
        if running and (call.mixed or (call.phase == "decode" and n > 1)):
            raise UnsupportedHost(
                f"ACT(decode='running') at {call.site.path}: its means move with each generated token, and this call has "
                "several (no cache, or candidates of assisted decoding). Decode over a cache token by token, or use another mode."
            )
        moving = call.phase == "prefill" or running
        if "sinks" not in state and (not moving or call.phase == "decode"):
            raise prompt_unseen(self, call, "the prompt's sinks are not known")
        if moving:
            self._update(call, length)
        sinks = state["sinks"]
        if m != length:
            return _at(sinks, call.keys.slot)
        # Longer where the cache was cut; the very tensor otherwise, so that what is made of it is found again.
        return sinks[..., :length] if sinks.shape[-1] > length else sinks

    def _update(self, call: AttnCall, length: int) -> None:
        """Add the rows of this call to the sums by slot, and look again which columns are sinks."""
        state, keys = call.state, call.keys
        all_rows = self.decode == "running" and not call.frozen
        # As many tokens as the rows that are counted belong to: those of a mixed call go on behind the prompt.
        counted, tokens = call.once("counted", lambda: self._counted(call, all_rows))
        # Told by the host, so that nothing has to be looked up: every row counts.
        plain = not (call.rows.padded or call.packed) and (all_rows or not call.mixed)
        column, seen = call.map.column_mass(None if plain else counted), call.seen_by(counted)
        B = column.shape[0]
        if call.past == 0 and column.shape[-1] == length:
            # A prompt from its first slot on.
            state["sum"], state["rows"] = column, seen.expand(B, -1, -1)
            state["valid"], state["first"] = tokens.expand(B, -1), keys.first.expand(B, -1)
            if keys.packed:
                state["request"] = keys.request.expand(B, -1)
        else:
            put = lambda name, values: _added(state.get(name), values, keys.slot, length)  # noqa: E731
            state["sum"] = put("sum", column)
            state["rows"] = put("rows", seen.expand(B, -1, -1))
            for name, flags in (("valid", tokens), ("first", keys.first)):
                state[name] = _set(state.get(name), flags.expand(B, -1), keys.slot, length)
            if keys.packed:
                state["request"] = _set(state.get("request"), keys.request.expand(B, -1), keys.slot, length)
        state["sinks"] = self._flagged(call, state, seen)

    @staticmethod
    def _counted(call: AttnCall, all_rows: bool) -> tuple[Tensor, Tensor]:
        """(the rows that are counted, bool [B or 1, n]; the keys that stand for tokens, bool [B or 1, m])."""
        if all_rows:
            return call.row_valid, call.key_valid
        return call.row_valid & ~call.rows.generated, call.key_valid & ~call.keys.generated

    def _flagged(self, call: AttnCall, state: dict[str, Tensor], seen: Tensor) -> Tensor:
        """S by slot, [B, H, T]; `seen`: the number of rows behind each key that this call has counted."""
        valid, fresh = state["valid"], call.past == 0 and state["sum"].shape[-1] == seen.shape[-1]
        fresh = fresh and not torch.compiler.is_compiling()
        make = lambda: self._columns(state)  # noqa: E731
        rows, allowed = call.once(f"columns {id(seen)}", make) if fresh else make()
        mean = state["sum"] / rows
        if self.alpha is None:
            tau = call.each(self.threshold)
        else:
            tau = call.each(self.alpha) / _count(valid, state.get("request")).clamp_min(1).to(mean.dtype)[:, None]
        hits = (mean > tau) & allowed
        return hits if self.exclude == "first_token" else hits & ~_first(hits, state.get("request"))

    def _columns(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(rows behind each mean, at least one, [B, H or 1, T]; the columns that may be sinks, bool [B, H or 1, T])."""
        rows = state["rows"]
        allowed = state["valid"][:, None] & (rows >= self.min_rows)
        return rows.clamp_min(1.0), allowed & ~state["first"][:, None] if self.exclude == "first_token" else allowed


def _first(mask: Tensor, request: Tensor | None) -> Tensor:
    """The first True along the last axis of each request (nothing where there is none): of `mask` [B, H, T], `request` [B, T]."""
    count = mask.to(torch.int32).cumsum(dim=-1)
    if request is None:
        return mask & (count == 1)
    begins = torch.nn.functional.pad(request.diff(dim=-1) != 0, (1, 0), value=True)[:, None]
    before = torch.where(begins, count - mask.to(torch.int32), 0).cummax(dim=-1).values
    return mask & (count - before == 1)


def _count(valid: Tensor, request: Tensor | None) -> Tensor:
    """Number of valid tokens of each slot's request, [B, T or 1]."""
    if request is None:
        return valid.sum(dim=-1, keepdim=True)
    sizes = torch.zeros_like(request).scatter_add(1, request, valid.to(request.dtype))
    return sizes.gather(1, request)


def _grown(t: Tensor, length: int) -> Tensor:
    """Zero-extended along the last axis to `length`, or cut to it after the cache was cut."""
    if t.shape[-1] >= length:
        return t[..., :length]
    return torch.nn.functional.pad(t, (0, length - t.shape[-1]))


def _at(t: Tensor, slot: Tensor) -> Tensor:
    """`t` [..., T] at `slot` [m]; nothing at slots beyond T."""
    inside = slot < t.shape[-1]
    return t[..., slot.clamp_max(t.shape[-1] - 1)] & inside


def _added(old: Tensor | None, values: Tensor, slot: Tensor, length: int) -> Tensor:
    """Sums [..., T] by slot with `values` [..., m] added at `slot`; slots that hold nothing yet are left out."""
    whole = values.new_zeros(*values.shape[:-1], length) if old is None else _grown(old, length)
    # The model may have been cast since, or an autocast have begun.
    dtype = torch.promote_types(whole.dtype, values.dtype)
    return whole.to(dtype).index_add(-1, slot.clamp_max(length - 1), values.to(dtype).masked_fill(slot >= length, 0.0))


def _set(old: Tensor | None, values: Tensor, slot: Tensor, length: int) -> Tensor:
    """Values [B, T] by slot with those of `slot` replaced."""
    # What slots behind the last hold falls into one of their own.
    whole = values.new_zeros(values.shape[0], length + 1) if old is None else _grown(_grown(old, length), length + 1)
    return whole.index_copy(1, slot.clamp_max(length), values)[:, :length]
