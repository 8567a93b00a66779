"""Run folders written by hand, in the agreed format, for tests of what reads them: text, existence, captions, images."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from attnsteer.evals.metrics import get_metric
from attnsteer.evals.significance import holm
from attnsteer.heads import HeadSet
from attnsteer.manifest import MANIFEST, manifest_of
from attnsteer.run.merging import files_of
from attnsteer.zoo.shapes.language import caption
from attnsteer.zoo.shapes.layouts import layout
from attnsteer.zoo.shapes.questions import picture, pope
from attnsteer.zoo.shapes.reading import reading
from attnsteer.zoo.shapes.render import render
from attnsteer.zoo.shapes.world import COLOUR_NAMES, Ground, Object, Scene

COUNT = 40
HEADS = {"1": [0, 2], "2": [1, 3], "3": [0]}
SCORES = {(1, 0): 0.11, (1, 2): 0.34, (2, 1): 0.27, (2, 3): 0.05, (3, 0): 0.19}


def arm(name: str, kind: str, method: str | None = None, **params: Any) -> dict[str, Any]:
    """One entry of arms.json."""
    chosen = HEADS if method == "ACT" else None
    steps = [] if method is None else [{"method": method, "params": params, "heads": chosen, "where": {}}]
    return {"id": name, "kind": kind, "interventions": steps, "decoding": {}}


def recipe(name: str, zoo: str, kind: str, data: str, task: str, metrics: list[Any], primary: str) -> dict[str, Any]:
    """A resolved recipe."""
    return {
        "schema": 1,
        "name": name,
        "summary": f"{name.split('/')[0].upper()} on the embedded model {zoo}",
        "model": {"zoo": zoo, "kind": kind, "dtype": "float32", "device": "cpu"},
        "data": {"zoo": data, "split": "test", "start": 0, "limit": COUNT, "options": {}},
        "task": task,
        "interventions": [{"method": "ACT", "params": {"beta": 0.4}, "zero": {"beta": 1.0}, "heads": "zoo:act"}],
        "controls": {"zero": True, "random_heads": 1},
        "metrics": metrics,
        "primary": primary,
        "chosen": "calibration",
        "seeds": [0],
        "batch_size": 20,
        "sweep": {},
        "claims": [],
        "notes": "",
    }


def text_run(
    path: Path, *, seed: int = 0, gain: float = 0.5, loss: float = 0.05, sweep: bool = False, **more: Any
) -> Path:
    """One-shot reading. gain: share of wrong answers that the method mends; loss: of right ones that it spoils."""
    draw = random.Random(7)
    plan = recipe("act/reading", "shapes-lm", "lm", "reading", "choice", ["choice"], "choice.accuracy")
    plan["claims"] = [
        {
            "metric": "choice.accuracy",
            "baseline": 57.1,
            "value": 60.2,
            "unit": "percent",
            "source": "Table 2, arXiv 2406.15765",
            "setting": "Llama-2-7B-chat, 14 datasets",
        }
    ]
    samples, base = [], {}
    for i in range(COUNT):
        item = reading("test", i, "one-shot")
        samples.append({"id": f"r{i}", "group": f"r{i}", "prompt": item.prompt, "choices": list(item.choices)})
        samples[-1]["answer"] = item.answer
        base[f"r{i}"] = _scores(draw, len(item.choices), item.answer, right=draw.random() < 0.55)
    betas = [0.2, 0.4, 0.6, 0.8] if sweep else [0.4]
    names = ["method"] if not sweep else [f"method@{k}" for k in range(len(betas))]
    arms = [arm("baseline", "baseline"), arm("zero", "zero", "ACT", beta=1.0)]
    arms += [arm(n, "method", "ACT", beta=b) for n, b in zip(names, betas, strict=True)]
    arms.append(arm("random-1", "random", "ACT", beta=0.4))
    points = []
    for k, (name, beta) in enumerate(zip(names, betas, strict=True)):
        values = {"interventions.0.params.beta": beta} if sweep else {}
        roles = {"baseline": "baseline", "zero": "zero", "method": name, "random-1": "random-1"}
        points.append({"point": k, "values": values, "arms": roles})
    if sweep:
        plan["sweep"] = {"interventions.0.params.beta": betas}
    records = []
    for a in arms:
        turn = random.Random(f"{seed} {a['id']}")
        strong = {"baseline": 0.0, "zero": 0.0, "random-1": 0.15}.get(a["id"], 1.0)
        if sweep and a["kind"] == "method":
            strong = [0.5, 1.0, 0.6, 0.1][names.index(a["id"])]
        for s in samples:
            scores = list(base[s["id"]])
            was = scores.index(max(scores)) == s["answer"]
            if turn.random() < strong * (loss if was else gain):
                scores = _scores(turn, len(scores), s["answer"], right=not was)
            elif strong:
                scores = [round(v + turn.gauss(0, 0.02 * strong), 4) for v in scores]
            records.append({"arm": a["id"], "seed": 0, "id": s["id"], "scores": scores})
            records[-1] |= {k: s[k] for k in ("choices", "answer")}
    write(path, plan, arms, samples, records, points=points, **more)
    # As a search leaves them.
    HeadSet({int(k): v for k, v in HEADS.items()}, scores=SCORES, shape=(4, 4)).save(
        path / "calibration/0123.safetensors"
    )
    return path


def _scores(draw: random.Random, count: int, answer: int, right: bool) -> list[float]:
    scores = [round(draw.uniform(-4.0, -1.5), 4) for _ in range(count)]
    best = answer if right else (answer + 1 + draw.randrange(count - 1)) % count
    scores[best] = round(draw.uniform(-1.2, -0.3), 4)
    return scores


def existence_run(path: Path, **more: Any) -> Path:
    """Existence questions about scenes that the data names by index; several questions of one scene are one group."""
    draw = random.Random(3)
    metrics = ["pope", {"name": "fluency"}]
    plan = recipe("vhr/existence", "shapes-lvlm", "vlm", "existence", "answer", metrics, "pope.accuracy")
    plan["interventions"] = [{"method": "VHR", "params": {"alpha": 2.0}, "zero": {"alpha": 1.0}}]
    samples: list[dict[str, Any]] = []
    for i in range(COUNT):
        _, asked = pope("test", i, "adversarial", pairs=1)
        samples += [
            {"id": f"p{i}-{k}", "group": f"p{i}", "image": i, "prompt": q.prompt, "label": q.answer}
            for k, q in enumerate(asked)
        ]
    samples = samples[:COUNT]
    arms = [
        arm("baseline", "baseline"),
        arm("zero", "zero", "VHR", alpha=1.0),
        arm("method", "method", "VHR", alpha=2.0),
    ]
    said = {s["id"]: draw.choices(["yes", "no", "maybe"], [6, 4, 0.5])[0] for s in samples}
    records = []
    for a in arms:
        for s in samples:
            word = said[s["id"]]
            if a["kind"] == "method" and word != s["label"] and draw.random() < 0.3:
                word = s["label"]
            records.append({"arm": a["id"], "seed": 0, "id": s["id"], "label": s["label"], "generated": word})
    return write(path, plan, arms, samples, records, **more)


def caption_run(path: Path, **more: Any) -> Path:
    """Captions, where a lower figure is better."""
    draw = random.Random(5)
    metrics = ["chair", "fluency"]
    plan = recipe("var/captions", "shapes-lvlm", "vlm", "captions", "caption", metrics, "chair.chair_i")
    plan["interventions"] = [{"method": "VAR", "params": {"rho": 0.5}, "zero": {"move_fraction": 0.0}}]
    samples, records = [], []
    arms = [arm("baseline", "baseline"), arm("zero", "zero", "VAR"), arm("method", "method", "VAR", rho=0.5)]
    for i in range(COUNT):
        objects = picture("test", i).objects
        samples.append({"id": f"c{i}", "group": f"c{i}", "image": i, "prompt": "caption"})
        samples[-1]["objects"] = [[o.colour, o.shape] for o in objects]
        right, wrong = caption(objects), caption(objects[:-1] or objects) + " and a red star"
        before = wrong if draw.random() < 0.5 else right
        after = right if draw.random() < 0.6 else before
        for name, text in (("baseline", before), ("zero", before), ("method", after)):
            found = {"arm": name, "seed": 0, "id": f"c{i}", "generated": text, "objects": samples[-1]["objects"]}
            records.append(found)
    return write(path, plan, arms, samples, records, **more)


def image_run(path: Path, *, side: int = 64, **more: Any) -> Path:
    """Layouts: pictures as PNG files, the method's with its objects in the boxes."""
    draw = random.Random(11)
    plan = recipe("refocus/layouts", "shapes-sd", "image", "layouts", "image", ["layout", "binding"], "layout.right")
    plan["interventions"] = [
        {"method": "AttentionRefocusing", "params": {"boxes": {"sample": "boxes"}}, "zero": {"step_size": 0}}
    ]
    samples, records = [], []
    told = {"boxes": {"sample": "boxes"}}
    arms = [arm("baseline", "baseline"), arm("method", "method", "AttentionRefocusing", **told)]
    scenes: list[tuple[str, Scene]] = []
    for i in range(COUNT):
        asked = layout("test", i, "objects", 2)
        phrases = [asdict(p) for p in asked.phrases]
        keys = {"prompt": asked.prompt, "phrases": phrases, "boxes": [list(b) for b in asked.boxes]}
        samples.append({"id": f"l{i}", "group": f"l{i}", **keys, "category": "objects", "side": None})
        ground = Ground(0.5)
        for a in arms:
            inside = draw.random() < (0.85 if a["id"] == "method" else 0.45)
            objects = []
            for phrase, box in zip(asked.phrases, asked.boxes, strict=True):
                x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                colour = phrase.colour if inside else draw.choice(COLOUR_NAMES)
                objects.append(Object(phrase.shape, colour, "large", x if inside else 1 - x, y, 0.14))
            relative = f"images/{a['id']}/0/l{i}.png"
            scenes.append((relative, Scene(tuple(objects), ground)))
            records.append({"arm": a["id"], "seed": 0, "id": f"l{i}", **keys, "category": "objects", "side": None})
            records[-1] |= {"detected": [asdict(o) for o in objects], "valid": True, "image": relative}
    pixels = (render([s for _, s in scenes], side) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for (relative, _), picture_of in zip(scenes, pixels, strict=True):
        (path / relative).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture_of).save(path / relative)
    return write(path, plan, arms, samples, records, **more)


def write(
    path: Path,
    plan: dict[str, Any],
    arms: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    records: list[dict[str, Any]],
    *,
    points: list[dict[str, Any]] | None = None,
    state: str = "complete",
    tiny: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a whole folder; metrics.json is computed from the records. changes: fields of the recipe to replace."""
    plan = {**plan, **(changes or {})}
    (path / "calibration").mkdir(parents=True, exist_ok=True)
    points = points or [{"point": 0, "values": {}, "arms": {a["id"]: a["id"] for a in arms}}]
    (path / "recipe.yaml").write_text(yaml.safe_dump(plan, sort_keys=False, allow_unicode=True), encoding="utf-8")
    done = len(records)
    status = {"state": state, "message": "", "started": "2026-11-24T10:00:00Z", "ended": "2026-11-24T10:02:10Z"}
    files: dict[str, Any] = {
        "identity.json": {
            "recipe": "0" * 64,
            "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
            "model": {"model.safetensors": plan["model"]["zoo"]},
            "tiny": tiny,
        },
        "environment.json": {
            "versions": {"attnsteer": "0.1.0", "torch": "2.13.0", "python": "3.12.4"},
            "platform": "Linux",
            "cpu": "a processor, 2 cores",
            "git": {"commit": "54a324b", "dirty": False},
        },
        "status.json": {**status, "done": done, "total": done if state == "complete" else 2 * done},
        "arms.json": {"arms": arms, "points": points},
        "audit.json": {"arms": {a["id"]: [] for a in arms}},
        "metrics.json": score(plan, arms, samples, records, points, partial=state != "complete"),
    }
    for name, value in files.items():
        (path / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
    lines(path / "samples.jsonl", samples)
    lines(path / "records.jsonl" if state == "complete" else path / "records-0.jsonl", records)
    if state == "complete":
        (path / MANIFEST).write_text(json.dumps(manifest_of(path, files_of(path), "run")))
    return path


def add_attention(path: Path, kind: str, count: int = 2) -> Path:
    """Write attention.json with made-up weights. kind: "lm", "vlm" or "image"."""
    draw = random.Random(1)
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()][:count]
    entries = []
    for s in samples:
        arms: dict[str, Any] = {}
        for a in ("baseline", "method"):
            if kind == "lm":
                words = s["prompt"].split()[-30:]
                arms[a] = {"labels": words, "weights": [round(draw.random() ** 3 / len(words), 4) for _ in words]}
                continue
            labels = ["red", "circle", "star"]
            maps = [[[draw.random() ** 4 / 64 for _ in range(8)] for _ in range(8)] for _ in labels]
            arms[a] = {"labels": labels, "maps": maps}
            if kind == "image":
                arms[a]["image"] = f"images/{a}/0/{s['id']}.png"
        entries.append({"id": s["id"], "seed": 0, "arms": arms})
    found = {"schema": 1, "note": "Mean over the steered heads.", "samples": entries}
    (path / "attention.json").write_text(json.dumps(found))
    return path


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSONL."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def score(
    plan: Mapping[str, Any],
    arms: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    partial: bool,
) -> dict[str, Any]:
    """metrics.json."""
    entries = [{"name": m} if isinstance(m, str) else dict(m) for m in plan["metrics"]]
    metrics = {name: get_metric(name, **o) for o in entries for name in [o.pop("name")]}
    group = {s["id"]: s["group"] for s in samples}
    rows = {a["id"]: [r for r in records if r["arm"] == a["id"]] for a in arms}
    labels = [group[r["id"]] for r in rows["baseline"]]
    labels = None if len(set(labels)) == len(labels) else labels
    read = {(a, n): [m.sample(r) for r in rows[a]] for a in rows for n, m in metrics.items()}
    found: dict[str, Any] = {}
    for a in rows:
        found[a] = {n: _plain(m.aggregate(read[a, n], groups=labels, draws=500)) for n, m in metrics.items()}
    differences = []
    for point in points:
        roles = point["arms"]
        others = [r for r in roles if r.startswith(("zero", "random"))]
        pairs = [("method", "baseline"), *((r, "baseline") for r in others)]
        pairs += [("method", r) for r in others if r.startswith("random")]
        for one, against in pairs:
            for n, m in metrics.items():
                before, after = read[roles[against], n], read[roles[one], n]
                test = m.mcnemar(before, after, groups=labels)
                estimates = _plain(m.compare(before, after, groups=labels, draws=500))
                differences.append({"point": point["point"], "arm": one, "against": against, "metric": n})
                differences[-1] |= {"estimates": estimates, "mcnemar": test and test._asdict(), "guards": []}
    primary, _, estimate = plan["primary"].partition(".")
    roles = {p["point"]: p["arms"] for p in points}
    tests = [d for d in differences if (d["arm"], d["against"], d["metric"]) == ("method", "baseline", primary)]
    for d in tests:
        before, after = (read[roles[d["point"]][r], primary] for r in ("baseline", "method"))
        d["p"] = metrics[primary].p_value(estimate, before, after, groups=labels, draws=500)
    for d, p in zip(tests, holm([d["p"] for d in tests]), strict=True):
        d["p_holm"] = p
    costs = {a: (0.021 if a == "baseline" else 0.0243) for a in rows}
    unit = "images" if plan["task"] == "image" else "tokens"
    claims = []
    for c in plan["claims"]:
        name, _, estimate = c["metric"].partition(".")
        first = next(d for d in differences if d["metric"] == name)
        ours = {
            "baseline": found["baseline"][name][estimate],
            "value": found[points[0]["arms"]["method"]][name][estimate],
        }
        claims.append({**c, "ours": {**ours, "difference": first["estimates"][estimate]}})
    return {
        "schema": 1,
        "partial": partial,
        "primary": plan["primary"],
        "arms": found,
        "differences": [{"p": None, "p_holm": None, **d} for d in differences],
        "points": list(points),
        "zero_equals_baseline": True if any(a["kind"] == "zero" for a in arms) else None,
        "cost": {
            a: {
                "seconds_per_sample": s,
                "per_second": 1 / s,
                "unit": unit,
                "peak_memory_mb": 412.0,
                "relative": s / costs["baseline"],
            }
            for a, s in costs.items()
        },
        "claims": claims,
        "warnings": [],
    }


def _plain(estimates: Mapping[str, Any]) -> dict[str, Any]:
    bare = {"low": None, "high": None}
    return {k: v._asdict() if hasattr(v, "_asdict") else {"value": v, **bare} for k, v in estimates.items()}
