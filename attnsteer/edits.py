"""What a method may return at the doors inside attention, and the check of it at its first act."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ContractError
from .kernels import Attention


@dataclass(frozen=True)
class KeyBias:
    """An additive score bias per key, [B or 1, H or 1, m], the same for all query rows."""

    bias: Tensor


@dataclass(frozen=True)
class MergedTokens:
    """Attention among groups of tokens; each row gets the output of its group.

    Attributes:
        q: [B, H, s, d], k and v: [B, Hkv, s, d], of the groups. group: int64 [B, n], that of each token.
        size: [B, s], the logarithm of which is added to the scores of a group's key; None: nothing is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    group: Tensor
    size: Tensor | None = None


@dataclass(frozen=True)
class HeadOutputs:
    """Head outputs [B, H, n, dv] that were computed in the place of attention, which is not run; of `inputs`."""

    out: Tensor


@dataclass(frozen=True)
class BlockBias:
    """Rows see some blocks of keys only; the scores of the others become minus infinity. No mask of rows and keys is built for it.

    Attributes:
        block: int64 [B or 1, m], the block of each key, from 0 to C - 1; a key of block -1 is seen as before by all rows.
        keep: bool [B or 1, H or 1, n, C], the blocks that each row keeps; a row that keeps none sees nothing.
        there: bool, broadcastable to that, the blocks that hold something for a row to see; None: all. The audit counts by it.
    """

    block: Tensor
    keep: Tensor
    there: Tensor | None = None


@dataclass(frozen=True)
class Reweight:
    """Weights per row for disjoint sets of keys: A'_ij = w_{i,g(j)} A_ij.

    Attributes:
        groups: pairs (keys bool [B or 1, H or 1, m], weight >= 0 broadcastable to [B, H, n]).
        rest: weight >= 0 of all other keys, broadcastable to [B, H, n].
        normalise: divide each row by its new sum (what adding log w to the scores would do); a row whose weights are all one, or
            that would keep no weight at all, stays as it is.
        positive: a promise that no weight is ever zero. Renormalised weights that are the same for all rows are a bias on the
            keys then, which the model's own kernel takes; numbers are looked at, tensors need the promise.
        grows: a promise that no group has less weight than the rest, so that sums may be taken as differences; as `positive`.
    """

    groups: tuple[tuple[Tensor, Tensor | float], ...]
    rest: Tensor | float = 1.0
    normalise: bool = True
    positive: bool = False
    grows: bool = False


@dataclass(frozen=True)
class Share:
    """Another share of each row on one set of keys; inside the set, and among the other keys, shares grow or shrink in proportion.

    Attributes:
        keys: bool [B or 1, H or 1, s], s up to m; keys behind the s-th are not in the set. The same tensor at each step of a
            decoding lets what is made of it be kept.
        of: the new share of the set from the one it has, both [B, H, n] from 0 to 1. Elementwise: it may be asked of other heads
            too, and by heads no further than by rows and samples.
        scale_sinks: whether a learned sink shrinks as the other keys do, or keeps what it has. For shares that never shrink, and
            below one.

    A row that gives the set nothing, or nothing to other keys, stays as it is.
    """

    keys: Tensor
    of: Callable[[Tensor], Tensor]
    scale_sinks: bool = False


class Check:
    """The check of one door of one method at one site; every error names all three.

    It reads values, which costs a synchronisation, so it runs at the first act only; without gradients, since a checkpointed pass
    that is computed again must save the same tensors.
    """

    def __init__(self, method: str, door: str, site: str, shown: Attention | Tensor, values: bool = True):
        """
        Args:
            shown: the attention that is edited; at the door "output", the outputs that are. values: whether they are read, which
                compiled code cannot; types, shapes, dtypes and devices are looked at in any case.
        """
        self.values = values
        self.place = f"{method}.{door} at {site}"
        self.att = shown
        self.device = shown.device if isinstance(shown, Tensor) else shown.q.device

    def refuse(self, what: str) -> ContractError:
        """The error that says `what` is wrong."""
        return ContractError(f"{self.place}: {what}")

    def left_alone(self, altered: list[str]) -> None:
        """None of the tensors that the method was shown was changed where it stands."""
        if altered:
            raise self.refuse(
                f"changed {', '.join(altered)} in place, which the model, other methods and the audit still read; return new "
                "tensors."
            )

    @torch.no_grad()
    def inputs(self, edit: Any) -> None:
        """q, k and v of the shapes, dtype and device that the call has; or `MergedTokens`, or `HeadOutputs`."""
        if isinstance(edit, MergedTokens):
            self._merged(edit)
            return
        if isinstance(edit, HeadOutputs):
            wanted, out = (*self.att.shape[:3], self.att.v.shape[-1]), edit.out
            if not isinstance(out, Tensor) or out.shape != wanted or out.dtype != self.att.v.dtype:
                raise self.refuse(f"the outputs are {_kind(out)}; expected {list(wanted)} of {self.att.v.dtype}.")
            self._device("the outputs", out)
            return
        if not isinstance(edit, (tuple, list)) or len(edit) != 3:
            raise self.refuse(f"returned {_kind(edit)}; return a tuple (q, k, v), or None for no edit.")
        for name, new, old in zip("qkv", edit, (self.att.q, self.att.k, self.att.v), strict=True):
            self._like(name, new, old)

    @torch.no_grad()
    def bias(self, edit: Any) -> None:
        """A `KeyBias`, or a score term that broadcasts to [B, H, n, m]; minus infinity is allowed, NaN is not. Or a `BlockBias`."""
        B, H, n, m = self.att.shape
        if isinstance(edit, BlockBias):
            self._blocks(edit)
            return
        term = edit.bias if isinstance(edit, KeyBias) else edit
        if not isinstance(term, Tensor):
            raise self.refuse(f"returned {_kind(term)}; return a KeyBias, a tensor [B, H, n, m], or None.")
        wanted = ((B, 1), (H, 1), (m,)) if isinstance(edit, KeyBias) else ((B, 1), (H, 1), (n, 1), (m, 1))
        if term.ndim != len(wanted) or any(s not in allowed for s, allowed in zip(term.shape, wanted, strict=True)):
            form = f"[{B} or 1, {H} or 1, {m}]" if isinstance(edit, KeyBias) else f"[{B}, {H}, {n}, {m}] or ones"
            raise self.refuse(f"the bias has shape {tuple(term.shape)}; expected {form}.")
        self._number("the bias", term)
        self._device("the bias", term)
        if not self.values:
            return
        used = term.to(self.att.stat_dtype)
        if bool((used.isnan() | (used == torch.inf)).any()):
            raise self.refuse(
                f"the bias has NaN or plus infinity in {self.att.stat_dtype}, in which it is used; finite numbers and minus "
                "infinity are defined."
            )

    def _merged(self, edit: MergedTokens) -> None:
        B, _, n, m = self.att.shape
        groups = edit.q.shape[2] if isinstance(edit.q, Tensor) and edit.q.ndim == 4 else 0
        for name, new, old in zip("qkv", (edit.q, edit.k, edit.v), (self.att.q, self.att.k, self.att.v), strict=True):
            wanted = (*old.shape[:2], groups, old.shape[3])
            if not isinstance(new, Tensor) or new.shape != wanted or new.dtype != old.dtype:
                raise self.refuse(f"{name} of the groups is {_kind(new)}; expected {list(wanted)} of {old.dtype}.")
            self._device(name, new)
            self._finite(name, new, old)
        if n != m:
            raise self.refuse(f"merges {n} rows that meet {m} keys; only tokens that are both can be merged.")
        group, size = edit.group, edit.size
        if not isinstance(group, Tensor) or group.dtype != torch.long or group.shape != (B, n):
            raise self.refuse(f"the groups are {_kind(group)}; expected int64 [{B}, {n}].")
        self._device("the groups", group)
        if self.values and bool(((group < 0) | (group >= groups)).any()):
            raise self.refuse(f"a token is in no one of the {groups} groups.")
        if size is None:
            return
        wanted = f"finite numbers above 0, [{B}, {groups}]"
        if not isinstance(size, Tensor) or not size.is_floating_point() or size.shape != (B, groups):
            raise self.refuse(f"the sizes are {_kind(size)}; expected {wanted}.")
        self._device("the sizes", size)
        if self.values and not bool((size.isfinite() & (size > 0)).all()):
            raise self.refuse(f"some sizes are zero, negative, infinite or NaN; expected {wanted}.")

    def _blocks(self, edit: BlockBias) -> None:
        B, H, n, m = self.att.shape
        block, keep = edit.block, edit.keep
        if not isinstance(block, Tensor) or block.dtype != torch.long or block.shape not in ((1, m), (B, m)):
            raise self.refuse(f"the blocks of the keys are {_kind(block)}; expected int64 [{B} or 1, {m}].")
        fits = isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.ndim == 4 and keep.shape[2] == n
        if not fits or keep.shape[0] not in (1, B) or keep.shape[1] not in (1, H):
            raise self.refuse(f"the kept blocks are {_kind(keep)}; expected bool [{B} or 1, {H} or 1, {n}, blocks].")
        self._device("the blocks of the keys", block)
        self._device("the kept blocks", keep)
        wrong = (block < -1) | (block >= keep.shape[-1]) if self.values else None
        if wrong is not None and bool(wrong.any()):
            raise self.refuse(
                f"a key is in block {int(block[wrong][0])}; {keep.shape[-1]} blocks are kept or left out, from 0 on, and -1 is "
                "for keys that all rows see."
            )
        there = edit.there
        if there is None:
            return
        if not isinstance(there, Tensor) or there.dtype != torch.bool or not _broadcasts(there.shape, keep.shape):
            raise self.refuse(
                f"which blocks hold something is {_kind(there)}; expected a bool tensor that broadcasts to {list(keep.shape)}."
            )
        self._device("which blocks hold something", there)

    @torch.no_grad()
    def weights(self, edit: Any) -> None:
        """A `Reweight` with disjoint boolean key sets and finite weights of zero or more, or a `Share`."""
        if isinstance(edit, Share):
            self._share(edit)
            return
        if not isinstance(edit, Reweight):
            raise self.refuse(f"returned {_kind(edit)}; return a Reweight or a Share, or None for no edit.")
        if not isinstance(edit.groups, (tuple, list)):
            raise self.refuse(f"the groups are {_kind(edit.groups)}; give a tuple of pairs (keys, weight).")
        self._flags(edit, "normalise", "positive", "grows")
        B, H, n, m = self.att.shape
        members: Tensor | None = None
        for i, group in enumerate(edit.groups):
            if not isinstance(group, (tuple, list)) or len(group) != 2:
                raise self.refuse(f"group {i} is {_kind(group)}; each group is a pair (keys, weight).")
            keys, weight = group
            if not isinstance(keys, Tensor) or keys.dtype != torch.bool:
                raise self.refuse(f"the keys of group {i} are {_kind(keys)}; expected a bool tensor.")
            if keys.ndim != 3 or keys.shape[0] not in (1, B) or keys.shape[1] not in (1, H) or keys.shape[2] != m:
                hint = " Write keys[:, None] for a set per sample." if keys.ndim == 2 else ""
                raise self.refuse(
                    f"the keys of group {i} have shape {tuple(keys.shape)}; expected [{B} or 1, {H} or 1, {m}].{hint}"
                )
            self._device(f"the keys of group {i}", keys)
            self._weight(f"the weight of group {i}", weight, (B, H, n), edit.positive)
            if self.values:
                members = keys.int() if members is None else members + keys
        self._weight("the weight of the rest", edit.rest, (B, H, n), edit.positive)
        if edit.grows and self.values:
            least = [torch.as_tensor(w, device=self.device) for w in (edit.rest, *(w for _, w in edit.groups))]
            if any(bool((w < least[0]).any()) for w in least[1:]):
                raise self.refuse(
                    "a group has less weight than the rest, and the edit promises that none has; leave it out."
                )
        if members is not None and bool((members > 1).any()):
            raise self.refuse("the key sets overlap; a key belongs to one set, and the remainder is implicit.")

    @torch.no_grad()
    def output(self, out: Any) -> None:
        """Finite head outputs of the shape that came in."""
        before = self.att
        if not isinstance(out, Tensor) or not out.is_floating_point():
            raise self.refuse(f"returned {_kind(out)}; return head outputs {list(before.shape)}, or None.")
        if out.shape != before.shape:
            raise self.refuse(f"returned shape {list(out.shape)}; expected {list(before.shape)}.")
        if out.dtype != before.dtype:
            raise self.refuse(f"returned dtype {out.dtype}; expected {before.dtype}.")
        self._device("the output", out)
        if self.values and bool(out.isfinite().logical_not().any()) and bool(before.isfinite().all()):
            raise self.refuse(
                f"the edited output has NaN or infinite values in {before.dtype}, in which the model takes it, where the model's "
                "own has none."
            )

    def _like(self, name: str, new: Any, old: Tensor) -> None:
        if not isinstance(new, Tensor):
            raise self.refuse(f"{name} is {_kind(new)}; expected a tensor.")
        if new.shape != old.shape or new.dtype != old.dtype:
            raise self.refuse(
                f"{name} has shape {list(new.shape)} and dtype {new.dtype}; expected {list(old.shape)} and {old.dtype}."
            )
        self._device(name, new)
        if new is not old:
            self._finite(name, new, old)

    def _finite(self, name: str, new: Tensor, old: Tensor) -> None:
        if self.values and bool(new.isfinite().logical_not().any()) and bool(old.isfinite().all()):
            raise self.refuse(f"{name} has NaN or infinite values where the model's own has none.")

    def _share(self, edit: Share) -> None:
        B, H, n, m = self.att.shape
        keys = edit.keys
        if not isinstance(keys, Tensor) or keys.dtype != torch.bool:
            raise self.refuse(f"the keys are {_kind(keys)}; expected a bool tensor.")
        if keys.ndim != 3 or keys.shape[0] not in (1, B) or keys.shape[1] not in (1, H) or keys.shape[2] > m:
            hint = " Write keys[:, None] for a set per sample." if keys.ndim == 2 else ""
            raise self.refuse(
                f"the keys have shape {tuple(keys.shape)}; expected [{B} or 1, {H} or 1, up to {m}].{hint}"
            )
        self._device("the keys", keys)
        self._flags(edit, "scale_sinks")
        if not callable(edit.of):
            raise self.refuse(f"the new share is {_kind(edit.of)}; give a function of the share that the keys have.")
        if not self.values:
            return
        # Each row of the call is tried at shares from nothing to all.
        for share in (0.0, 0.001, 0.5, 0.999):
            old = torch.full((B, H, n), share, dtype=self.att.stat_dtype, device=self.device)
            given = old.clone()
            try:
                new = edit.of(given)
            except Exception as error:
                error.add_note(f"attnsteer: raised in the share of {self.place}.")
                raise
            if not torch.equal(given, old):
                raise self.refuse(
                    "the new share is written into the one it is given, which is still read; return a new tensor."
                )
            if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
                raise self.refuse(
                    f"the new share of {list(old.shape)} in {old.dtype} is {_kind(new)}; expected the same shape and dtype."
                )
            self._device("the new share", new)
            wrong = ~((new >= 0) & (new <= 1))
            if edit.scale_sinks and bool(((new < old) | (new >= 1)).any()) and not bool(wrong.any()):
                raise self.refuse(
                    f"a share of {share} becomes {float(new.flatten()[0]):.4g}; with scale_sinks it never shrinks, and is below 1."
                )
            if bool(wrong.any()):
                raise self.refuse(
                    f"a share of {share} becomes {float(new[wrong][0]):.4g}; a share is a number from 0 to 1."
                )

    def _weight(self, what: str, weight: Any, shape: tuple[int, int, int], positive: bool = False) -> None:
        if isinstance(weight, bool) or not isinstance(weight, (int, float, Tensor)):
            raise self.refuse(f"{what} is {_kind(weight)}; expected a number or a tensor.")
        if self.values and isinstance(weight, int) and weight.bit_length() > 63:
            raise self.refuse(
                f"{what} is an integer of {weight.bit_length()} bits; give a number that a tensor can hold."
            )
        if isinstance(weight, Tensor):
            self._number(what, weight)
            if not _broadcasts(weight.shape, shape):
                raise self.refuse(
                    f"{what} has shape {tuple(weight.shape)}; expected one that broadcasts to {list(shape)}."
                )
            self._device(what, weight)
        dtype = self.att.stat_dtype
        if not self.values:
            # A tensor of a number would have to be read as well.
            if not isinstance(weight, Tensor) and not 0 <= weight <= torch.finfo(dtype).max:
                raise self.refuse(f"{what} is {weight}; give a finite number of zero or more.")
            return
        if isinstance(weight, int) and abs(weight) > torch.finfo(dtype).max:
            # torch cannot read it at all.
            weight = torch.inf
        value = torch.as_tensor(weight, dtype=dtype)
        if not bool(value.isfinite().all()):
            raise self.refuse(
                f"{what} has NaN or infinite values in {dtype}, in which it is used; give finite numbers."
            )
        if bool((value < 0).any()):
            raise self.refuse(
                f"{what} has negative values (least {float(value.min()):.4g}); attention is never negative."
            )
        if positive and bool((value == 0).any()):
            raise self.refuse(f"{what} has zeros, and the edit promises that it is positive; leave the promise out.")

    def _flags(self, edit: Any, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(edit, name), bool):
                raise self.refuse(f"{name} is {_kind(getattr(edit, name))}; expected True or False.")

    def _number(self, what: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point():
            raise self.refuse(f"{what} has dtype {tensor.dtype}; expected a floating-point tensor.")

    def _device(self, what: str, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            raise self.refuse(f"{what}: stored as {tensor.layout}; return a dense tensor.")
        # A single number may stay on the CPU: torch combines it with tensors of any device.
        if tensor.device != self.device and (tensor.ndim or tensor.device.type != "cpu"):
            raise self.refuse(f"{what} is on {tensor.device}; the call runs on {self.device}.")


def check_state(place: str, state: dict[str, Any], batch: int) -> None:
    """Raise where `call.state` holds what cannot follow beams, repeated samples and copies of the cache."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            if value.ndim and value.shape[0] == batch:
                continue
            what = f"a tensor {list(value.shape)}"
        elif value is None or isinstance(value, (bool, int, float, str)):
            continue
        else:
            what = _kind(value)
        raise ContractError(
            f"{place}: call.state[{name!r}] is {what}; keep tensors with the batch of {batch} first, or plain numbers and strings."
        )


def _broadcasts(shape: Sequence[int], whole: Sequence[int]) -> bool:
    return len(shape) <= len(whole) and all(s in (1, w) for s, w in zip(shape[::-1], whole[::-1], strict=False))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"
