"""Attention with the row log-sum-exp, from the fused kernel where one returns it, blockwise elsewhere."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Attention, assemble, exponential, sees_any, visible
from .sources import find_source, source_named

HALF = (torch.float16, torch.bfloat16)
# A key bias of minus infinity as the kernels get it: the exponential is zero, and no product is NaN.
FLOOR = -(2.0**14)


def lse_source(att: Attention) -> str:
    """The kernel that will give (out, lse): "cpu-flash", "cuda-flash", "cuda-efficient", "blockwise", or that of a source."""
    d, dv = att.q.shape[-1], att.v.shape[-1]
    if att.sinks is not None or att.requires_grad or d != dv or 0 in att.shape:
        return "blockwise"
    own = "blockwise" if att.softcap is not None else _own_source(att)
    if own != "blockwise":
        return own
    # Where none of torch's own serves.
    further = find_source(att, own_pass)
    return own if further is None else further.name


def _own_source(att: Attention) -> str:
    d = att.q.shape[-1]
    device, dtype = att.q.device.type, att.q.dtype
    if device == "cpu" and hasattr(torch, "_scaled_dot_product_flash_attention_for_cpu"):
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
    """The attention output [B, H, n, dv], in the dtype of v.

    Rows that see no key are left to torch: zero, or the mean value where the mask is a finite float.
    """
    mask = att.mask4()
    both = att.causal and mask is not None and not _takes_both(att)
    if att.softcap is not None or att.sinks is not None or both:
        return attend_lse(att)[0]
    q, k, v = _lanes(att)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(_mask_dtype(att))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=att.causal, scale=att.scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out[..., : att.v.shape[-1]]


def causal_with_mask() -> bool:
    """Whether torch's CPU kernel takes the causal flag beside a mask that is the same for all rows; tried once."""
    global _BOTH
    if _BOTH is None:
        # Compiled code cannot try it; a steering does before.
        _BOTH = not torch.compiler.is_compiling() and _try_both()
    return _BOTH


# Whether the kernel takes both; None: not tried yet.
_BOTH: bool | None = None


def _try_both() -> bool:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 8, generator=draw) for _ in range(3))
    bias = torch.randn(1, 1, 1, 4, generator=draw)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    with torch.no_grad():
        want = torch.softmax((q @ k.mT * 0.5 + bias).masked_fill(~seen, -torch.inf), dim=-1) @ v
        try:
            own = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=True, scale=0.5)
            fused = torch._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, True, attn_mask=bias.expand(1, 1, 4, 4), scale=0.5
            )[0]
        except (RuntimeError, AttributeError):
            return False
    return bool(torch.allclose(own, want, atol=1e-5) and torch.allclose(fused, want, atol=1e-5))


def _takes_both(att: Attention) -> bool:
    """Whether the causal flag may stand beside the mask of this call."""
    return (
        att.q.device.type == "cpu"
        and att.mask4().shape[2] == 1
        and att.mask.dtype != torch.bool
        and att.shape[2] == att.shape[3]
        # What the kernel does not take goes to torch's own operators, which do not take both.
        and att.q.shape[3] == att.v.shape[3]
        and not att.mask.requires_grad
        and causal_with_mask()
    )


def attend_lse(att: Attention, blind: Tensor | bool | None = None) -> tuple[Tensor, Tensor]:
    """Output [B, H, n, dv] and row log-sum-exp [B, H, n] in fp32 (natural log, mask and scale included).

    Rows that see no key have output zero and log-sum-exp minus infinity.

    Args:
        blind: where the caller knows which rows see no key: bool [B or 1, H or 1, n or 1], or False for none. Its mask is
            additive then, with true minus infinities.
    """
    source = lse_source(att)
    if source == "cpu-flash":
        out, lse = _cpu_flash(att, att.additive(_mask_dtype(att)) if blind is None else att.mask)
        if blind is not None:
            return out, lse if blind is False else lse.masked_fill(blind, -torch.inf)
    elif source == "cuda-flash":
        out, lse = _cuda_flash(att)
    elif source == "cuda-efficient":
        out, lse = _cuda_efficient(att)
    elif source == "blockwise":
        return own_pass(att)
    else:
        return source_named(source).attend(att)
    return _blind_rows(att, out, lse)


def _lanes(att: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v for a kernel, with the key bias as extra lanes of the head dimension (identity F4).

    Half precision takes the bias as three lanes (value and two remainders): one lane alone is off by percents.
    """
    q, k, v = att.q, att.k, att.v
    if att.key_bias is None:
        return q, k, v
    B, H, n, d = q.shape
    if att.key_bias.shape[1] > 1 and att.groups > 1:
        # A bias per query head needs a K per query head.
        k, v = (t.repeat_interleave(att.groups, dim=1) for t in (k, v))
    # The lane of q undoes the scale up to a power of two, which is exact; the lanes of k do the rest.
    one = 2.0 ** -round(math.log2(att.scale))
    rest = att.key_bias.to(att.stat_dtype).clamp(min=FLOOR).expand(*k.shape[:3]) / (att.scale * one)
    lanes = []
    for _ in range(3 if q.dtype in HALF else 1):
        lanes.append(rest.to(q.dtype))
        rest = rest - lanes[-1].to(rest.dtype)
    fill = -(d + len(lanes)) % 8
    q = F.pad(torch.cat([q, q.new_full((B, H, n, len(lanes)), one)], dim=-1), (0, fill))
    k = F.pad(torch.cat([k, torch.stack(lanes, dim=-1)], dim=-1), (0, fill))
    return q, k, F.pad(v, (0, len(lanes) + fill))


def _kernel_inputs(att: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """`_lanes`, with dense rows: the kernels read any other layout as if it were dense."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in _lanes(att))
    return q, k, v


def _mask_dtype(att: Attention) -> torch.dtype:
    """What a kernel takes an additive mask in: the dtype of q; on CPU also fp32, which loses nothing."""
    exact = att.q.device.type == "cpu" and att.mask is not None and att.mask.dtype not in (torch.bool, att.q.dtype)
    return att.stat_dtype if exact else att.q.dtype


def _cpu_flash(att: Attention, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = _kernel_inputs(att)
    causal = att.causal
    if mask is not None and causal and not _takes_both(att):
        mask, causal = _fold_causal(att, mask), False
    if mask is not None and mask.shape[2:] != att.shape[2:]:
        mask = mask.expand(-1, -1, att.shape[2], att.shape[3])
    out, lse = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=att.scale)
    width = att.v.shape[-1]
    return out if out.shape[-1] == width else out[..., :width], lse.to(att.stat_dtype)


def _fold_causal(att: Attention, mask: Tensor) -> Tensor:
    _, _, n, m = att.shape
    lower = torch.ones(n, m, dtype=torch.bool, device=mask.device).tril()
    return mask.masked_fill(~lower, -torch.inf)


def _cuda_flash(att: Attention) -> tuple[Tensor, Tensor]:
    q, k, v = _kernel_inputs(att)
    result = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, att.causal, return_debug_mask=False, scale=att.scale
    )
    return result[0][..., : att.v.shape[-1]], result[1][..., : att.shape[2]].float()


def _cuda_efficient(att: Attention) -> tuple[Tensor, Tensor]:
    q, k, v = _kernel_inputs(att)
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


def _blind_rows(att: Attention, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Zero output and minus infinity for rows without a visible key: kernels report 0, NaN or infinity there."""
    blind, mask = None, att.mask4()
    if mask is not None:
        if not att.causal:
            blind = ~sees_any(mask)
        elif mask.shape[2] == 1 and att.shape[2] == att.shape[3]:
            # Row i sees the keys up to i.
            blind = visible(mask)[:, :, 0].long().cumsum(dim=-1) == 0
        else:
            _, _, n, m = att.shape
            blind = ~sees_any(visible(mask) & torch.ones(n, m, dtype=torch.bool, device=mask.device).tril())
    if att.key_bias is not None:
        removed = lse < FLOOR / 2
        blind = removed if blind is None else blind | removed
    if blind is None:
        return out, lse
    if att.key_bias is not None or out.device.type != "cpu":
        out = out.masked_fill(blind[..., None], 0.0)
    return out, lse.masked_fill(blind, -torch.inf)


def own_pass(att: Attention) -> tuple[Tensor, Tensor]:
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
        top = z.detach().amax(dim=-1)
        blind = torch.isneginf(top)
        if att.sinks is not None:
            sink = att.sinks[heads].to(dtype)[None, :, None]
            top = torch.maximum(top, sink.detach())
        top = top.masked_fill(torch.isneginf(top), 0.0)
        z -= top[..., None]
        p = exponential(z)
        total = p.sum(dim=-1)
        if att.sinks is not None:
            total = total + torch.exp(sink - top)
        total = total.masked_fill(blind, 1.0)
        b, h, r, _ = p.shape
        folded = p.reshape(b, h // att.groups, att.groups * r, -1)
        out = torch.matmul(folded, att.v[batch, kv, keys].to(dtype)).reshape(b, h, r, -1)
        outs.append((out / total[..., None]).to(att.v.dtype))
        sums.append((top + total.log()).masked_fill(blind, -torch.inf))
    return assemble(tiles, outs), assemble(tiles, sums)
