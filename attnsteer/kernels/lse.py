"""Attention with the row log-sum-exp, from the fused kernel where one returns it, blockwise elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Attention, assemble

HALF = (torch.float16, torch.bfloat16)


def lse_source(att: Attention) -> str:
    """The kernel that will give (out, lse): "cpu-flash", "cuda-flash", "cuda-efficient" or "blockwise"."""
    d, dv = att.q.shape[-1], att.v.shape[-1]
    if att.softcap is not None or att.sinks is not None or att.requires_grad or d != dv or 0 in att.shape:
        return "blockwise"
    device, dtype = att.q.device.type, att.q.dtype
    if device == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return "cpu-flash"
    if device == "cuda" and d % 8 == 0 and dtype in (torch.float32, *HALF):
        plain = att.mask is None and att.key_bias is None
        # The flash kernel's causal flag is lower-right aligned, ours upper-left: equal for square maps only.
        square = not att.causal or att.shape[2] == att.shape[3]
        if plain and square and dtype in HALF and d <= 256:
            return "cuda-flash"
        if not (att.causal and att.mask is not None):
            return "cuda-efficient"
    return "blockwise"


def attend(att: Attention) -> Tensor:
    """The attention output [B, H, n, dv], in the dtype of v."""
    fits = att.softcap is None and att.sinks is None and not (att.causal and att.mask is not None)
    if not fits:
        return attend_lse(att)[0]
    q, k = _lanes(att)
    v = att.v if q.shape[-1] == att.q.shape[-1] else _pad(att.v, q.shape[-1] - att.q.shape[-1])
    gqa = att.groups > 1
    mask = att.mask4()
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=att.causal, scale=att.scale, enable_gqa=gqa)
    return out[..., : att.v.shape[-1]]


def attend_lse(att: Attention) -> tuple[Tensor, Tensor]:
    """Output [B, H, n, dv] and row log-sum-exp [B, H, n] in fp32 (natural log, mask and scale included).

    Rows that see no key have output zero and log-sum-exp minus infinity.
    """
    source = lse_source(att)
    if source == "cpu-flash":
        out, lse = _cpu_flash(att)
    elif source == "cuda-flash":
        out, lse = _cuda_flash(att)
    elif source == "cuda-efficient":
        out, lse = _cuda_efficient(att)
    else:
        return _blockwise(att)
    return out, _blind_rows(att, lse)


def _pad(t: Tensor, lanes: int) -> Tensor:
    return F.pad(t, (0, lanes))


def _lanes(att: Attention) -> tuple[Tensor, Tensor]:
    """q and k with the key bias as extra lanes of the head dimension (identity F4).

    Half precision takes the bias as three lanes (value and two remainders): one lane alone is off by percents.
    """
    if att.key_bias is None:
        return att.q, att.k
    B, H, n, m = att.shape
    bias = att.key_bias.to(torch.float32).expand(B, -1, m)
    # A bias per query head needs its own K; one shared by the heads of a kv group does not.
    per_head = bias.shape[1] not in (1, att.k.shape[1]) or (bias.shape[1] > 1 and att.groups > 1)
    k = att.k.repeat_interleave(att.groups, dim=1) if per_head else att.k
    bias = bias.expand(B, k.shape[1], m)
    parts, rest = [], bias
    for _ in range(3 if att.q.dtype in HALF else 1):
        part = rest.to(att.q.dtype)
        parts.append(part)
        rest = rest - part.to(torch.float32)
    lanes = torch.stack(parts, dim=-1)
    width = lanes.shape[-1]
    # The lane must survive the multiplication by scale; 1/scale is exact for powers of two only, so in
    # other cases its rounding is at most half a unit in the last place of the bias.
    one = torch.full((B, H, n, width), 1.0 / att.scale, dtype=att.q.dtype, device=att.q.device)
    fill = -(-(att.q.shape[-1] + width) // 8) * 8 - att.q.shape[-1] - width
    q = _pad(torch.cat([att.q, one], dim=-1), fill)
    return q, _pad(torch.cat([k, lanes.to(k.dtype)], dim=-1), fill)


def _with_lanes(att: Attention) -> tuple[Tensor, Tensor, Tensor]:
    q, k = _lanes(att)
    v = att.v
    if k.shape[1] != v.shape[1]:
        v = v.repeat_interleave(att.groups, dim=1)
    if q.shape[-1] != v.shape[-1]:
        v = _pad(v, q.shape[-1] - v.shape[-1])
    return q, k, v


def _cpu_flash(att: Attention) -> tuple[Tensor, Tensor]:
    q, k, v = _with_lanes(att)
    mask, causal = att.additive(q.dtype), att.causal
    if mask is not None and causal:
        mask, causal = _fold_causal(att, mask), False
    if mask is not None:
        mask = mask.expand(-1, -1, att.shape[2], att.shape[3])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=att.scale
    )
    return out[..., : att.v.shape[-1]], lse.to(att.stat_dtype)


def _fold_causal(att: Attention, mask: Tensor) -> Tensor:
    _, _, n, m = att.shape
    lower = torch.ones(n, m, dtype=torch.bool, device=mask.device).tril()
    return mask.masked_fill(~lower, -torch.inf)


def _cuda_flash(att: Attention) -> tuple[Tensor, Tensor]:
    q, k, v = _with_lanes(att)
    result = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, att.causal, return_debug_mask=False, scale=att.scale
    )
    return result[0][..., : att.v.shape[-1]], result[1][..., : att.shape[2]].float()


def _cuda_efficient(att: Attention) -> tuple[Tensor, Tensor]:
    q, k, v = _with_lanes(att)
    if k.shape[1] != q.shape[1]:
        # This kernel has no grouped-query form.
        k, v = (t.repeat_interleave(att.groups, dim=1) for t in (k, v))
    B, H, n, m = att.shape
    bias = att.additive(q.dtype)
    if bias is not None:
        # The kernel wants rows aligned to 16 bytes; a padded buffer viewed back gives that for any m.
        padded = torch.empty(B, H, n, -(-m // 8) * 8, dtype=q.dtype, device=q.device)
        padded[..., :m] = bias.expand(B, H, n, m)
        bias = padded[..., :m]
    result = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, att.causal, scale=att.scale
    )
    return result[0][..., : att.v.shape[-1]], result[1][..., :n].float()


def _blind_rows(att: Attention, lse: Tensor) -> Tensor:
    """Minus infinity for rows without a visible key: kernels report 0, NaN or infinity there."""
    mask = att.mask4()
    if mask is None:
        return lse
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if att.causal:
        _, _, n, m = att.shape
        seen = seen & torch.ones(n, m, dtype=torch.bool, device=mask.device).tril()
    if seen.shape[-1] == 1 and att.shape[3] > 1:
        seen = seen.expand(*seen.shape[:-1], att.shape[3])
    return lse.masked_fill(~seen.any(dim=-1), -torch.inf)


def _blockwise(att: Attention) -> tuple[Tensor, Tensor]:
    """Our own pass over row tiles: any device, dtype, soft-capping and learned sinks; differentiable."""
    B, H, n, _ = att.shape
    dtype = att.stat_dtype
    if 0 in att.shape:
        lse = torch.full((B, H, n), -torch.inf, dtype=dtype, device=att.q.device)
        return att.v.new_zeros(B, H, n, att.v.shape[-1]), lse
    tiles, outs, sums = att.tiles(), [], []
    for batch, kv, rows in tiles:
        heads, keys = att.heads(kv), att.seen_keys(rows)
        z = att.scores(rows, keys, batch, kv)
        blind = torch.isneginf(z).all(dim=-1)
        # The gradient of a log-sum-exp of minus infinities would be NaN.
        lse = (z.masked_fill(blind[..., None], 0.0) if att.requires_grad else z).logsumexp(dim=-1)
        if att.sinks is not None:
            lse = torch.logaddexp(lse, att.sinks[heads].to(dtype)[None, :, None].expand_as(lse))
        lse = lse.masked_fill(blind, -torch.inf)
        p = torch.exp(z - lse.masked_fill(blind, 0.0)[..., None])
        b, h, r, _ = p.shape
        folded = p.reshape(b, h // att.groups, att.groups * r, -1)
        outs.append(torch.matmul(folded, att.v[batch, kv, keys].to(dtype)).reshape(b, h, r, -1))
        sums.append(lse)
    return assemble(tiles, outs).to(att.v.dtype), assemble(tiles, sums)
