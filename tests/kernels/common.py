"""Attention problems of every shape and mask, their dense truth in fp64, and the comparison of a kernel with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnsteer import kernels
from attnsteer.kernels import Attention
from tests.reference import dense as reference
from tests.reference import identities

# Largest error against the dense fp64 map of the same (rounded) inputs, absolute up to one and relative above.
# Statistics are fp32; torch's half-precision CPU kernel has an exponential of 20 bits, hence their looser limit.
# An output is rounded to its own dtype, and a reweighted one may lose some digits more: `merge.LIMIT`.
STATISTIC = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-4, torch.bfloat16: 2e-4}
OUTPUT = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
REWEIGHTED = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

MASKS = (
    "none",
    "causal",
    "bool",
    "bool per head",
    "matrix",
    "stack",
    "keys",
    "float -inf",
    "float min",
    "left padding",
    "left padding, causal flag",
    "right padding",
    "right padding, float min",
    "window",
    "block-causal",
    "chunk",
)


class Truth(NamedTuple):
    """The dense answer in fp64: scores, map, output, row log-sum-exp, share of the learned sink."""

    z: Tensor
    A: Tensor
    out: Tensor
    lse: Tensor
    sink: Tensor


def mask_of(
    kind: str, B: int, H: int, n: int, m: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor | None, bool]:
    """A mask of this kind and the causal flag to go with it; several kinds leave rows that see no key."""
    offset = m - n  # position of the first query among the keys, where the mask is causal
    i, j = torch.arange(n)[:, None] + max(offset, 0), torch.arange(m)[None, :]
    see = j <= i
    start = torch.arange(B)[:, None, None, None] * 2 % max(m, 1)
    stop = m - start
    random = torch.rand(B, 1, n, m) < 0.6
    low = torch.finfo(dtype).min
    match kind:
        case "none":
            return None, False
        case "causal":
            return None, True
        case "bool":
            return random, False
        case "bool per head":
            return torch.rand(B, H, n, m) < 0.6, False
        case "matrix":
            return random[0, 0], False
        case "stack":
            return torch.rand(H, n, m) < 0.6, False
        case "keys":
            return torch.rand(B, 1, 1, m) < 0.6, False
        case "float -inf":
            return torch.randn(B, H, n, m).to(dtype).masked_fill(~random, -torch.inf), False
        case "float min":
            return torch.randn(B, 1, n, m).to(dtype).masked_fill(~random, low), False
        case "left padding":
            return see & (j >= start), False
        case "left padding, causal flag":
            return (j >= start).expand(B, 1, 1, m), True
        case "right padding":
            return see & (j < stop), False
        case "right padding, float min":
            return torch.zeros(B, 1, n, m, dtype=dtype).masked_fill(~(see & (j < stop)), low), False
        case "window":
            return (see & (j > i - 3))[None, None], False
        case "block-causal":
            return (j // 4 <= i // 4)[None, None], False
        case "chunk":
            return see[None, None], False
    raise ValueError(kind)


def problem(
    mask: str = "none",
    B: int = 2,
    H: int = 4,
    Hkv: int = 2,
    n: int = 12,
    m: int = 12,
    d: int = 8,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    sharp: float = 1.5,
    softcap: float | None = None,
    sinks: bool = False,
    bias: tuple[int, int] | None = None,
    seed: int = 0,
) -> Attention:
    """A random problem; `sharp` sets how peaked the rows are, `bias` is the leading shape of a key bias."""
    torch.manual_seed(seed)
    q, k = torch.randn(B, H, n, d).to(dtype), (sharp * torch.randn(B, Hkv, m, d)).to(dtype)
    v = torch.randn(B, Hkv, m, d if dv is None else dv).to(dtype)
    wide = torch.float32 if dtype != torch.float64 else dtype
    key_bias = None if bias is None else torch.randn(*bias, m).to(wide) * 2
    cut, causal = mask_of(mask, B, H, n, m, dtype)
    return Attention(
        q, k, v, d**-0.5, cut, causal, softcap, sinks=torch.randn(H).to(wide) if sinks else None, key_bias=key_bias
    )


def truth(att: Attention) -> Truth:
    """The reference in fp64. The library's causal flag is upper-left, so it goes in as a mask of its own."""
    n, m = att.shape[2:]
    bias = None if att.key_bias is None else att.key_bias[:, :, None].double()
    if att.causal:
        upper = torch.zeros(n, m, dtype=torch.float64).masked_fill(~torch.ones(n, m).tril().bool(), -torch.inf)
        bias = upper if bias is None else upper + bias
    z = reference.dense_scores(att.q.double(), att.k.double(), att.scale, att.mask, softcap=att.softcap, bias=bias)
    A = reference.dense_map(z, att.sinks)
    lse = z.masked_fill(blind(z)[..., None], 0.0).logsumexp(-1)
    if att.sinks is not None:
        lse = torch.logaddexp(lse, att.sinks.double()[None, :, None])
    lse = lse.masked_fill(blind(z), -torch.inf)
    return Truth(z, A, reference.dense_out(A, att.v), lse, reference.sink_share(z, att.sinks))


def blind(z: Tensor) -> Tensor:
    """[B, H, n]: rows that see no key."""
    return (z == -torch.inf).all(-1)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative where the truth is above one. Infinities must agree; NaN is never right."""
    actual, expected = torch.broadcast_tensors(actual.double(), expected.double())
    finite = torch.isfinite(expected)
    assert torch.equal(actual[~finite], expected[~finite]), "infinities differ"
    assert torch.isfinite(actual[finite]).all(), "not finite"
    difference = (actual.detach() - expected).abs() / expected.abs().clamp_min(1.0)
    return float(difference[finite].max()) if finite.any() else 0.0


def close(actual: Tensor, expected: Tensor, tol: float) -> None:
    found = error(actual, expected)
    assert found <= tol, f"error {found:.2e}, allowed {tol:.0e}"


def key_sets(att: Attention) -> dict[str, Tensor]:
    """Sets of keys: shared, per batch row, per head, a span, none and all."""
    B, H, _, m = att.shape
    return {
        "shared": torch.rand(1, 1, m) < 0.4,
        "batch": torch.rand(B, 1, m) < 0.4,
        "head": torch.rand(1, H, m) < 0.4,
        "both": torch.rand(B, H, m) < 0.4,
        "span": ((torch.arange(m) >= m // 4) & (torch.arange(m) < m // 4 + max(1, m // 2)))[None, None],
        "none": torch.zeros(1, 1, m, dtype=torch.bool),
        "all": torch.ones(1, 1, m, dtype=torch.bool),
    }


def edited(
    t: Truth, v: Tensor, groups: list[tuple[Tensor, Tensor | float]], rest: Tensor | float, norm: bool
) -> Tensor:
    """A'_ij = w_ig A_ij on the dense map, applied to v; rows without any weight left stay as they were."""
    B, H, n, m = t.A.shape
    as_rows = lambda w: torch.as_tensor(w, dtype=torch.float64).expand(B, H, n)[..., None]  # noqa: E731
    weight = as_rows(rest)
    for keys, w in groups:
        weight = torch.where(keys.expand(B, H, m)[:, :, None], as_rows(w), weight)
    A = t.A * weight
    if norm:
        total = t.sink[..., None] + A.sum(-1, keepdim=True)
        A = torch.where((total > 0) & (t.A.sum(-1, keepdim=True) > 0), A / total.clamp_min(1e-300), t.A)
    return reference.dense_out(A, v)


def errors(att: Attention) -> dict[str, float]:
    """The error of every kernel on this problem; those of outputs have names that start with "out"."""
    t = truth(att)
    B, H, n, m = att.shape
    out, lse = kernels.attend_lse(att)
    found = {"out": error(out, t.out), "lse": error(lse, t.lse)}
    plain = kernels.attend(att)
    assert torch.isfinite(plain).all()
    # Rows that see no key are torch's own there.
    found["out attend"] = error(plain.masked_fill(blind(t.z)[..., None], 0.0), t.out)
    found["dense"] = error(kernels.dense(att), t.A)
    found["entropy"] = error(kernels.entropy(att, lse), identities.entropy(t.A))
    found["keys seen"] = error(
        kernels.keys_seen(att).double().expand(B, H, n), t.z.isneginf().logical_not().sum(-1).double()
    )
    found["column_mass"] = error(kernels.column_mass(att, lse), identities.column_mass(t.A))
    keep = torch.rand(B, n) < 0.7
    found["column_mass valid"] = error(kernels.column_mass(att, lse, keep), identities.column_mass(t.A, keep))
    index = torch.randint(0, n, (3,))
    found["rows"] = error(kernels.rows(att, lse, index), t.A[:, :, index])
    for name, keys in key_sets(att).items():
        mass, u = kernels.partial(att, lse, keys)
        assert torch.equal(kernels.mass(att, lse, keys), mass)
        found[f"mass {name}"] = error(mass, identities.mass(t.A, keys))
        found[f"partial {name}"] = error(u, identities.partial(t.A, att.v, keys))
        found[f"leftover {name}"] = error(kernels.leftover(att, lse, keys, mass), identities.mass(t.A, ~keys))
        w, rest = 3.0 * torch.rand(B, H, n), 0.1 + torch.rand(B, 1, n)
        for norm in (False, True):
            new = kernels.reweight(att, out, lse, [(keys, w, mass, u)], rest, norm)
            assert new.dtype == out.dtype
            found[f"reweight {name} {norm}"] = error(new, edited(t, att.v, [(keys, w)], rest, norm))
    return found


def check(att: Attention) -> None:
    """Every kernel within the tolerance of its dtype."""
    dtype = att.q.dtype
    limits = {"out": OUTPUT[dtype], "reweight": REWEIGHTED[dtype]}
    # The partial output of a large span is the fused kernel's, so in half precision it is rounded like an output.
    limits["partial"] = max(STATISTIC[dtype], OUTPUT[dtype])
    found = errors(att)
    wrong = {k: f"{v:.1e}" for k, v in found.items() if not v <= limits.get(k.split()[0], STATISTIC[dtype])}
    assert not wrong, wrong
