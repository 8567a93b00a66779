"""Attention that a module writes out itself, softmax(scores) V: seen and edited as it runs, by what it computes.

While the forward of such a module runs, a torch function mode follows the softmax: what it was taken of are the scores, biases and
mask included, and what its result is multiplied with are the values. So whatever the module adds to its scores (ALiBi, buckets of
relative positions, disentangled terms) is in the map that a method sees. Queries and keys are not told apart from it; methods that
edit those are refused. Other layers, and the model unsteered, run without the mode.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...bound import Bound
from ...call import AttnCall
from ...engine import SiteRuntime
from ...errors import AttnSteerError, UnsupportedHost
from ...kernels import Attention
from ...site import Site
from .host import check_copyable, problem

_PRODUCTS = {"matmul", "bmm", "__matmul__", "einsum"}
# Functions that hand a map on as what it is; whether one changed its numbers, the comparison at the first call tells.
_CARRY = {
    "dropout", "dropout_", "to", "type", "type_as", "float", "half", "bfloat16", "view", "reshape", "contiguous", "clone", "mul",
    "masked_fill", "nan_to_num", "view_as", "flatten", "unflatten", "__mul__",
}  # fmt: skip


@functools.cache
def opened() -> Callable[..., Any]:
    """`F.multi_head_attention_forward` as a mode sees into it: as it is, it is one function for a mode."""
    own = torch.nn.functional.multi_head_attention_forward
    known = {**own.__globals__, "has_torch_function": lambda tensors: False}
    copied = types.FunctionType(own.__code__, known, own.__name__, own.__defaults__, own.__closure__)
    copied.__kwdefaults__ = own.__kwdefaults__
    return copied


def check_written(site: Site, bound: Bound) -> None:
    """Raise where an edit of this attention could not be exact."""
    check_copyable(site)
    if "inputs" in bound.doors:
        raise UnsupportedHost(
            f"{site.path}: {type(site.module).__name__} writes its attention out, so its queries and keys cannot be told "
            f"from its scores, and {bound.name} edits them. Leave it out, e.g. by Where(modules=...)."
        )


@dataclass(frozen=True)
class Account:
    """What a host knows of the running call of such a module.

    Attributes:
        acting: which interventions act now. call: what a method sees, from batch, rows, keys and device. check: compares what is
            computed here (`Attention`) with what the model computed (from rows to outputs), where a map is read.
    """

    acting: Callable[[], tuple[int, ...]]
    call: Callable[[int, int, int, torch.device], AttnCall]
    check: Callable[[Attention, Callable[[Tensor], Tensor]], None]


def attach_written(runtime: SiteRuntime, account: Account, journal: Any) -> None:
    """Follow the softmax of the site's module in its forwards, until undone."""
    module = runtime.site.module
    names = list(inspect.signature(type(module).forward).parameters)[1:]

    # Traced code would not enter the mode again.
    @torch.compiler.disable
    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        active = account.acting()
        if not active:
            return inner(*args, **kwargs)
        asked = {**dict(zip(names, args, strict=False)), **kwargs}.get("output_attentions")
        if asked and runtime.reads_map(active):
            raise UnsupportedHost(
                f"{runtime.site.path} hands its attention map out before it is edited. Call the model without "
                "output_attentions, or leave this site out of Where."
            )
        mode = _Following(runtime, account, active)
        try:
            with mode:
                out = inner(*args, **kwargs)
        finally:
            if mode.error is not None:
                raise mode.error
        # That one takes a mean of its map for who asks for it, behind the product.
        if mode.products and mode.cut and not isinstance(module, nn.MultiheadAttention):
            raise UnsupportedHost(
                f"{runtime.site.path}: {type(module).__name__} takes its map apart ({mode.cut}), so that a part of it could "
                "meet values unseen. Leave this site out of Where."
            )
        if not mode.products:
            raise UnsupportedHost(
                f"{runtime.site.path}: a forward of {type(module).__name__} multiplied no softmax with values, so there was "
                "nothing to edit. Leave this site out of Where."
            )
        return out

    journal.wrap(module, "forward", forward)


class _Following(TorchFunctionMode):
    """One forward of one module: from each softmax to the product with its values, which comes out edited."""

    def __init__(self, runtime: SiteRuntime, account: Account, active: tuple[int, ...]):
        super().__init__()
        self.runtime, self.account, self.active, self.products = runtime, account, active, 0
        self.cut = ""
        # Kept until the forward ends: an operator takes a TypeError for "not implemented", and ours are such.
        self.error: AttnSteerError | None = None
        # id of a map -> (the map, which keeps the id its own; its scores).
        self._maps: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.multi_head_attention_forward:
            with self:
                return opened()(*args, **kwargs)
        out = func(*args, **kwargs)
        if self.error is not None:
            return out
        try:
            return self._follow(getattr(func, "__name__", ""), args, kwargs, out)
        except AttnSteerError as error:
            self.error = error
            return out

    def _follow(self, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        """What comes out of a function of torch, edited where that is a product with values."""
        if name == "scaled_dot_product_attention":
            return self._fused(out, *args, **kwargs)
        if name == "softmax":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            scores = args[0] if args else kwargs["input"]
            if scores.ndim >= 3 and dim in (-1, scores.ndim - 1):
                self._maps[id(out)] = (out, scores)
        elif name in _CARRY and args and (known := self._maps.get(id(args[0]))):
            if "dropout" in name and out is not args[0] and self.runtime.site.module.training:
                self._refuse_dropout(args, kwargs)
            if isinstance(out, Tensor):
                self._maps[id(out)] = (out, known[1])
        elif name in _PRODUCTS:
            if name == "einsum" and len(args) == 2 and isinstance(args[1], (tuple, list)):
                args = (args[0], *args[1])
            at = 1 if name == "einsum" else 0
            known = self._maps.get(id(args[at])) if len(args) > at + 1 and isinstance(args[at], Tensor) else None
            if known is not None:
                return self._product(args[at], known[1], args[at + 1], out, args[0] if name == "einsum" else "")
        if isinstance(out, Tensor) and out.ndim > 2 and out.is_floating_point() and name not in _CARRY:
            given = [a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,))]
            if any(id(a) in self._maps for a in given if isinstance(a, Tensor)):
                # A part of a map (its global columns, a window): what becomes of it is not followed.
                self.cut = self.cut or name
        return out

    def _fused(
        self,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """What SDPA gave, edited."""
        site = self.runtime.site
        self.products += 1
        if dropout_p:
            raise UnsupportedHost(f"{site.path} runs with dropout {dropout_p}; call eval() on the model first.")
        if query.ndim != 4:
            raise UnsupportedHost(f"{site.path} attends on {query.ndim}-D tensors; [B, H, N, d] is needed.")
        att = problem(query, key, value, attn_mask, is_causal, scale)
        call = self.account.call(query.shape[0], query.shape[2], key.shape[2], query.device)
        return self.runtime(att, lambda: out, call, self.active)

    def _refuse_dropout(self, args: Any, kwargs: Any) -> None:
        rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        if rate:
            raise UnsupportedHost(
                f"{self.runtime.site.path} runs with attention dropout {rate} in training mode; an exact edit is not defined "
                "there. Call model.eval() first."
            )

    def _product(self, maps: Tensor, scores: Tensor, values: Tensor, out: Tensor, equation: str) -> Tensor:
        """The product of a map with its values, edited."""
        site, runtime = self.runtime.site, self.runtime
        self.products += 1
        if self.products > 1 and runtime.reads_map(self.active):
            raise UnsupportedHost(
                f"{site.path}: one forward of {type(site.module).__name__} computes its attention in several parts, each "
                "with a softmax of its own, so a share of a row's attention is not defined. Edits of head outputs (HeadGate) are."
            )
        form = _Form.of(equation, maps, values, out, site)
        z, v = form.map(scores.reshape(maps.shape)), form.values(values)
        # As the softmax is taken: in half precision of nothing.
        dtype = torch.promote_types(torch.promote_types(z.dtype, v.dtype), torch.float32)
        z, v = z.to(dtype), v.to(dtype)
        B, H, n, m = z.shape
        # The scores stand as a mask: what they are made of is not asked.
        zeros = v.new_zeros(())
        q, k = zeros.expand(B, H, n, v.shape[-1]), zeros.expand(B, H, m, v.shape[-1])
        att = Attention(q.contiguous(), k.contiguous(), v, 1.0, mask=z)
        if runtime.reads_map(self.active):
            self.account.check(att, lambda index: form.output(out).index_select(2, index))
        call = self.account.call(B, n, m, z.device)
        edited = runtime(att, lambda: form.output(out), call, self.active)
        return form.back(edited).to(out.dtype).reshape(out.shape)


class _Form:
    """How a product lies: its map, values and output brought to [B, H, n, m], [B, H, m, d] and [B, H, n, d], and back."""

    def __init__(self, heads: int, axes: tuple[tuple[int, ...], ...] | None = None, batch: tuple[int, ...] = ()):
        """
        Args:
            axes: of map, values and output, in the order batch, head, row or key, key or channel; None: batch and heads are one.
            batch: the sizes of the axes of the batch, of which windows are some.
        """
        self.heads, self.axes, self.batch = heads, axes, batch

    @classmethod
    def of(cls, equation: str, maps: Tensor, values: Tensor, out: Tensor, site: Site) -> _Form:
        """Raises where it is none of the known forms."""
        heads, axes, ndim = site.heads, None, maps.ndim
        if equation:
            axes = _einsum_axes(equation, tuple(maps.shape), heads)
        elif ndim == values.ndim == 3 and maps.shape[0] == values.shape[0] and maps.shape[0] % heads == 0:
            return cls(heads)
        elif ndim == values.ndim > 3 and maps.shape[1] == values.shape[1] == heads:
            # Windows may lie behind the heads.
            axes = ((0, *range(2, ndim - 2), 1, ndim - 2, ndim - 1),) * 3
        if axes is None:
            raise UnsupportedHost(
                f"{site.path}: {type(site.module).__name__} multiplies a map {tuple(maps.shape)} with values "
                f"{tuple(values.shape)} {equation}, in which its {heads} heads are not to be found. Leave this site out of Where."
            )
        return cls(heads, axes, tuple(maps.shape[i] for i in axes[0][:-3]))

    def map(self, t: Tensor) -> Tensor:
        return self._standard(t, 0)

    def values(self, t: Tensor) -> Tensor:
        return self._standard(t, 1)

    def output(self, t: Tensor) -> Tensor:
        return self._standard(t, 2)

    def _standard(self, t: Tensor, which: int) -> Tensor:
        if self.axes is None:
            return t.reshape(-1, self.heads, *t.shape[1:])
        return t.permute(self.axes[which]).flatten(0, -4)

    def back(self, t: Tensor) -> Tensor:
        """Head outputs [B, H, n, d] as the product lies."""
        if self.axes is None:
            return t.flatten(0, 1)
        order = self.axes[2]
        return t.unflatten(0, self.batch).permute([order.index(i) for i in range(len(order))])


def _einsum_axes(equation: str, shape: tuple[int, ...], heads: int) -> tuple[tuple[int, ...], ...] | None:
    """The axes of map, values and output; None where it is no product of a map of this shape and this number of heads."""
    equation = equation.replace(" ", "")
    named = len(equation.partition(",")[0].replace("...", ""))
    more = [c for c in "ABCDEFG" if c not in equation][: len(shape) - named]
    inputs, _, result = equation.replace("...", "".join(more)).partition("->")
    first, _, second = inputs.partition(",")
    if len(first) != len(shape) or any(
        len(set(part)) != len(first) or len(part) != len(first) for part in (second, result)
    ):
        return None
    key = [c for c in first if c in second and c not in result]
    channel = [c for c in second if c in result and c not in first]
    row = [c for c in first if c in result and c not in second]
    shared = [c for c in first if c in second and c in result]
    head = next((c for c in reversed(shared) if shape[first.index(c)] == heads), None)
    if head is None or len(shared) < 2 or not len(key) == len(channel) == len(row) == 1:
        return None
    batch = [c for c in shared if c != head]
    parts = ((first, row, key), (second, key, channel), (result, row, channel))
    return tuple(tuple(part.index(c) for c in (*batch, head, *a, *b)) for part, a, b in parts)
