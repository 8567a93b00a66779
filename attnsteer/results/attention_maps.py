"""Attention of a few samples in some arms, before and after, as attention.json for the report.

For a language model: the last row of the prompt over its tokens, with which the answer is chosen. For a vision-language
model: over the image, for each word of the first arm's answer (other arms are made to say the same, so that words can be
compared). For a diffusion pipeline: of the image over the prompt's nouns. Each is the mean over the steered heads, or over
all heads where a method has no heads of its own, read by `attnsteer.viz.record` after the method's edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError
from ..heads import HeadSet
from ..intervention import Intervention
from ..run import store
from ..steering import steer
from ..viz.record import WordRecorder, phrase_maps, word_maps
from ..where import Where

FILE, SCHEMA_VERSION = "attention.json", 1
# Words of an answer that get a map each, cells of a map's side, and tokens of a prompt's end.
WORDS, CELLS, TOKENS = 8, 32, 256

Sample = Mapping[str, Any]


def collect(
    loaded: Any,
    arms: Sequence[Any],
    samples: Sequence[Sample],
    *,
    inputs: Callable[[Sequence[Sample]], Any] | None = None,
    generator: Callable[[Sample], Any] | None = None,
    picture: Callable[[str, Sample], str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What attention.json holds (`attnsteer.results.reports.overlays` says how): all arms over all samples.

    Args:
        loaded: `kind` (lm, vlm or image), `target`, and `tokenizer`. arms: each with `id`, `make(samples, loaded)` and
            `decoding`, the baseline first; their number times that of samples is the number of model calls.
        inputs: the model's inputs for samples; needed for a vlm. generator: of a sample's picture, so that it is the run's.
        picture: (arm id, sample) -> the path of its picture in the run folder. seed: of the run, for the record.

    Raises:
        AttnSteerError: an arm cannot act on a sample, or a model whose tokens or image are not known.
    """
    heads = _heads(arm.make([s], loaded) for arm in arms for s in samples[:1])
    entries = []
    for sample in samples:
        shown: dict[str, Any] = {}
        said: list[int] | None = None
        for arm in arms:
            part, ids = record(loaded, arm, sample, heads=heads, inputs=inputs, generator=generator, continuation=said)
            said = ids if said is None else said
            if loaded.kind == "image" and picture is not None:
                part["image"] = picture(arm.id, sample)
            shown[arm.id] = part
        entries.append({"id": sample["id"], "seed": seed, "arms": shown})
    over = "all heads" if heads is None else f"the {len(heads)} steered heads"
    what = {
        "lm": "The last token's attention over the prompt",
        "vlm": "Attention over the image with which each word was chosen; below a word, the share that went to the image",
        "image": "Attention of the picture to words of the prompt, mean over layers and steps",
    }[loaded.kind]
    return {
        "schema": SCHEMA_VERSION,
        "note": f"{what}; mean over {over}, after the method's edits.",
        "samples": entries,
    }


def save(folder: str | Path, found: Mapping[str, Any]) -> Path:
    """Write attention.json into a run folder, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    path = Path(folder) / FILE
    store.write_atomic(path, store.to_json(found).encode())
    return path


def record(
    loaded: Any,
    arm: Any,
    sample: Sample,
    *,
    heads: HeadSet | None = None,
    inputs: Callable[[Sequence[Sample]], Any] | None = None,
    generator: Callable[[Sample], Any] | None = None,
    continuation: Sequence[int] | None = None,
) -> tuple[dict[str, Any], list[int] | None]:
    """One arm on one sample: its part of attention.json, and the token ids that a vlm said.

    Args:
        heads: to average over; all by default. continuation: what a vlm is made to say. Others: see `collect`.

    Raises:
        AttnSteerError: see `collect`.
    """
    methods = arm.make([sample], loaded)
    if loaded.kind == "lm":
        return _words(loaded, methods, sample, heads, inputs), None
    if loaded.kind == "vlm":
        return _image(loaded, arm, methods, sample, heads, inputs, continuation)
    return _phrases(loaded, arm, methods, sample, heads, generator), None


@torch.no_grad()
def _words(
    loaded: Any, methods: list[Intervention], sample: Sample, heads: HeadSet | None, inputs: Any
) -> dict[str, Any]:
    if inputs is None:
        batch = loaded.tokenizer(sample["prompt"], return_tensors="pt", return_token_type_ids=False)
        batch = batch.to(loaded.target.device)
    else:
        batch = inputs([sample])
    recorder = WordRecorder(heads)
    with steer(loaded.target, *methods, recorder):
        loaded.target(**batch)
    # Several groups of heads of one call report one after the other; every head counts once.
    rows = torch.cat([row[0] for calls in recorder.seen.values() for row in calls])
    weights = rows.mean(dim=0)
    ids = batch["input_ids"][0].tolist()
    labels = [loaded.tokenizer.decode([i]).strip() or "␣" for i in ids]
    return {"labels": labels[-TOKENS:], "weights": _rounded(weights[-TOKENS:])}


def _image(
    loaded: Any,
    arm: Any,
    methods: list[Intervention],
    sample: Sample,
    heads: HeadSet | None,
    inputs: Any,
    continuation: Sequence[int] | None,
) -> tuple[dict[str, Any], list[int]]:
    if inputs is None:
        raise RunError("attention of a vision-language model needs inputs=, a function from samples to its inputs.")
    options = {"max_new_tokens": 3 * WORDS, **arm.decoding}
    options["max_new_tokens"] = min(options["max_new_tokens"], 3 * WORDS)
    found = word_maps(
        loaded.target,
        inputs([sample]),
        *methods,
        heads=heads,
        tokenizer=loaded.tokenizer,
        continuation=continuation,
        **options,
    )
    return {"labels": found.words[:WORDS], "maps": _rounded(_smaller(found.maps[:WORDS]))}, found.ids


def _phrases(
    loaded: Any, arm: Any, methods: list[Intervention], sample: Sample, heads: HeadSet | None, generator: Any
) -> dict[str, Any]:
    words = list(dict.fromkeys(sample.get("words") or [p["shape"] for p in sample.get("phrases", ())]))[:WORDS]
    if not words:
        raise RunError(
            f"sample {sample['id']} names no words of its prompt (words, phrases), so there are no maps to show."
        )
    options = dict(arm.decoding)
    if generator is not None:
        options["generator"] = generator(sample)
    where = Where() if heads is None else Where(heads=heads)
    found = phrase_maps(
        loaded.target,
        sample["prompt"],
        words,
        *methods,
        where=where,
        tokenizer=loaded.tokenizer,
        output_type="pt",
        **options,
    )
    return {"labels": words, "maps": _rounded(_smaller(found.mean()[0]))}


def _heads(made: Iterable[list[Intervention]]) -> HeadSet | None:
    """The heads that the interventions of any arm name, all together; None where none does."""
    found: HeadSet | None = None
    for method in (m for methods in made for m in methods):
        for chosen in (getattr(method, "heads", None), method.where.heads):
            if isinstance(chosen, HeadSet) and not chosen.towers:
                found = chosen if found is None else found | chosen
    return found


def _smaller(maps: Tensor) -> Tensor:
    """[W, h, w] with at most `CELLS` cells on a side; sums stay as they were."""
    h, w = maps.shape[-2:]
    if max(h, w) <= CELLS:
        return maps
    size = tuple(max(1, round(n * CELLS / max(h, w))) for n in (h, w))
    small = torch.nn.functional.adaptive_avg_pool2d(maps[:, None], size)[:, 0]
    return small * (h * w / (size[0] * size[1]))


def _rounded(values: Tensor) -> Any:
    """Nested lists of four digits: more than a colour shows."""

    def short(item: Any) -> Any:
        return [short(i) for i in item] if isinstance(item, list) else float(f"{item:.4g}")

    return short(values.double().tolist())
