"""Similarity of images and texts by a model that the user gives, for the metric `clip_score`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RecordError

Embed = Callable[[Tensor, list[str]], tuple[Tensor, Tensor]]


class Similarity:
    """Cosines of images with their prompts and with the parts of their prompts.

    Args:
        embed: (images [B, 3, H, W] with values in [0, 1], B texts) -> embeddings of both, [B, d].
        name: of the model and its revision, for the report.
    """

    def __init__(self, embed: Embed, name: str):
        self.embed, self.name = embed, name

    @classmethod
    def of(cls, model: Any, processor: Any, name: str) -> Similarity:
        """With a CLIP-type model of transformers (its outputs have `image_embeds` and `text_embeds`) and its processor."""

        def embed(images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
            pictures = [(i.clamp(0, 1) * 255).round().byte() for i in images]
            inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
            most = model.config.text_config.max_position_embeddings
            if inputs["input_ids"].shape[1] > most:
                raise RecordError(f"a text has {inputs['input_ids'].shape[1]} tokens; {name} reads {most}. Shorten it.")
            with torch.no_grad():
                out = model(**{k: v.to(model.device) for k, v in inputs.items()})
            return out.image_embeds.float().cpu(), out.text_embeds.float().cpu()

        return cls(embed, name)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """What goes into the records: `similarity` and, for prompts of two parts, `part_similarities`.

        Raises:
            RecordError: not one prompt per image, or embeddings of another shape.
        """
        if len(images) != len(prompts):
            raise RecordError(f"{len(images)} images and {len(prompts)} prompts; give one prompt per image.")
        split = [parts(p) for p in prompts]
        texts = [t for p, ps in zip(prompts, split, strict=True) for t in (p, *ps)]
        owner = torch.tensor([i for i, ps in enumerate(split) for _ in range(1 + len(ps))])
        image, text = self.embed(images[owner], texts)
        if image.ndim != 2 or image.shape != text.shape or len(image) != len(texts):
            raise RecordError(
                f"embeddings of the shapes {list(image.shape)} and {list(text.shape)} for {len(texts)} pairs."
            )
        cosines = iter(torch.nn.functional.cosine_similarity(image.double(), text.double()).tolist())
        found = []
        for ps in split:
            entry: dict[str, Any] = {"similarity": next(cosines)}
            if ps:
                entry["part_similarities"] = [next(cosines) for _ in ps]
            found.append(entry)
        return found


def parts(prompt: str) -> list[str]:
    """The halves of a prompt at its first " and ", else at its first " with "; none where it has neither."""
    for word in (" and ", " with "):
        first, found, second = prompt.partition(word)
        if found:
            return [first, second]
    return []
