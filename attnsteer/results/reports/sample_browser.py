"""What the sample browser shows: each sample once, with what every arm made of it and what the method changed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...run.folder import Key, RunFolder
from ..figures import per_sample, values_text
from .album import Album
from .headline import Headline

# Samples in a page, and method arms to choose from; the rest is in the run folder.
MOST, ARMS = 2000, 6
STATES = ("gained", "lost", "changed", "same")
# Parameters, and keys of samples, that say where things shall be.
BOXES = ("boxes", "regions", "layout")


def browser(run: RunFolder, head: Headline, album: Album) -> dict[str, Any]:
    """JSON for the page's script.

    Keys: `figure`, `better`, `arms` (of methods: {id, label, base}), `images` (data URIs), `samples`, `total`, `notes`.
    A sample has `id`, `seed`, `prompt`, `truth`, `choices`, `image`, `boxes`, and per arm `outs`: `p` (share of each
    choice) and `pick`, or `text`, or `image`; `v`: the primary figure; `state` against the baseline, one of `STATES`.
    """
    arms = _arms(run, head)
    bases = {a: run.base(a) for a, _ in arms}
    every_arm = list(dict.fromkeys([*bases.values(), *bases]))
    metric = run.measures[head.metric]
    values = {a: per_sample(metric, head.estimate, run.records.get(a, {})) for a in every_arm}
    every = [k for k in _ordered(run) if any(k in run.records.get(a, {}) for a in every_arm)]
    state = {(a, k): _state(run, head, values, a, k) for a in bases for k in every}
    # What changed is what a reader looks for: it stays, and gets its pictures first.
    shown = sorted(every, key=lambda k: STATES.index(state[head.arm, k]))[:MOST]
    keep = set(shown)
    images: dict[tuple[Key, str], int | None] = {}
    for arm in every_arm:
        for key in shown:
            images[key, arm] = album.add(run.records.get(arm, {}).get(key, {}).get("image"), own=True)
    scenes = {key: album.add(run.samples[key[1]].get("image")) for key in shown}
    samples = [
        {
            "id": key[1],
            "seed": key[0],
            **_prompt_of(run.samples[key[1]]),
            "image": scenes[key],
            "outs": {
                arm: {
                    **_made(run.records[arm][key]),
                    "image": images[key, arm],
                    "v": _number(values[arm].get(key)),
                    "state": state.get((arm, key), "same"),
                }
                for arm in every_arm
                if key in run.records.get(arm, {})
            },
        }
        for key in every
        if key in keep
    ]
    return {
        "figure": f"{head.metric}.{head.estimate}",
        "name": head.estimate.replace("_", " "),
        # Figures of a sample that are yes or no are shown as that.
        "binary": all(v in (None, 0, 1) for rows in values.values() for v in rows.values()),
        "better": head.better,
        "seeds": len(run.seeds),
        "arm": head.arm,
        "arms": [{"id": a, "label": label, "base": bases[a], "boxes": _knows_boxes(run, a)} for a, label in arms],
        "images": album.uris,
        "samples": samples,
        "total": len(every),
        "notes": _notes(run, len(every), album, arms),
    }


def states(run: RunFolder, head: Headline) -> dict[Key, str]:
    """What the headline's method did to each record of the baseline, one of `STATES`."""
    metric = run.measures[head.metric]
    values = {a: per_sample(metric, head.estimate, run.records.get(a, {})) for a in (head.base, head.arm)}
    keys = [k for k in _ordered(run) if all(k in run.records.get(a, {}) for a in values)]
    return {k: _state(run, head, values, head.arm, k) for k in keys}


def _arms(run: RunFolder, head: Headline) -> list[tuple[str, str]]:
    """The methods, that of the headline first."""
    found: dict[str, str] = {}
    for point in sorted(run.points, key=lambda p: p["arms"].get("method") != head.arm):
        arm = point["arms"].get("method")
        if arm is not None and len(found) < ARMS:
            found.setdefault(arm, f"{arm} ({values_text(point['values'])})" if point["values"] else arm)
    return list(found.items())


def _knows_boxes(run: RunFolder, arm: str) -> bool:
    """Whether the arm's methods are told where things shall be."""
    given = [p for entry in run.arms[arm].get("interventions", ()) for p in entry.get("params", {}).items()]
    return any(name in BOXES or (isinstance(v, Mapping) and v.get("sample") in BOXES) for name, v in given)


def _ordered(run: RunFolder) -> list[Key]:
    return [(seed, i) for seed in run.seeds for i in run.samples]


def _state(run: RunFolder, head: Headline, values: Mapping[str, Any], arm: str, key: Key) -> str:
    base = run.base(arm)
    before, after = values[base].get(key), values[arm].get(key)
    one, two = (run.records.get(a, {}).get(key) for a in (base, arm))
    if before is not None and after is not None and abs(after - before) > 1e-12 and head.better:
        won = head.better * (after - before) > 0
        # A clean picture of something else is no gain, nor was it one before.
        needed = run.measures[head.metric].only_with.get(head.estimate)
        counted = two if won else one
        if needed is None or (counted is not None and run.measures[head.metric].sample(counted).get(needed)):
            return "gained" if won else "lost"
        return "changed"
    return "same" if one is None or two is None or _answer_of(one) == _answer_of(two) else "changed"


def _answer_of(record: Mapping[str, Any]) -> Any:
    """What must be equal for two records to count as the same."""
    if "scores" in record:
        return _pick(record["scores"])
    return record.get("generated", record.get("detected"))


def _pick(scores: Sequence[float]) -> int:
    return scores.index(max(scores))


def _prompt_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The question, and the right answer in words."""
    found: dict[str, Any] = {"prompt": str(sample.get("prompt") or sample.get("question") or "")}
    answer = sample.get("answer")
    if isinstance(sample.get("choices"), list) and isinstance(answer, int):
        found |= {"choices": [str(c) for c in sample["choices"]], "answer": answer}
        found["truth"] = str(sample["choices"][answer])
    elif "label" in sample or answer is not None:
        found["truth"] = _words(sample.get("label", answer))
    elif sample.get("answers"):
        found["truth"] = ", ".join(dict.fromkeys(map(_words, sample["answers"])))
    elif sample.get("objects"):
        found["truth"] = _words(sample["objects"])
    pairs: Sequence[tuple[str, Any]] = ()
    if sample.get("regions"):
        # A phrase has one box or several.
        regions = sample["regions"].items()
        pairs = [(name, box) for name, own in regions for box in (own if isinstance(own[0], list) else [own])]
    elif sample.get("boxes"):
        names = [_words(p) for p in sample.get("phrases", ())]
        pairs = sample["boxes"].items() if isinstance(sample["boxes"], Mapping) else _named(names, sample["boxes"])
    if pairs:
        found["boxes"] = [[str(name), *map(float, box)] for name, box in pairs]
    return found


def _named(names: Sequence[str], boxes: Sequence[Any]) -> list[tuple[str, Any]]:
    return [(names[i] if i < len(names) else "", box) for i, box in enumerate(boxes)]


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        known = [str(value[k]) for k in ("size", "colour", "shape", "label") if value.get(k)]
        return " ".join(known) or json.dumps(value)
    if isinstance(value, list):
        inner = [_words(v) for v in value]
        return " ".join(inner) if inner and not any(isinstance(v, list | dict) for v in value) else ", ".join(inner)
    return str(value)


def _made(record: Mapping[str, Any]) -> dict[str, Any]:
    """What one arm gave."""
    if "scores" in record:
        scores = [float(s) for s in record["scores"]]
        best = max(scores)
        raised = [math.exp(s - best) for s in scores]
        return {"p": [round(r / sum(raised), 4) for r in raised], "pick": _pick(scores)}
    if "generated" in record:
        return {"text": str(record["generated"])}
    if isinstance(record.get("detected"), list):
        return {"found": ", ".join(_words(d) for d in record["detected"]) or "nothing"}
    return {}


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _notes(run: RunFolder, total: int, album: Album, arms: Sequence[Any]) -> list[str]:
    found = []
    if total > MOST:
        found.append(f"{MOST} of {total} samples are shown, those that changed first; all are in records.jsonl.")
    swept = {p["arms"].get("method") for p in run.points} - {None}
    if len(swept) > len(arms):
        found.append(f"{len(arms)} of {len(swept)} settings can be chosen here.")
    if album.left_out:
        found.append(
            f"Pictures left out of this page, which would be too large: {album.left_out}; they are in the run folder."
        )
    if album.missing:
        found.append(f"Pictures of the data that cannot be read where the report is made: {album.missing}.")
    if album.shrunk:
        found.append(f"Pictures made smaller for this page: {album.shrunk}.")
    return found
