"""Methods on images, measured on smollm2-llava, whose visual sinks are planted: `python -m benchmarks.visual_sinks --out FOLDER`.

Existence questions about scenes (random, popular and adversarial ones; a class that two kinds ask about is asked once), every arm
on the same questions. The image is prefilled once for all questions of a scene, and the cache cut back between them, which is
exact for every method here (VHR with rows="last"). Answers are scored by the likelihoods of " yes" and " no". One JSON file per
arm; one that is there, or that another process has claimed, is left alone, so that several may share the work.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnsteer import ADHH, PAI, PAINT, VAR, VHR, HeadGate, HeadSet, Intervention, VisualKnockout, Where, steer, zoo
from attnsteer.call import AttnCall
from attnsteer.evals.significance import Interval, percentiles, ratio_bootstrap, resampled_totals
from attnsteer.methods.var import sink_tokens
from attnsteer.search import find_sink_dims
from attnsteer.zoo.patches import paint_patches
from attnsteer.zoo.shapes.layouts import chair
from attnsteer.zoo.shapes.questions import NEGATIVES, pope
from attnsteer.zoo.shapes.render import render

# Calibration scenes on which settings are compared.
SWEEP = 16
# Layers and heads of the text model.
SHAPE = (30, 9)
PARTS = ("preconditions", "heads", "sweep", "choose", "existence", "captions", "knockout", "report")
BATCH, SINK_DIM, TAU = 20, 507, 20.0
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
    """`count` scenes with their questions, those with the most questions first."""
    found = []
    for index in range(start, start + count):
        asked: dict[str, tuple[bool, list[str]]] = {}
        for kind in NEGATIVES:
            scene, questions = pope(split, index, kind)
            for q in questions:
                asked.setdefault(q.prompt, (q.answer == "yes", []))[1].append(kind)
        found.append(Item(index, scene, tuple((text, there, tuple(kinds)) for text, (there, kinds) in asked.items())))
    return sorted(found, key=lambda i: -len(i.asked))


def pixels(scenes: Sequence[Any]) -> list[Any]:
    return [(i * 255).round().byte() for i in render(list(scenes))]


def encoded(processor: Any, scenes: Sequence[Any], texts: Sequence[str]) -> Any:
    """The processor's output for one turn each, as recipes make it."""
    turns = [
        [{"role": "user", "content": [{"type": "image"}, *([{"type": "text", "text": t}] if t else [])]}] for t in texts
    ]
    written = [processor.apply_chat_template(t, tokenize=False) for t in turns]
    return processor(images=pixels(scenes), text=written, padding=True, return_tensors="pt")


@torch.no_grad()
def existence(model: Any, processor: Any, data: Sequence[Item], make: Make) -> list[list[Any]]:
    """[scene, question, there, kinds, log p(yes) - log p(no)] for every question."""
    from transformers import DynamicCache

    tokenizer = processor.tokenizer
    yes, no = (tokenizer(w).input_ids[0] for w in (" yes", " no"))
    rows: list[list[Any]] = []
    for at in range(0, len(data), BATCH):
        part = data[at : at + BATCH]
        scenes = [i.scene for i in part]
        before = encoded(processor, scenes, [""] * len(part))
        # The template ends with the line break that begins each question in training.
        ids = before.input_ids[:, :-1]
        width = ids.shape[1]
        rounds = max(len(i.asked) for i in part)
        texts = [[i.asked[min(k, len(i.asked) - 1)][0] for i in part] for k in range(rounds)]
        questions = [torch.tensor([tokenizer(f"\n{t}").input_ids for t in own]) for own in texts]
        method, cache = make(scenes), DynamicCache()
        run = None if method is None else steer(model, method, control=True)

        def call(run: Any = run, total: int = width + questions[0].shape[1], **inputs: Any) -> Tensor:
            if run is None:
                return model(**inputs, logits_to_keep=1, use_cache=True).logits[:, -1].float()
            with run.chunked_prefill(tokens=total):
                return model(**inputs, logits_to_keep=1, use_cache=True).logits[:, -1].float()

        try:
            call(input_ids=ids, pixel_values=before.pixel_values, past_key_values=cache)
            for k, asked in enumerate(questions):
                logits = call(input_ids=asked, past_key_values=cache)
                cache.crop(-asked.shape[1])
                for item, row in zip(part, logits, strict=True):
                    if k < len(item.asked):
                        text, there, kinds = item.asked[k]
                        rows.append([item.index, text, there, list(kinds), float(row[yes] - row[no])])
        finally:
            if run is not None:
                run.remove()
    return rows


@torch.no_grad()
def captions(model: Any, processor: Any, data: Sequence[Item], make: Make) -> list[list[Any]]:
    """[scene, caption, mentions, hallucinated, named, classes there, words, ended] for every scene."""
    rows: list[list[Any]] = []
    for at in range(0, len(data), BATCH):
        part = data[at : at + BATCH]
        scenes = [i.scene for i in part]
        inputs = encoded(processor, scenes, ["caption"] * len(part))
        method = make(scenes)
        run = None if method is None else steer(model, method, control=True)
        try:
            out = model.generate(**inputs, max_new_tokens=28, do_sample=False, pad_token_id=2)
        finally:
            if run is not None:
                run.remove()
        new = out[:, inputs.input_ids.shape[1] :]
        for item, own, text in zip(
            part, new, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            said, wrong, named = chair(text, item.scene.objects)
            there = len({(o.colour, o.shape) for o in item.scene.objects})
            rows.append([item.index, text, said, wrong, named, there, len(text.split()), bool((own == 2).any())])
    return rows


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


def influence(model: Any, processor: Any, data: Sequence[Item], most: int = 60) -> HeadSet:
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
    return HeadSet(out)


def painted(alpha: float, beta: float, seed: int | None = None) -> Make:
    """PAINT on the tower's patches, or on as many random ones."""

    def make(scenes: list[Any]) -> Intervention:
        local, summary = paint_patches(scenes)
        if seed is not None:
            g = torch.Generator().manual_seed(seed)
            drawn = [torch.randperm(64, generator=g).tolist() for _ in scenes]
            both = zip(drawn, local, summary, strict=True)
            local, summary = zip(*((d[: len(a)], d[len(a) : len(a) + len(b)]) for d, a, b in both), strict=True)
        return PAINT(list(local), list(summary), alpha, beta)

    return make


def one(method: Intervention | None) -> Make:
    return lambda scenes: method


def arms(heads: list[tuple[int, int]] | None, chosen: dict[str, Any]) -> dict[str, tuple[bool, Make]]:
    """Arm -> (with registers, method)."""
    var: dict[str, Any] = {"sink_dims": (SINK_DIM,), "tau": TAU, "rho": chosen.get("rho", 0.5)}
    own = HeadSet(heads[: chosen.get("top", 10)], shape=SHAPE) if heads is not None else None
    alpha, beta = chosen.get("paint", (0.3, 0.3))
    threshold, shape = chosen.get("threshold", 0.2), chosen.get("pai", 0.2)
    strength = chosen.get("vhr", 1.2)
    methods: dict[str, Make] = {
        "base": one(None),
        "VAR": one(VAR(**var)),
        "VHR": one(VHR(strength, rows="last")),
        "PAI": one(PAI(shape)),
        "PAINT": painted(alpha, beta),
    }
    if own is not None:
        methods["ADHH"] = one(ADHH(own, threshold))
    found = {name: (True, make) for name, make in methods.items()}
    found |= {f"{name}, no registers": (False, make) for name, make in methods.items()}
    found |= {
        "VAR, zero": (True, one(VAR(**var, move_fraction=0.0))),
        "VAR, rho 0.8": (True, one(VAR(**{**var, "rho": 0.8}))),
        "VAR, visual sinks only": (True, one(VAR(**var, sinks="visual"))),
        "VAR, placebo tokens": (True, one(VAR(**var, sinks="placebo"))),
        "VAR, head selection off": (True, one(VAR(**{**var, "rho": 0.0, "min_image_mass": 0.0}))),
        "VAR, head selection off, all moved": (
            True,
            one(VAR(**{**var, "rho": 0.0, "min_image_mass": 0.0, "move_fraction": 1.0})),
        ),
        "VHR, alpha 2": (True, one(VHR(2.0, rows="last"))),
        "VHR, zero": (True, one(VHR(1.0, rows="last"))),
        "PAI, zero": (True, one(PAI(0.0))),
        "PAINT, random patches": (True, painted(alpha, beta, 0)),
        "PAINT, zero": (True, painted(0.0, 0.0)),
    }
    # As many heads as VHR reinforces (half of those of 15 layers), drawn once.
    g = torch.Generator().manual_seed(1)
    half = {(i, int(h)): strength for i in (1, *range(16, 30)) for h in torch.randperm(9, generator=g)[:4]}
    found["VHR, random heads"] = (True, one(HeadGate(half)))
    if own is not None:
        found |= {f"ADHH, random heads {s}": (True, one(ADHH(random_heads(own, s), threshold))) for s in (1, 2)}
        found["ADHH, zero"] = (True, one(ADHH(own, 1.1)))
    return found


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
    for path in sorted(out.glob("sweep *.json")):
        name = path.stem.removeprefix("sweep ")
        rows = json.loads(path.read_text())
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
    """Existence questions with attention between two parts of the prompt blocked in a band of layers: band -> accuracy, log p."""
    model, processor = zoo.load(name)
    data = items("calibration", count)

    def measured(method: Intervention | None) -> list[float]:
        rows = (existence if processor.chat_template else _whole)(model, processor, data, one(method))
        return [round(accuracy(rows), 4), round(log_p(rows), 4)]

    layers = model.config.text_config.num_hidden_layers
    bands = [(a, min(a + width, layers)) for a in range(0, layers, width)]
    found: dict[str, Any] = {
        "model": name,
        "questions": sum(len(i.asked) for i in data),
        "base": measured(None),
        "bands": {},
    }
    for told, pairs in PAIRS.items():
        for first, stop in [*bands, (0, layers)]:
            band = Where(layers=range(first, stop), kinds="self")
            found["bands"].setdefault(told, {})[f"{first}-{stop - 1}"] = measured(VisualKnockout(pairs, where=band))
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

    fig, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.4), squeeze=False, layout="constrained")
    for ax, own in zip(axes[0], found, strict=True):
        for told, bands in own["bands"].items():
            names = list(bands)[:-1]
            ax.plot(names, [bands[n][1] - own["base"][1] for n in names], marker="o", label=told)
        ax.axhline(0, color="grey", lw=0.8)
        ax.set(title=f"{own['model']}, {own['questions']} questions", xlabel="layers in which it is blocked")
        ax.set(ylabel="change of log p of the right answer")
    axes[0][0].legend(fontsize=8)
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


def report(out: Path) -> str:
    """The tables of the documentation."""
    rows = {p.stem.removeprefix("existence "): json.loads(p.read_text()) for p in sorted(out.glob("existence *.json"))}
    told = lambda i, f, d: f"{f * i.value:+.{d}f} [{f * i.low:.{d}f}, {f * i.high:.{d}f}]"  # noqa: E731
    lines = [
        "| arm | questions | accuracy | difference in points | log p | says yes | "
        + " | ".join(NEGATIVES) + " | changed answers |",
        "| --- " * (7 + len(NEGATIVES)) + "|",
    ]  # fmt: skip
    for name, own in rows.items():
        base = rows.get("base, no registers" if name.endswith("no registers") else "base", [])
        asked = {(r[0], r[1]) for r in own}
        base = [r for r in base if (r[0], r[1]) in asked]
        if len(base) < len(own):
            continue
        kinds = [difference(*([r for r in x if k in r[3]] for x in (base, own)), right) for k in NEGATIVES]
        if name.startswith("base"):
            cells = ["-", f"{log_p(own):.3f}", f"{100 * sum(map(said_yes, own)) / len(own):.1f} %"]
            cells += [f"{100 * accuracy([r for r in own if k in r[3]]):.1f} %" for k in NEGATIVES] + ["-"]
        else:
            before = {(r[0], r[1]): r[4] > 0 for r in base}
            cells = [
                told(difference(base, own, f), x, d) for f, x, d in ((right, 100, 1), (gain, 1, 3), (said_yes, 100, 1))
            ]
            cells += [told(k, 100, 1) for k in kinds]
            cells += [str(sum(before[r[0], r[1]] != (r[4] > 0) for r in own))]
        lines.append(f"| {name} | {len(own)} | {100 * accuracy(own):.1f} % | " + " | ".join(cells) + " |")
    lines.append(f"\n{len(rows['base'])} questions about {len({r[0] for r in rows['base']})} scenes.\n")
    texts = {p.stem.removeprefix("captions "): json.loads(p.read_text()) for p in sorted(out.glob("captions *.json"))}
    if "base" in texts:
        lines += ["| arm | CHAIR_i | CHAIR_s | recall | words | ended |", "| --- " * 6 + "|"]
    for name, own in texts.items():
        base = texts["base"]
        ratio = lambda r, a, b: sum(x[a] for x in r) / max(sum(x[b] for x in r), 1)  # noqa: E731
        cells = []
        for a, b in ((3, 2), (4, 5)):
            tops = torch.tensor([[x[a], x[b], y[a], y[b]] for x, y in zip(own, base, strict=True)])
            sums = resampled_totals(tops)
            spread = percentiles(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3])
            change = 100 * (ratio(own, a, b) - ratio(base, a, b))
            more = f", {change:+.1f} [{100 * spread[0]:.1f}, {100 * spread[1]:.1f}]" if own is not base else ""
            cells.append(f"{100 * ratio(own, a, b):.1f} %{more}")
        hallucinating = 100 * sum(x[3] > 0 for x in own) / len(own)
        words, ended = sum(x[6] for x in own) / len(own), 100 * sum(x[7] for x in own) / len(own)
        lines.append(f"| {name} | {cells[0]} | {hallucinating:.1f} % | {cells[1]} | {words:.1f} | {ended:.0f} % |")
    if texts:
        lines.append(f"\n{len(texts['base'])} captions.\n")
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
        draw(found, args.out / "knockout.png")
        print(json.dumps(found, indent=1))
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
    measure = captions if args.part == "captions" else existence
    for name in args.arms.split(";") if args.arms else every:
        registers, make = every[name]
        path = args.out / f"{'sweep' if tried else args.part} {name}.json"
        claim = path.with_suffix(".claim")
        if path.exists() or claim.exists():
            continue
        claim.touch()
        begun = time.monotonic()
        rows = measure(*models(registers), data, make)
        write(path, rows)
        claim.unlink()
        if args.part == "captions":
            told = f"CHAIR_i {sum(r[3] for r in rows) / max(sum(r[2] for r in rows), 1):.3f}"
        else:
            told = f"accuracy {accuracy(rows):.4f} of {len(rows)}, log p {log_p(rows):.4f}"
        print(f"{name}: {told}, {time.monotonic() - begun:.0f} s", flush=True)
    if args.part == "choose":
        write(args.out / "chosen.json", choose(args.out))
        print((args.out / "chosen.json").read_text())


if __name__ == "__main__":
    main()
