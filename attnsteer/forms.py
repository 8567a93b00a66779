"""The cheapest exact form of an edit: heads whose weights do not depend on the row share one biased call of the model's kernel,
and a share of a few rows is one interpolation between two calls of it. Heads that are not edited take part in these calls as they
are, bit for bit, so that none is gathered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import kernels
from .attention_map import FEW_ROWS, SHORT_CACHE
from .edits import Reweight, Share
from .kernels import Attention

# Slots that a split key set is extended by at a time while its cache grows.
STEP = 64
# A set of at most one key in so many is picked out of the cache; a larger one is seen under a mask.
FEW_KEYS = 8
# A bias that has to be written out for each row takes at most so many numbers.
LARGEST = 1 << 24
# Split key sets by the tensor that says which keys; freed with it.
_SPLITS: WeakIdKeyDictionary = WeakIdKeyDictionary()

# Whether an edit moves anything: 0-d bool, and by batch row, bool [B or 1].
Moves = tuple[Tensor, Tensor]


def _id(thing: Any) -> int:
    """Under which what is made once is kept; compiled code keeps nothing, and has no names for what it makes."""
    return 0 if torch.compiler.is_compiling() else id(thing)


@dataclass
class WholeForms:
    """The edits of one attention call that all heads can take together.

    Args:
        att: the call. memo: what is the same for all calls of this forward.
        packs: whether the model hands one masked row of the query heads of a key head to its kernel as so many rows of one
            head, which comes out with other last bits.
    """

    att: Attention
    memo: dict[Any, Any]
    packs: bool = False
    biased: list[tuple[Any, tuple[int, ...] | None, Reweight, Tensor | None]] = field(default_factory=list)
    shared: Tensor | None = None
    # Of a share under no mask: its key set, itself, and where it acts.
    divided: tuple[_Split, Share, Tensor | None] | None = None

    def takes_bias(self, edit: Any, chosen: Tensor | None) -> bool:
        """Whether an edit is a bias of the keys that a kernel takes as its mask."""
        if not isinstance(edit, Reweight) or not edit.normalise or self.shared is not None:
            return False
        if chosen is not None and chosen.shape[-1] > 1:
            return False
        if not all(self._constant(w, edit.positive) for w in (edit.rest, *(w for _, w in edit.groups))):
            return False
        if self.att.causal:
            return self.att.shape[2] == self.att.shape[3] and kernels.causal_with_mask()
        return True

    @staticmethod
    def _constant(weight: Tensor | float, positive: bool) -> bool:
        if isinstance(weight, Tensor):
            return positive and not weight.requires_grad and (weight.ndim == 0 or weight.shape[-1] == 1)
        return weight > 0

    def rescored(
        self, key: Any, att: Attention, edit: Reweight, chosen: Tensor | None
    ) -> tuple[Attention, Tensor] | None:
        """(the call of some heads with such an edit among its scores, whether it moves anything); for edits that come after."""
        bias, moves = self._once(("bias", key, _id(edit)), lambda: self._log_weights(edit, chosen), edit)
        mask = att.mask4()
        if mask is not None and torch.broadcast_shapes(bias[:, :, None].shape, mask.shape).numel() > LARGEST:
            return None
        make = lambda: bias[:, :, None] if mask is None else bias[:, :, None] + att.additive(att.stat_dtype)  # noqa: E731
        return att.replace(mask=self._once(("rescored", key, _id(edit), _id(mask)), make, edit, mask)), moves

    def add_bias(self, key: Any, heads: tuple[int, ...] | None, edit: Reweight, chosen: Tensor | None) -> Moves | None:
        """Take such an edit of some heads (None: all), and say whether it moves anything. None: too large, not taken.

        Args:
            key: what tells `chosen` apart in this forward. chosen: where the edit acts, [B or 1, h or 1, 1]; None: all.
        """
        bias, moves = self._once(("bias", key, _id(edit)), lambda: self._log_weights(edit, chosen), edit)
        _, H, n, m = self.att.shape
        mask = self.att.mask4()
        if mask is not None and n > FEW_ROWS:
            by_head = H if heads is not None or bias.shape[1] > 1 else mask.shape[1]
            if max(len(bias), len(mask)) * by_head * n * m > LARGEST:
                return None
        self.biased.append(((key, _id(edit)), heads, edit, bias))
        return moves

    def _log_weights(self, edit: Reweight, chosen: Tensor | None) -> tuple[Tensor, Moves]:
        """(log w [b, h, m] in the dtype of statistics, whether it moves anything)."""
        # Over the weight of the rest, so that rows which see nothing else stay to the last bit.
        rest = self._log(edit.rest)
        bias = torch.zeros((1, 1, 1), dtype=self.att.stat_dtype, device=self.att.q.device)
        for keys, weight in edit.groups:
            bias = torch.where(keys, self._log(weight) - rest, bias)
        if chosen is not None:
            bias = torch.where(chosen, bias, 0.0)
        bias = bias.expand(*bias.shape[:2], self.att.shape[3])
        return bias, self._moves(bias)

    def _log(self, weight: Tensor | float) -> Tensor | float:
        """The logarithm of a weight, three-dimensional where it is a tensor."""
        if not isinstance(weight, Tensor):
            return math.log(weight)
        return weight.to(self.att.stat_dtype).reshape((1,) * (3 - weight.ndim) + weight.shape).log()

    def _moves(self, bias: Tensor) -> Moves:
        """Whether some row sees keys with unlike weights: at all, 0-d bool, and by batch row, [B or 1]."""
        if self.att.mask is None:
            # Under causality the last row sees all of them.
            moves = bias != bias[..., :1]
        else:
            seen, bias = kernels.visible(self.att.mask4()), bias[:, :, None]
            most = torch.where(seen, bias, -torch.inf).amax(dim=-1)
            moves = most > torch.where(seen, bias, torch.inf).amin(dim=-1)
        by_row = moves.flatten(1).any(dim=1)
        return by_row.any(), by_row

    def share(
        self, heads: tuple[int, ...] | None, edit: Any, chosen: Tensor | None = None, prompts: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Take a `Share` of few rows; the shares before and after, [B, H, n], zero where it does not act. None: not taken.

        Args:
            chosen: where it acts, [B or 1, 1, n or 1]; the others see all of their keys in one of the two calls, and come out
                bit for bit. None: everywhere.
            prompts: whether to take that of a whole prompt too, on a set of few keys: for edits that have asked nothing of the
                map, whose rows would be there already.
        """
        att = self.att
        n, m = att.shape[2:]
        if not isinstance(edit, Share) or self.biased or self.shared is not None:
            return None
        compiling = torch.compiler.is_compiling()
        if att.requires_grad:
            return None
        if not compiling and (n > FEW_ROWS or att.causal):
            return self._share_of_prompt(heads, edit) if prompts and chosen is None else None
        if compiling and att.causal and not (n == m and kernels.causal_with_mask()):
            return None
        kept = ("split", _id(edit.keys), heads)
        split = self._once(kept, lambda: self._split(heads, edit.keys), edit.keys)
        if split.few is None and not compiling and m > SHORT_CACHE:
            # A second pass over a long cache is dearer than the rows of the map.
            return None
        if split.few is None:
            out_in, lse_in = self._attend(split.inside, split.empty)
        else:
            out_in, lse_in = self._attend(split.inside, False, att.replace(k=att.k[split.few], v=att.v[split.few]))
        outside = split.outside
        if chosen is not None:
            acts, spared, own = self._once(("chosen", _id(chosen)), lambda: self._sides(chosen), chosen)
            outside = torch.where(acts, outside, own)
        out, lse = self._attend(outside, split.full)
        before, after = split.shares(lse_in, lse, edit)
        if chosen is not None:
            before, after = before.masked_fill(spared, 0.0), after.masked_fill(spared, 0.0)
        self._between(out, out_in, after)
        self.divided = None if att.mask is not None else (split_keys(edit.keys, heads, att), edit, chosen)
        return before, after

    def _between(self, out: Tensor, inside: Tensor, after: Tensor) -> None:
        """The output is what the two calls gave, by the share of the second."""
        if out.dtype != after.dtype:
            out, inside = out.to(after.dtype), inside.to(after.dtype)
        self.shared = torch.lerp(out, inside, after[..., None]).to(self.att.v.dtype)

    def _share_of_prompt(self, heads: tuple[int, ...] | None, edit: Share) -> tuple[Tensor, Tensor] | None:
        """A `Share` in a prompt without a mask, all rows in two calls: one over few keys, and one over the others."""
        att = self.att
        n, m = att.shape[2:]
        if not att.causal or n != m or att.mask is not None or not kernels.causal_with_mask():
            return None
        if heads is not None and n > SHORT_CACHE:
            # The rows of some heads alone are less work.
            return None
        kept = ("prompt", _id(edit.keys), heads)
        split = self._once(kept, lambda: split_keys(edit.keys, heads, att).of_prompt(att), edit.keys)
        if split is None:
            return None
        out_in, lse_in = self._attend(
            split.inside, False, att.replace(k=att.k[split.few], v=att.v[split.few], causal=False)
        )
        out, lse = self._attend(split.outside, False)
        before, after = split.shares(lse_in, lse, edit)
        self._between(out, out_in, after)
        return before, after

    def own_key_in_set(self) -> bool:
        """Whether the key set of a share holds the last key of all; the keys that come after would be in it too."""
        assert self.divided is not None
        keys = self.divided[1].keys
        return keys.shape[-1] == self.att.shape[3] and bool(keys[..., -1].any())

    def _sides(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(where an edit acts, [B, 1, n, 1]; where it does not, [B, 1, n]; the mask of rows there)."""
        own = self.att.additive(self.att.stat_dtype)
        return chosen[..., None], ~chosen, self.att.q.new_zeros((), dtype=self.att.stat_dtype) if own is None else own

    def _split(self, heads: tuple[int, ...] | None, keys: Tensor) -> _Parts:
        """The two parts of the keys as a kernel takes them."""
        m, split = self.att.shape[3], split_keys(keys, heads, self.att)
        mask = self.att.additive(self.att.stat_dtype)
        if torch.compiler.is_compiling():
            # Rows behind keys that they do not see are many in a prompt; all are found from the masks.
            inside, outside = split.masks(m)
            return _Parts(inside, outside) if mask is None else _Parts(inside + mask, outside + mask)
        if mask is not None:
            inside, outside = split.masks(m)
            return _Parts(inside + mask, outside + mask)
        return split.parts(self.att)

    def out(self) -> Tensor | None:
        """The output of all heads with the edits taken, [B, H, n, dv]; None where there is none."""
        if self.shared is not None or not self.biased:
            return self.shared
        key = ("mask", *(found[0] for found in self.biased))
        mask = self._once(key, self._mask, self.att.mask)
        # One operator; what torch puts around it takes as much time as a small call.
        return self._attend(mask, False)[0]

    def _attend(
        self, mask: Tensor | None, blind: Tensor | bool | None, att: Attention | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the model's kernel with an additive mask in place of the model's own; `att`: of other keys."""
        att = self.att if att is None else att
        q, k, v = att.q, att.k, att.v
        B, H, n, d = q.shape
        packed = self.packs and n == 1 and att.mask is not None and k.shape[1] < H
        if packed:
            q = q.reshape(B, k.shape[1], -1, d)
            mask = mask if mask.shape[1] == 1 else mask.reshape(len(mask), *q.shape[1:3], -1)
        plain = (
            blind is not None
            and not torch.compiler.is_compiling()
            and d == v.shape[-1]
            and q.numel()
            and q.stride(3) == k.stride(3) == v.stride(3) == 1
        )
        if plain and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            # The kernel itself: what stands around it takes as much time as a small call.
            out, lse = torch._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, att.causal, attn_mask=mask, scale=att.scale
            )
            lse = lse if blind is False else lse.masked_fill(blind, -torch.inf)
        else:
            att = att.replace(q=q, mask=mask)
            blockwise = kernels.lse_source(att) == "blockwise"
            # For a gradient, torch's own.
            out, lse = (kernels.attend(att), None) if blockwise else kernels.attend_lse(att, blind)
        return (out.reshape(B, H, 1, -1), None if lse is None else lse.reshape(B, H, 1)) if packed else (out, lse)

    def _mask(self) -> Tensor:
        """The model's mask and all biases, as the kernel takes them."""
        whole, mask = self.log_weights(), self.att.additive(self.att.stat_dtype)
        return whole[:, :, None] if mask is None else whole[:, :, None] + mask

    def log_weights(self) -> Tensor:
        """The biases of all heads, [B or 1, H or 1, m]."""
        whole: Tensor | None = None
        for _, heads, _, bias in self.biased:
            if heads is not None:
                full = bias.new_zeros(len(bias), self.att.shape[1], bias.shape[-1])
                full[:, list(heads)] = bias
                bias = full
            whole = bias if whole is None else whole + bias
        return whole

    def _once(self, key: Any, make: Any, *kept: Any) -> Any:
        """What is made of tensors that other calls of this forward may bring as well; those are kept with it."""
        att = self.att
        if torch.compiler.is_compiling():
            return make()
        key = (*key, att.shape, att.q.dtype, att.causal, _id(att.mask))
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = (make(), att.mask, kept)
        return found[0]


@dataclass(frozen=True)
class _Parts:
    """What two calls of a kernel need that attend to a key set and to the others.

    Attributes:
        inside, outside: the mask of each, or None. few: what picks keys and values of the first; None: all, under the mask.
        empty, full, stays: rows [B, H, 1] that see none of the first, of the second, of either. None: to be seen from the mask.
            False: none.
    """

    inside: Tensor | None
    outside: Tensor
    empty: Tensor | bool | None = None
    full: Tensor | bool | None = None
    stays: Tensor | bool | None = None
    few: tuple[Any, ...] | None = None

    def shares(self, inside: Tensor, outside: Tensor, edit: Share, idle: bool = False) -> tuple[Tensor, Tensor]:
        """The shares of the first set before and after, [B, H, n], from the log-sum-exps of both.

        Args:
            idle: whether a share of zero stays zero and none is one, so that rows which stay need not be looked for.
        """
        before = torch.sigmoid(inside - outside)
        if self.few is not None:
            before = before if self.empty is False else before.masked_fill(self.empty, 0.0)
        elif self.stays is None:
            # NaN where a row sees no key at all.
            before = before.masked_fill(torch.isneginf(inside), 0.0)
        stays = (before <= 0) | (before >= 1) if self.stays is None else self.stays
        after = edit.of(before)
        return before, after if idle or stays is False else torch.where(stays, before, after)


class _Split:
    """A key set as two masks, of its keys and of the others, for a cache that grows."""

    def __init__(self, keys: Tensor, heads: Sequence[int] | None, att: Attention):
        if heads is not None:
            full = keys.new_zeros(len(keys), att.shape[1], keys.shape[-1])
            full[:, list(heads)] = keys
            keys = full
        # Another object than the one that it is kept under, which could not be freed otherwise.
        self.keys, self.dtype = keys.detach(), att.stat_dtype
        self.empty = ~keys.any(dim=-1, keepdim=True)
        self.full = keys.all(dim=-1, keepdim=True)
        self._masks: tuple[Tensor, Tensor] | None = None
        # By the batch and key heads of a call.
        self._few: dict[tuple[int, int], tuple[Tensor | None, Tensor | bool, tuple[Any, ...]] | None] = {}

    def masks(self, size: int) -> tuple[Tensor, Tensor]:
        """(mask of the keys, mask of the others), [B or 1, H or 1, 1, size] additive; slots behind the set are others."""
        inside, outside = self._of_room(size)
        return inside.narrow(-1, 0, size), outside.narrow(-1, 0, size)

    def _of_room(self, size: int) -> tuple[Tensor, Tensor]:
        if self._masks is None or self._masks[0].shape[-1] < size:
            room = -(-size // STEP) * STEP
            keys = torch.nn.functional.pad(self.keys, (0, room - self.keys.shape[-1]))[:, :, None]
            zero = torch.zeros(keys.shape, dtype=self.dtype, device=keys.device)
            self._masks = zero.masked_fill(~keys, -torch.inf), zero.masked_fill(keys, -torch.inf)
        return self._masks

    def parts(self, att: Attention) -> _Parts:
        """For rows that see all keys."""
        B, H, _, m = att.shape
        return self.parts_of(B, H, att.k.shape[1], m)

    def parts_of(self, B: int, H: int, kv: int, m: int) -> _Parts:
        """The same, from the sizes of a call."""
        size = B, kv
        if size not in self._few:
            self._few[size] = self._picked(B, kv, H // kv)
        # A row sees its own token, which is in no set that ends before it.
        full: Tensor | bool = self.full if self.keys.shape[-1] == m else False
        if self._few[size] is None:
            inside, outside = self.masks(m)
            return _Parts(inside, outside, self.empty, full, self.empty if full is False else self.empty | full)
        inside, empty, few = self._few[size]
        outside = self._of_room(m)[1].narrow(-1, 0, m)
        # Few of all keys are not all of them.
        return _Parts(inside, outside, empty, False, empty, few)

    def of_prompt(self, att: Attention) -> _Parts | None:
        """For a prompt, each row of which sees the keys up to its own; None: many keys, or rows that see none but them."""
        B, H, n, _ = att.shape
        size = B, att.k.shape[1]
        if size not in self._few:
            self._few[size] = self._picked(*size, att.groups)
        if self._few[size] is None or bool(self.keys[..., :1].any()):
            return None
        inside, empty, few = self._few[size]
        rows = torch.arange(n, device=self.keys.device)
        slots = few[2] if isinstance(few[2], Tensor) else rows[few[1]].reshape(1, 1, -1)
        if max(1, slots.shape[0]) * slots.shape[1] * n * slots.shape[2] > LARGEST:
            return None
        hidden = slots[:, :, None] > rows[:, None]
        hidden = hidden if inside is None else hidden | inside.isneginf()
        blind = hidden.all(dim=-1)
        # A row that sees none of them gets all, so that it has no NaN; its share is set to zero.
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
        mask = mask.masked_fill(hidden & ~blind[..., None], -torch.inf)
        blind = blind if empty is False else blind | empty
        return _Parts(mask, self._of_room(n)[1].narrow(-1, 0, n), blind, False, blind, few)

    def _picked(self, B: int, kv: int, groups: int) -> tuple[Tensor | None, Tensor | bool, tuple[Any, ...]] | None:
        """(mask of what is picked, rows that see none of it or False, the picks); None: there are too many."""
        index = kernels.index_keys(self.keys)
        if index.size > self.keys.shape[-1] // FEW_KEYS:
            return None
        if index.span is not None or not index.size:
            return None, False if index.size else self.empty, (..., slice(*(index.span or (0, 1))), slice(None))
        at, device = index.index, self.keys.device
        lead = torch.arange(B, device=device)[:, None, None]
        head = torch.arange(kv if at.shape[1] == 1 else at.shape[1], device=device)[None, :, None]
        few = lead, head if at.shape[1] == 1 else head // groups, at
        empty = self.empty if bool(self.empty.any()) else False
        if index.full:
            return None, empty, few
        # A row that sees none gets any of them, so that it has no NaN; its share is set to zero.
        seen = (index.valid | self.empty)[:, :, None]
        return torch.zeros(seen.shape, dtype=self.dtype, device=device).masked_fill(~seen, -torch.inf), empty, few


def split_keys(keys: Tensor, heads: Sequence[int] | None, att: Attention) -> _Split:
    """The split of a key set [B or 1, h or 1, s] of some heads, made once for each tensor of keys."""
    if torch.compiler.is_compiling():
        return _Split(keys, heads, att)
    version = 0 if keys.is_inference() else keys._version
    key = (None if heads is None else tuple(heads), att.shape[1], att.stat_dtype, version)
    known = _SPLITS.get(keys)
    if known is None:
        known = _SPLITS[keys] = {}
    found = known.get(key)
    if found is None:
        found = known[key] = _Split(keys, heads, att)
    return found
