"""The search of a recipe's calibration section, and its cache: what was found once is not searched again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import AttnSteerError, RecipeError, RunError, SerializationError
from ..heads import HeadSet
from ..method_files import imported, require
from ..recipe.loading import load_recipe
from ..recipe.parameters import Sample
from ..recipe.resolved import resolve
from ..recipe.schema import DataSpec, Recipe, digest
from ..recipe.search_specs import NAMES, search_of, searched_method, searches_of
from . import store
from .searches import RUNNERS, Subject, Task


def calibrate(
    recipe: Recipe,
    subject: Subject,
    samples: Callable[[DataSpec], Sequence[Sample]],
    cache: str | Path | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Run all searches of a recipe, or take them from the cache.

    Args:
        recipe: with its sweep. subject: the loaded model. samples: gives the samples of a data section.
        cache: a folder; results are kept there under a hash of the recipe's part, the samples and the weights. None:
            nothing is kept.

    Returns:
        {`calibration_key`: HeadSet, or a tuple of numbers}: what `attnsteer.run.build.plan` takes as `found`.

    Raises:
        RecipeError: the search does not take these samples, options or methods, or finds nothing; RunError: the cache cannot
            be written.
    """
    found = {}
    for key, one in searches_of(recipe):
        split = list(samples(one.calibration.data))
        refuse_overlap(split, samples(one.data))
        found[key] = _cached(key, Task(one, subject, split, progress), cache)
    return found


def refuse_overlap(split: Sequence[Sample], test: Sequence[Sample]) -> None:
    """Names of splits are only names: what counts is whether a sample is in both.

    Raises:
        RecipeError: some are.
    """
    seen, tested = ({digest({k: v for k, v in s.items() if k not in NAMES}) for s in part} for part in (split, test))
    both = len(seen & tested)
    if both:
        raise RecipeError(
            f"calibration.data: {both} of its {len(split)} samples are in the test split too; what is found on them would be "
            "tested on itself. Take others."
        )


def _cached(key: str, task: Task, cache: str | Path | None) -> Any:
    """The result of one search, from the cache where it is there whole."""
    search = search_of(task.recipe)
    if cache is None:
        return _run(task)
    facts: dict[str, Any] = {
        "key": key,
        "samples": task.samples,
        "weights": weights(task.subject.target),
        "version": __version__,
    }
    # The code of a method from a file is no part of the recipe.
    used = {spec.method for spec in task.recipe.interventions}
    files = [f.sha256 for f in imported() if used & set(f.methods)]
    name = digest({**facts, **({"imports": files} if files else {})})
    folder = Path(cache)
    path = folder / f"{name}.{'safetensors' if search.heads else 'json'}"
    try:
        if path.is_file():
            return HeadSet.load(path) if search.heads else tuple(json.loads(path.read_text(encoding="utf-8")))
    except (SerializationError, ValueError, TypeError):
        # A damaged file of a cache is as good as none.
        pass
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the cache {folder} cannot be made ({error.strerror}); give another folder.") from error
    state = folder / f"{name}.state.safetensors"
    found = _run(replace(task, state=state))
    _write(found, path)
    state.unlink(missing_ok=True)
    return found


def _run(task: Task) -> Any:
    """The result of one search; what it has to say about its samples or options comes as a RecipeError."""
    spec, search = task.recipe.calibration, search_of(task.recipe)
    if search.for_method:
        task = replace(task, method=searched_method(task.recipe).make((), None))
    try:
        found = RUNNERS[spec.search](task)
        if search.heads and spec.top is not None and len(found) > spec.top:
            found = found.top(spec.top)
    except RecipeError:
        raise
    except (AttnSteerError, TypeError, ValueError, KeyError) as error:
        raise RecipeError(f"calibration ({spec.search}): {error}") from error
    return found


def save_found(given: str | Path, out: str | Path, cache: str | Path | None, *, tiny: bool = False) -> str:
    """Run the search of a recipe and save what it finds: what `attnsteer calibrate` does.

    Args:
        given: a file, or the name of a shipped recipe. out: the file: safetensors for heads, else JSON. cache: see `calibrate`.

    Returns:
        a line that says what was found and where it is.

    Raises:
        RecipeError: see `calibrate`; the recipe has no search, or its sweep has several. RunError: the file cannot be written.
    """
    source = load_recipe(given)
    require(source.import_paths())
    recipe = resolve(source, tiny=tiny)
    if recipe.calibration is None:
        raise RecipeError(f"{recipe.name} has no calibration section, so there is nothing to search.")
    if len(searches_of(recipe)) > 1:
        raise RecipeError(
            f"{recipe.name} has {len(searches_of(recipe))} searches, one for each value of its sweep, and one is saved; copy the "
            "recipe and take the sweep out."
        )
    search = search_of(recipe)
    from . import models
    from .data import load
    from .tasks import Request
    from .tasks.prompts import encode

    get = lambda spec: load(spec, recipe.task, prompt=recipe.prompt, folder=recipe.folder)  # noqa: E731
    loaded = models.load(recipe.model, tiny=get(recipe.data) if tiny else None, folder=recipe.folder)
    own = get(recipe.calibration.data)
    inputs = (lambda part: encode(loaded, Request(part, own, {}, 0))) if loaded.kind == "vlm" else None
    (found,) = calibrate(
        recipe, Subject(loaded.target, loaded.tokenizer, inputs), lambda spec: get(spec).samples, cache
    ).values()
    path = Path(out)
    _write(found, path)
    return f"{path}: {len(found)} {'heads, ' + repr(found) if search.heads else 'dimensions, ' + repr(found)}"


def _write(found: Any, path: Path) -> None:
    """Write a result whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    if not isinstance(found, HeadSet):
        return store.write_atomic(path, store.to_json(list(found)).encode())
    with tempfile.TemporaryDirectory() as folder:
        data = found.save(Path(folder) / path.name).read_bytes()
    store.write_atomic(path, data)


def weights(target: Any) -> str:
    """A hash that tells models apart; see `attnsteer.search.state.model_digest`."""
    from torch import nn

    from ..search.state import model_digest

    if isinstance(target, nn.Module):
        return model_digest(target)
    parts = getattr(target, "components", {})
    return model_digest(*(m for _, m in sorted(parts.items()) if isinstance(m, nn.Module)))
