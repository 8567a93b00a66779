"""What the demonstration shows: methods that gain, on the embedded models and on a fetched one that is there.

A demonstration, not an evaluation: few samples of the test split, settings chosen beforehand on other samples
(`zoo.preset`). The intervals are wide and are shown for that reason; docs/effects.md has the evaluations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import zoo
from .evals.significance import Interval, paired_bootstrap
from .steering import steer

READINGS, FACTS, BOXES, PROMPTS, SHOWN = 120, 16, 6, 16, 4
REAL = "smollm2-135m"
LEADING = (REAL, "shapes-lm", "shapes-sd")
LABELS = ("as it is", "steered")
# Tokens, layers and width of the model whose cost is measured.
LENGTH, LAYERS, WIDTH = 2048, 2, 512
# One sentence on what has no row: figures of docs/effects.md.
WITHOUT_GAIN = (
    "Not everything helps these small models: on shapes-lvlm VHR changes the accuracy by -0.6 [-1.5, 0.3] points and VAR by +0.2 "
    "[0.0, 0.4], and SEG gains nothing on shapes-sd; docs/effects.md has every figure."
)


@dataclass(frozen=True)
class Row:
    """What one method did.

    Attributes:
        model: of the zoo. code: the line that attaches the method. figure: what is measured, of how many samples.
        before, after: shares of the samples. change: paired, with its 95 % interval. control: what else was tried, and its share.
        fired: attention calls that were edited. seconds: for all arms.
    """

    model: str
    code: str
    figure: str
    before: float
    after: float
    change: Interval
    control: tuple[str, float] | None
    fired: int
    seconds: float


@dataclass(frozen=True)
class Example:
    """One prompt: what stands before, in and behind the marked words, the choices, the right one, and their probabilities."""

    model: str
    code: str
    text: tuple[str, str, str]
    choices: tuple[str, ...]
    answer: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    note: str


@dataclass(frozen=True)
class Sheet:
    """Pictures of one model: a label for each row, a prompt for each column; what the frames mean."""

    model: str
    rows: list[tuple[str, list[Tensor]]]
    prompts: list[str]
    legend: str


@dataclass(frozen=True)
class Cost:
    """Of one prefill: seconds, and bytes above the model's own, for the plain model, the steered one, and written-out maps."""

    method: str
    tokens: int
    seconds: dict[str, float]
    memory: dict[str, int]


Part = Row | Example | Sheet


def showcase(names: Sequence[str] | None = None) -> Iterator[Part]:
    """Steer models, before and after; parts come as they are done.

    Args:
        names: of the zoo; None: the fetched model where it is there, and those embedded ones on which much is gained at no loss.
    """
    for name in names or [n for n in LEADING if n in (*zoo.present(), *zoo.available())]:
        yield from PARTS.get(name, lambda _: iter(()))(name)


# ------------------------------------------------------------------------------------------------ texts


def _reading(name: str) -> Iterator[Part]:
    """Marked facts of a passage, on the embedded language model."""
    samples = _samples("reading", READINGS, task="one-shot")
    yield from _texts(name, ("SpotLight", "PASTA"), samples, "right answers about a passage", 50)


def _facts(name: str) -> Iterator[Part]:
    """Facts that a passage overrules, on a real one, of which each pass costs as much as all of the small one's."""
    samples = _samples("facts", FACTS, kind="now")
    yield from _texts(name, ("SpotLight",), samples, "answers from the passage, against what the model knows", 16)


def _samples(source: str, count: int, **options: Any) -> list[dict[str, Any]]:
    from .recipe.schema import DataSpec
    from .run.data import load

    return load(DataSpec(zoo=source, split="test", options=options, limit=count), "choice").samples


def _texts(name: str, methods: Sequence[str], samples: list[dict[str, Any]], figure: str, size: int) -> Iterator[Part]:
    model, tokenizer = zoo.load(name)
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]

    def answered(method: str | None, key: str = "fact") -> tuple[list[list[float]], int]:
        found, fired = [], 0
        for part in batches:
            if method is None:
                found += _probabilities(model, tokenizer, part)
                continue
            marked = zoo.preset(name, method, spans=[s[key] for s in part], tokenizer=tokenizer)
            with steer(model, marked, control=True) as run:
                found += _probabilities(model, tokenizer, part, run)
            fired += sum(record.edits for record in run.audit.records.values())
        return found, fired

    right = lambda found: [float(p.index(max(p)) == s["answer"]) for p, s in zip(found, samples, strict=True)]  # noqa: E731
    plain, _ = answered(None)
    before = right(plain)
    for number, method in enumerate(methods):
        begun = time.monotonic()
        found, fired = answered(method)
        code = f'steer(model, zoo.preset("{name}", "{method}", spans=marked))'
        if not number:
            yield _example(name, code, samples, plain, found, right(found))
        other, _ = answered(method, "random")
        yield _row(
            name,
            code,
            f"{figure}, {len(samples)} samples",
            before,
            right(found),
            ("random words marked", right(other)),
            fired,
            begun,
        )


def _probabilities(model: Any, tokenizer: Any, samples: Sequence[dict[str, Any]], run: Any = None) -> list[list[float]]:
    """Of the choices of each sample, among themselves."""
    import torch

    from .evals.continuations import score_continuations
    from .run.tasks.prompts import continuations

    both = [continuations(tokenizer, s["prompt"], s["choices"]) for s in samples]
    scores = score_continuations(model, [p for p, _ in both], [c for _, c in both], run)
    return [torch.tensor([s.log_likelihood for s in own]).softmax(0).tolist() for own in scores]


def _example(
    name: str,
    code: str,
    samples: list[dict[str, Any]],
    plain: list[list[float]],
    found: list[list[float]],
    right: list[float],
) -> Example:
    """The first sample that the method sets right."""
    was = [float(p.index(max(p)) == s["answer"]) for p, s in zip(plain, samples, strict=True)]
    turned = [i for i, (a, b) in enumerate(zip(was, right, strict=True)) if b > a]
    at = turned[0] if turned else 0
    sample = samples[at]
    note = (
        f"the first of {len(turned)} that turn right; {sum(a > b for a, b in zip(was, right, strict=True))} turn wrong"
    )
    return Example(
        name,
        code,
        _marked(sample),
        tuple(sample["choices"]),
        sample["answer"],
        tuple(plain[at]),
        tuple(found[at]),
        note,
    )


def _marked(sample: dict[str, Any]) -> tuple[str, str, str]:
    (span,) = sample["fact"]
    if isinstance(span, str):
        before, _, behind = sample["prompt"].partition(span)
        return before, span, behind
    # Token ranges of the shapes world count from <s>; its tokens are words. The example before the passage is left out.
    words, begin = sample["prompt"].split(), sample["passage"][0][0] - 1
    start, stop = span[0] - 1, span[1] - 1
    return f"[an example] {' '.join(words[begin:start])} ", " ".join(words[start:stop]), f" {' '.join(words[stop:])}"


def _row(
    name: str, code: str, figure: str, before: list[float], after: list[float], control: Any, fired: int, begun: float
) -> Row:
    mean = lambda v: sum(v) / len(v)  # noqa: E731
    change = paired_bootstrap(before, after, draws=2000)
    other = None if control is None else (control[0], mean(control[1]))
    return Row(name, code, figure, mean(before), mean(after), change, other, fired, time.monotonic() - begun)


# ------------------------------------------------------------------------------------------------ pictures


def _compared(
    name: str,
    pipe: Any,
    method: Any,
    code: str,
    figure: str,
    draw: Callable[[], Tensor],
    score: Callable[[Tensor], list[float]],
) -> tuple[Row, list[Tensor]]:
    begun = time.monotonic()
    plain = draw()
    with steer(pipe, method) as run:
        steered = draw()
    fired = sum(record.edits or record.calls for record in run.audit.records.values())
    return _row(name, code, figure, score(plain), score(steered), None, fired, begun), [plain, steered]


def _boxes(name: str) -> Iterator[Part]:
    """Objects in the boxes that were asked for."""
    from .zoo.measure.image_quality import generate, shorter
    from .zoo.shapes.detect import detect
    from .zoo.shapes.layouts import in_boxes, layout

    pipe = zoo.load(name)
    wanted = [layout("test", i) for i in range(BOXES)]
    boxes = [{p.words: b for p, b in zip(w.phrases, w.boxes, strict=True)} for w in wanted]
    row, images = _compared(
        name,
        pipe,
        zoo.preset(name, "AttentionRefocusing", boxes=boxes),
        f'steer(pipe, zoo.preset("{name}", "AttentionRefocusing", boxes={{"red circle": (0.0, 0.1, 0.5, 0.9), ...}}))',
        f"objects in their boxes, {sum(map(len, boxes))} boxes",
        lambda: generate(pipe, [w.prompt for w in wanted], **shorter(pipe)),
        lambda made: [sum(in_boxes(w, d.objects)) / len(w.boxes) for w, d in zip(wanted, detect(made), strict=True)],
    )
    yield row
    framed = [[_framed(i, w.boxes) for i, w in zip(made, wanted[:SHOWN], strict=False)] for made in images]
    legend = "Above: the model as it is; below: steered. White frame: where the first object shall be, black frame: the second."
    yield Sheet(name, list(zip(LABELS, framed, strict=True)), [w.prompt for w in wanted[:SHOWN]], legend)
    if name == "shapes-sd":
        yield from _valid(name, pipe)


def _valid(name: str, pipe: Any) -> Iterator[Part]:
    """Clean pictures without classifier-free guidance."""
    from .zoo.measure.image_quality import generate, several
    from .zoo.shapes.detect import detect

    prompts = [several(i).prompt for i in range(PROMPTS)]
    row, images = _compared(
        name,
        pipe,
        zoo.preset(name, "SoftPAG"),
        f'steer(pipe, zoo.preset("{name}", "SoftPAG"))',
        f"clean pictures without classifier-free guidance, {PROMPTS} prompts",
        lambda: generate(pipe, prompts, steps=12, guidance_scale=1.0),
        lambda made: [float(d.valid) for d in detect(made)],
    )
    yield row
    shown = [[_framed(i, ()) for i in made[:SHOWN]] for made in images]
    legend = "Above: the model without guidance; below: guided by SoftPAG. A clean picture shows whole shapes and nothing else."
    yield Sheet(name, list(zip(LABELS, shown, strict=True)), prompts[:SHOWN], legend)


def _framed(image: Tensor, boxes: Any) -> Tensor:
    """The image three times as large, with the boxes' outlines: the first white, the second black."""
    large = image.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2).clone()
    side = large.shape[-1]
    for k, box in enumerate(boxes):
        x0, y0, x1, y1 = (min(side - 2, round(v * side)) for v in box)
        tone = 1.0 - k
        for d in (0, 1):
            large[:, y0 + d, x0 : x1 + 1] = large[:, y1 - d, x0 : x1 + 1] = tone
            large[:, y0 : y1 + 1, x0 + d] = large[:, y0 : y1 + 1, x1 - d] = tone
    return large


# ------------------------------------------------------------------------------------------------ cost


def cost(tokens: int | None = None) -> Cost:
    """Time and memory of one prefill of a small Llama shape: plain, steered in every head, and with maps written out.

    The last is the model without any edit: whoever edits written-out maps pays at least that.
    """
    import torch
    import transformers

    from .methods.pasta import PASTA
    from .run.cost import measured_cost, resident

    tokens = LENGTH if tokens is None else tokens
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(4, 256, (1, tokens))
    method = PASTA([[(tokens // 4, tokens // 2)]], alpha=0.1)

    def prefill() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    def steered() -> None:
        with steer(model, method):
            prefill()

    def written() -> None:
        model.set_attn_implementation("eager")
        try:
            prefill()
        finally:
            model.set_attn_implementation("sdpa")

    arms = {"plain": prefill, "steered": steered, "maps written out": written}
    seconds = dict.fromkeys(arms, float("inf"))
    memory = dict.fromkeys(arms, 0)
    with torch.no_grad():
        for _ in range(3):
            for name, arm in arms.items():
                begun = resident()
                with measured_cost("cpu") as reading:
                    arm()
                seconds[name] = min(seconds[name], reading.seconds)
                memory[name] = max(memory[name], reading.peak_memory - begun)
    return Cost("PASTA in every head", tokens, seconds, memory)


PARTS: dict[str, Callable[[str], Iterator[Part]]] = {
    REAL: _facts,
    "shapes-lm": _reading,
    "shapes-sd": _boxes,
    "shapes-mmdit": _boxes,
}
