"""RefAM: finds what a phrase refers to in a given picture, from the text-image attention of a diffusion transformer.

Kukleva et al., "RefAM: Attention Magnets for Zero-Shot Referral Segmentation" (2025, arXiv 2509.22650). A RECONSTRUCTION: the
abstract and summaries were read; the body of the paper and its code were not to be had. From them: stop words draw surplus
attention and are dropped when the words of a phrase are averaged; global attention sinks, strong and flat over the image, are
suppressed or redirected; further stop words, the magnets, are appended to the prompt, take attention of the background, and are
removed.

Ours, every number of it: the picture is encoded, noised to `noise`, and passes the denoiser once for each draw of noise; head
means of P[image rows, text keys] (softmax over text and image, or over the text alone with `renormalise`) are averaged over
blocks. A text token is a sink of a block where its mass m_j is above `sink_mass` medians and std / mean over the image is below
`sink_flatness`. The map is the mean over content tokens; the point its largest value, the mask what is above `threshold` of its
range.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..captured import blocks, map_rows
from ..errors import SelectionError, UnsupportedHost, brief
from ..intervention import Intervention
from ..maps.phrases import Prompt
from ..parameters import Named, check_fields, choice, flag, integer, number, parsed
from ..steering import steer
from ..where import Where
from ._pictures import checked_picture, minmax, resized

STOP_WORDS = tuple(
    "a an and are as at be by for from in is it of on or that the their there this to was were which with".split()
)
MAGNETS = ("the", "of", "and", "with", "in")


@dataclass(frozen=True)
class Referred:
    """Where a phrase is.

    Attributes:
        map: fp32 [h, w] over the image tokens. mask: bool [height, width] of the picture. point: (x, y) in fractions of it;
            away: where the magnets look most, likewise, or None. sinks: text keys that were found to be sinks, by site.
    """

    map: Tensor
    mask: Tensor
    point: tuple[float, float]
    away: tuple[float, float] | None
    sinks: dict[str, tuple[int, ...]]


def _words(given: Any) -> tuple[str, ...]:
    listed = [given] if isinstance(given, str) else list(given) if isinstance(given, (list, tuple)) else [None]
    if not all(isinstance(w, str) and w.strip() for w in listed):
        raise SelectionError(f"RefAM: {brief(given)} are no words; give strings.")
    return tuple(listed)


@dataclass(frozen=True)
class RefAM(Named):
    """Referral segmentation by attention magnets, a reconstruction: a reader; nothing in attention is edited.

    Args:
        where: the blocks that are read; empty: all of joint attention.
        noise: of the picture, 0 (none) to 1 (nothing left of it). draws: noises that are averaged over, from `seed` on.
        magnets: words that are appended to the phrase. stop_words: words of the phrase that are not read.
        sinks: "suppress": text keys that are sinks are dropped; "redirect": their attention counts as the magnets'; "keep".
        sink_mass, sink_flatness: what a sink is. renormalise: each image row is a distribution over the text keys that are kept.
        include: "words": all content words; "last" or "last+1": the phrase's last one, or it and the token behind.
        threshold: of the mask, a share of the map's range, 0 to 1.
    """

    where: Any = field(default_factory=Where)
    noise: float = number(0.5, low=0, high=1)
    draws: int = integer(1, low=1)
    seed: int = integer(0, low=0)
    magnets: Any = parsed(_words, "words", MAGNETS)
    stop_words: Any = parsed(_words, "words", STOP_WORDS)
    sinks: str = choice("suppress", ("keep", "suppress", "redirect"))
    sink_mass: float = number(5.0, above=0)
    sink_flatness: float = number(0.5, above=0)
    renormalise: bool = flag(True)
    include: str = choice("words", ("words", "last", "last+1"))
    threshold: float = number(0.5, low=0, high=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.where, Where):
            raise SelectionError(f"RefAM(where={brief(self.where)}): give a Where, e.g. Where(layers=[3]).")

    # Tensor maths.

    def found_sinks(self, P: Tensor) -> Tensor:
        """bool [M]: the text keys of P [image rows, M] that are sinks."""
        mass = P.mean(dim=0)
        flat = P.std(dim=0, unbiased=False) / mass.clamp_min(torch.finfo(P.dtype).tiny)
        return (mass > self.sink_mass * mass.median()) & (flat < self.sink_flatness)

    def read(self, P: Tensor, content: Sequence[int], magnets: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(content map [N], magnet map [N], sinks bool [M]) of P [N image rows, M text keys].

        Content tokens that are sinks are left out, unless all of them are.
        """
        drop = self.found_sinks(P) if self.sinks != "keep" else torch.zeros_like(P[0], dtype=torch.bool)
        own = [j for j in content if not bool(drop[j])] or list(content)
        kept = ~drop
        kept[own] = True
        share = torch.where(kept, P, 0.0)
        away = share[:, list(magnets)].sum(dim=1)
        total = share.sum(dim=1)
        if self.sinks == "redirect":
            moved = torch.where(kept, 0.0, P).sum(dim=1)
            away, total = away + moved, total + moved
        if self.renormalise:
            scale = total.clamp_min(torch.finfo(P.dtype).tiny)
            share, away = share / scale[:, None], away / scale
        return share[:, own].mean(dim=1), away, drop

    # With a model.

    @torch.no_grad()
    def refer(self, pipe: Any, image: Any, phrase: str, **options: Any) -> Referred:
        """Where in a picture a phrase is.

        Args:
            pipe: a pipeline of diffusers with joint attention, a VAE, and noise levels as `sigmas` (Stable Diffusion 3).
            image: a PIL image. phrase: the referring expression. options: of the pipeline's call.

        Raises:
            SelectionError: no content word in the phrase. UnsupportedHost: the pipeline takes no picture or noise level this way.
        """
        image = checked_picture("RefAM", image)
        content = [w for w in phrase.split() if w.lower().strip(".,;:!?") not in self.stop_words]
        if not content:
            raise SelectionError(f"RefAM: {phrase!r} has no word that is no stop word, so it refers to nothing.")
        prompt = " ".join([phrase, *self.magnets])
        reader = _Columns(self, phrase, tuple(content), where=self.where)
        with steer(pipe, reader):
            for draw in range(self.draws):
                noisy, level = _noised(pipe, image, self.noise, self.seed + draw)
                call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", **options}
                pipe(prompt=prompt, latents=noisy, sigmas=[level], **call)
        grids = {g for g, _, _ in reader.found}
        if len(grids) != 1:
            raise UnsupportedHost(f"RefAM: maps of the sizes {sorted(grids)}; select blocks of one size with where=.")
        (grid,) = grids
        found, away = (torch.stack([own[k] for own in reader.found]).mean(dim=0).cpu().view(grid) for k in (1, 2))
        size = (image.size[1], image.size[0])
        mask = minmax(resized(found, size)) >= self.threshold
        magnet = _point(away) if self.magnets else None
        return Referred(found, mask, _point(found), magnet, dict(reader.sinks))


def _point(found: Tensor) -> tuple[float, float]:
    h, w = found.shape
    y, x = divmod(int(found.argmax()), w)
    return (x + 0.5) / w, (y + 0.5) / h


@dataclass(frozen=True)
class _Columns(Intervention):
    """Reads the text columns of the image rows; edits nothing."""

    method: Any = None
    phrase: str = ""
    content: tuple[str, ...] = ()
    found: list[tuple[tuple[int, int], Tensor, Tensor]] = field(default_factory=list, compare=False, repr=False)
    sinks: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    observes = True
    whole_heads = True
    kinds = ("joint",)
    needs = ("grid", "segments", "prompt")

    def prepare(self, prompt: Prompt) -> None:
        """The words must be in the prompt; asked before the first pass."""
        self._places(prompt)

    def _places(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Text keys of the content words, and of the magnets, which may repeat words of the phrase."""
        words, magnets = self.phrase.split(), list(self.method.magnets)
        content = prompt.terms([self._phrases(words)], self.method.include)[-1]
        names = [(w, (words + magnets)[: len(words) + k].count(w)) for k, w in enumerate(magnets)]
        behind = prompt.terms([names], "words")[-1] if names else ()
        return [j for _, own in content for j in own], [j for _, own in behind for j in own]

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Take them, block by block of image rows, as head means."""
        if not {"image", "text"} <= set(call.segments):
            raise UnsupportedHost(f"RefAM: which rows of {call.site.path} are image and which text is not known.")
        image, text = call.segments["image"], call.segments["text"]
        B, H, n, m = call.map.shape
        rows = torch.arange(n, device=call.map.device)[image]
        parts = []
        for block in blocks(len(rows), B * H * m):
            parts.append(map_rows(call, rows[block].expand(B, -1))[-1][..., text].float().mean(dim=0))
        P = torch.cat(parts)
        found, away, sinks = self.method.read(P, *self._places(call.prompt))
        self.found.append((call.grid, found, away))
        self.sinks[call.site.path] = tuple(sinks.nonzero()[:, 0].tolist())

    def _phrases(self, words: Sequence[str]) -> list[Any]:
        """The content words, each as (word, which of its occurrences)."""
        chosen = [(w, words[:k].count(w)) for k, w in enumerate(words) if w in self.content]
        return chosen if self.method.include == "words" else chosen[-1:]


def _noised(pipe: Any, image: Any, noise: float, seed: int) -> tuple[Tensor, float]:
    """(the noisy latent, the noise level that the pipeline is to be given)."""
    vae, scheduler = getattr(pipe, "vae", None), getattr(pipe, "scheduler", None)
    takes = inspect.signature(type(pipe).__call__).parameters
    dynamic = getattr(getattr(scheduler, "config", None), "use_dynamic_shifting", False)
    if (
        vae is None
        or not {"sigmas", "latents", "prompt"} <= set(takes)
        or dynamic
        or not hasattr(scheduler, "scale_noise")
    ):
        raise UnsupportedHost(
            f"RefAM: {type(pipe).__name__} takes no picture at a noise level of one's choice this way (a VAE, latents=, sigmas=, a "
            "flow-matching scheduler without dynamic shifting), as Stable Diffusion 3 does."
        )
    device, dtype = vae.device, vae.dtype
    pixels = pipe.image_processor.preprocess(image).to(device, dtype)
    z = vae.encode(pixels).latent_dist.mode()
    z = (z - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
    # The scheduler shifts what it is given; the level at which it then stands is the one that is asked for.
    shift = float(getattr(scheduler.config, "shift", 1.0))
    level = min(max(noise, 1e-3), 1.0)
    given = level / (shift - (shift - 1) * level)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)
    return (1 - level) * z + level * eps, given
