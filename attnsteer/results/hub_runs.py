"""Run folders on the hub: what travels, the card, and getting one back to verify it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import hub
from ..errors import HubError, RunError
from ..heads import HeadSet
from ..intervention import Intervention
from ..manifest import MANIFEST
from ..recipe.parameters import is_sample
from ..registry import registered_name
from ..run import store
from ..run.folder import RunFolder, read_run
from ..run.merging import files_of, model_of
from .figures import Figure, is_share
from .verdict import verdict
from .verification import verified

# Made from the run, and pleasant to have beside it.
BESIDE = (store.STATUS, "report.html", "report.md", "attention.json")
KNOWN = re.compile(r"images/[\w.@ -]+/\d+/[\w.@ -]+\.(png|jpg)|calibration/[\w.-]+\.(safetensors|json)", re.ASCII)


def known(name: str) -> bool:
    """Whether a run folder may have a file of this name."""
    return name in (*store.WRITTEN, store.IDENTITY, *BESIDE) or bool(KNOWN.fullmatch(name))


def push_run(
    folder: str | Path, repo: str, *, private: bool | None = None, token: str | None = None, endpoint: str | None = None
) -> str:
    """Share a finished run as a data set of the hub, with a card that has its verdict; returns the address of the commit.

    Raises:
        RunError: it is not finished. HubError: the hub refuses or cannot be reached.
    """
    from ..recipe.loading import load_recipe

    run = read_run(folder)
    if run.metrics is None or not run.complete:
        raise RunError(
            f"{run.path} is {run.status['state']}; start the run again with the same command to finish it, then push it."
        )
    names = [*files_of(run.path), *(n for n in BESIDE if (run.path / n).is_file())]
    strange = [n for n in names if not known(n)]
    if strange:
        raise RunError(f"{run.path} has {strange[0]}, which is none of a run's files.")
    about = {"model": model_of(load_recipe(run.path / store.RECIPE))}
    text = hub.card(run.name, "run", run_card(run, repo), tags=[str(i["method"]) for i in run.recipe["interventions"]])
    return hub.upload(
        run.path, names, repo, "run", about=about, card=text, private=private, token=token, endpoint=endpoint
    )


def pull_run(
    repo: str,
    to: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Get a shared run into a new folder; `attnsteer verify` says whether it is what it says.

    Raises:
        HubError, SerializationError: it cannot be had, or is no run. RunError: the folder is not empty, or the run damaged.
    """
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to} is there already; give a folder that is new or empty.")
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HubError(f"{to} cannot be made ({error.strerror}); give a folder that you can write.") from error
    try:
        hub.download(repo, "run", known, revision=revision, token=token, endpoint=endpoint, to=to)
        read_run(to)
    except BaseException:
        # What was refused does not stay.
        shutil.rmtree(to, ignore_errors=True)
        raise
    shutil.rmtree(to / ".cache", ignore_errors=True)
    return to


def run_card(run: RunFolder, repo: str) -> str:
    """The card of a run in Markdown, computed from it: verdict, interval, controls, hashes, versions."""
    lines = [*_figures(run), "", "Get it, and check that it is what it says:", "", "```bash"]
    lines += [f"attnsteer pull {repo} my-copy", "attnsteer verify my-copy", "```", ""]
    return "\n".join([*lines, f"{MANIFEST} has the SHA-256 of every file."])


def evidence(folder: str | Path, of: Intervention | HeadSet) -> str:
    """What a finished run says of a method or of its heads, in Markdown: for `push_to_hub(..., evidence=...)`.

    Raises:
        RunError: it is not finished, or of another method or other heads.
    """
    run = read_run(folder)
    arm = verdict(run).point["arms"]["method"]
    steps = run.arms[arm]["interventions"]
    if not any(_same(step, of) for step in steps):
        named = ", ".join(f"{s['method']}({s['params']})" for s in steps)
        raise RunError(
            f"{run.path} is of {named}, not of {of!r}, so it says nothing of it; give the run that measured it."
        )
    state, when = verified(run.path)
    lines = [f"## {run.name}", "", *_figures(run), f"- the run's folder: {state}" + (f", {when}" if when else "")]
    if len(steps) > 1:
        lines += ["- it acted together with " + ", ".join(s["method"] for s in steps if not _same(s, of))]
    return "\n".join(lines)


def _same(step: Mapping[str, Any], of: Intervention | HeadSet) -> bool:
    """Whether an intervention of arms.json is this one, or has these heads. What samples give is not compared."""
    heads = {int(layer): list(own) for layer, own in (step.get("heads") or {}).items()}
    if isinstance(of, HeadSet):
        return heads == of.to_dict()
    own = of.to_dict()
    given = {k: v for k, v in step["params"].items() if not is_sample(v)}
    mine = getattr(of, "heads", None)
    same = (mine.to_dict() if isinstance(mine, HeadSet) else {}) == heads
    return step["method"] == registered_name(type(of)) and same and all(own.get(k) == v for k, v in given.items())


def _figures(run: RunFolder) -> list[str]:
    said = verdict(run)
    metric, estimate = run.primary()
    arm, share = said.point["arms"]["method"], is_share(run, metric, estimate)
    base = run.base(arm)
    entry = next(
        d["estimates"][estimate]
        for d in run.metrics["differences"]
        if (d["point"], d["arm"], d["against"], d["metric"]) == (said.point["point"], "method", "baseline", metric)
    )
    before, after = (Figure.of(run.metrics["arms"][a][metric][estimate], share) for a in (base, arm))
    model, data = run.recipe.get("model") or {}, run.recipe.get("data") or {}
    name = model.get("zoo") or model.get("hub") or "a local model"
    revision = run.environment.get("model_revision") or model.get("revision")
    source = data.get("zoo") or data.get("hub") or "a file"
    versions = ", ".join(f"{k} {v}" for k, v in (run.environment.get("versions") or {}).items())
    lines = [f"**{said.words}.** {said.reason}".rstrip(), "", str(run.recipe.get("summary", "")), ""]
    lines += [f"| {run.metrics['primary']} | value [95 % interval] |", "| --- | --- |"]
    lines += [
        f"| baseline | {before} |",
        f"| method | {after} |",
        f"| difference, paired | {Figure.of(entry, share, signed=True)} |",
        "",
    ]
    lines += [f"- {line}" for line in said.lines()[1:]]
    lines += [
        f"- {len(run.samples)} samples of {source}, split {data.get('split', 'test')}, hash `{run.identity.get('samples')}`"
    ]
    lines += [
        f"- model: {name}" + (f" at {revision}" if revision else "") + "; hashes of its files are in identity.json"
    ]
    return [*lines, f"- made with {versions}"]
