"""One pass of a ComfyUI model: what its attention calls are about, read from the options that travel with them.

A pass lays its hooks into a copy of the options: the one slot for an attention override (whoever had it is called on), and marks
that say which block is running. So there is no slot to lose to a later node, and nothing to take away afterwards.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import kernels
from ...account import Samples, plain
from ...call import AttnCall, Contrast
from ...errors import UnsupportedHost
from ...kernels import Attention
from ...site import Site
from .sites import Key

if TYPE_CHECKING:
    from .install import Sampling

SLOT = "optimized_attention_override"
MARK = "attnsteer"
# How far the program's kernel may be from softmax(q k^T) v before it is called another attention.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF = 5e-2
POSITIVE, NEGATIVE = 0, 1


@dataclass
class Given:
    """The arguments of one attention call, by name. Its own layout is [b, n, h * d], or [b, h, n, d] where it says so."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None = None
    skip_reshape: bool = False
    skip_output_reshape: bool = False
    scale: float | None = None
    options: dict[str, Any] | None = None

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> Given:
        """From the arguments of `optimized_attention`."""
        names = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
        found = {**dict(zip(names, args, strict=False)), **kwargs}
        found["options"] = found.get("transformer_options")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})

    def split(self, t: Tensor) -> Tensor:
        """[b, h, n, d]."""
        if self.skip_reshape:
            return t
        return t.view(t.shape[0], t.shape[1], -1, self.q.shape[-1] // self.heads).transpose(1, 2)

    def heads_of(self, out: Tensor) -> Tensor:
        """The program's output as [b, h, n, d]."""
        return out if self.skip_output_reshape else out.view(*out.shape[:2], self.heads, -1).transpose(1, 2)

    def joined(self, out: Tensor) -> Tensor:
        """[b, h, n, d] as the program's output."""
        return out if self.skip_output_reshape else out.transpose(1, 2).flatten(2)

    def attention(self) -> Attention:
        """The call in terms of the kernels."""
        q, k, v = Attention.cast(*(self.split(t) for t in (self.q, self.k, self.v)))
        scale = float(q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        return Attention(q, k, v, scale, mask=self._mask(q.shape[0], q.shape[2], k.shape[2]))

    def _mask(self, b: int, n: int, m: int) -> Tensor | None:
        mask = self.mask
        if mask is None or mask.ndim == 4:
            return mask
        if mask.ndim == 3:
            return mask[:, None]
        # A bool mask of two axes says which keys each sample has; an additive one is [n, m].
        keys = mask.dtype == torch.bool and mask.shape == (b, m)
        return mask[:, None, None] if keys else mask[None, None]


class Here(threading.local):
    """Which block is running in this thread, how many of its rows are text, and how many calls it has made."""

    key: Key | None = None
    text: int = 0
    calls: int = 0


class Pass:
    """The calls of one `calc_cond_batch`.

    Attributes:
        sampling: what the passes of a steering share. sigma, step, steps: where in the schedule it is.
        twins: rows of the positive prompt, and those with the negative one behind all others; None where there are none.
        size: (height, width) of the image's tokens in Flux and SD3. grad: attention runs through our own kernels, for gradients.
    """

    def __init__(self, sampling: Sampling, model: Any, sigma: Tensor, options: dict[str, Any]):
        self.sampling, self.run, self.host = sampling, sampling.run, sampling.run.host
        self.family = self.host.layout.family
        self.sigma = float(sigma.flatten()[0])
        self.step, self.steps = step_of(self.sigma, options.get("transformer_options", {}).get("sample_sigmas"))
        self.here = Here()
        self.twins: tuple[Any, Any] | None = None
        self.size: tuple[int, int] | None = None
        self.active = {p: r.active(None, self.step, self.steps) for p, r in self.run.runtimes.items()}
        self.capture = sampling.capture
        self.grad = sampling.capture is not None
        self.contrasts = sampling.contrasting(self)

    def __deepcopy__(self, memo: Any) -> Pass:
        return self

    # What is laid into the options.

    def options(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """A copy of the options with the hooks of this pass."""
        options = dict(model_options.get("transformer_options", {}))
        options[SLOT] = functools.partial(self.attention, options.get(SLOT))
        options[MARK] = self
        if self.family == "unet":
            patches = dict(options.get("patches", {}))
            for name, kind in (("attn1_patch", "self"), ("attn2_patch", "cross")):
                patches[name] = [*patches.get(name, ()), functools.partial(self._mark, kind)]
            options["patches"] = patches
        else:
            replace = dict(options.get("patches_replace", {}))
            dit = dict(replace.get("dit", {}))
            for kind, n in dict.fromkeys(key[:2] for key in self.host.layout.keys):
                name = (f"{kind}_block", n)
                dit[name] = functools.partial(self._block, (kind, n), dit.get(name))
            options["patches_replace"] = {**replace, "dit": dit}
            wrappers = dict(options.get("wrappers", {}))
            around, call = (
                ("diffusion_model", self._diffusion) if self.family == "flux" else ("apply_model", self._apply)
            )
            wrappers[around] = {**wrappers.get(around, {}), MARK: [call]}
            options["wrappers"] = wrappers
        return {**model_options, "transformer_options": options}

    def _mark(self, kind: str, n: Any, context: Any, value: Any, extra_options: dict[str, Any]) -> tuple[Any, Any, Any]:
        """A patch of a UNet's attention that changes nothing: it only says which of the two is next."""
        self.here.key = (extra_options.get("block"), extra_options.get("block_index"), kind)
        return n, context, value

    def _block(self, key: Key, other: Callable[..., Any] | None, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        """A block of Flux or SD3, as it is: says which one runs."""
        if "txt" in args:
            self.here.text = args["txt"].shape[1]
        if key == ("single", 0) and self.twins is not None:
            # The image stream of twins becomes that of their row between double and single blocks, as in the official code.
            rows, twins = self.twins
            hidden = args["img"].clone()
            hidden[twins, self.here.text :] = hidden[rows, self.here.text :]
            args = {**args, "img": hidden}
        self.here.key, self.here.calls = key, 0
        try:
            return extra["original_block"](args) if other is None else other(args, extra)
        finally:
            self.here.key = None

    def _apply(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """SD3 behind what turns a latent into a prediction; its rows of the positive prompt once more, as in `_diffusion`."""
        bound = inspect.signature(type(executor.class_obj)._apply_model).bind(executor.class_obj, x, t, *args, **kwargs)
        given = bound.arguments
        patch = int(executor.class_obj.diffusion_model.patch_size)
        self.size = tuple(-(-side // patch) for side in x.shape[-2:])
        rows = positive_rows(given["transformer_options"], len(x)) if self.contrasts else None
        if rows is None:
            return executor(x, t, *args, **kwargs)
        if given.get("control") is not None or given.get("c_concat") is not None:
            raise UnsupportedHost(
                "NAG runs the rows of the prompt twice in SD3, and ControlNets are not cut into rows here. Leave it out."
            )
        extra = dict(given.get("kwargs", {}))
        for name, negative in self.sampling.negative(x).items():
            holder, key = (given, "c_crossattn") if name == "context" else (extra, name)
            own = holder.get(key)
            if own is not None:
                holder[key] = torch.cat([own, self._as_rows(name, negative, own[rows])])
        given["kwargs"] = extra
        for name in ("x", "t"):
            given[name] = torch.cat([given[name], given[name][rows]])
        batch = len(x)
        self.twins = rows, slice(batch, len(given["x"]))
        try:
            return executor(*bound.args[1:], **bound.kwargs)[:batch]
        finally:
            self.twins = None

    @staticmethod
    def _as_rows(name: str, negative: Tensor, own: Tensor) -> Tensor:
        """An argument of the negative prompt, one for each row of the prompt's own."""
        negative = negative.to(own).expand(-(-len(own) // len(negative)) * len(negative), *negative.shape[1:])
        if negative.shape != own.shape:
            raise UnsupportedHost(
                f"NAG: the negative prompt has {list(negative.shape)} for {name}, the prompt {list(own.shape)}; in Flux and SD3 "
                "they must agree in tokens. Encode both with the same length."
            )
        return negative

    def _diffusion(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward of Flux; with the rows of the positive prompt once more, where a negative one is compared with."""
        bound = inspect.signature(type(executor.class_obj)._forward).bind(executor.class_obj, *args, **kwargs)
        given = bound.arguments
        patch = int(executor.class_obj.patch_size)
        self.size = tuple(-(-side // patch) for side in given["x"].shape[-2:])
        if not self.contrasts:
            return executor(*args, **kwargs)
        batch = len(given["x"])
        rows = positive_rows(given["transformer_options"], batch)
        if rows is None:
            return executor(*args, **kwargs)
        extra = given.get("kwargs", {})
        refused = [n for n in ("control", "ref_latents") if given.get(n) is not None]
        refused += [n for n in ("attention_mask",) if extra.get(n) is not None]
        if refused:
            raise UnsupportedHost(
                f"NAG runs the rows of the prompt twice in Flux, and how {refused[0]} is cut into rows is not known. Leave it out."
            )
        for name, negative in self.sampling.negative(given["x"]).items():
            own = given.get(name)
            if own is None:
                continue
            given[name] = torch.cat([own, self._as_rows(name, negative, own[rows])])
        for name in ("x", "timestep", "guidance"):
            if isinstance(given.get(name), Tensor):
                given[name] = torch.cat([given[name], given[name][rows]])
        self.twins = rows, slice(batch, len(given["x"]))
        try:
            return executor(*bound.args[1:], **bound.kwargs)[:batch]
        finally:
            self.twins = None

    # One attention call.

    def attention(
        self, other: Callable[..., Any] | None, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The override: the program's own kernel, or another node's override, but for steered sites."""
        base = func if other is None else functools.partial(other, func)
        key, self.here.key = self.here.key, None if self.family == "unet" else self.here.key
        if self.family == "sd3" and key is not None:
            self.here.calls += 1
            key = key if self.here.calls == 1 else (*key, "self")
        site = self.host.layout.keys.get(key)
        runtime = None if site is None else self.run.runtimes.get(site.path)
        if key is None and self.family == "unet" and self.run.runtimes:
            # Called again without its mark: another node attends a second time inside this block.
            self.sampling.report.note("another node attends by itself in some blocks; that attention is left as it is")
        if runtime is None or not self.active[runtime.site.path]:
            if self.grad:
                given = Given.of(*args, **kwargs)
                return given.joined(kernels.attend(given.attention()))
            return base(*args, **kwargs)
        given = Given.of(*args, **kwargs)
        att, kept = given.attention(), []

        def run_base() -> Tensor:
            out = kernels.attend(att) if self.grad else given.heads_of(base(*args, **kwargs))
            kept.append(out)
            return out

        if site.path not in self.sampling.compared and not self.grad:
            check_kernel(site, att, run_base(), other)
            self.sampling.compared.add(site.path)
        call = self.call(site, att, given.options or {}, key)
        out = runtime(att, (lambda: kept[0]) if kept else run_base, call, self.active[site.path])
        if kept and not self.grad:
            self.sampling.report.attended(self.run.branch, out, kept[0])
        if self.sampling.capture_complete():
            self.sampling.stop_pass()
        return given.joined(out)

    def call(self, site: Site, att: Attention, options: dict[str, Any], key: Key) -> AttnCall:
        """What a method sees."""
        b, _, n, m = att.shape
        facts: dict[str, Any] = {"capture": self.capture}
        if self.family == "unet":
            segments = {"image": slice(0, n)}
            grid = tuple(options.get("activations_shape", ())[-2:])
        else:
            text = self.here.text
            segments = (
                {"text": slice(0, text), "image": slice(text, n)} if site.kind == "joint" else {"image": slice(0, n)}
            )
            grid = self.size or ()
        image = segments["image"]
        if len(grid) == 2 and grid[0] * grid[1] == image.stop - image.start:
            facts["grid"] = grid
        kinds = list(options.get("cond_or_uncond", ()))
        twins = 0 if self.twins is None else self.twins[1].stop - self.twins[1].start
        branch_rows, samples = None, None
        if kinds and (b - twins) % len(kinds) == 0:
            each = (b - twins) // len(kinds)
            index = torch.arange(b, device=att.q.device) // each
            which = torch.tensor([*kinds, *[-1] * (twins // each)], device=att.q.device)[index]
            branch_rows = {"cond": which == POSITIVE, "uncond": which == NEGATIVE}
            samples = Samples({each: [r % each for r in range(b)]})
        if self.contrasts:
            facts["contrast"] = self._contrast(site, att, options, key)
        return AttnCall(
            site,
            plain(n, att.q.device),
            plain(m, att.q.device),
            host="comfyui",
            step=self.step,
            steps=self.steps,
            segments=segments,
            branch_rows=branch_rows,
            samples=samples,
            facts=facts,
        )

    def _contrast(self, site: Site, att: Attention, options: dict[str, Any], key: Key) -> Contrast | None:
        if self.family != "unet":
            # What an image attends to alone has no prompt in it; twins have the image of their row there.
            apart = key[0] == "double"
            return None if self.twins is None or site.kind != "joint" else Contrast(*self.twins, apart=apart)
        rows = positive_rows(options, len(att.q))
        if rows is None or site.kind != "cross":
            return None
        if att.mask is not None:
            raise UnsupportedHost(
                f"{site.path}: its text is masked, so the negative text cannot take its place exactly."
            )
        module = self.host.layout.modules[site.path]
        q = att.q[rows]
        # The negative text has keys and values of its own, which do not depend on the image.
        text = self.sampling.negative(q)["context"].to(q)
        given = Given(q, module.to_k(text), module.to_v(text), att.q.shape[1])
        k, v = (t.view(*t.shape[:2], given.heads, -1).transpose(1, 2) for t in (given.k, given.v))
        if len(q) % len(k):
            raise UnsupportedHost(
                f"NAG: {len(k)} negative prompts for {len(q)} rows of the prompt; give one, or one for each."
            )
        k, v = (t.repeat(len(q) // len(t), 1, 1, 1) for t in (k, v))
        return Contrast(rows, negative=kernels.attend(Attention(q, k, v, att.scale)))


def step_of(sigma: float, sigmas: Tensor | None) -> tuple[int | None, int | None]:
    """(which step of the schedule a sigma belongs to, how many there are); the last one that began at or above it."""
    if sigmas is None:
        return None, None
    begun = (sigmas[:-1] >= sigma * (1 - 1e-5)).sum()
    return max(0, int(begun) - 1), len(sigmas) - 1


def positive_rows(options: dict[str, Any], batch: int) -> Any:
    """The rows of the positive prompt: a slice, or an index where they do not stand together; None where there are none."""
    kinds = list(options.get("cond_or_uncond", ()))
    if POSITIVE not in kinds:
        return None
    each = batch // len(kinds)
    found = [i for i, kind in enumerate(kinds) if kind == POSITIVE]
    if found == list(range(found[0], found[-1] + 1)):
        return slice(found[0] * each, (found[-1] + 1) * each)
    return torch.tensor([i * each + r for i in found for r in range(each)])


def check_kernel(site: Site, att: Attention, out: Tensor, other: Callable[..., Any] | None) -> None:
    """Raise where what computes attention here is something else than attention; a few rows, once a run."""
    n = att.shape[2]
    rows = torch.tensor(sorted({0, n // 3, n // 2, n - 1}), device=att.q.device)
    mask = None if att.mask is None else att.mask4()
    if mask is not None and mask.shape[2] > 1:
        mask = mask.index_select(2, rows)
    with torch.no_grad():
        wanted = kernels.attend(att.replace(q=att.q.index_select(2, rows), mask=mask)).float()
        found = out.index_select(2, rows).float()
        apart = float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
    if not apart <= TOLERANCE.get(att.q.dtype, HALF):
        inner = getattr(other, "func", other)
        who = "the program's attention" if other is None else getattr(inner, "__qualname__", type(inner).__name__)
        raise UnsupportedHost(
            f"{site.path}: {who} computes something else than attention ({apart:.1%} from it), so an edit of the map is not "
            "defined there. Bypass that node, or steer other layers."
        )
