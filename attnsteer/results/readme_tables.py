"""Tables of results for the folders of recipes, from the folders of runs: the paper's figure, ours, and the difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RecipeError
from ..recipe import yaml
from ..recipe.loading import load_recipe
from ..recipe.schema import Recipe
from ..recipe.sweep import own_point

HEAD = ("recipe", "figure", "paper", "here: baseline", "here: method", "difference [95 %]", "samples")
NOT_RUN = "not run"
UNCHANGED = "changed nothing"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


class Done(NamedTuple):
    """A complete run: the time of its metrics.json, what it holds, the run's recipe, and the number of samples."""

    when: float
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    samples: int


def results_table(folder: str | Path, runs: str | Path) -> str:
    """A Markdown table of the recipes of a folder.

    Args:
        folder: such as recipes/act. runs: a folder of run folders; of several complete runs of a recipe the last one counts.

    Raises:
        RecipeError: a recipe that does not load.
    """
    found = _runs(Path(runs))
    rows = [HEAD, tuple("---" for _ in HEAD)]
    for path in sorted(Path(folder).glob("*.yaml")):
        rows.append(_row(load_recipe(path), found))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write_results(folder: str | Path, runs: str | Path) -> bool:
    """Put the table into the folder's README.md, between its two marks; whether the file changed.

    Raises:
        RecipeError: no README, or one without the marks.
    """
    path = Path(folder) / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RecipeError(f"{path} has no place for results; put {BEGIN} and {END} on lines of their own.")
    new = f"{before}{BEGIN}\n\n{results_table(folder, runs)}\n{END}{after}"
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text


def _runs(root: Path) -> dict[str, Done]:
    """Name of a recipe -> the last complete run of it that is not a tiny one."""
    out: dict[str, Done] = {}
    for path in sorted(root.rglob("metrics.json")):
        status, identity = (_json(path.with_name(n)) for n in ("status.json", "identity.json"))
        metrics = _json(path)
        whole = status.get("state") == "complete" and not metrics.get("partial") and not identity.get("tiny")
        try:
            recipe = yaml.read(path.with_name("recipe.yaml")).value if whole and metrics else None
        except RecipeError:
            recipe = None
        name = recipe.get("name") if isinstance(recipe, dict) else None
        when = path.stat().st_mtime
        if name is not None and (name not in out or when >= out[name].when):
            out[name] = Done(when, recipe, metrics, _count(path.with_name("samples.jsonl")))
    return out


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _count(path: Path) -> int:
    try:
        with path.open(encoding="utf-8") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def _row(recipe: Recipe, runs: dict[str, Done]) -> tuple[str, ...]:
    paper = "; ".join(_claim(c) for c in recipe.claims if c.metric == recipe.primary) or "-"
    name = f"[{recipe.name}]({recipe.name.rpartition('/')[2]}.yaml)"
    if recipe.name not in runs:
        return name, recipe.primary, paper, NOT_RUN, NOT_RUN, "", ""
    done = runs[recipe.name]
    metrics = done.metrics
    metric, _, estimate = recipe.primary.partition(".")
    # One point of a sweep stands for the recipe; its report has all.
    points = metrics.get("points") or [{"point": 0, "values": {}, "arms": {}}]
    point = own_point(points, done.recipe) or points[0]
    arms = metrics.get("arms", {})
    own = [arms.get(point["arms"].get(k, k), {}).get(metric, {}).get(estimate) for k in ("baseline", "method")]
    change = next(
        (
            d["estimates"].get(estimate)
            for d in metrics.get("differences", [])
            if (d["point"], d["metric"], d["arm"], d["against"]) == (point["point"], metric, "method", "baseline")
        ),
        None,
    )
    unchanged = point["arms"].get("method") in (metrics.get("unchanged") or ())
    difference = UNCHANGED if unchanged else _figure(change, sign="+")
    return name, recipe.primary, paper, _figure(own[0]), _figure(own[1]), difference, str(done.samples)


def _claim(claim: Any) -> str:
    figures = " → ".join(f"{v:g}" for v in (claim.baseline, claim.value) if v is not None)
    return f"{figures} ({claim.unit}; {claim.source})"


def _figure(found: Any, sign: str = "") -> str:
    """A value with its interval."""
    if not isinstance(found, dict):
        return f"{found:{sign}.3f}" if isinstance(found, (int, float)) else "-"
    value, low, high = (found.get(k) for k in ("value", "low", "high"))
    if value is None:
        return "-"
    interval = "" if low is None or high is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f"{value:{sign}.3f}{interval}"
