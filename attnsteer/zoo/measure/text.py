"""How good shapes-lm and shapes-lvlm are, and whether their attention has what the literature says of real models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...call import AttnCall
from ...evals.significance import Interval, ratio_bootstrap, wilson
from ...intervention import Intervention
from ...steering import steer
from ..shapes.layouts import chair
from ..shapes.questions import KINDS, NEGATIVES, Question, draw, picture, pope
from ..shapes.reading import TASKS, Reading, reading
from ..shapes.render import render
from ..shapes.world import Scene, rng

BATCH = 50
# A key is a sink of a head when its mean attention over the rows that see it is above this many times the uniform one.
SINK = 5.0


@torch.no_grad()
def choose(model: Any, tokenizer: Any, items: Sequence[Reading]) -> list[int]:
    """The likeliest choice of each item, as an index; right answers are not looked at."""
    found = []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        batch = tokenizer([r.prompt for r in part], padding=True, return_tensors="pt").to(model.device)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=1).logits[:, -1]
        for row, r in zip(logits, part, strict=True):
            found.append(int(row[tokenizer.convert_tokens_to_ids(list(r.choices))].argmax()))
    return found


def accuracy_of_reading(model: Any, tokenizer: Any, split: str = "test", count: int = 1000) -> dict[str, Interval]:
    """Accuracy by likelihood of the choices, for each task and for all."""
    right: dict[str, list[bool]] = {}
    for task in TASKS:
        items = [reading(split, i, task) for i in range(count)]
        right[task] = [r.answer == c for r, c in zip(items, choose(model, tokenizer, items), strict=True)]
    right["all"] = [r for task in TASKS for r in right[task]]
    return {task: wilson(sum(r), len(r)) for task, r in right.items()}


@dataclass(frozen=True)
class Columns(Intervention):
    """Reads, edits nothing: each key's mean attention over the rows that see it, per layer, [B, H, m]."""

    found: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    kinds = ("self",)

    def weights(self, call: AttnCall) -> None:
        n, m = call.map.shape[2:]
        if n == m:
            rows = torch.arange(m, 0, -1, device=call.k.device)
            self.found[call.site.layer] = (call.map.dense().sum(dim=2) / rows).cpu()


@torch.no_grad()
def sinks(model: Any, tokenizer: Any, split: str = "calibration", count: int = 100) -> dict[str, Any]:
    """Attention sinks on reading passages: the first token's mean attention by layer, and which later tokens are sinks."""
    first: dict[int, list[float]] = {}
    later: Counter[str] = Counter()
    share: Counter[int] = Counter()
    for index in range(count):
        ids = tokenizer(reading(split, index).prompt, return_tensors="pt").input_ids.to(model.device)
        with steer(model, reader := Columns()):
            model(input_ids=ids)
        words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        for layer, columns in reader.found.items():
            first.setdefault(layer, []).append(float(columns[0, :, 0].mean()))
            # The last rows see every key, and few rows make a mean of their own.
            body = columns[0, :, 1:-5]
            strong = body > SINK / len(words)
            share[layer] += int(strong.any(dim=-1).sum())
            for at in strong.any(dim=0).nonzero().flatten().tolist():
                later[f"layer {layer}: {words[1 + at]}"] += 1
    heads = model.config.num_attention_heads
    return {
        "first token": {layer: sum(v) / len(v) for layer, v in first.items()},
        "heads with later sinks": {layer: share[layer] / (count * heads) for layer in first},
        "later sinks": later.most_common(12),
    }


@torch.no_grad()
def answer(model: Any, processor: Any, scenes: Sequence[Scene], questions: Sequence[Question]) -> list[str]:
    """The model's next word for each question about its scene, whatever word it is."""
    tokenizer, found = processor.tokenizer, []
    for start in range(0, len(questions), BATCH):
        part = slice(start, start + BATCH)
        batch = inputs(processor, scenes[part], [q.prompt for q in questions[part]]).to(model.device)
        top = model(**batch, logits_to_keep=1).logits[:, -1].argmax(dim=-1)
        found += tokenizer.convert_ids_to_tokens(top.tolist())
    return found


def inputs(processor: Any, scenes: Sequence[Scene], texts: Sequence[str]) -> Any:
    """What the processor makes of rendered scenes and texts that follow the image."""
    images = [(i * 255).round().byte() for i in render(list(scenes))]
    return processor(images=images, text=[f"<image> {t}" for t in texts], padding=True, return_tensors="pt")


def existence(model: Any, processor: Any, kind: str, split: str = "test", count: int = 300) -> dict[str, Any]:
    """POPE's figures (Li et al. 2023) on `count` scenes: accuracy, precision, recall, F1, share of yes, unparsed."""
    asked = [(s, q) for s, qs in (pope(split, i, kind) for i in range(count)) for q in qs]
    said = answer(model, processor, [s for s, _ in asked], [q for _, q in asked])
    pairs = [(q.answer, w) for (_, q), w in zip(asked, said, strict=True)]
    tp = sum(p == ("yes", "yes") for p in pairs)
    positive, yes = sum(a == "yes" for a, _ in pairs), sum(w == "yes" for _, w in pairs)
    precision, recall = tp / max(yes, 1), tp / max(positive, 1)
    return {
        "accuracy": wilson(sum(a == w for a, w in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / max(precision + recall, 1e-9),
        "yes": wilson(yes, len(pairs)),
        "unparsed": sum(w not in ("yes", "no") for _, w in pairs) / len(pairs),
    }


def other_questions(model: Any, processor: Any, split: str = "test", count: int = 300) -> dict[str, Interval]:
    """Accuracy of counting, colour and relation questions."""
    out = {}
    for kind in KINDS[1:]:
        drawn = [(picture(split, i), draw(picture(split, i), kind, rng(split, i, 25))) for i in range(count)]
        asked = [(s, q) for s, q in drawn if q is not None]
        said = answer(model, processor, [s for s, _ in asked], [q for _, q in asked])
        out[kind] = wilson(sum(q.answer == w for (_, q), w in zip(asked, said, strict=True)), len(asked))
    return out


@torch.no_grad()
def captions(model: Any, processor: Any, split: str = "test", count: int = 300, limit: int = 40) -> list[str]:
    """Greedy captions of the scenes of a split."""
    found: list[str] = []
    for start in range(0, count, BATCH):
        scenes = [picture(split, i) for i in range(start, min(start + BATCH, count))]
        batch = inputs(processor, scenes, ["caption"] * len(scenes)).to(model.device)
        ids = model.generate(**batch, max_new_tokens=limit, do_sample=False)[:, batch.input_ids.shape[1] :]
        found += processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found


def chair_of(texts: Sequence[str], split: str = "test") -> dict[str, Any]:
    """CHAIR_i, CHAIR_s, recall and length of captions of the scenes 0, 1, ... of a split."""
    scenes = [picture(split, i).objects for i in range(len(texts))]
    rows = [chair(t, s) for t, s in zip(texts, scenes, strict=True)]
    classes = [len({(o.colour, o.shape) for o in s}) for s in scenes]
    return {
        "CHAIR_i": ratio_bootstrap([r[1] for r in rows], [r[0] for r in rows]),
        "CHAIR_s": wilson(sum(r[1] > 0 for r in rows), len(rows)),
        "recall": sum(r[2] for r in rows) / sum(classes),
        "words": sum(len(t.split()) for t in texts) / len(texts),
    }


@torch.no_grad()
def activations(model: Any, processor: Any, split: str = "calibration", count: int = 64) -> dict[str, Any]:
    """Massive activations (Sun et al. 2024) of the decoder's residual stream, and visual sinks.

    For each layer the largest activation over the median one, its dimension and token; and the image tokens whose
    mean attention from later rows is above `SINK` times that of an average image token.
    """
    scenes = [picture(split, i) for i in range(count)]
    batch = inputs(processor, scenes, ["caption"] * count).to(model.device)
    image = batch.input_ids[0] == model.config.image_token_id
    with steer(model, reader := Columns()):
        hidden = model(**batch, output_hidden_states=True).hidden_states
    table = {}
    for layer, h in enumerate(hidden[1:]):
        size = h.float().abs()
        top = size.amax(dim=(0, 1))
        at = int(size.flatten(0, 1).amax(dim=1).argmax()) % h.shape[1]
        table[layer] = {
            "largest over median": float(size.max() / size.median()),
            "dimension": int(top.argmax()),
            "position": at,
            "on an image token": bool(image[at]),
        }
    strong = {}
    for layer, columns in reader.found.items():
        mass = columns[:, :, image]
        strong[layer] = float((mass > SINK * mass.mean(dim=-1, keepdim=True)).any(dim=-1).float().mean())
    return {"activations": table, "heads with visual sinks": strong}


def measure_lm(model: Any, tokenizer: Any, count: int = 1000) -> dict[str, Any]:
    """All figures of the card of shapes-lm."""
    return {"reading": accuracy_of_reading(model, tokenizer, count=count), "sinks": sinks(model, tokenizer)}


def measure_lvlm(model: Any, processor: Any, count: int = 300) -> dict[str, Any]:
    """All figures of the card of shapes-lvlm."""
    return {
        "existence": {kind: existence(model, processor, kind, count=count) for kind in NEGATIVES},
        "questions": other_questions(model, processor, count=count),
        "captions": chair_of(captions(model, processor, count=count)),
        "attention": activations(model, processor),
    }
