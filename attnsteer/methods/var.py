"""VAR: takes attention away from sink tokens and gives it to the image tokens that are no sinks.

Kang, Kim, Kim, Hwang, "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (ICLR 2025, arXiv
2503.03321); official code seilk/VisAttnSink. The paper's statements are known through secondary texts (unverified), the
code was read: it moves 0.4 where the paper moves 0.6, reads rho as the share that sinks may have, modifies the last layer,
and keeps the first sample's sinks for later ones (a bug, not offered); see `released_code`. Others report mixed results on MME.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall, Reweight
from ..errors import SelectionError
from ..intervention import Intervention
from ..parameters import choice, flag, integer, is_all, number, parsed, plain, whole
from ..registry import register_method
from ..site import Site
from ..tokens import Tokens
from ..where import Where
from ._images import check_some_image
from ._prompt import prompt_unseen

RMS_EPSILON = 1e-6
# The official code adds this to each image token's attention before it takes the share.
SHARE_EPSILON = 1e-6
SINKS = ("all", "visual", "placebo")


def _dims(given: Any) -> tuple[int, ...]:
    # Of a search that found none.
    reason = getattr(given, "reason", "")
    if reason:
        raise SelectionError(
            f"{reason}. Search with eight varied prompts or more and a smaller tau or drop, or give dimensions by hand."
        )
    given = plain(given)
    listed = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))
    dims = tuple(whole(d) for d in given) if listed else ()
    if not dims or any(d is None or d < 0 for d in dims):
        raise SelectionError(
            "give one or more hidden dimensions, e.g. (1415, 2533); attnsteer.search.find_sink_dims(model, batches) finds them."
        )
    return dims


@register_method
@dataclass(frozen=True)
class VAR(Intervention):
    """Visual attention redistribution in image-centric heads, for the text rows after an image.

    A token is a sink of a layer where |x_d| / rms(x) > tau for one of the sink dimensions d, x the hidden state entering
    the layer. With S the sinks, V the image tokens and N = V without S, the row i of a head is edited where
    a_V >= min_image_mass and a_N >= rho a_V: A' = (1 - c) A on S, and A' = A (1 + c a_S / a_N) on N; row sums stay.

    Args:
        sink_dims: the hidden dimensions of massive activations, a property of the language model; None: looked up
            for backbones that the authors name (`attnsteer.search.SINK_DIMS`; `find_sink_dims` finds others).
        tau: threshold on |x_d| / rms(x), above 0. It is at most the square root of the hidden size; 20 is the
            paper's, for a width of 4,096 (`attnsteer.search.scaled_tau` for others).
        rho: least share of the image's attention that lies on no sink, 0 to 1 (paper: 0.8 general, 0.5
            hallucination, 0.9 vision-centric tasks).
        min_image_mass: least attention to the image, 0 to 1.
        move_fraction: c, the fraction of the sinks' attention that is moved, 0 to 1; 0 changes nothing.
        released: the official code's other differences: layers from the third on, the last one included; rows that
            see no visual sink are left alone; 1e-6 is added to each image token's attention in the share.

        sinks: whose attention is moved. "all": of every sink (paper); "visual": of those that are image tokens, so that the
            first token keeps its own; "placebo": of as many image tokens that are no sinks, drawn at random in each image in
            place of its visual sinks (`placebo`): what moving attention does by itself.
        seed: of the placebo's draw, 0 or more.

    Without `where` it acts on all layers but the last (paper). Sinks are those of the prompt; generated tokens do not
    become sinks. Text between the tiles of an image counts as text after an image. A sample without an image among others with
    one is left alone.

    Raises:
        SelectionError: a value out of range; an unknown backbone without sink_dims; no image in any prompt of a call.
    """

    sink_dims: Sequence[int] | None = parsed(_dims, "hidden dimensions", None)
    tau: float = number(20.0, above=0)
    rho: float = number(0.5, low=0, high=1)
    min_image_mass: float = number(0.2, low=0, high=1)
    move_fraction: float = number(0.6, low=0, high=1, per_sample=True, learnable=True)
    released: bool = flag(False, kw_only=True)
    sinks: str = choice("all", SINKS, kw_only=True)
    seed: int = integer(0, low=0, kw_only=True)

    kinds = ("self",)
    needs = ("tokens", "images", "residual")
    # Sinks are told token by token, and the rows behind an image are edited by keys that they see.
    prefix_local = True
    # A prompt without sinks, or without visual sinks in the official code, is left alone.
    may_rest = True

    @classmethod
    def released_code(
        cls, sink_dims: Sequence[int] | None = None, tau: float = 20.0, rho: float = 0.5, p: float = 0.6, **other: Any
    ) -> VAR:
        """The official code's form, with its parameters: `rho` is the share that sinks may have, `p` the fraction kept."""
        return cls(sink_dims, tau, 1.0 - rho, move_fraction=1.0 - p, released=True, **other)

    def check_tokens(self, tokens: Tokens) -> None:
        check_some_image(tokens, "VAR")

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        layers = sorted({s.layer for s in sites if s.modality == "text" and s.kind == "self"})
        kept = layers[2:] if self.released else layers[:-1]
        if not kept:
            raise SelectionError(
                f"VAR acts on {'the third layer and those after it' if self.released else 'all layers but the last'}; the model "
                f"has layers {layers}. Name some with where=Where(layers=...)."
            )
        return Where(layers=kept, kinds="self")

    def prepared(self, target: Any) -> VAR:
        if self.sink_dims is not None:
            return self
        from ._sink_dims import known_sink_dims

        return self.new(sink_dims=known_sink_dims(target))

    def weights(self, call: AttnCall) -> Reweight | None:
        image = call.image_tokens()
        self._find_sinks(call)
        if is_all(self.move_fraction, 0.0) or not call.state["any"]:
            return None
        acting = self._acting(call, image)
        visual, sinks = call.at_keys(image), call.at_keys(acting)
        visual_sinks, other_sinks, rest = visual & sinks, sinks & ~visual, visual & ~sinks
        on_visual_sinks, on_other_sinks = call.map.mass(visual_sinks), call.map.mass(other_sinks)
        on_rest = call.map.mass(rest)
        on_image = on_rest + on_visual_sinks
        edit = self._rows(call, image, acting)[:, None]
        edit = edit & (on_image >= self.min_image_mass) & (on_rest > 0)
        share_of = on_image + SHARE_EPSILON * visual.sum(dim=-1, keepdim=True) if self.released else on_image
        edit = edit & (on_visual_sinks <= (1.0 - self.rho) * share_of)
        one = torch.ones_like(on_rest)
        fraction = call.each(self.move_fraction)
        keep = torch.where(edit, 1.0 - fraction, one)
        moved = fraction * (on_visual_sinks + on_other_sinks)
        grow = torch.where(edit, 1.0 + moved / on_rest.masked_fill(~edit, 1.0), one)
        return Reweight(((visual_sinks, keep), (other_sinks, keep), (rest, grow)), normalise=False)

    def _find_sinks(self, call: AttnCall) -> None:
        """Keep the sinks among the prompt's tokens, bool [B, T], in the state."""
        state, past = call.state, call.past
        decoding = call.phase == "decode" or call.frozen
        if past and ("sinks" not in state or (not decoding and state["sinks"].shape[1] < past)):
            raise prompt_unseen(self, call, f"which of the {past} tokens in the cache are sinks is not known")
        # Where the cache was cut back, other tokens now stand behind the cut.
        known = state["sinks"] if past else None
        if past and known.shape[1] > past:
            known = known[:, :past]
        if decoding:
            state["sinks"] = known
            return
        flags = sink_tokens(call.residual, self.sink_dims, self.tau)
        flags = flags & call.rows.prompt
        state["sinks"] = torch.cat([known, flags], dim=1) if past else flags
        # Whether there are any is not asked in compiled code.
        state["any"] = torch.compiler.is_compiling() or bool(state["sinks"].any())

    def _acting(self, call: AttnCall, image: Tensor) -> Tensor:
        """bool [B, T]: the tokens that are taken for sinks."""
        sinks = call.state["sinks"]
        if self.sinks == "all":
            return sinks
        image = image[:, : sinks.shape[1]]
        return sinks & image if self.sinks == "visual" else placebo(sinks, image, self.seed)

    def _rows(self, call: AttnCall, image: Tensor, acting: Tensor) -> Tensor:
        """bool [B, n]: text rows behind an image token (a visual sink that they see, in the official code)."""
        own = call.at_rows(image)
        if self.released:
            first = _first(acting & image[:, : acting.shape[1]])
        else:
            first = _first(image)
        return ~own & (call.row_position > first[:, None]) & call.row_valid


def sink_tokens(hidden: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """bool [B, n]: tokens whose hidden state [B, n, D] has |x_d| / rms(x) > tau for one of the dimensions.

    Raises:
        SelectionError: a dimension that does not exist, or a tau that no hidden state can reach.
    """
    width = hidden.shape[-1]
    if max(dims) >= width:
        raise SelectionError(f"sink_dims {tuple(dims)}: the hidden states have {width} dimensions, 0 to {width - 1}.")
    if tau >= math.sqrt(width):
        raise SelectionError(
            f"tau={tau}: |x_d| / rms(x) is at most {math.sqrt(width):.1f} with {width} dimensions, so no token can be a sink. "
            "Use attnsteer.search.scaled_tau(hidden_size)."
        )
    return normalised(hidden, dims).amax(dim=-1) > tau


def placebo(sinks: Tensor, image: Tensor, seed: int = 0) -> Tensor:
    """As many tokens of each image as it has sinks, none of them a sink: bool [B, T], from sinks and image tokens bool [B, T].

    An image is a run of image tokens. Its tokens are taken in the order of a hash of the seed and of the token's place in the
    run, so that neither the batch nor the cut of a prompt into chunks has a say; one with more sinks than other tokens gives
    all of those.
    """
    places = torch.arange(image.shape[1], device=image.device).expand(image.shape)
    starts = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
    run = starts.cumsum(dim=1)
    first = torch.where(starts, places, 0).cummax(dim=1).values
    wanted = torch.zeros_like(run).scatter_add_(1, run.clamp(max=run.shape[1] - 1), (sinks & image).long())
    free = image & ~sinks
    # By run, then by hash; what cannot be drawn comes last.
    key = torch.where(free, (run << 32) + _hashed(places - first, seed), torch.iinfo(torch.int64).max)
    order = key.argsort(dim=1, stable=True)
    run, free = run.gather(1, order), free.gather(1, order)
    new = run != torch.nn.functional.pad(run, (1, 0), value=-1)[:, :-1]
    rank = places - torch.where(new, places, 0).cummax(dim=1).values
    chosen = free & (rank < wanted.gather(1, run.clamp(max=run.shape[1] - 1)))
    return torch.zeros_like(image).scatter_(1, order, chosen)


def _hashed(number: Tensor, seed: int) -> Tensor:
    """32 well-mixed bits of each number (the finaliser lowbias32 of hash-prospector)."""
    x = (number * 0x9E3779B1 + seed * 0x85EBCA77) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def normalised(hidden: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """|x_d| / rms(x) in fp32, [B, n, D], or for some dimensions only."""
    x = hidden.float() if hidden.dtype != torch.float64 else hidden
    rms = (x.square().mean(dim=-1, keepdim=True) + RMS_EPSILON).sqrt()
    return (x if dims is None else x[..., list(dims)]).abs() / rms


def _first(mask: Tensor) -> Tensor:
    """Index [B] of the first True of each row; where there is none, an index behind all that will come."""
    return torch.where(mask.any(dim=-1), mask.to(torch.int8).argmax(dim=-1), torch.iinfo(torch.int64).max)
