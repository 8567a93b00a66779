"""Merging weighted groups of keys into an edited output (identities F2, F3, F8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .groups import FAR, complement, masked_group
from .problem import Attention

# How much a subtraction may magnify rounding before the row takes a pass over the other keys instead: the output of a
# half-precision kernel carries about 2^-9; the masses of an fp32 one 2^-24 times the scores, which reach the hundreds.
LIMIT = {torch.float16: 4.0, torch.bfloat16: 4.0, torch.float32: 2.0, torch.float64: 32.0}
# In fp32 where scores are small.
MOST = 8.0


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key blocks, each (out [B, H, n, dv], lse [B, H, n]) (identity F8)."""
    lse = torch.stack([part[1] for part in parts]).logsumexp(dim=0)
    safe = lse.masked_fill(torch.isneginf(lse), 0.0)
    out = sum(torch.exp(l - safe)[..., None] * o.to(l.dtype) for o, l in parts)
    return out.to(parts[0][0].dtype), lse


def held(value: Tensor, gradient: Tensor) -> Tensor:
    """`value` bit for bit, with the gradient of `gradient`: for rows that an edit at its neutral strength leaves as they are."""
    return value.detach() + (gradient - gradient.detach())


def lift(out: Tensor, mass: Tensor, partial: Tensor, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A set's share of each row lifted to `of(share)`, which is at least what it was and below one; no gradient.

    Args:
        out: attention output [B, H, n, dv]. mass, partial: of the set, [B, H, n] and [B, H, n, dv].

    Returns:
        (output in the dtype of `out`, rows that moved bool [B, H, n]). A learned sink shrinks as the other keys do. All
        coefficients are positive, so that no digits are lost; a row that stays is returned bit for bit.
    """
    new = of(mass)
    moved = (new != mass) & (mass > 0) & (mass < 1)
    rest = torch.where(moved, (1.0 - new) / (1.0 - mass), 1.0)
    more = torch.where(moved, new / mass - rest, 0.0)
    lifted = (out.to(mass.dtype) * rest[..., None]).addcmul_(more[..., None], partial)
    return lifted.to(out.dtype), moved


def reweight(
    att: Attention,
    out: Tensor,
    lse: Tensor,
    groups: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    rest: Tensor | float,
    normalise: bool,
    grows: bool = False,
) -> Tensor:
    """The output of A'_ij = w_{i,g(j)} A_ij, with `rest` for keys in no group; optionally renormalised.

    Renormalising is what adding log w to the scores would do; a learned sink keeps weight one. A row that would
    keep no weight at all has no renormalised form and stays as it was.

    Args:
        out: attention output [B, H, n, dv]. lse: row log-sum-exp [B, H, n].
        groups: (keys bool [B or 1, H or 1, m], weight, mass [B, H, n], partial output [B, H, n, dv]) of
            disjoint sets; weights broadcast to [B, H, n].
        rest: weight of the remaining keys, broadcastable to [B, H, n].
        normalise: divide by the new row sum. grows: a promise that no group has less weight than the rest.

    Returns:
        [B, H, n, dv] in the dtype of `out`. Where all weights are one the row is returned bit for bit; where a weight needs
        a gradient, it has the right one there too.
    """
    if torch.compiler.is_compiling():
        return _added_up(att, out, lse, groups, rest, normalise)
    dtype = att.stat_dtype
    total, sink = att.visible_total(lse), att.sink_share(lse)
    rest = torch.as_tensor(rest, dtype=dtype, device=out.device).expand_as(total)
    gains = [torch.as_tensor(w, dtype=dtype, device=out.device) - rest for _, w, _, _ in groups]
    norm = sink + rest * total + sum(g * m for g, (_, _, m, _) in zip(gains, groups, strict=True))
    # Renormalising undoes a weight that all keys have, but for a learned sink.
    same = rest > 0 if normalise and att.sinks is None else rest == 1
    shrunk = torch.zeros_like(total, dtype=torch.bool)
    for g in gains:
        same, shrunk = same & (g == 0), shrunk | (g < 0)
    # A row that stays has the gradient of one that does not.
    learned = rest.requires_grad or any(g.requires_grad for g in gains)
    stays = total <= 0 if learned else same | (total <= 0)
    # Only a group with less weight than the rest can make the difference small against its terms.
    risky = shrunk & ~stays & (rest != 0) & (rest.abs() > _limit(att, out.dtype) * norm.clamp_min(0.0))
    if normalise:
        stays = stays | ((norm <= 0) & ~risky)
        # Divided itself, so that it is one in rows that see no key of a group.
        norm = norm.masked_fill(stays | risky, 1.0)
        rest_share, gains = rest / norm, [g / norm for g in gains]
    else:
        rest_share = rest
    # Coefficients of one and zero return a row bit for bit.
    new = out.to(dtype) * rest_share.masked_fill(stays | risky, 1.0)[..., None]
    for g, (_, _, _, u) in zip(gains, groups, strict=True):
        new.addcmul_(g.masked_fill(stays | risky, 0.0)[..., None], u)
    if not grows and bool(risky.any()):
        B, H, n, m = att.shape
        union = torch.stack([keys.expand(B, H, m) for keys, _, _, _ in groups]).any(dim=0)
        for b, h, at, o, m_rest in complement(att, lse, union, risky):
            # The masses come from passes that round their scores differently, so that they need not add up to one.
            scale = 1.0 / (m_rest + sum(mass[b, h, at] for _, _, mass, _ in groups)) if att.sinks is None else 1.0
            weight = scale * rest[b, h, at] * m_rest
            edited, norm = weight[:, None] * o.to(dtype), sink[b, h, at] + weight
            for _, w, mass, u in groups:
                w = scale * torch.as_tensor(w, dtype=dtype, device=out.device).expand(B, H, n)[b, h, at]
                edited, norm = edited + w[:, None] * u[b, h, at], norm + w * mass[b, h, at]
            if normalise:
                # Where no weight is left at all, `new` holds the unedited output.
                edited = torch.where(norm[:, None] > 0, edited / norm.clamp_min(1e-37)[:, None], new[b, h, at])
            new[b, h, at] = edited
    new = new.to(out.dtype)
    return torch.where(same[..., None], held(out, new), new) if learned else new


def _limit(att: Attention, dtype: torch.dtype) -> Tensor | float:
    """`LIMIT`, by row where it depends on the scores."""
    reach = att.reach() if dtype == torch.float32 else None
    return LIMIT[dtype] if reach is None else (LIMIT[dtype] * FAR / reach.clamp_min(1.0)).clamp(LIMIT[dtype], MOST)


def _added_up(
    att: Attention,
    out: Tensor,
    lse: Tensor,
    groups: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    rest: Tensor | float,
    normalise: bool,
) -> Tensor:
    """`reweight` as a sum of parts that are all computed: nothing cancels, and nothing is read, as compiled code needs it."""
    dtype = att.stat_dtype
    union = torch.zeros((1, 1, att.shape[3]), dtype=torch.bool, device=out.device)
    for keys, _, _, _ in groups:
        union = union | keys
    m_rest, u_rest = masked_group(att, lse, ~union)
    rest = torch.as_tensor(rest, dtype=dtype, device=out.device).expand_as(m_rest)
    new, norm, same = rest[..., None] * u_rest, att.sink_share(lse) + rest * m_rest, rest == 1
    for _, w, m, u in groups:
        w = torch.as_tensor(w, dtype=dtype, device=out.device).expand_as(m_rest)
        new, norm, same = new + w[..., None] * u, norm + w * m, same & (w == 1)
    if normalise:
        same = same | (norm <= 0)
        new = new / norm.masked_fill(same, 1.0)[..., None]
    same, new = (same | torch.isneginf(lse))[..., None], new.to(out.dtype)
    return torch.where(same, held(out, new) if new.requires_grad else out, new)
