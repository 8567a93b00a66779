"""Two evaluations of lm-evaluation-harness or lmms-eval, without and with a method, as a run folder: report, board and hub take it.

The harness logs its samples (`--log_samples`), which are paired by the hash that it gives each document. Choices with their
log-likelihoods become records of the task `choice`; of other tasks the number that the harness gave each sample is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecordError, RunError, listing
from ..intervention import Intervention
from ..manifest import MANIFEST, manifest_of
from ..recipe.schema import ZOO_KINDS, digest
from ..recipe.validate import validate
from ..registry import registered_name
from ..run import store
from ..run.merging import files_of
from ..run.runs import now
from ..run.score import Scores
from ..versions import library_versions

Lines = str | Path | Sequence[Mapping[str, Any]]
FORMATS = {"choice": "choices", "answer": "questions"}
HARNESSES = {"lm": "lm-eval", "vlm": "lmms-eval"}


def write_lm_eval_run(
    out: str | Path,
    *,
    task: str,
    baseline: Lines,
    method: Lines,
    model: str,
    interventions: Sequence[Intervention],
    chosen: str | None = None,
    metric: str | None = None,
    better: int = 1,
    kind: str = "lm",
) -> Path:
    """Write the run folder of a task of the harness.

    There is no control at zero strength and no random one, since the harness ran none; the page says so. `attnsteer verify`
    checks files, records and figures; it cannot ask the harness's questions again.

    Args:
        out: a new folder. task: its name. baseline, method: the samples that the harness logged (`samples_*.jsonl`, or the list
            in its results), without and with the method. model: hub id, or the name of an embedded model.
        interventions: what was steered with. chosen: where its settings were chosen; see a recipe's `chosen`.
        metric: the harness's figure of each sample, such as "exact_match"; None: a question with choices, scored by likelihood.
        better: 1 where more of the metric is better, -1 where less is, 0 where neither. kind: "lm" or "vlm".

    Raises:
        RecordError: samples without choices or without the metric, other documents in the two, or prompts that differ.
        RunError: the folder is there already.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is there already; give a folder that is new or empty.")
    before, after = _read(baseline), _read(method)
    if set(before) != set(after):
        only = sorted({*before} ^ {*after})[:2]
        raise RecordError(
            f"{task}: the two evaluations are over other documents ({len(before)} and {len(after)}; {only} in one alone); evaluate "
            "both with the same --limit and task."
        )
    samples, records = [], []
    for key, one in before.items():
        sample = _sample(task, one, metric)
        samples.append(sample)
        if {**_sample(task, after[key], metric), "id": ""} != {**sample, "id": ""}:
            raise RecordError(f"{task}: document {one['doc_id']} was asked in other words in the two evaluations.")
        for arm, line in (("baseline", one), ("method", after[key])):
            given = _scores(sample, line) if metric is None else _given(task, line, metric)
            records.append({"arm": arm, "seed": 0, "id": sample["id"], **given})
    figures = {"task": "choice", "metrics": ["choice"], "primary": "choice.accuracy"}
    if metric is not None:
        measure = {"name": "given", "figure": metric, "better": better}
        figures = {"task": "answer", "metrics": [measure], "primary": "given.mean"}
    return _write(folder, task, {"name": model, "kind": kind}, interventions, chosen, samples, records, figures)


def _scores(sample: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    scores = [float(r[0]) for r in line["filtered_resps"]]
    return {"choices": sample["choices"], "scores": scores, "answer": sample["answer"]}


def _given(task: str, line: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """A record with the harness's own figure; some tasks of lmms-eval give it inside a mapping."""
    value = line.get(metric)
    value = value.get("score") if isinstance(value, Mapping) else value
    if not isinstance(value, bool | int | float):
        numbers = [k for k, v in line.items() if isinstance(v, bool | int | float) and k not in ("doc_id", "target")]
        raise RecordError(
            f"{task}: document {line.get('doc_id')} has no number {metric!r}; its numbers are {listing(numbers) or 'none'}."
        )
    answer = line.get("filtered_resps", line.get("resps"))
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return {
        "generated": answer if isinstance(answer, str) else store.to_json(answer),
        "finished": True,
        "value": float(value),
    }


def _read(lines: Lines) -> dict[str, Mapping[str, Any]]:
    """Samples by the hash of their document."""
    found = list(store.read_lines(Path(lines))) if isinstance(lines, str | Path) else list(lines)
    if not found:
        raise RecordError(
            f"{lines if isinstance(lines, str | Path) else 'the list'} has no samples; evaluate with --log_samples."
        )
    return {f"{line['doc_hash']}-{line['doc_id']}": line for line in found}


def _sample(task: str, line: Mapping[str, Any], metric: str | None) -> dict[str, Any]:
    if metric is not None:
        return {"id": f"{task}-{line['doc_id']}", "prompt": _prompt(line)}
    arguments = line["arguments"]
    # The file has {"gen_args_0": {"arg_0": context, "arg_1": continuation}, ...}, the results a list of pairs.
    pairs = [tuple(a.values()) for a in arguments.values()] if isinstance(arguments, Mapping) else list(arguments)
    answer = line.get("target")
    if isinstance(answer, str) and answer.isdecimal():
        answer = int(answer)
    fits = len(pairs) > 1 and isinstance(answer, int) and all(len(p) == 2 and p[0] == pairs[0][0] for p in pairs)
    if not fits or len(line["filtered_resps"]) != len(pairs) or not 0 <= answer < len(pairs):
        raise RecordError(
            f"{task}: document {line.get('doc_id')} is no question with choices after one prompt; of other tasks name the "
            'harness\'s figure of a sample: metric="exact_match".'
        )
    return {
        "id": f"{task}-{line['doc_id']}",
        "prompt": str(pairs[0][0]),
        "choices": [str(p[1]).strip() for p in pairs],
        "answer": answer,
    }


def _prompt(line: Mapping[str, Any]) -> str:
    """What was asked: lmms-eval keeps it under `input`, lm-eval among the arguments of each request."""
    found = line.get("input", line.get("arguments"))
    while not isinstance(found, str) and found:
        found = next(iter(found.values() if isinstance(found, Mapping) else found))
    return str(found or "")


def _write(
    folder: Path,
    task: str,
    of: Mapping[str, str],
    interventions: Sequence[Intervention],
    chosen: str | None,
    samples: list[dict[str, Any]],
    records: list[dict[str, Any]],
    figures: Mapping[str, Any],
) -> Path:
    model = of["name"]
    arms = [{"id": "baseline", "kind": "baseline", "interventions": [], "decoding": {}}]
    steps = [_step(m) for m in interventions]
    arms.append({"id": "method", "kind": "method", "interventions": steps, "decoding": {}})
    points = [{"point": 0, "values": {}, "arms": {"baseline": "baseline", "method": "method"}}]
    named = {"zoo": model} if model in ZOO_KINDS else {"hub": model}
    recipe = validate(
        {
            "schema": 1,
            "name": f"lm-eval/{_plain(task)}",
            "summary": f"{task}, evaluated by a harness",
            "model": {**named, "kind": of["kind"], **({} if "zoo" in named else {"architecture": "llama"})},
            "data": {"file": store.SAMPLES, "format": FORMATS[figures["task"]], "limit": len(samples)},
            "interventions": [{"method": s["method"]} for s in steps],
            "controls": {"zero": False},
            "chosen": chosen,
            "notes": "Evaluated by a harness, not by this package; the methods' parameters are in arms.json.",
            **figures,
        }
    )
    start = now()
    store.write_json(
        folder / store.IDENTITY,
        {"recipe": recipe.digest(), "samples": digest(samples), "model": {"name": model}, "tiny": False},
    )
    store.write_atomic(folder / store.RECIPE, recipe.canonical().encode())
    store.write_json(folder / store.ARMS, {"arms": arms, "points": points})
    store.write_json(folder / store.ENVIRONMENT, {"versions": library_versions(), "harness": HARNESSES[of["kind"]]})
    store.write_lines(folder / store.SAMPLES, samples)
    store.write_lines(folder / store.RECORDS, records)
    store.write_lines(folder / store.TIMINGS, [])
    store.write_json(folder / store.AUDIT, {"arms": {}})
    rows = {arm: {(0, r["id"]): r for r in records if r["arm"] == arm} for arm in ("baseline", "method")}
    plan = {"arms": arms, "points": points}
    store.write_json(folder / store.METRICS, Scores(recipe, plan, samples, rows, [], {}).to_dict())
    done = {"state": "complete", "message": "", "started": start, "ended": now()}
    store.write_json(folder / store.STATUS, {**done, "done": len(records), "total": len(records)})
    store.write_json(folder / MANIFEST, manifest_of(folder, files_of(folder), "run", model={"id": model}))
    return folder


def _step(method: Intervention) -> dict[str, Any]:
    """An intervention as arms.json has it."""
    values = method.to_dict()
    heads, where = values.pop("heads", None), values.pop("where", {})
    return {"method": registered_name(type(method)), "params": values, "heads": heads, "where": where}


def _plain(task: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in task.lower())
