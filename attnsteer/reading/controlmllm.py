"""ControlMLLM: an offset on the image's embeddings, optimised until the text's rows look at a marked region; then the answer.

Wu et al., "ControlMLLM: Training-Free Visual Prompt Learning for Multimodal Large Language Models" (NeurIPS 2024, arXiv
2407.21534), and ControlMLLM++ (arXiv 2602.19505); abstracts and code read; official code mrwu-mac/ControlMLLM at 57e16e7. With
a the mean over layers, heads and rows of the attention to the image tokens, and w the weight of each cell:
rho = sum(a w) / sum(a), loss alpha (1 - rho)^2, summed over regions. w is 1 inside a box or mask; of a scribble or point the
density of N(x; 0, sigma), x the distance over the largest one in the image.

Plain: v_t = beta p_t + (1 - beta) v_{t-1} (v_{-1} = p_0 = 0) is added in pass t, p_{t+1} = p_t - lr dloss/dp_t, and v_T in the
answer; stopped where the loss has changed by more than `stop` percent. The released scripts add every v_t to the same embeddings,
so that they accumulate: `ControlMLLM.released_code()`. ++: Adam (eps 1e-3) on the offset itself, the last row alone, layers 14 to
25 of 32: `ControlMLLM.plus_plus()`; its contrastive decoding is in a fork that could not be read, and is left out.

With sigma 0.1 the density is 3.99 at the mark, so that rho may pass 1, behind which the loss pushes attention away: `peak` divides
by it. Distances are exact, where the code has OpenCV's 5 x 5 approximation in 8 bits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.projections import evaluating
from ..errors import NotFinite, SelectionError, UnsupportedHost, brief, did_you_mean
from ..parameters import Named, check_fields, choice, flag, integer, number, parsed, plain
from ._pictures import checked_picture
from ._vision import checked_layers, decoded, generated, image_grid, over_image, prepared, share

REGIONS = ("box", "mask", "scribble", "point")
# Layers 14 to 25 of 32.
DEPTH = (14 / 32, 26 / 32)
ADAM = (0.9, 0.999, 1e-3)


def _layers(given: Any) -> Any:
    return given if given in (None, "middle") else checked_layers("ControlMLLM", plain(given))


@dataclass(frozen=True)
class Controlled:
    """What an optimisation found.

    Attributes:
        offset: [N, D], added to the embeddings of the N image tokens. losses: of each pass, the first without an offset.
        shares: rho of each pass, summed over regions. image: bool [n], which tokens of the prompt are the image's.
    """

    offset: Tensor
    losses: tuple[float, ...]
    shares: tuple[float, ...]
    image: Tensor = field(repr=False)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The offset is on in all calls of the model with this prompt inside the block."""
        with _offset(model, self.image, lambda: self.offset):
            yield


@dataclass(frozen=True)
class ControlMLLM(Named):
    """Latent optimisation towards a region: the image's embeddings are moved; nothing in attention is edited.

    Args:
        steps: gradient steps (T of the paper; T - 1 of ++'s scripts). lr: step size. alpha: factor on the loss.
        beta: share of the new offset in the moving average, 0 to 1; of `optimiser` "average".
        sigma: width of the weight around scribbles and points, in largest distances. peak: scale it to 1 at the mark.
        optimiser: "average" (of the paper) or "adam" (++). accumulate: offsets add up from pass to pass, as in the scripts.
        rows: "text": all rows of the prompt behind the image; "last": its last one. layers: None: all; "middle": from 14/32 to
            26/32 of the depth; or numbers.
        stop: percent by which the loss may change, against the first pass; None: never stopped.
        rising: also stop once the loss rises from one pass to the next, as the demo does.
    """

    steps: int = integer(5, low=0)
    lr: float = number(1.0, low=0)
    alpha: float = number(400.0, above=0)
    beta: float = number(0.5, low=0, high=1)
    sigma: float = number(0.1, above=0)
    peak: bool = flag(False)
    optimiser: str = choice("average", ("average", "adam"))
    accumulate: bool = flag(False)
    rows: str = choice("text", ("text", "last"))
    layers: Any = parsed(_layers, 'layer numbers or "middle"', None)
    stop: float | None = number(25.0, above=0, optional=True)
    rising: bool = flag(False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.accumulate and self.optimiser == "adam":
            raise SelectionError(
                'ControlMLLM(accumulate=True): with optimiser="adam" offsets are not averaged, and do not add up.'
            )

    @classmethod
    def released_code(cls) -> ControlMLLM:
        """The released scripts of the first paper: offsets accumulate."""
        return cls(accumulate=True)

    @classmethod
    def plus_plus(cls) -> ControlMLLM:
        """ControlMLLM++ for LLaVA-1.5, without its contrastive decoding: three Adam steps on the last row's middle layers."""
        return cls(steps=3, lr=0.03, sigma=0.4, optimiser="adam", rows="last", layers="middle", stop=None)

    # Tensor maths.

    def weight(self, region: Mapping[str, Any], grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """w [h, w] of a region.

        Args:
            region: {"box": (x0, y0, x1, y1)}, {"point": (x, y)}, {"scribble": [(x, y), ...]}, all in fractions of the image, or
                {"mask": bool [height, width]}. grid: (h, w) in image tokens. size: (height, width) of the image in pixels.

        Raises:
            SelectionError: no such form, outside of the image, or on no cell of the grid.
        """
        kind, value = checked_region(region)
        if kind in ("box", "mask"):
            inside = filled(value, size) if kind == "box" else torch.as_tensor(value).bool()
            found = nearest(inside.float(), grid)
            if not bool(found.any()):
                raise SelectionError(
                    f"ControlMLLM: the {kind} {brief(value)} holds the centre of no cell of {grid[0]} x {grid[1]}."
                )
            return found
        x = nearest(distance(strokes(value if kind == "scribble" else [value], size)), grid)
        density = torch.exp(-x.pow(2) / (2 * self.sigma**2))
        return density if self.peak else density / (math.sqrt(2 * math.pi) * self.sigma)

    def energy(self, found: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(loss, rho summed over regions) of mean attention [h, w] over the image."""
        rho = torch.stack([(found * w.to(found)).sum() / found.sum() for w in weights])
        return self.alpha * (1 - rho).pow(2).sum(), rho.sum()

    def stopped(self, losses: Sequence[float]) -> bool:
        """Whether the loop ends behind these losses."""
        if len(losses) < 2:
            return False
        if self.rising and losses[-1] > losses[-2]:
            return True
        return self.stop is not None and abs(losses[-1] - losses[0]) > self.stop / 100 * losses[0]

    # With a model.

    def optimise(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        regions: Any,
        size: tuple[int, int] | None = None,
        *,
        grid: Any = None,
    ) -> Controlled:
        """The offset for one prompt.

        Args:
            model: of transformers. inputs: the processor's output, one sample with one image. regions: one (see `weight`), or a
                list. size: (height, width) of the image in pixels; None: that of the pixel values, or eight for each image token.
            grid: (height, width) in image tokens where the model does not tell.

        Raises:
            SelectionError: a region of no known form, no or several images, a grid that is not known.
            UnsupportedHost: where the image tokens are is not known, or the embeddings do not pass the language model.
            NotFinite: the loss or its gradient is not finite.
        """
        image = image_tokens(model, inputs)
        cells = image_grid(model, inputs, int(image.sum()), grid)
        if size is None:
            values = inputs.get("pixel_values")
            whole = isinstance(values, Tensor) and values.ndim == 4
            size = tuple(values.shape[-2:]) if whole else (8 * cells[0], 8 * cells[1])
        wanted = [regions] if isinstance(regions, Mapping) else list(regions or ())
        if not wanted:
            raise SelectionError("ControlMLLM: no region; give {'box': (x0, y0, x1, y1)} in fractions of the image.")
        weights = [self.weight(region, cells, size) for region in wanted]
        layers = share(model, *DEPTH) if self.layers == "middle" else self.layers
        state = _State(self)
        losses: list[float] = []
        shares: list[float] = []
        with evaluating(model), _frozen(model):
            for _ in range(self.steps):
                offset = state.offset(model, int(image.sum()))
                with torch.enable_grad():
                    found = self._attention(model, inputs, image, offset, layers)
                    loss, rho = self.energy(found.view(cells), weights)
                losses.append(float(loss.detach()))
                shares.append(float(rho.detach()))
                if self.stopped(losses):
                    break
                (gradient,) = torch.autograd.grad(loss, state.leaf)
                if not math.isfinite(losses[-1]) or not bool(torch.isfinite(gradient).all()):
                    raise NotFinite(
                        f"ControlMLLM: the loss ({losses[-1]}) or its gradient is not finite in pass {len(losses)}.",
                        offset,
                        len(losses),
                        self.steps,
                    )
                state.step(gradient)
        return Controlled(state.final(model, int(image.sum())), tuple(losses), tuple(shares), image)

    def _attention(
        self, model: nn.Module, inputs: Mapping[str, Any], image: Tensor, offset: Tensor, layers: Any
    ) -> Tensor:
        """Mean attention to the image tokens [N], with its graph."""
        behind = self.rows == "text"
        with (
            over_image(model, layers, "last", gradients=True, after_image=behind) as rows,
            _offset(model, image, lambda: offset),
        ):
            model(**{**inputs, "use_cache": False})
        if not rows:
            raise SelectionError(
                "ControlMLLM: the prompt has no text behind its image, whose attention could be moved."
            )
        return torch.stack([r.map.mean(dim=(0, 1)) for r in rows]).mean(dim=0)

    def ask(
        self,
        model: nn.Module,
        processor: Any,
        image: Any,
        text: str,
        regions: Any,
        *,
        max_new_tokens: int = 30,
        grid: Any = None,
        **options: Any,
    ) -> tuple[str, Controlled]:
        """(the answer, what was found). text: the whole prompt, with the processor's image token; the others: as of `optimise`."""
        image = checked_picture("ControlMLLM", image)
        inputs = prepared(model, processor, image, text)
        found = self.optimise(model, inputs, regions, (image.size[1], image.size[0]), grid=grid)
        with torch.no_grad(), found.applied(model):
            made = generated(model, inputs, max_new_tokens, options)
        return decoded(processor, made), found


class _State:
    """The offset from pass to pass."""

    def __init__(self, method: ControlMLLM):
        self.method = method
        self.p: Tensor | None = None
        self.history: Tensor | None = None
        self.current: Tensor | None = None
        self.sum: Tensor | None = None
        self.moments: tuple[Tensor, Tensor] | None = None
        self.count = 0
        self.leaf: Tensor | None = None

    def _begin(self, model: nn.Module, tokens: int) -> None:
        if self.p is None:
            table = model.get_input_embeddings().weight
            self.p = torch.zeros(tokens, table.shape[1], dtype=table.dtype, device=table.device)
            self.sum = torch.zeros_like(self.p)

    def _average(self, leaf: Tensor) -> Tensor:
        if self.method.optimiser == "adam":
            return leaf
        before = leaf if self.history is None else self.history
        return self.method.beta * leaf + (1 - self.method.beta) * before

    def offset(self, model: nn.Module, tokens: int) -> Tensor:
        """That of the next pass, of which `leaf` is what is optimised."""
        self._begin(model, tokens)
        self.leaf = self.p.detach().requires_grad_(True)
        self.current = self._average(self.leaf)
        if not self.method.accumulate:
            return self.current
        self.sum = self.sum.detach() + self.current
        return self.sum

    def step(self, gradient: Tensor) -> None:
        """One update."""
        method = self.method
        self.history = self.current.detach()
        if method.optimiser == "average":
            self.p = self.p - method.lr * gradient
            return
        one, two, eps = ADAM
        self.count += 1
        m, v = self.moments or (torch.zeros_like(gradient), torch.zeros_like(gradient))
        self.moments = m, v = one * m + (1 - one) * gradient, two * v + (1 - two) * gradient.pow(2)
        mean, size = m / (1 - one**self.count), v / (1 - two**self.count)
        self.p = self.p - method.lr * mean / (size.sqrt() + eps)

    def final(self, model: nn.Module, tokens: int) -> Tensor:
        """The offset of the answer."""
        self._begin(model, tokens)
        last = self._average(self.p).detach()
        return self.sum.detach() + last if self.method.accumulate else last


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def image_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """bool [n]: the image tokens of one prompt.

    Raises:
        SelectionError: several samples, or no image. UnsupportedHost: which tokens they are is not known.
    """
    config, ids = getattr(model, "config", None), inputs.get("input_ids")
    marks = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    marks = [m for m in marks if isinstance(m, int)]
    if not isinstance(ids, Tensor) or not marks:
        raise UnsupportedHost(
            f"which tokens of {type(model).__name__} are the image's is not known: its config has no image_token_id, or the "
            "inputs no input_ids."
        )
    if len(ids) != 1:
        raise SelectionError(f"ControlMLLM: {len(ids)} samples; give one at a time.")
    image = ids[0] == marks[0]
    if not bool(image.any()):
        raise SelectionError("ControlMLLM: there is no image in the prompt.")
    return image


@contextlib.contextmanager
def _offset(model: nn.Module, image: Tensor, offset: Any) -> Iterator[None]:
    """Adds to the embeddings that enter the language model, in calls that begin with this prompt."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    if not isinstance(decoder, nn.Module):
        raise UnsupportedHost(f"the language model of {type(model).__name__} is not known (no get_decoder).")
    seen: list[int] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if not isinstance(embeds, Tensor):
            raise UnsupportedHost(
                f"{type(model).__name__} gives its language model no inputs_embeds, to which an offset could be added."
            )
        if embeds.shape[1] < len(image):
            # A token over the cache.
            return None
        seen.append(1)
        at = torch.zeros(embeds.shape[1], dtype=torch.bool, device=embeds.device)
        at[: len(image)] = image.to(embeds.device)
        # A new tensor: the embeddings themselves are not added to.
        moved = embeds.clone()
        moved[:, at] = embeds[:, at] + offset().to(embeds)
        return args, {**kwargs, "inputs_embeds": moved}

    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# Regions.


def checked_region(region: Any) -> tuple[str, Any]:
    """(kind, value) of a region.

    Raises:
        SelectionError: it has no form that `ControlMLLM.weight` names, or is outside of the image.
    """
    if not isinstance(region, Mapping) or len(region) != 1:
        raise SelectionError(
            f"a region is one of {REGIONS} with its value, such as {{'box': (0, 0, 0.5, 0.5)}}, not {brief(region)}."
        )
    ((kind, value),) = region.items()
    if kind not in REGIONS:
        raise SelectionError(f"a region of the kind {kind!r}; there are {REGIONS}.{did_you_mean(str(kind), REGIONS)}")
    if kind == "mask":
        mask = torch.as_tensor(value)
        if mask.ndim != 2 or not bool(mask.bool().any()):
            raise SelectionError(f"the mask is {list(mask.shape)}; give bool [height, width] with something in it.")
        return kind, mask
    given = plain(value)
    if kind == "box":
        if not _numbers(given, 4) or not (given[0] < given[2] and given[1] < given[3]):
            raise SelectionError(
                f"the box {brief(value)}: (x0, y0, x1, y1) in fractions of the image, x0 < x1 and y0 < y1."
            )
        return kind, tuple(given)
    points = list(given) if kind == "scribble" and isinstance(given, (list, tuple)) else [given]
    if not points or not all(_numbers(p, 2) for p in points):
        raise SelectionError(f"the {kind} {brief(value)}: points (x, y) in fractions of the image, 0 to 1.")
    return kind, points if kind == "scribble" else points[0]


def _numbers(value: Any, count: int) -> bool:
    value = plain(value)
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return False
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= 1 for v in value)


def filled(box: Sequence[float], size: tuple[int, int]) -> Tensor:
    """bool [height, width]: the pixels int(y0) to int(y1), ends excluded, of a box in fractions."""
    height, width = size
    mask = torch.zeros(size, dtype=torch.bool)
    mask[int(box[1] * height) : int(box[3] * height), int(box[0] * width) : int(box[2] * width)] = True
    return mask


def strokes(points: Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """bool [height, width]: the pixels of a line through points (x, y) in fractions."""
    height, width = size
    at = torch.tensor([[float(y) * height, float(x) * width] for x, y in points], dtype=torch.float64)
    if len(at) > 1:
        count = int((at[1:] - at[:-1]).abs().max()) * 2 + 2
        t = torch.linspace(0, 1, count, dtype=torch.float64)[None, :, None]
        at = (at[:-1, None] * (1 - t) + at[1:, None] * t).flatten(0, 1)
    y, x = at[:, 0].long().clamp(0, height - 1), at[:, 1].long().clamp(0, width - 1)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[y, x] = True
    return mask


def distance(mask: Tensor) -> Tensor:
    """fp32 [height, width]: distance of each pixel to the nearest True one, over the largest; 0 where all are True."""
    height, width = mask.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    every = torch.stack([y, x], dim=-1).view(-1, 2).float()
    marked = mask.nonzero().float()
    found = torch.cat([torch.cdist(part, marked).amin(dim=1) for part in every.split(max(1, (1 << 24) // len(marked)))])
    return (found / found.max().clamp_min(1e-12)).view(height, width)


def nearest(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """[h, w]: the values at the centres of the cells of a grid."""
    y, x = (((torch.arange(n) + 0.5) * side / n).long() for n, side in zip(grid, values.shape, strict=True))
    return values[y][:, x]
