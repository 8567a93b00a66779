"""What injected maps are, in loops over rows and keys; nothing here imports the library."""

from __future__ import annotations

from torch import Tensor

__all__ = ["inside", "masked", "pattern"]


def _allowed(
    name: str, number: int, i: int, j: int, ids: list[int], ends: list[int], spans: list[tuple[int, int]]
) -> bool:
    if name == "all":
        return True
    if name == "previous":
        return j == i - 1
    if name == "self":
        return j == i
    if name == "first":
        return j == 0
    if name == "offset":
        return i - j == number
    if name == "block":
        return i // number == j // number
    if name == "same_token":
        return ids[i] == ids[j]
    if name == "other_same_token":
        return ids[i] == ids[j] and i != j
    if name == "after_same_token":
        return j > 0 and ids[j - 1] == ids[i]
    if name == "sentence":
        return [t in ends for t in ids[:i]].count(True) == [t in ends for t in ids[:j]].count(True)
    if name == "span":
        return any(a <= i < b and a <= j < b for a, b in spans)
    raise ValueError(name)


def pattern(
    A: Tensor, name: str, number: int, ids: list[int], first: int, ends: list[int], spans: list[tuple[int, int]]
) -> Tensor:
    """Rows of one sample replaced by the uniform distribution over the keys that a pattern allows and the row sees.

    A [H, n, m], the last n of its m slots being its rows, tokens from slot `first` on; ids of the tokens. Rows without such a key
    stay.
    """
    heads, n, m = A.shape
    out = A.clone()
    for row in range(n):
        i = m - n + row - first
        if i < 0:
            continue
        keys = [j for j in range(i + 1) if _allowed(name, number, i, j, ids, ends, spans)]
        if keys:
            out[:, row] = 0.0
            for j in keys:
                out[:, row, first + j] = 1.0 / len(keys)
    return out


def masked(A: Tensor, P: Tensor) -> Tensor:
    """A over the keys where P is not zero, renormalised; rows that would be empty stay."""
    out = A.clone()
    for h in range(A.shape[0]):
        for i in range(A.shape[1]):
            kept = A[h, i] * (P[h, i] != 0)
            if float(kept.sum()) > 0:
                out[h, i] = kept / kept.sum()
    return out


def inside(A: Tensor, target: Tensor, keys: list[int], share: float | None) -> Tensor:
    """The distribution `target` [len(keys)] over some keys of A [H, n, m], which keep their share of each row, or get `share`."""
    out = A.clone()
    others = [j for j in range(A.shape[2]) if j not in keys]
    for h in range(A.shape[0]):
        for i in range(A.shape[1]):
            mass = float(A[h, i, keys].sum())
            if mass == 0:
                continue
            new = mass if share is None else share
            out[h, i, keys] = new * target / target.sum()
            if share is not None:
                out[h, i, others] = A[h, i, others] * (1 - share) / float(A[h, i, others].sum())
    return out
