"""Methods on images, measured on smollm2-llava, whose visual sinks are planted: `python -m benchmarks.visual_sinks --out FOLDER`.

Existence questions about scenes (random, popular and adversarial absent classes, and ones in the colour of something that is
there; a class that several kinds ask about is asked once) and the captions of the same scenes, every arm on the same ones. The
image and the words that all questions begin with are prefilled once for a scene, and the cache cut back between questions, which
is exact for every method here (VHR with rows="last"). Answers are scored by the likelihoods of " yes" and " no". One JSON file
per arm and `CHUNK` scenes; one that is there, or that another process has claimed, is left alone, so that several may share the
work.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnsteer import ADHH, PAI, PAINT, VAR, VHR, HeadGate, HeadSet, Intervention, VisualKnockout, Where, steer, zoo
from attnsteer.analysis import visual_heads
from attnsteer.call import AttnCall
from attnsteer.evals.significance import Interval, percentiles, ratio_bootstrap, resampled_totals
from attnsteer.methods._images import speaking
from attnsteer.methods.var import sink_tokens
from attnsteer.search import find_sink_dims
from attnsteer.zoo.llava import CORNERS
from attnsteer.zoo.patches import paint_patches
from attnsteer.zoo.shapes.layouts import chair
from attnsteer.zoo.shapes.questions import CLASSES, NEGATIVES, pope
from attnsteer.zoo.shapes.questions import existence as ask
from attnsteer.zoo.shapes.render import render
from attnsteer.zoo.shapes.world import rng

# Calibration scenes on which settings are compared.
SWEEP = 20
# Layers and heads of the text model.
SHAPE = (30, 9)
PARTS = ("preconditions", "heads", "sweep", "choose", "arms", "knockout", "looking", "report")
BATCH, CHUNK, SINK_DIM, TAU = 15, 30, 507, 20.0
# The longest caption in tokens, and the token that ends one.
LONGEST, END = 28, 2
BOUND = "same colour"
KINDS = (*NEGATIVES, BOUND)
BANDS = {"0-2": (0, 3), "3-9": (3, 10), "10-12": (10, 13), "13-28": (13, 29)}
# What a method may need of the scenes of a batch.
Make = Callable[[list[Any]], Intervention | None]


@dataclass(frozen=True)
class Item:
    """A scene and the classes that are asked about it: text, whether it is there, the kinds that ask."""

    index: int
    scene: Any
    asked: tuple[tuple[str, bool, tuple[str, ...]], ...]


def items(split: str, count: int, start: int = 0) -> list[Item]:
    """`count` scenes with their questions."""
    found = []
    for index in range(start, start + count):
        asked: dict[str, tuple[bool, list[str]]] = {}
        for kind in NEGATIVES:
            scene, questions = pope(split, index, kind)
            for q in questions:
                asked.setdefault(q.prompt, (q.answer == "yes", []))[1].append(kind)
        for q in bound(scene, [text for text, (there, _) in asked.items() if there], rng(split, index, stream=40)):
            asked.setdefault(q.prompt, (q.answer == "yes", []))[1].append(BOUND)
        found.append(Item(index, scene, tuple((text, there, tuple(kinds)) for text, (there, kinds) in asked.items())))
    return found


def bound(scene: Any, there: list[str], g: Any) -> list[Any]:
    """Those of `there`, and for each a question about an absent class in a colour of the scene: colour alone does not answer."""
    classes = sorted({(o.colour, o.shape) for o in scene.objects})
    colours = sorted({c for c, _ in classes})
    free = [c for c in CLASSES if c[0] in colours and c not in classes]
    drawn = [free[int(i)] for i in g.permutation(len(free))[: len(there)]]
    return [q for c in classes if (q := ask(scene, *c)).prompt in there] + [ask(scene, *c) for c in drawn]


def pixels(scenes: Sequence[Any]) -> list[Any]:
    return [(i * 255).round().byte() for i in render(list(scenes))]


def encoded(processor: Any, scenes: Sequence[Any], texts: Sequence[str]) -> Any:
    """The processor's output for one turn each, as recipes make it."""
    turns = [
        [{"role": "user", "content": [{"type": "image"}, *([{"type": "text", "text": t}] if t else [])]}] for t in texts
    ]
    written = [processor.apply_chat_template(t, tokenize=False) for t in turns]
    return processor(images=pixels(scenes), text=written, padding=True, return_tensors="pt")


def existence(model: Any, processor: Any, data: Sequence[Item], make: Make) -> list[list[Any]]:
    """[scene, question, there, kinds, log p(yes) - log p(no)] for every question."""
    return measured(model, processor, data, make, described=False)[0]


@torch.no_grad()
def measured(
    model: Any, processor: Any, data: Sequence[Item], make: Make, described: bool = True
) -> tuple[list[list[Any]], list[list[Any]]]:
    """The rows of `existence`, and [scene, caption, mentions, hallucinated, named, classes there, words, ended] for every scene."""
    from transformers import DynamicCache

    tokenizer = processor.tokenizer
    yes, no = (tokenizer(w).input_ids[0] for w in (" yes", " no"))
    answers: list[list[Any]] = []
    captions: list[list[Any]] = []
    for at in range(0, len(data), BATCH):
        # Those with the most questions first: less is asked in vain.
        part = sorted(data, key=lambda i: -len(i.asked))[at : at + BATCH]
        scenes = [i.scene for i in part]
        before = encoded(processor, scenes, [""] * len(part))
        # The template ends with the line break that begins each question in training.
        ids = before.input_ids[:, :-1]
        rounds = max(len(i.asked) for i in part)
        texts = [[i.asked[min(k, len(i.asked) - 1)][0] for i in part] for k in range(rounds)]
        questions = torch.tensor([[tokenizer(f"\n{t}").input_ids for t in own] for own in texts])
        # How many tokens all questions begin with.
        head = int((questions == questions[0, 0]).all(dim=0).all(dim=0).long().cumprod(dim=0).sum())
        method, cache = make(scenes), DynamicCache()
        run = None if method is None else steer(model, method, control=True)

        def call(total: int, run: Any = run, cache: Any = cache, **inputs: Any) -> Tensor:
            chunk = nullcontext() if run is None or not total else run.chunked_prefill(tokens=total)
            with chunk:
                out = model(**inputs, past_key_values=cache, logits_to_keep=1, use_cache=True)
            return out.logits[:, -1].float()

        try:
            total = ids.shape[1] + questions.shape[2]
            call(total, input_ids=ids, pixel_values=before.pixel_values)
            call(total, input_ids=questions[0, :, :head])
            for k, asked in enumerate(questions[:, :, head:]):
                logits = call(total, input_ids=asked)
                cache.crop(-asked.shape[1])
                for item, row in zip(part, logits, strict=True):
                    if k < len(item.asked):
                        text, there, kinds = item.asked[k]
                        answers.append([item.index, text, there, list(kinds), float(row[yes] - row[no])])
            if described:
                cache.crop(-head)
                asked = torch.tensor([tokenizer("\ncaption").input_ids] * len(part))
                said = [call(ids.shape[1] + asked.shape[1], input_ids=asked).argmax(dim=-1)]
                while len(said) < LONGEST and not bool((torch.stack(said) == END).any(dim=0).all()):
                    said.append(call(0, input_ids=said[-1][:, None]).argmax(dim=-1))
                captions += [told(i, own, tokenizer) for i, own in zip(part, torch.stack(said, dim=1), strict=True)]
        finally:
            if run is not None:
                run.remove()
    return answers, captions


def told(item: Item, ids: Tensor, tokenizer: Any) -> list[Any]:
    """The row of a caption."""
    ended = bool((ids == END).any())
    # What a finished caption goes on with, while others are being written, is none of it.
    text = tokenizer.decode(ids[: int((ids == END).int().argmax())] if ended else ids, skip_special_tokens=True)
    said, wrong, named = chair(text, item.scene.objects)
    there = len({(o.colour, o.shape) for o in item.scene.objects})
    return [item.index, text, said, wrong, named, there, len(text.split()), ended]


@dataclass(frozen=True)
class Probe(Intervention):
    """Reads, edits nothing: what VAR's precondition is made of, in the rows behind the image."""

    found: dict[int, list[Tensor]] = field(default_factory=dict, compare=False, repr=False)
    sinks: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    kinds = ("self",)
    needs = ("tokens", "images", "residual")
    observes = True

    def weights(self, call: AttnCall) -> None:
        layer = call.site.layer
        flags = sink_tokens(call.residual, (SINK_DIM,), TAU)
        known = self.sinks.get(layer)
        flags = torch.cat([known, flags], dim=1) if call.past and known is not None else flags
        self.sinks[layer] = flags
        image = call.image_tokens()
        visual = call.at_keys(image & flags)
        on_image, on_sinks = call.map.mass(call.at_keys(image)), call.map.mass(visual)
        first = torch.zeros_like(image)
        first[:, 0] = True
        last = image.shape[1] - 1 - image.flip(-1).to(torch.int8).argmax(dim=-1)
        rows = call.row_position > last[:, None]
        if not bool(rows.any()):
            return
        gate = (on_image >= 0.2) & (on_image - on_sinks >= 0.5 * on_image)
        pick = lambda x: x.float().mean(dim=1)[rows].mean()  # noqa: E731
        values = [
            (image & flags).sum(dim=1).float().mean(),
            pick(on_sinks),
            pick(on_image),
            pick(call.map.mass(call.at_keys(first))),
            pick(on_image >= 0.2),
            pick(gate),
        ]
        self.found.setdefault(layer, []).append(torch.stack(values))


@torch.no_grad()
def preconditions(model: Any, processor: Any, data: Sequence[Item]) -> dict[str, list[float]]:
    """By layer band: visual sinks an image, their share, the image's mass, the first token's, rows with an image mass of 0.2 or
    more, rows that VAR's gate (rho 0.5) lets through."""
    table: dict[int, list[Tensor]] = {}
    for at in range(0, len(data), BATCH):
        part = data[at : at + BATCH]
        probe = Probe()
        with steer(model, probe, control=True):
            model(**encoded(processor, [i.scene for i in part], [i.asked[0][0] for i in part]), logits_to_keep=1)
        for layer, values in probe.found.items():
            table.setdefault(layer, []).extend(values)
    mean = {layer: torch.stack(v).mean(dim=0) for layer, v in table.items()}
    return {
        name: [round(float(x), 4) for x in torch.stack([mean[i] for i in range(a, b)]).mean(dim=0)]
        for name, (a, b) in BANDS.items()
    }


def influence(model: Any, processor: Any, data: Sequence[Item], most: int = 40) -> HeadSet:
    """AD-HH's score of every head to first order: how much less likely a wrong " yes" gets without the head than a right one.

    The authors take each head away in turn, which costs a forward for each; here d p / d gate comes from one backward.
    """
    base = existence(model, processor, data, lambda scenes: None)
    said = [(i, t, there) for i, t, there, _, margin in base if margin > 0]
    wrong, right = [s for s in said if not s[2]][:most], [s for s in said if s[2]][:most]
    scenes = {i.index: i.scene for i in data}
    yes = processor.tokenizer(" yes").input_ids[0]
    layers = model.model.language_model.layers
    heads = model.config.text_config.num_attention_heads
    scores = []
    for group in (wrong, right):
        total = torch.zeros(len(layers), heads)
        for at in range(0, len(group), BATCH):
            part = group[at : at + BATCH]
            gates = torch.ones(len(layers), heads, requires_grad=True)
            hooks = [
                layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda _, args, gate=gates[i]: (args[0] * gate.repeat_interleave(args[0].shape[-1] // heads),)
                )
                for i, layer in enumerate(layers)
            ]
            try:
                inputs = encoded(processor, [scenes[i] for i, _, _ in part], [t for _, t, _ in part])
                chance = model(**inputs, logits_to_keep=1).logits[:, -1].float().softmax(-1)[:, yes].sum()
                (own,) = torch.autograd.grad(chance, gates)
            finally:
                for hook in hooks:
                    hook.remove()
            total += own
        scores.append(total / max(len(group), 1))
    found = {(i, h): float(scores[0][i, h] - scores[1][i, h]) for i in range(len(layers)) for h in range(heads)}
    return HeadSet(sorted(found, key=lambda k: -found[k]), scores=found, shape=(len(layers), heads))


def random_heads(like: HeadSet, seed: int) -> HeadSet:
    """As many heads of the same layers, none of them in the set where there are others."""
    g = torch.Generator().manual_seed(seed)
    own = set(like)
    out = []
    for layer in sorted({i for i, _ in own}):
        free = [h for h in range(like.shape[1]) if (layer, h) not in own]
        count = sum(i == layer for i, _ in own)
        out += [(layer, free[int(k)]) for k in torch.randperm(len(free), generator=g)[:count]]
    return HeadSet(out, shape=SHAPE)


def some_heads(layers: Iterable[int], count: int, seed: int = 1) -> HeadSet:
    """`count` random heads of each layer."""
    g = torch.Generator().manual_seed(seed)
    return HeadSet([(i, int(h)) for i in layers for h in torch.randperm(SHAPE[1], generator=g)[:count]], shape=SHAPE)


@dataclass(frozen=True)
class Scaled(Intervention):
    """What VHR does to the heads that it chooses, done to given ones: their output of the rows that speak, times alpha."""

    alpha: float = 1.1

    kinds = ("self",)
    needs = ("tokens",)

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        return torch.where(speaking(call)[:, None, :, None], self.alpha * out, out)


Patches = Callable[[list[Any]], tuple[list[list[int]], list[list[int]]]]


def corners(scenes: list[Any]) -> tuple[list[list[int]], list[list[int]]]:
    """The registers, in the place of PAINT's local patches."""
    return [list(CORNERS)] * len(scenes), [[]] * len(scenes)


def drawn(like: Patches, seed: int = 0) -> Patches:
    """As many patches drawn at random, none of them a register."""

    def patches(scenes: list[Any]) -> tuple[list[list[int]], list[list[int]]]:
        g = torch.Generator().manual_seed(seed)
        inner = torch.tensor([i for i in range(64) if i not in CORNERS])
        local, summary = [], []
        for a, b in zip(*like(scenes), strict=True):
            order = inner[torch.randperm(len(inner), generator=g)].tolist()
            local.append(order[: len(a)])
            summary.append(order[len(a) : len(a) + len(b)])
        return local, summary

    return patches


def painted(alpha: float, beta: float, patches: Patches = paint_patches, heads: HeadSet | None = None) -> Make:
    """PAINT on the patches of the tower, or on others."""
    return lambda scenes: PAINT(*patches(scenes), alpha, beta, heads=heads)


def one(method: Intervention | None) -> Make:
    return lambda scenes: method


def arms(heads: list[tuple[int, int]] | None, chosen: dict[str, Any]) -> dict[str, tuple[bool, Make]]:
    """Arm -> (with registers, method). Arms of one method differ in one thing."""
    var: dict[str, Any] = {"sink_dims": (SINK_DIM,), "tau": TAU, "rho": chosen.get("rho", 0.5)}
    free = {**var, "rho": 0.0, "min_image_mass": 0.0}
    own = HeadSet(heads[: chosen.get("top", 10)], shape=SHAPE) if heads is not None else None
    alpha, beta = chosen.get("paint", (0.3, 0.3))
    threshold, pai = chosen.get("threshold", 0.2), chosen.get("pai", 0.2)
    strength = chosen.get("vhr", 1.2)
    # VHR's layers, and PAI's and PAINT's.
    deep, third = (1, *range(SHAPE[0] - 14, SHAPE[0])), range(2, SHAPE[0])
    methods: dict[str, Make] = {
        "base": one(None),
        "VAR": one(VAR(**var)),
        "VHR": one(VHR(strength, rows="last")),
        "PAI": one(PAI(pai)),
        "PAINT": painted(alpha, beta),
    }
    if own is not None:
        methods["ADHH"] = one(ADHH(own, threshold))
    found = {name: (True, make) for name, make in methods.items()}
    found |= {f"{name}, no registers": (False, make) for name, make in methods.items()}
    controls: dict[str, Make] = {
        "VAR, zero": one(VAR(**var, move_fraction=0.0)),
        # As many heads as pass the gate on average, whatever they look at.
        "VAR, random heads": one(VAR(**free, where=Where(heads=some_heads(range(SHAPE[0] - 1), 2)))),
        "VAR, head selection off": one(VAR(**free)),
        "VAR, visual sinks only": one(VAR(**var, sinks="visual")),
        "VAR, placebo tokens": one(VAR(**var, sinks="placebo")),
        "VHR, zero": one(VHR(1.0, rows="last")),
        "VHR, random heads": one(Scaled(strength, where=Where(heads=some_heads(deep, 4)))),
        "VHR, head selection off": one(Scaled(strength, where=Where(layers=deep, kinds="self"))),
        "VHR, alpha 2": one(VHR(2.0, rows="last")),
        "PAI, zero": one(PAI(0.0)),
        "PAI, random heads": one(PAI(pai, some_heads(third, 4))),
        # PAI's term on some of the image's tokens alone is PAINT's.
        "PAI, visual sinks only": painted(pai, 0.0, corners),
        "PAI, placebo tokens": painted(pai, 0.0, drawn(corners)),
        "PAINT, zero": painted(0.0, 0.0),
        "PAINT, random heads": painted(alpha, beta, heads=some_heads(third, 4)),
        "PAINT, visual sinks only": painted(alpha, 0.0, corners),
        "PAINT, placebo tokens": painted(alpha, beta, drawn(paint_patches)),
    }
    if own is not None:
        controls |= {f"ADHH, random heads {s}": one(ADHH(random_heads(own, s), threshold)) for s in (1, 2)}
        controls["ADHH, zero"] = one(ADHH(own, 1.1))
        controls["ADHH, head selection off"] = one(ADHH(None, threshold, where=Where(layers=third, kinds="self")))
    return found | {name: (True, make) for name, make in controls.items()}


def sweep(heads: list[tuple[int, int]]) -> dict[str, tuple[bool, Make]]:
    """What is tried on the calibration split."""
    var = {"sink_dims": (SINK_DIM,), "tau": TAU}
    found: dict[str, Make] = {"base": one(None)}
    found |= {f"VAR rho {r}": one(VAR(**var, rho=r)) for r in (0.5, 0.8)}
    found |= {f"VHR {a}": one(VHR(a, rows="last")) for a in (1.1, 1.3)}
    found |= {f"PAI {a}": one(PAI(a)) for a in (0.1, 0.3)}
    found |= {f"PAINT {a} {b}": painted(a, b) for a, b in ((0.2, 0.1), (0.5, 0.2))}
    found |= {f"ADHH top {n} {t}": one(ADHH(HeadSet(heads[:n], shape=SHAPE), t)) for n, t in ((5, 0.2), (15, 0.2))}
    return {name: (True, make) for name, make in found.items()}


SETTINGS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "VAR": lambda w: {"rho": float(w[1])},
    "VHR": lambda w: {"vhr": float(w[0])},
    "PAI": lambda w: {"pai": float(w[0])},
    "PAINT": lambda w: {"paint": [float(w[0]), float(w[1])]},
    "ADHH": lambda w: {"top": int(w[1]), "threshold": float(w[2])},
}


def choose(out: Path) -> dict[str, Any]:
    """The setting of each method with the highest log p of the right answer on the calibration split, with all of its figures.

    Not accuracy: on a few hundred questions one setting or another has a few answers more by chance.
    """
    best: dict[str, tuple[float, list[str]]] = {}
    table = {}
    for name, rows in collected(out, "sweep").items():
        table[name] = {"accuracy": round(accuracy(rows), 4), "log p": round(log_p(rows), 4), "questions": len(rows)}
        method, *words = name.split()
        if words and (method not in best or log_p(rows) > best[method][0]):
            best[method] = (log_p(rows), words)
    found: dict[str, Any] = {}
    for method, (_, words) in best.items():
        found |= SETTINGS[method](words)
    return {**found, "calibration": table}


def accuracy(rows: list[list[Any]]) -> float:
    return sum((r[4] > 0) == r[2] for r in rows) / len(rows)


def log_p(rows: list[list[Any]]) -> float:
    """Mean log-likelihood of the right one of " yes" and " no", in nats."""
    margin = torch.tensor([r[4] if r[2] else -r[4] for r in rows], dtype=torch.float64)
    return float(torch.nn.functional.logsigmoid(margin).mean())


PAIRS = {
    "image from the question": [("question", "image")],
    "image from the last token": [("last", "image")],
    "question from the last token": [("last", "question")],
}


@torch.no_grad()
def knockout(name: str, width: int, count: int) -> dict[str, Any]:
    """Existence questions with attention between two parts of the prompt blocked in a band of layers.

    By pair and band: accuracy, and the change of log p of the right answer with its interval (paired, resampled by scene). The
    last entry of each pair is all layers.
    """
    model, processor = zoo.load(name)
    data = items("calibration", count)

    def asked(method: Intervention | None) -> list[list[Any]]:
        return (existence if processor.chat_template else _whole)(model, processor, data, one(method))

    layers = model.config.text_config.num_hidden_layers
    bands = [(a, min(a + width, layers)) for a in range(0, layers, width)]
    base = asked(None)
    found: dict[str, Any] = {"model": name, "questions": len(base), "base": [accuracy(base), log_p(base)], "bands": {}}
    for told, pairs in PAIRS.items():
        for first, stop in [*bands, (0, layers)]:
            rows = asked(VisualKnockout(pairs, where=Where(layers=range(first, stop), kinds="self")))
            change = difference(base, rows, gain)
            band = f"{first}-{stop - 1}" if stop - first > 1 else str(first)
            found["bands"].setdefault(told, {})[band] = [accuracy(rows), change.value, change.low, change.high]
    return found


@torch.no_grad()
def looking(count: int, sizes: Sequence[int] = (4, 8, 16), draws: int = 3) -> dict[str, Any]:
    """Visual heads of shapes-lvlm, scored on questions of `count` calibration scenes, and removed on as many test scenes.

    By layer: mean mass, concentration and score, with the mass that a uniform row has; the mass of rightly and wrongly answered
    questions. By number of removed heads (gate 0): the change of log p of the right answer for those of the largest score, of
    the least, and random ones, with intervals resampled by scene.
    """
    from attnsteer.zoo.measure.text import inputs

    model, processor = zoo.load("shapes-lvlm")
    scored, tested = items("calibration", count), items("test", count)
    rows = _whole(model, processor, scored, one(None))
    scenes = {i.index: i.scene for i in scored}
    batches = [
        dict(inputs(processor, [scenes[r[0]] for r in rows[at : at + 100]], [r[1] for r in rows[at : at + 100]]))
        for at in range(0, len(rows), 100)
    ]
    table = visual_heads(model, batches, right=[bool(right(r)) for r in rows])
    layers, heads = table.shape
    names = ("mass", "concentration", "score", "mass_right", "mass_wrong")
    by_layer = {n: [sum(table[n][i, h] for h in range(heads)) / heads for i in range(layers)] for n in names}
    score = table["score"]
    ranked = sorted(score, key=lambda h: -score[h])
    base = _whole(model, processor, tested, one(None))
    found: dict[str, Any] = {
        "questions": [len(rows), len(base)],
        "base": [accuracy(base), log_p(base)],
        "chance": float(table.column("mass").chance[0]),
        "layers": by_layer,
        "ranked": [[*h, score[h]] for h in ranked],
    }
    g = torch.Generator().manual_seed(0)
    for size in sizes:
        sets = {"largest": ranked[:size], "least": ranked[-size:]}
        sets |= {
            f"random {d}": [ranked[int(k)] for k in torch.randperm(len(ranked), generator=g)[:size]]
            for d in range(draws)
        }
        for name, own in sets.items():
            gone = _whole(model, processor, tested, one(HeadGate(dict.fromkeys(own, 0.0))))
            change = difference(base, gone, gain)
            found.setdefault("removed", {}).setdefault(str(size), {})[name] = [accuracy(gone), *change]
    return found


@torch.no_grad()
def _whole(model: Any, processor: Any, data: Sequence[Item], make: Make) -> list[list[Any]]:
    """`existence` of shapes-lvlm, a whole prompt for each question."""
    from attnsteer.zoo.measure.text import inputs

    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    asked = [(i, text, there, kinds) for i in data for text, there, kinds in i.asked]
    rows: list[list[Any]] = []
    for at in range(0, len(asked), 100):
        part = asked[at : at + 100]
        scenes = [i.scene for i, *_ in part]
        method = make(scenes)
        run = None if method is None else steer(model, method, control=True)
        try:
            batch = inputs(processor, scenes, [text for _, text, *_ in part])
            logits = model(**batch, logits_to_keep=1).logits[:, -1].float()
        finally:
            if run is not None:
                run.remove()
        rows += [
            [i.index, text, there, list(kinds), float(row[yes] - row[no])]
            for (i, text, there, kinds), row in zip(part, logits, strict=True)
        ]
    return rows


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """What each blocked band costs, a panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.6), squeeze=False, layout="constrained")
    for ax, own in zip(axes[0], found, strict=True):
        for (told, bands), shape in zip(own["bands"].items(), "os^", strict=True):
            names = list(bands)[:-1]
            value, low, high = zip(*(bands[n][1:] for n in names), strict=True)
            ends = [[v - x for v, x in zip(value, low, strict=True)], [x - v for v, x in zip(value, high, strict=True)]]
            ax.errorbar(names, value, yerr=ends, marker=shape, markersize=5, capsize=2, label=told)
        ax.axhline(0, color="grey", lw=0.8)
        ax.set(title=f"{own['model']}, {own['questions']} questions", xlabel="layers in which attention is blocked")
        ax.set(ylabel="change of log p of the right answer")
    axes[0][0].legend(fontsize=8, title="hidden is the", title_fontsize=8)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def by_scene(rows: list[list[Any]], values: list[float]) -> tuple[list[float], list[float]]:
    """Sums and counts by scene: questions about one picture are no independent samples."""
    sums: dict[int, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        own = sums.setdefault(row[0], [0.0, 0.0])
        own[0] += value
        own[1] += 1
    return [v[0] for v in sums.values()], [v[1] for v in sums.values()]


def difference(base: list[list[Any]], rows: list[list[Any]], of: Callable[[list[Any]], float]) -> Interval:
    """Paired, resampled by scene."""
    before = {(r[0], r[1]): of(r) for r in base}
    return ratio_bootstrap(*by_scene(rows, [of(r) - before[r[0], r[1]] for r in rows]))


def right(row: list[Any]) -> float:
    return float((row[4] > 0) == row[2])


def gain(row: list[Any]) -> float:
    return float(torch.nn.functional.logsigmoid(torch.tensor(row[4] if row[2] else -row[4], dtype=torch.float64)))


def said_yes(row: list[Any]) -> float:
    return float(row[4] > 0)


def collected(out: Path, what: str) -> dict[str, list[list[Any]]]:
    """Arm -> rows of all of its chunks."""
    found: dict[str, list[list[Any]]] = {}
    for path in sorted(out.glob(f"{what} *.json")):
        name = path.stem.removeprefix(f"{what} ").rpartition(" @")[0]
        found.setdefault(name, []).extend(json.loads(path.read_text()))
    return found


def like(base: list[list[Any]], rows: list[list[Any]], key: int) -> list[list[Any]]:
    """The rows of `base` about what `rows` are about, in their order."""
    known = {tuple(r[:key]): r for r in base}
    return [known[tuple(r[:key])] for r in rows if tuple(r[:key]) in known]


def spread(i: Interval, factor: float, digits: int) -> str:
    return f"{factor * i.value:+.{digits}f} [{factor * i.low:.{digits}f}, {factor * i.high:.{digits}f}]"


def report(out: Path) -> str:
    """The tables of the documentation."""
    rows = collected(out, "existence")
    # Those of `arms`, in its order.
    order = [n for n in arms([(0, 0)], {}) if n in rows]
    bases = [n for n in order if n.startswith("base")]
    lines = ["| arm | questions | all, of which there | " + " | ".join(KINDS) + " | log p | says yes |"]
    lines.append("| --- " * (5 + len(KINDS)) + "|")
    for name in bases:
        own = rows[name]
        cells = [f"{100 * accuracy(own):.1f} %, {100 * sum(r[2] for r in own) / len(own):.0f} %"]
        cells += [f"{100 * accuracy([r for r in own if k in r[3]]):.1f} %" for k in KINDS]
        cells += [f"{log_p(own):.3f}", f"{100 * sum(map(said_yes, own)) / len(own):.1f} %"]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| arm | questions | accuracy, points | log p, nats | says yes, points | changed answers | "
        + " | ".join(KINDS)
        + " |",
    ]
    lines.append("| --- " * (6 + len(KINDS)) + "|")
    for name in order:
        own = rows[name]
        base = like(rows.get("base, no registers" if name.endswith("no registers") else "base", []), own, 2)
        if name in bases or len(base) < len(own):
            continue
        cells = [
            spread(difference(base, own, f), x, d) for f, x, d in ((right, 100, 1), (gain, 1, 3), (said_yes, 100, 1))
        ]
        cells.append(str(sum((b[4] > 0) != (r[4] > 0) for b, r in zip(base, own, strict=True))))
        for k in KINDS:
            kind = difference(*([r for r in x if k in r[3]] for x in (base, own)), right)
            cells.append(spread(kind, 100, 1))
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    texts = collected(out, "captions")
    lines += [
        "",
        "| arm | captions | CHAIR_i | CHAIR_s | recall | words | ended | other captions |",
        "| --- " * 8 + "|",
    ]
    for name in order:
        own = texts.get(name, [])
        base = like(texts.get("base, no registers" if name.endswith("no registers") else "base", []), own, 1)
        if not own or len(base) < len(own):
            continue
        ratio = lambda r, a, b: sum(x[a] for x in r) / max(sum(x[b] for x in r), 1)  # noqa: E731
        cells = []
        for a, b in ((3, 2), (4, 5)):
            sums = resampled_totals(torch.tensor([[x[a], x[b], y[a], y[b]] for x, y in zip(own, base, strict=True)]))
            ends = percentiles(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3])
            change = 100 * (ratio(own, a, b) - ratio(base, a, b))
            more = f", {change:+.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if name not in bases else ""
            cells.append(f"{100 * ratio(own, a, b):.1f} %{more}")
        hallucinating = 100 * sum(x[3] > 0 for x in own) / len(own)
        words, ended = sum(x[6] for x in own) / len(own), 100 * sum(x[7] for x in own) / len(own)
        other = sum(x[1] != y[1] for x, y in zip(own, base, strict=True))
        lines.append(
            f"| {name} | {len(own)} | {cells[0]} | {hallucinating:.1f} % | {cells[1]} | {words:.1f} | {ended:.0f} % | {other} |"
        )
    return "\n".join(lines)


def write(path: Path, value: Any) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(path)


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.visual_sinks", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("runs/visual_sinks"))
    parser.add_argument("--scenes", type=int, default=120)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--arms", help="names, separated by semicolons; all unless given")
    parser.add_argument("--chosen", type=Path, help="JSON of the settings that the calibration split chose")
    args = parser.parse_args(None if argv is None else list(argv))
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    loaded: dict[bool, Any] = {}

    def models(registers: bool) -> Any:
        if registers not in loaded:
            loaded[registers] = zoo.load("smollm2-llava", registers=registers)
        return loaded[registers]

    if args.part == "report":
        print(report(args.out))
        return
    if args.part == "knockout":
        found = [knockout("shapes-lvlm", 1, 4 * args.scenes), knockout("smollm2-llava", 5, args.scenes)]
        write(args.out / "knockout.json", found)
        draw(found, args.out / "knockout.webp")
        print(json.dumps(found, indent=1))
        return
    if args.part == "looking":
        found = looking(args.scenes)
        write(args.out / "looking.json", found)
        print(json.dumps(found))
        return
    split = "calibration" if args.part in ("heads", "sweep", "choose") else "test"
    data = items(split, min(args.scenes, SWEEP) if args.part in ("sweep", "choose") else args.scenes, args.start)
    if args.part == "preconditions":
        found = {str(r): preconditions(*models(r), data) for r in (True, False)}
        model, processor = models(True)
        batch = encoded(processor, [i.scene for i in data[:8]], [i.asked[0][0] for i in data[:8]])
        dims = find_sink_dims(model, [batch])
        found["find_sink_dims"] = {"dims": list(dims), "tau": dims.tau, "reason": dims.reason}
        write(args.out / "preconditions.json", found)
        print(json.dumps(found, indent=1))
        return
    at = args.out / "heads.json"
    if args.part == "heads":
        heads = influence(*models(True), data)
        ranked = sorted(heads, key=lambda h: -heads.scores[h])
        write(at, {"heads": [list(h) for h in ranked], "scores": [heads.scores[h] for h in ranked]})
        print([(h, round(heads.scores[h], 4)) for h in ranked[:12]])
        return
    heads = None
    if at.is_file():
        heads = [(int(i), int(h)) for i, h in json.loads(at.read_text())["heads"]]
    chosen = json.loads(args.chosen.read_text()) if args.chosen else {}
    tried = args.part in ("sweep", "choose")
    every = sweep(heads or []) if tried else arms(heads, chosen)
    asked = args.arms.split(";") if args.arms else list(every)
    for first in range(0, 0 if args.part == "choose" else len(data), CHUNK):
        for name in asked:
            registers, make = every[name]
            path = args.out / f"{'sweep' if tried else 'existence'} {name} @{args.start + first}.json"
            claim = path.with_suffix(".claim")
            if path.exists() or claim.exists():
                continue
            claim.touch()
            begun = time.process_time()
            rows, texts = measured(*models(registers), data[first : first + CHUNK], make, described=not tried)
            if not tried:
                write(path.with_name(path.name.replace("existence", "captions", 1)), texts)
            write(path, rows)
            claim.unlink()
            told = f"accuracy {accuracy(rows):.4f} of {len(rows)}, log p {log_p(rows):.4f}"
            if texts:
                told += f", CHAIR_i {sum(r[3] for r in texts) / max(sum(r[2] for r in texts), 1):.3f}"
            print(f"{name}: {told}, {time.process_time() - begun:.0f} s", flush=True)
    if args.part == "choose":
        write(args.out / "chosen.json", choose(args.out))
        print((args.out / "chosen.json").read_text())


if __name__ == "__main__":
    main()
