"""Further sources of (out, lse): flash-attention 2 and 3, dense and for padded batches, and flex attention.

A source is used for the problems that it takes once it has agreed with our own pass on a small problem of that form, device and
dtype; one that does not is left out, with a warning. None of them has run on the machines on which this library is tested
(docs/backends.md).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .problem import Attention

HALF = (torch.float16, torch.bfloat16)
# Of outputs and log-sum-exps in units of one; the kernels round probabilities to half precision.
LIMIT = 2e-2

Attend = Callable[[Attention], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Source:
    """A kernel that gives the row log-sum-exp beside its output.

    Attributes:
        name: as `lse_source` calls it. takes: whether it computes such a problem.
        attend: (out [B, H, n, dv], lse [B, H, n] in fp32); rows that see no key have output zero and minus infinity.
    """

    name: str
    takes: Callable[[Attention], bool]
    attend: Attend


_SOURCES: dict[str, Source] = {}
# (source, form of problem) -> whether it agreed with our own pass.
_AGREED: dict[tuple[Any, ...], bool] = {}


def add_source(source: Source) -> None:
    """Ask this source from now on where torch's own kernels do not serve; one of the same name is replaced."""
    _SOURCES[source.name] = source
    for key in [key for key in _AGREED if key[0] == source.name]:
        del _AGREED[key]


def remove_source(name: str) -> None:
    """Forget a source."""
    _SOURCES.pop(name, None)


def find_source(att: Attention, reference: Attend) -> Source | None:
    """The first source that takes the problem and agrees with `reference`, our own pass, on one of its form."""
    _look_once(att)
    if not _SOURCES or att.requires_grad:
        return None
    for source in list(_SOURCES.values()):
        if source.takes(att) and _agrees(source, att, reference):
            return source
    return None


# Whether it was looked whether flash-attention is installed.
_LOOKED = False


def _look_once(att: Attention) -> None:
    """flash-attention is asked where it is installed."""
    global _LOOKED
    if _LOOKED or att.q.device.type != "cuda" or torch.compiler.is_compiling():
        return
    _LOOKED = True
    module = flash_module()
    if module is not None:
        add_source(flash_source(module))


def source_named(name: str) -> Source | None:
    """A source by its name, or None."""
    return _SOURCES.get(name)


def _form(att: Attention) -> tuple[Any, ...]:
    mask = att.mask4()
    return (
        att.q.device.type,
        att.q.dtype,
        att.causal,
        None if mask is None else (mask.dtype, tuple(size > 1 for size in mask.shape)),
        att.softcap is not None,
        att.groups > 1,
        att.q.shape[-1],
    )


def _agrees(source: Source, att: Attention, reference: Attend) -> bool:
    key = (source.name, *_form(att))
    found = _AGREED.get(key)
    if found is None:
        if torch.compiler.is_compiling():
            # Nothing can be tried there.
            return False
        found = _AGREED[key] = _tried(source, att, reference)
    return found


@torch.no_grad()
def _tried(source: Source, att: Attention, reference: Attend) -> bool:
    """Whether a source computes what our own pass does, on a small problem of the form of `att`."""
    draw, n = torch.Generator().manual_seed(0), 24
    make = lambda h, d: torch.randn(2, h, n, d, generator=draw).to(att.q.device, att.q.dtype)  # noqa: E731
    d, mask = att.q.shape[-1], att.mask4()
    q, k, v = make(2 * min(att.groups, 2), d), make(2, d), make(2, d)
    if mask is not None:
        shape = [size if full > 1 else 1 for size, full in zip((2, q.shape[1], n, n), mask.shape, strict=True)]
        seen = torch.ones(shape, dtype=torch.bool, device=q.device)
        # A batch that is padded on the left, if the mask tells samples apart.
        seen[-1, ..., : n // 3] = False
        floor = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else 0
        mask = (
            seen
            if mask.dtype == torch.bool
            else torch.zeros(shape, dtype=mask.dtype, device=q.device).masked_fill(~seen, floor)
        )
    small = Attention(q, k, v, att.scale, mask=mask, causal=att.causal, softcap=att.softcap)
    try:
        out, lse = source.attend(small)
    except Exception as error:  # whatever a foreign kernel may raise: it is not used then
        warnings.warn(f"attnsteer does not use {source.name} for this form of attention: {error}", stacklevel=2)
        return False
    wanted, wanted_lse = reference(small)
    blind = torch.isneginf(wanted_lse)
    error = torch.where(blind, 0.0, (lse - wanted_lse).abs()).amax()
    error = torch.maximum(error, (out.float() - wanted.float()).abs().amax())
    agrees = bool((torch.isneginf(lse) == blind).all()) and bool(error <= LIMIT)
    if not agrees:
        warnings.warn(
            f"attnsteer does not use {source.name}: it disagrees with the definition of attention by {float(error):.2g} here.",
            stacklevel=2,
        )
    return agrees


# flash-attention.


def flash_module() -> Any:
    """flash-attention 3 or 2 where one is installed, else None."""
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def flash_source(module: Any) -> Source:
    """flash-attention as a source; `module`: `flash_attn_interface` (version 3) or `flash_attn` (version 2)."""
    return Source("flash-attn", _flash_takes, functools.partial(_flash, module))


def _flash_takes(att: Attention) -> bool:
    mask = att.mask4()
    padding = mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1) and att.shape[2] == att.shape[3])
    # Its causal flag is lower-right aligned, ours upper-left: equal for square maps only.
    square = not att.causal or att.shape[2] == att.shape[3]
    plain = att.sinks is None and att.key_bias is None and att.q.shape[-1] == att.v.shape[-1]
    return (
        padding and square and plain and att.q.dtype in HALF and att.q.device.type == "cuda" and att.q.shape[-1] <= 256
    )


def _flash(module: Any, att: Attention) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"softmax_scale": att.scale, "causal": att.causal, "return_attn_probs": True}
    if att.softcap is not None:
        options["softcap"] = att.softcap
    q, k, v = (t.transpose(1, 2) for t in (att.q, att.k, att.v))
    if att.mask is None:
        out, lse = module.flash_attn_func(q, k, v, **options)[:2]
        return out.transpose(1, 2), lse.float()
    return flash_padded(module, q, k, v, att.mask4()[:, 0, 0].expand(len(q), -1), options)


def flash_padded(
    module: Any, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A padded batch without its padding, by the kernel for sequences of several lengths.

    Args:
        q, k, v: [B, n, H or Hkv, d]. valid: bool [B, n]. options: of the kernel.

    Returns:
        (out [B, H, n, d], lse [B, H, n]); padding rows have output zero and minus infinity.
    """
    B, n, H, _ = q.shape
    lengths = valid.sum(dim=-1, dtype=torch.int32)
    bounds = torch.nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    longest, at = int(lengths.max()), valid.flatten().nonzero()[:, 0]
    q, k, v = (t.reshape(B * n, *t.shape[2:])[at] for t in (q, k, v))
    packed, lse = module.flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, **options)[:2]
    if lse.ndim == 3:
        # Older versions pad: [B, H, longest].
        row = torch.arange(longest, device=lse.device) < lengths[:, None]
        lse = lse.transpose(1, 2)[row].T
    out = packed.new_zeros(B * n, *packed.shape[1:]).index_copy(0, at, packed)
    rows = torch.full((H, B * n), -torch.inf, dtype=torch.float32, device=lse.device).index_copy(1, at, lse.float())
    return out.reshape(B, n, H, -1).transpose(1, 2), rows.reshape(H, B, n).transpose(0, 1)


# flex attention.


def flex_source() -> Source:
    """flex attention of torch, for CUDA, compiled on first use (seconds): `add_source(flex_source())`.

    It takes a mask beside the causal flag, and soft-capping, which no fused kernel of torch does there.
    """
    return Source("flex", _flex_takes, _flex)


def _flex_takes(att: Attention) -> bool:
    return att.q.device.type == "cuda" and att.sinks is None and att.q.dtype in (torch.float32, *HALF)


@functools.cache
def _flex_function() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(att: Attention, function: Any = None) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest

    mask, bias = att.additive(att.stat_dtype), att.key_bias
    mask = None if mask is None else mask.expand(*mask.shape[:2], att.shape[2], att.shape[3])

    def score(z: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if att.softcap is not None:
            z = att.softcap * torch.tanh(z / att.softcap)
        if mask is not None:
            z = z + mask[b if len(mask) > 1 else 0, h if mask.shape[1] > 1 else 0, i, j]
        if bias is not None:
            z = z + bias[b if len(bias) > 1 else 0, h if bias.shape[1] > 1 else 0, j]
        return torch.where(j <= i, z, -torch.inf) if att.causal else z

    run = _flex_function() if function is None else function
    out, aux = run(
        att.q,
        att.k,
        att.v,
        score_mod=score,
        scale=att.scale,
        enable_gqa=att.groups > 1,
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse.float()


__all__ = [
    "Source",
    "add_source",
    "find_source",
    "flash_module",
    "flash_source",
    "flex_source",
    "remove_source",
    "source_named",
]
