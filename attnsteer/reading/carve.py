"""CARVE: where a question looks beyond what any question looks at; the image is masked and cropped to it, and asked again.

Ge et al., "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning" (2025, arXiv 2509.06461), section 4; official code
YuyaoGe/CARVE at a1f0442. A_{l,t}: head mean of the last row over the image tokens, at layer l and generated token t. Of a
question Q and a general instruction G: Ahat = A^Q / (A^G + lam); S = sum_t t sum_l upsample(Ahat_{l,t}), bilinear to the
image's size, over the steps that both have. Kept are the pixels above the (1 - keep) quantile of S, of them the components
(4-connected) of largest summed S; the rest is black; the picture is cut to the box around them and enlarged.

The code keeps at least max(3, 0.2 of the number of components) components and asks on both pictures: `CARVE.released_code()`.
The paper has at most K, and asks on the refined picture: the defaults. `scale`, `lam` in units of 1/N are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SelectionError, brief
from ..parameters import Named, check_fields, choice, flag, integer, number, parsed, plain
from ._pictures import LANCZOS, box_of, checked_picture, components, picture, pixels, quantile, resized
from ._vision import ImageRows, checked_layers, decoded, generated, image_grid, over_image, prepared, share

GENERAL = "Write a general description of the image."
# 20 to 25 of 32 layers.
DEPTH = (20 / 32, 26 / 32)


@dataclass(frozen=True)
class Refined:
    """What CARVE found.

    Attributes:
        map: S, float64 [height, width] of the image. mask: bool likewise. box: (x0, y0, x1, y1) in pixels, ends excluded.
        image: the refined picture. before, answer: what the model says on the picture, and on the refined one.
    """

    map: Tensor
    mask: Tensor
    box: tuple[int, int, int, int]
    image: Any
    before: str
    answer: str


def _layers(given: Any) -> Any:
    return None if given is None else checked_layers("CARVE", plain(given))


@dataclass(frozen=True)
class CARVE(Named):
    """Contrastive attention refinement for visual enhancement: a reader; nothing in attention is edited.

    Args:
        layers: of the language model; None: those from 5/8 to 13/16 of its depth (20 to 25 of 32).
        steps: "all": every generated token, the t-th with weight t; "first" or "last": that one.
        lam: added to the general map, a share of attention; in units of 1/N (N image tokens) where `relative`.
        keep: share of pixels that are kept, 0 to 1. regions: how many components are kept.
        at_least: `regions` is a floor below a share `keep` of the components, as in the code; else the most that are kept.
        scale: "none", or "max": each contrasted map is divided by its largest value before it is summed.
        second: the second question is asked on the "refined" picture, or on "both".
    """

    layers: Any = parsed(_layers, "layer numbers", None)
    steps: str = choice("all", ("all", "first", "last"))
    lam: float = number(1e-8, low=0)
    relative: bool = flag(False)
    keep: float = number(0.2, above=0, high=1)
    regions: int = integer(3, low=1)
    at_least: bool = flag(False)
    scale: str = choice("none", ("none", "max"))
    second: str = choice("refined", ("refined", "both"))

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def released_code(cls) -> CARVE:
        """The official code's version 4: layers 20 to 25, at least max(3, 0.2 of the components), both pictures."""
        return cls(layers=range(20, 26), at_least=True, second="both")

    # Tensor maths.

    def contrast(self, query: Tensor, general: Tensor, size: tuple[int, int]) -> Tensor:
        """S, float64 [height, width].

        Args:
            query, general: [steps, layers, h, w]. size: (height, width) of the image.

        Raises:
            SelectionError: maps of other layers or grids.
        """
        if query.ndim != 4 or query.shape[1:] != general.shape[1:]:
            raise SelectionError(
                f"CARVE: maps of the shapes {list(query.shape)} and {list(general.shape)}; give [steps, layers, h, w] of one image."
            )
        common = min(len(query), len(general))
        if not common:
            raise SelectionError("CARVE: no step was generated, so there is no attention to contrast.")
        ridge = self.lam / (query.shape[2] * query.shape[3]) if self.relative else self.lam
        hat = query[:common].double() / (general[:common].double() + ridge)
        if self.scale == "max":
            hat = hat / hat.amax(dim=(-2, -1), keepdim=True)
        weight = torch.arange(1, common + 1, dtype=torch.float64, device=hat.device)
        if self.steps != "all":
            weight = (torch.arange(common, device=hat.device) == (0 if self.steps == "first" else common - 1)).double()
        # The upsampling is linear, so that layers and steps may be summed before it.
        return resized(torch.einsum("t,tlhw->hw", weight, hat), size)

    def mask(self, S: Tensor) -> Tensor:
        """bool [height, width]: the pixels that are kept."""
        kept = quantile(S, 1 - self.keep) <= S
        label = components(kept).to(S.device)
        count = int(label.max())
        sums = torch.zeros(count + 1, dtype=torch.float64, device=S.device).index_add_(
            0, label.flatten(), S.double().flatten()
        )
        most = max(self.regions, int(count * self.keep)) if self.at_least else self.regions
        # By sum, the first component first among equals.
        best = sums[1:].argsort(descending=True, stable=True)[:most] + 1
        return torch.isin(label, best)

    def refine(self, image: Any, mask: Tensor) -> tuple[Any, tuple[int, int, int, int]]:
        """(the picture with black outside of bool `mask` [height, width], cut and enlarged; the box of the cut)."""
        image = checked_picture("CARVE", image)
        if tuple(mask.shape) != (image.size[1], image.size[0]):
            raise SelectionError(
                f"CARVE: a mask of {list(mask.shape)} for a picture of {image.size[1]} x {image.size[0]}."
            )
        box = box_of(mask)
        cut = picture(image, pixels(image) * mask.cpu()[..., None].to(torch.uint8)).crop(box)
        factor = max(image.size[0] / cut.size[0], image.size[1] / cut.size[1])
        return cut.resize((int(cut.size[0] * factor), int(cut.size[1] * factor)), LANCZOS), box

    # With a model.

    def attention(
        self, model: Any, inputs: Any, max_new_tokens: int = 32, grid: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """(maps [steps, layers, h, w] of the last row at each generated token, the token ids that were generated), one sample.

        Args:
            inputs: the processor's output. grid: (height, width) in image tokens where the model does not tell. options: of
                `generate`; greedy by default.
        """
        layers = share(model, *DEPTH) if self.layers is None else self.layers
        with torch.no_grad(), over_image(model, layers) as rows:
            made = generated(model, inputs, max_new_tokens, options)
        found = step_means(rows, layers)
        size = image_grid(model, inputs, found.shape[-1], grid)
        return found.unflatten(-1, size), made

    def ask(
        self,
        model: Any,
        processor: Any,
        image: Any,
        question: str,
        general: str | Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        grid: Any = None,
        **options: Any,
    ) -> Refined:
        """Ask, look closer, and ask again.

        Args:
            model, processor: of transformers. image: a PIL image.
            question: the whole prompt, with the processor's image token. general: the general instruction as a whole prompt, or
                its maps (of `attention`), which depend on the image alone; None: `question` with `GENERAL` behind the image.
            max_new_tokens, options: of `generate`. grid: see `attention`.

        Raises:
            SelectionError: no image token in a prompt, a grid that is not known.
        """
        image = checked_picture("CARVE", image)
        token = getattr(processor, "image_token", "<image>")
        inputs = prepared(model, processor, image, question)
        query, said = self.attention(model, inputs, max_new_tokens, grid, **options)
        if not isinstance(general, Tensor):
            other = prepared(model, processor, image, f"{token} {GENERAL}" if general is None else general)
            general, _ = self.attention(model, other, max_new_tokens, grid, **options)
        S = self.contrast(query, general, (image.size[1], image.size[0]))
        kept = self.mask(S)
        refined, box = self.refine(image, kept)
        both = self.second == "both"
        text = question.replace(token, token * 2, 1) if both else question
        again = prepared(model, processor, [image, refined] if both else refined, text)
        with torch.no_grad():
            made = generated(model, again, max_new_tokens, options)
        answer = decoded(processor, made)
        return Refined(S, kept, box, refined, decoded(processor, said), answer)


def step_means(rows: Sequence[ImageRows], layers: Sequence[int]) -> Tensor:
    """Head means of the last row, [steps, layers, N], from what `over_image` took."""
    by_layer = {layer: [r.map[:, -1].mean(dim=0) for r in rows if r.layer == layer] for layer in layers}
    counts = {len(found) for found in by_layer.values()}
    if counts == {0} or len(counts) != 1:
        raise SelectionError(
            f"layers {brief(list(layers))} gave {by_layer and sorted(counts)} steps; they are no layers of one stack."
        )
    return torch.stack([torch.stack(found) for found in by_layer.values()], dim=1)
