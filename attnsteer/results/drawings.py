"""Look at the attention of a finished run: load its model again, and record a few samples in the baseline and the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RunError
from ..recipe.loading import load_recipe
from ..run.data.sample import Sample
from ..run.folder import RunFolder, read_run
from ..run.loaded import Loaded
from ..run.ranks import Ranks
from ..run.runs import Job, plan_arms, prepare
from ..run.store import RECIPE
from . import attention_maps as attention
from .reports.headline import headline
from .reports.sample_browser import STATES, states


def record_attention(folder: str | Path, count: int = 3) -> Path:
    """Write attention.json of `count` samples, those that the method changed the most plainly first.

    Raises:
        RunError: the folder is no finished run, or its model is not what it was then.
        RecipeError: the recipe's model or data are no longer there.
    """
    run = read_run(folder)
    job, loaded = reopened(run)
    head = headline(run, set())
    arms = {a.id: a for a in plan_arms(job, loaded, Ranks(), progress=False).arms}
    seed = run.seeds[0]
    found = attention.collect(
        loaded,
        [arms[head.base], arms[head.arm]],
        most_changed(run, job.data.samples, seed, count),
        inputs=_inputs(loaded, job),
        generator=lambda s: _generator(seed, s),
        picture=lambda arm, s: run.records[arm][seed, s["id"]]["image"],
        seed=seed,
    )
    return attention.save(run.path, found)


def reopened(run: RunFolder) -> tuple[Job, Loaded]:
    """The job of a finished run, and its model, loaded again.

    Raises:
        RunError, RecipeError: see `record_attention`.
    """
    from ..run.models import load

    if run.metrics is None:
        raise RunError(f"{run.path} has no metrics.json yet; start the run again with the same command to finish it.")
    job = prepare(load_recipe(run.path / RECIPE), run.path, tiny=run.tiny)
    if {f.path.name: f.sha256 for f in job.method_files()} != run.identity.get("imports", {}):
        raise RunError(f"the imported files are not those of the run {run.path}: its attention cannot be shown.")
    loaded = load(job.recipe.model, tiny=job.data if run.tiny else None, folder=job.source.folder)
    if loaded.files != run.identity.get("model"):
        raise RunError(f"the files of the model are not those of the run {run.path}: its attention cannot be shown.")
    return job, loaded


def most_changed(run: RunFolder, samples: list[Sample], seed: int, count: int) -> list[Sample]:
    """What was gained, then lost, then changed in words only, then the rest; each in the run's order."""
    state = states(run, headline(run, set()))
    there = [s for s in samples if (seed, s["id"]) in state]
    return sorted(there, key=lambda s: STATES.index(state[seed, s["id"]]))[:count]


def _inputs(loaded: Loaded, job: Job) -> Any:
    if loaded.kind != "vlm":
        return None
    from ..run.tasks import Request
    from ..run.tasks.prompts import encode

    return lambda samples: encode(loaded, Request(samples, job.data, {}, 0))


def _generator(seed: int, sample: Sample) -> Any:
    """The one that made the run's picture."""
    import torch

    from ..run.tasks.image import seed_of

    return torch.Generator().manual_seed(seed_of(seed, sample["index"]))
