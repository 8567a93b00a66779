"""The data and model card of an embedded model, from its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...evals.significance import Interval
from .. import PIPELINES
from ..shapes.language import WORDS
from .image_quality import FILLERS, STEPS, middle

TITLES = {
    "shapes-lm": ("LlamaForCausalLM", "reads passages about coloured shapes and chooses answers"),
    "shapes-lvlm": ("LlavaForConditionalGeneration", "answers questions about pictures of shapes and describes them"),
    "shapes-sd": ("StableDiffusionPipeline", "draws 64x64 pictures of shapes from a caption"),
    "shapes-mmdit": ("StableDiffusion3Pipeline", "draws 64x64 pictures of shapes from a caption"),
}
DATA = {
    "shapes-lm": "Passages of 2 to 9 facts with questions, lists of labelled examples, repeated words "
    "(`attnsteer.zoo.shapes.reading.lesson`). A text belongs to one split by its hash.",
    "shapes-lvlm": "Scenes of 1 to 5 objects whose attributes come together (`world.BIASED`), with questions, seven in ten "
    "existence questions about what is there, and captions from left to right (`questions.lesson`).",
    "shapes-sd": "Scenes of 1 to 5 objects on plain ground (`train.diffusion.scene`), captions in random order with a size "
    "now and then (`language.describe`), one in ten empty.",
}
DATA["shapes-mmdit"] = (
    DATA["shapes-sd"]
    + " In a second stage half the scenes have one object; half the captions of those are empty, and one in twenty of the "
    "others. The weights are the average of both stages' (0.4 and 0.6)."
)
# What stock `from_pretrained` has to be told.
LOADING = {
    "shapes-mmdit": " It has no T5, which diffusers wants to hear: "
    "`StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)`."
}


# What a text has to look like; words stand apart, punctuation too.
PROMPTS = {
    "shapes-lm": "A passage, a question, `answer`: `a small red star . question what colour is the star ? answer` is "
    "followed by `red`. "
    "With choices (`options A red B green answer`) a letter follows; a labelled example may come first. In lists, "
    "`input small purple star output A . input large yellow cross output` is followed by a label.",
    "shapes-lvlm": "`<image>`, then a question and `answer`, as in `<image> question is there a red circle ? answer`, followed by "
    "`yes` or `no`; or `<image> caption`, followed by phrases from left to right. One picture of 64x64 pixels.",
    "shapes-sd": "Phrases, joined by `,` and `and`: `a red circle , a small blue square and two green stars`. Up to 30 tokens.",
}
PROMPTS["shapes-mmdit"] = PROMPTS["shapes-sd"]


def words(name: str) -> str:
    """What a model can read: its vocabulary, and the form of a prompt."""
    draws = name in PIPELINES
    known = [w for w in WORDS if not draws or w.islower() or not w.isalpha()]
    rest = "others are spelled letter by letter and mean nothing to it" if draws else "others are `<unk>`"
    return f"**Words.** One token each, {rest}: `{' '.join(known)}`. {PROMPTS[name]}"


def write_card(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write `README.md` of a model folder; returns its path."""
    name = folder.name
    kind, does = TITLES[name]
    curves = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    lines = [
        f"# {name}",
        "",
        f"A `{kind}` that {does}. Trained by this project from scratch; weights in half precision, {size / 1e6:.1f} MB.",
        "",
        f"**Data.** {DATA[name]} Splits are disjoint: `train`, `calibration`, `test` (`world.rng`).",
        "",
        "**Training.** " + "; ".join(_stage(*s) for s in curves.items()) + f". `python -m attnsteer.zoo.train {name}`",
        "trains it again; times are those of one core of a shared machine. With `--threads 1` the same machine gives the same",
        "weights bit for bit. A processor that rounds differently gives others, whose figures may differ by more than the",
        "intervals below: those hold the choice of the test samples alone.",
        "",
        "**Use.** To try and test attention interventions. It knows shapes and nothing else." + LOADING.get(name, ""),
        "",
        words(name),
        "",
        "## Measured",
        "",
        f"On the test split, with 95 % intervals; `python -m attnsteer.zoo.measure {name}`.",
        "",
        *_figures(name, metrics),
    ]
    path = folder / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _stage(stage: str, curve: dict[str, Any]) -> str:
    last = ", ".join(f"{k} {v[-1]:.3g}" for k, v in curve["values"].items())
    return f"{stage}: {curve['step'][-1] + 1:,} steps in {curve['seconds'] / 60:.0f} minutes (at the end {last})"


def _figures(name: str, metrics: dict[str, Any]) -> list[str]:
    if name == "shapes-lm":
        return _lm(metrics)
    return _lvlm(metrics) if name == "shapes-lvlm" else _images(metrics)


def _percent(value: Any) -> str:
    return Interval(*value).percent()


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows)]


def _lm(metrics: dict[str, Any]) -> list[str]:
    sinks = metrics["sinks"]
    layers = sorted(sinks["first token"], key=int)
    return [
        *_table(["reading task", "accuracy"], [[t, _percent(v)] for t, v in metrics["reading"].items()]),
        "",
        "### Attention sinks",
        "",
        "Mean attention of a column over the rows that see it, on calibration passages. A later sink is a token (neither",
        "the first nor one of the last five) above five times the uniform share.",
        "",
        *_table(
            ["layer", *map(str, layers)],
            [
                ["first token", *(f"{sinks['first token'][k]:.3f}" for k in layers)],
                ["heads with later sinks", *(f"{100 * sinks['heads with later sinks'][k]:.0f} %" for k in layers)],
            ],
        ),
        "",
        "The most frequent later sinks: " + ", ".join(f"{w} ({n})" for w, n in sinks["later sinks"]) + ".",
    ]


def _lvlm(metrics: dict[str, Any]) -> list[str]:
    rows = []
    for kind, m in metrics["existence"].items():
        plain = [f"{m[k]:.3f}" for k in ("precision", "recall", "F1")]
        rows.append([kind, _percent(m["accuracy"]), *plain, _percent(m["yes"]), f"{m['unparsed']:.3f}"])
    c, a = metrics["captions"], metrics["attention"]
    layers = sorted(a["activations"], key=int)
    return [
        *_table(["existence, negatives", "accuracy", "precision", "recall", "F1", "yes", "unparsed"], rows),
        "",
        *_table(["question", "accuracy"], [[k, _percent(v)] for k, v in metrics["questions"].items()]),
        "",
        f"Captions: CHAIR_i {_percent(c['CHAIR_i'])}, CHAIR_s {_percent(c['CHAIR_s'])}, recall {c['recall']:.3f}, "
        f"{c['words']:.1f} words.",
        "",
        "### Massive activations and visual sinks",
        "",
        "The largest entry of the residual stream after each layer, over the median entry; and the heads with an image token",
        "whose attention is above five times that of an average image token.",
        "",
        *_table(
            ["layer", *map(str, layers)],
            [
                ["largest over median", *(f"{a['activations'][k]['largest over median']:.1f}" for k in layers)],
                ["dimension", *(str(a["activations"][k]["dimension"]) for k in layers)],
                ["at an image token", *("yes" if a["activations"][k]["on an image token"] else "no" for k in layers)],
                ["heads with visual sinks", *(f"{100 * a['heads with visual sinks'][k]:.0f} %" for k in layers)],
            ],
        ),
    ]


def _images(metrics: dict[str, Any]) -> list[str]:
    rows = [
        [name, *(_percent(m[k]) if k in m else "" for k in ("all there", "right", "exact", "valid"))]
        for name, m in metrics.items()
        if name != "maps"
    ]
    maps = metrics["maps"]
    sites = middle(maps)
    steps = [STEPS // 5 * k for k in range(5)]
    detail = [
        [_site(s), w, *(f"{maps['ratios'][s][w][k]:.2f}" for k in steps)]
        for s in maps["ratios"]
        for w in maps["ratios"][s]
    ]
    return [
        *_table(["prompts", "all there", "right", "exact", "wholly valid"], rows),
        "",
        "All there: the detector finds every object of the prompt in its colour and shape. Right: that, in a wholly valid",
        "picture. Exact: and no other object. Wholly valid: every coloured patch is a clean known shape, and there is one.",
        f"{STEPS} steps"
        + (
            f"; {FILLERS} places for the missing T5's tokens (max_sequence_length), where it says so 256, the default."
            if any("text length" in name for name in metrics)
            else "."
        ),
        "",
        "### Where the text-image attention means something",
        "",
        "Share of a token's attention inside its object, over the object's share of the image, on pictures of two-object",
        f"prompts of the calibration split ({maps['objects']} objects that were drawn once). Middle third of the steps, over",
        "both phrases:",
        "",
        *_table(
            ["site", "map", "colour word", "shape word", "token after"],
            [
                [_site(s), "x".join(map(str, maps["sizes"][s])), *(f"{v:.2f}" for v in r.values())]
                for s, r in sites.items()
            ],
        ),
        "",
        "![attention to each word](picture.png)",
        "",
        "Every site, token and some steps (of the first phrase and of the second):",
        "",
        *_table(["site", "token", *(f"step {k}" for k in steps)], detail),
    ]


def _site(path: str) -> str:
    return path.removeprefix("unet.").removeprefix("transformer.").replace(".transformer_blocks.0", "")
