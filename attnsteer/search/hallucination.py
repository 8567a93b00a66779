"""`hallucination_heads`: heads whose output makes a model say what is not in the picture, as a `HeadSet` with scores.

Yang et al., "Understanding and Mitigating Hallucination in Large Vision-Language Models via Modular Attribution and Intervention"
(ICLR 2025), section 3; official code TianyunYoung/Hallucination-Attribution. The influence of a head on a word is the drop of the
word's probability when the head's output is zero; a head's score is its mean influence on hallucinated words less that on true
ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import SelectionError
from ..heads import HeadSet
from ..methods.headgate import HeadGate
from ..steering import steer
from ..versions import library_versions
from ..where import Where
from .gradients import Leaves, Tap
from .scored import table
from .screen import sites_of
from .state import model_digest


class Said(NamedTuple):
    """Prompts, padded on the left, and the token that the model said next.

    Attributes:
        inputs: the model's arguments, `input_ids` [B, n] among them. tokens: token ids, B of them.
        hallucinated: for each, whether it names something that is not in the picture.
    """

    inputs: Mapping[str, Any]
    tokens: Sequence[int]
    hallucinated: Sequence[bool]


@torch.no_grad()
def hallucination_heads(
    model: nn.Module, batches: Iterable[Said], *, where: Where | None = None, progress: bool = False
) -> HeadSet:
    """Score heads by how much more they bring hallucinated words about than true ones.

    A forward of every batch for each head.

    Args:
        model: a vision-language model of transformers. batches: what it said. The paper takes object words of captions of 3,000
            pictures of COCO's training split.
        where: the heads to score; None: all of the language model.

    Returns:
        All scored heads, from -1 to 1; the authors act on the twenty highest (`top(20)`).

    Raises:
        SelectionError: no hallucinated or no true word; lists of another length than the batch; padding on the right.
    """
    parts = list(batches)
    for said in parts:
        _check(said)
    halls = torch.tensor([bool(h) for said in parts for h in said.hallucinated])
    if not bool(halls.any()) or bool(halls.all()):
        raise SelectionError(
            f"hallucination_heads: {int(halls.sum())} of {len(halls)} words are hallucinated; a head is scored by the difference "
            "between both kinds, so give some of each."
        )
    found, shape = sites_of(model, Tap(Leaves(outputs=True), where=Where(kinds="self") if where is None else where))

    from tqdm import tqdm

    before = _probabilities(model, parts)
    scores: dict[tuple[int, int], float] = {}
    for pair in tqdm(found, desc="heads", disable=not progress):
        with steer(model, HeadGate({pair: 0.0}), control=True):
            drop = before - _probabilities(model, parts)
        scores[pair] = float(drop[halls].mean() - drop[~halls].mean())
    provenance = {
        "search": "hallucination_heads",
        "venue": "ICLR 2025",
        "model": model_digest(model),
        "samples": len(halls),
        "hallucinated": int(halls.sum()),
        "influence": table(shape, scores),
        "versions": library_versions(),
    }
    return HeadSet(list(found), scores=scores, shape=shape, provenance=provenance)


def _check(said: Said) -> None:
    ids, mask = said.inputs["input_ids"], said.inputs.get("attention_mask")
    if not len(ids) == len(said.tokens) == len(said.hallucinated):
        raise SelectionError(
            f"hallucination_heads: {len(ids)} prompts, {len(said.tokens)} tokens, {len(said.hallucinated)} marks; give one of each."
        )
    if isinstance(mask, Tensor) and not bool(mask[:, -1].all()):
        raise SelectionError(
            "hallucination_heads: a prompt is padded on the right; pad on the left, so that the last row speaks."
        )


def _probabilities(model: nn.Module, parts: Sequence[Said]) -> Tensor:
    """What the model gives to the tokens, float64."""
    found = []
    for said in parts:
        last = model(**said.inputs).logits[:, -1].softmax(dim=-1, dtype=torch.float64)
        found.append(last.gather(1, torch.tensor([list(said.tokens)], device=last.device).mT)[:, 0].cpu())
    return torch.cat(found)
