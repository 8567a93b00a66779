"""A negative prompt inside the conditional passes of a denoiser: what a method that needs "contrast" compares with.

Two exact ways. In a UNet the text meets the image in cross-attention only, so there the negative text is attended to beside
the prompt, with the same queries. In the transformers below the conditional rows run once more with the negative text as
*twins*, whose image stream the method keeps that of their row.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...bound import Bound
from ...branches import BranchInputs, Prediction
from ...call import Contrast
from ...errors import CompositionError, SelectionError, UnsupportedHost
from ...site import Site
from .prefix import layered

if TYPE_CHECKING:
    from .clock import DenoiserClock

TWIN = "negative"
# Transformers in which rows with other text keep the image stream of their row where attention gives both the same, and the
# arguments that carry their text. Elsewhere the text reaches the image by other ways too, or nobody has looked.
TEXT = ("encoder_hidden_states", "encoder_attention_mask")
TWINS = {
    "FluxTransformer2DModel": ("encoder_hidden_states", "pooled_projections"),
    "SD3Transformer2DModel": ("encoder_hidden_states", "pooled_projections"),
    "PixArtTransformer2DModel": TEXT,
    "SanaTransformer2DModel": TEXT,
    "WanTransformer3DModel": ("encoder_hidden_states",),
}


# Processors whose keys and values come from the text alone: one query is enough to have them computed. Others may add keys made
# of their hidden states.
TEXT_ALONE = ("AttnProcessor", "AttnProcessor2_0", "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0")


class Collected(Exception):
    """Ends a call of a processor that was made for its keys and values alone.

    Attributes:
        attend: the attention of other queries to them.
    """

    def __init__(self, attend: Callable[[Tensor], Tensor]):
        super().__init__()
        self.attend = attend


@dataclass(frozen=True)
class Twins:
    """The rows of one pass of a transformer, and those with the negative prompt."""

    rows: slice
    twins: slice

    def fact(self, negative: Tensor | None, apart: bool) -> Contrast:
        """What a method sees of it in one attention call; `apart`: text and image came as two streams."""
        return Contrast(self.rows, self.twins, apart)


@dataclass(frozen=True)
class NegativeText:
    """The negative prompt of one pass of a UNet.

    Attributes:
        names: of the sites that compare with it. text: what the denoiser was given for the prompt, all rows. negative: for the
            conditional rows. rows: these.
    """

    names: frozenset[str]
    text: Tensor
    negative: Tensor
    rows: slice

    def fact(self, negative: Tensor | None, apart: bool) -> Contrast:
        """What a method sees of it in one attention call."""
        return Contrast(self.rows, negative=negative)

    def attention(
        self, copied: Callable[..., Any], processor: Any, attn: nn.Module, given: dict[str, Any], path: str
    ) -> Callable[[Tensor], Tensor]:
        """Attention to the negative text, as a function of queries: `copied` run up to its primitive.

        Raises:
            UnsupportedHost: the text of this call is not the denoiser's own argument.
        """
        text = given.get("encoder_hidden_states")
        several = isinstance(text, tuple)
        if (text[0] if several else text) is not self.text or given.get("attention_mask") is not None:
            raise UnsupportedHost(
                f"{path}: its text is masked, or not what the denoiser was given (projected, or repeated for frames), so the "
                "negative text cannot take its place exactly."
            )
        negative = (self.negative, *text[1:]) if several else self.negative
        hidden = given["hidden_states"][self.rows]
        if type(processor).__name__ in TEXT_ALONE and hidden.ndim == 3:
            # The queries are those of the call itself.
            hidden = hidden[:, :1]
        try:
            copied(processor, attn, **{**given, "hidden_states": hidden, "encoder_hidden_states": negative})
        except Collected as found:
            return found.attend
        raise UnsupportedHost(f"{path}: {type(processor).__name__} reached no attention for the negative text.")


class ContrastPasses:
    """Gives the passes of one denoiser their negative text, while a method that needs it acts."""

    def __init__(self, clock: DenoiserClock, sites: Sequence[Site], bounds: Sequence[Bound]):
        """
        Args:
            sites: all of this denoiser. bounds: the methods that need a negative prompt.
        """
        self.clock, self.bound, self.method = clock, bounds[0], bounds[0].method
        model, name = clock.model, self.bound.name
        self.names = frozenset(clock.declared.edits[self.bound.index])
        self.unet = hasattr(model, "down_blocks") and hasattr(model, "up_blocks")
        if len(bounds) > 1:
            raise CompositionError(f"{name} is there {len(bounds)} times; one negative prompt is followed. Leave one.")
        if not self.unet and type(model).__name__ not in TWINS:
            raise UnsupportedHost(
                f"{name}: on which ways the text reaches the image of {type(model).__name__} is not known. It acts on UNets "
                f"with cross-attention and on {', '.join(TWINS)}."
            )
        if self.unet and clock.declared.compiled:
            raise UnsupportedHost(
                f"{name} runs cross-attention a second time, which compiled UNets do not allow. Steer it uncompiled."
            )
        if not self.unet:
            if clock.declared.latent_moves:
                raise CompositionError(
                    f"{name} adds rows to each call of {type(model).__name__}, which methods that move the latent do not expect."
                )
            self._check_all(sites, name)
        if isinstance(self.method.negative, dict):
            names = self._names()
            other = sorted(set(self.method.negative) - set(names))
            if other:
                raise SelectionError(
                    f"{name}: negative has {other[0]!r}, and of {type(model).__name__} {' and '.join(names)} can be negative."
                )
            return
        if clock.sampling.pipeline is None:
            raise SelectionError(
                f"{name}: a denoiser cannot encode a prompt; steer the pipeline, or give negative={{argument of the denoiser: "
                "tensor}."
            )
        clock.sampling.prompts.negative = self.method.negative

    def _check_all(self, sites: Sequence[Site], name: str) -> None:
        if self.bound.where.rows is not None:
            raise SelectionError(
                f"{name}: in {type(self.clock.model).__name__} the two streams would part where rows are left out."
            )
        every = {s.name for s in sites if s.kind in ("cross", "joint")}
        left_out = sorted(every - set(self.clock.declared.edits[self.bound.index]))
        if left_out:
            raise SelectionError(
                f"{name} leaves {left_out[0]} out: in {type(self.clock.model).__name__} the two streams would part there. Select "
                "all cross- and joint attention of it, or steps only."
            )

    @property
    def acts(self) -> bool:
        """Whether the method acts in this step."""
        sampling = self.clock.sampling
        return self.method.on and (not self.bound.timed or self.bound.where.active(None, sampling.step, sampling.steps))

    def predict(self, call: Callable[[BranchInputs], Prediction], inputs: BranchInputs) -> Prediction:
        """`call` on these rows, of which the conditional ones have a negative prompt."""
        if not self.acts or inputs.layout is None or "cond" not in inputs.layout:
            return call(inputs)
        found = self._texts(inputs)
        if self.unet:
            own = inputs.values["encoder_hidden_states"]
            with self._set(NegativeText(self.names, own, found["encoder_hidden_states"], inputs.part("cond"))):
                return call(inputs)
        twice = inputs.with_again("cond", TWIN, found)
        rows, twins = twice.part("cond"), twice.part(TWIN)
        with self._set(Twins(rows, twins)), self._together(rows, twins):
            prediction = call(twice)
        return Prediction(prediction.with_sample(prediction.sample[: inputs.batch]).wrapped)

    @contextlib.contextmanager
    def _set(self, contrast: Any) -> Iterator[None]:
        before, self.clock.contrast = self.clock.contrast, contrast
        try:
            yield
        finally:
            self.clock.contrast = before

    def _together(self, rows: slice, twins: slice) -> contextlib.AbstractContextManager[None]:
        """Flux: between double and single blocks the image stream of twins becomes that of their row, as in the official code."""
        single = getattr(self.clock.model, "single_transformer_blocks", None)
        return layered([(single[0], functools.partial(_same_image, rows, twins))] if single else [])

    def _texts(self, inputs: BranchInputs) -> dict[str, Tensor]:
        """Arguments of the denoiser for the conditional rows, with the negative prompt; found once a run."""
        memory = self.clock.sampling.memory
        own = inputs.only("cond").values
        names = [n for n in self._names() if own.get(n) is not None]
        # A bare denoiser may be called with other rows at the same timestep.
        key = ("contrast", inputs.batch // len(inputs.layout))
        if key not in memory:
            memory[key] = {n: self._text(n, own[n]) for n in names}
        found = memory[key]
        for n in names:
            # Beside cross-attention the two texts never meet, so there the number of tokens is free.
            same = (0, 2) if self.unet and found[n].ndim == 3 else range(found[n].ndim)
            if found[n].ndim != own[n].ndim or any(found[n].shape[d] != own[n].shape[d] for d in same):
                raise UnsupportedHost(
                    f"{self.bound.name}: the negative {n} is {list(found[n].shape)}, that of the prompt {list(own[n].shape)}. They "
                    "must agree in samples and channels, and in transformers in tokens too."
                )
        return {n: found[n].to(own[n]) for n in names}

    def _names(self) -> tuple[str, ...]:
        """The arguments of the denoiser that carry its text."""
        return TEXT[:1] if self.unet else TWINS[type(self.clock.model).__name__]

    def _text(self, name: str, own: Tensor) -> Tensor:
        """The negative counterpart of one argument."""
        given = self.method.negative
        if isinstance(given, dict):
            if name not in given:
                raise SelectionError(
                    f"{self.bound.name}: negative has no {name!r}, of which the denoiser needs {list(own.shape)}."
                )
            value = given[name]
            return (
                value.repeat_interleave(len(own) // len(value), dim=0)
                if len(value) and len(own) % len(value) == 0
                else value
            )
        # Which of the encoder's results this is, shows in the values for the prompt itself.
        for plain, negative in self.clock.sampling.prompts.encoded:
            if plain.shape == own.shape and torch.equal(plain.to(own), own):
                return negative
        raise UnsupportedHost(
            f"{self.bound.name}: the denoiser's {name} is not what the pipeline's encode_prompt gave, so "
            "what the negative prompt would be there is not known. Give negative={argument of the denoiser: tensor}."
        )


def _same_image(rows: slice, twins: slice, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    hidden = kwargs["hidden_states"].clone()
    hidden[twins] = hidden[rows]
    return inner(*args, **{**kwargs, "hidden_states": hidden})
