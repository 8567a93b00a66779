"""Attention prompting: the picture is darkened where an auxiliary model does not look for the question, and asked about again.

Yu et al., "Attention Prompting on Image for Large Vision-Language Models" (ECCV 2024, arXiv 2409.17143); official code
yu-rp/apiprompting at eed9978 (`API/API_LLaVA`, `API/API_CLIP`). With a vision-language model: the last row at each generated
token of one layer, over the image tokens alone (a softmax over them), head mean, mean over tokens. With CLIP: what each patch
adds to the class token's output of one block, projected and compared with the question's embedding; joined, by a soft or, with the
inverse similarity of the patches themselves. The map is scaled to [0, 1], z = sigmoid(contrast (z - mean) / std), averaged over
3 x 3 cells; the picture becomes z I + (1 - z) grey.

The paper sums attention from a start layer on, the code takes one block; so does this. The code's LLaVA script blends with grey
200 whatever is asked: `AttentionPrompting.released_llava()`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..call import AttnCall
from ..captured import map_rows
from ..errors import SelectionError, UnsupportedHost
from ..intervention import Intervention
from ..parameters import Named, check_fields, integer, number
from ..steering import steer
from ..where import Where
from ._pictures import LANCZOS, checked_picture, minmax, picture, pixels
from ._vision import generated, image_grid, over_image, prepared, text_depth

# 20 of 40 layers of LLaVA-1.5-13B; 22 of 24 blocks of ViT-L.
LLAVA, CLIP = 20 / 40, 22 / 24


@dataclass(frozen=True)
class Prompted:
    """map: fp32 [h, w] in [0, 1], how bright each cell stays. image: the picture that was made."""

    map: Tensor
    image: Any


@dataclass(frozen=True)
class AttentionPrompting(Named):
    """Attention prompting on image: a reader; nothing in attention is edited.

    Args:
        layer: of the auxiliary model, from 0; None: half of a language model's depth (20 of 40), 22 of 24 blocks of CLIP's.
        contrast: factor in the sigmoid, in standard deviations of the map. kernel: side of the mean filter in cells, odd; 1: none.
        grey: what the picture is darkened to, 0 to 255.
    """

    layer: int | None = integer(None, low=0)
    contrast: float = number(5.0, above=0)
    kernel: int = integer(3, low=1)
    grey: float = number(0.0, low=0, high=255)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kernel % 2 == 0:
            raise SelectionError(f"AttentionPrompting(kernel={self.kernel}): give an odd number of cells.")

    @classmethod
    def released_llava(cls) -> AttentionPrompting:
        """The official script of the LLaVA branch: layer 20, contrast 5, grey 200."""
        return cls(layer=20, contrast=5.0, grey=200.0)

    # Tensor maths.

    def enhanced(self, found: Tensor) -> Tensor:
        """[h, w] scaled to [0, 1] and contrasted; a map of equal values is 0.5 everywhere."""
        z = minmax(found)
        z = z - z.mean()
        spread = z.std()
        return torch.sigmoid(self.contrast * torch.where(spread > 0, z / torch.where(spread > 0, spread, 1.0), 0.0))

    def filtered(self, found: Tensor) -> Tensor:
        """[h, w] averaged over `kernel` x `kernel` cells, edges repeated."""
        side = self.kernel // 2
        return F.avg_pool2d(F.pad(found[None, None], (side,) * 4, mode="replicate"), self.kernel, stride=1)[0, 0]

    def of_rows(self, found: Tensor) -> Tensor:
        """The map of the branch of vision-language models, from mean attention over the image tokens [h, w]."""
        return self.filtered(self.enhanced(found))

    def joined(self, own: Tensor, complement: Tensor) -> Tensor:
        """The map of the CLIP branch: the soft or of the class token's map [h, w] and of the patches' [h, w], inverted."""
        a = self.filtered(self.enhanced(own))
        b = self.filtered(1 - minmax(complement))
        return minmax(a + b - a * b)

    def blended(self, image: Any, found: Tensor) -> Any:
        """The picture, darkened by a map [h, w] in [0, 1]; 8-bit steps and filters as in the code."""
        image = checked_picture("AttentionPrompting", image)
        mask = picture(image, (found.detach().cpu().clamp(0, 1) * 255).to(torch.uint8)).resize(image.size, LANCZOS)
        z = pixels(mask).float() / 255
        return picture(image, (pixels(image).float() * z + (1 - z) * self.grey).to(torch.uint8))

    # With a model.

    def prompt(
        self,
        model: Any,
        processor: Any,
        image: Any,
        question: str,
        *,
        max_new_tokens: int = 20,
        grid: Any = None,
        **options: Any,
    ) -> Prompted:
        """The picture for a question, by the attention of a vision-language model that answers it.

        Args:
            model, processor: of transformers. image: a PIL image. question: the whole prompt, with the processor's image token.
            max_new_tokens, options: of `generate`. grid: (height, width) in image tokens where the model does not tell.

        Raises:
            SelectionError: no image token in the prompt, a grid that is not known.
        """
        image = checked_picture("AttentionPrompting", image)
        inputs = prepared(model, processor, image, question)
        layer = round(LLAVA * text_depth(model)) if self.layer is None else self.layer
        with torch.no_grad(), over_image(model, [layer]) as rows:
            generated(model, inputs, max_new_tokens, options)
        steps = torch.stack([r.map[:, -1] for r in rows])
        found = (steps / steps.sum(dim=-1, keepdim=True)).mean(dim=(0, 1))
        found = self.of_rows(found.view(image_grid(model, inputs, len(found), grid)))
        return Prompted(found, self.blended(image, found))

    @torch.no_grad()
    def prompt_clip(self, model: nn.Module, processor: Any, image: Any, question: str) -> Prompted:
        """The picture for a question, by a CLIP model of transformers.

        Raises:
            UnsupportedHost: the model has not the parts of CLIP.
        """
        image = checked_picture("AttentionPrompting", image)
        device = next(model.parameters()).device
        batch = processor(images=image, text=[question], return_tensors="pt", truncation=True).to(device)
        own, complement = self.similarities(
            model, batch["pixel_values"], batch["input_ids"], batch.get("attention_mask")
        )
        found = self.joined(own, complement)
        return Prompted(found, self.blended(image, found))

    @torch.no_grad()
    def similarities(
        self, model: nn.Module, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(what each patch adds to the class token's similarity, the patches' own), [h, w] each, for one image and text."""
        tower = getattr(model, "vision_model", None)
        blocks = getattr(getattr(tower, "encoder", None), "layers", None)
        if blocks is None or not hasattr(model, "visual_projection") or not hasattr(tower, "post_layernorm"):
            raise UnsupportedHost(f"AttentionPrompting: {type(model).__name__} is no CLIPModel of transformers.")
        if len(pixel_values) != 1 or len(input_ids) != 1:
            raise SelectionError(f"AttentionPrompting: one image and one text at a time, not {len(pixel_values)}.")
        depth = len(blocks)
        layer = round(CLIP * depth) if self.layer is None else self.layer
        if layer >= depth:
            raise SelectionError(f"AttentionPrompting(layer={layer}): the model has {depth} blocks, counted from 0.")
        probe = _ClassRow(where=Where(layers=[layer], modalities="vision"))
        left: list[Tensor] = []
        hooks = [
            blocks[layer].register_forward_hook(lambda m, a, o: left.append(o if isinstance(o, Tensor) else o[0])),
            tower.post_layernorm.register_forward_pre_hook(lambda m, a: left.append(a[0])),
        ]
        try:
            with steer(model, probe):
                out = model(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        finally:
            for hook in hooks:
                hook.remove()
        A, v = probe.found["map"], probe.found["values"]
        projection, norm = blocks[layer].self_attn.out_proj, tower.post_layernorm
        count, heads = A.shape[1], A.shape[0]
        W = projection.weight.float().view(-1, heads, v.shape[-1])
        c = torch.einsum("hm,hmd,Dhd->mD", A, v, W) + projection.bias.float() / count
        final = left[1].float().reshape(-1, left[1].shape[-1])[:1]
        mean, spread = final.mean(), (final.var(unbiased=False) + norm.eps).sqrt()
        # As many parts as the stream is thought to be a sum of: two for each block but one.
        parts = 2 * depth - 1
        z = out.image_embeds.float()
        # Both embeddings come out normalised; the code divides by the norm of the image's.
        raw = model.visual_projection(norm(final.to(norm.weight.dtype))).float()
        scale, text = raw.norm(dim=-1), out.text_embeds.float()[0]
        if not torch.allclose(raw / scale, z, atol=1e-2):
            raise UnsupportedHost(
                f"AttentionPrompting: the embedding of {type(model).__name__} is not that of its class token."
            )

        def similarity(x: Tensor, pieces: float) -> Tensor:
            u = norm.weight.float() * (x - mean / pieces) / spread + norm.bias.float() / pieces
            return model.visual_projection(u.to(norm.weight.dtype)).float() @ text / scale

        own = similarity(c[1:], parts * count)
        complement = similarity(left[0][0, 1:].float(), parts)
        height, width = (s // model.config.vision_config.patch_size for s in pixel_values.shape[-2:])
        return own.view(height, width), complement.view(height, width)


@dataclass(frozen=True)
class _ClassRow(Intervention):
    """Keeps the first row's map and the values; edits nothing."""

    found: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    observes = True
    whole_heads = True
    kinds = ("self",)

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Take them, of one image."""
        first = torch.zeros(call.map.shape[0], 1, dtype=torch.long, device=call.map.device)
        self.found.update(map=map_rows(call, first)[0, :, 0].float(), values=call.values[0].float())
