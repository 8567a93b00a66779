"""A run before its model is loaded: everything that can be known and checked by then."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import MissingExtra, RecipeError
from ..method_files import MethodFile, imported
from ..recipe.checks import check
from ..recipe.resolved import resolve
from ..recipe.schema import DataSpec, Recipe
from ..recipe.search_specs import searches_of
from ..recipe.validate import with_values
from . import scorers
from .data import load as load_data
from .data.sample import Data, Sample
from .recipe_calibration import refuse_overlap
from .score import measures
from .tasks import get_task


@dataclass(frozen=True)
class Job:
    """A run before its model is loaded. recipe: resolved. source: the recipe as it was given, which tells runs apart."""

    recipe: Recipe
    source: Recipe
    folder: Path
    data: Data
    tiny: bool

    def method_files(self) -> list[MethodFile]:
        """The imported files that the run depends on: those of its methods, those that its recipe names, and all with hosts."""
        used = {spec.method for spec in self.recipe.interventions}
        named = {path.resolve() for path in self.source.import_paths()}
        return [f for f in imported() if f.path in named or f.hosts or used & set(f.methods)]

    def samples(self, spec: DataSpec) -> list[Sample]:
        """The samples of another section of the recipe."""
        return self.load(spec).samples

    def load(self, spec: DataSpec) -> Data:
        """The samples of a section, and their images."""
        if self.tiny and spec.zoo is None:
            from .tiny import tiny_spec

            spec = tiny_spec(spec, other=spec != self.recipe.data)
        data = load_data(spec, self.recipe.task, prompt=self.recipe.prompt, folder=self.recipe.folder)
        if self.tiny and spec.zoo is None and self.recipe.model.kind == "lm":
            # The bundled questions are about pictures; texts alone are asked of a language model.
            data = Data([{k: v for k, v in s.items() if k != "image"} for s in data.samples], data.image, data.folder)
        return data


def prepare(
    recipe: Recipe, folder: Path, tiny: bool = False, limit: int | None = None, given: Data | None = None
) -> Job:
    """Everything that can be checked without the model.

    Args:
        given: the samples, where the recipe's own file of them is not here.

    Raises:
        RecipeError, MissingExtra: see `run`.
    """
    if limit is not None:
        recipe = with_values(recipe, {"data.limit": limit})
    missing = [] if tiny else [m for m in recipe.requires if find_spec(m.partition(".")[0]) is None]
    if missing:
        raise MissingExtra(f"the recipe {recipe.name} needs {', '.join(missing)}, which is not installed.")
    problems = check(recipe, files=not tiny and given is None)
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise RecipeError(f"{recipe.name}: {' '.join(problems[:5])}{more}")
    resolved = resolve(recipe, tiny)
    job = Job(resolved, recipe, folder, Data([], lambda s: None), tiny)
    data = job.load(resolved.data) if given is None else given
    if tiny:
        from .tiny import tiny_metrics

        resolved = tiny_metrics(resolved)
    _check_images(resolved, data)
    if not tiny:
        for _, one in searches_of(resolved):
            refuse_overlap(job.samples(one.calibration.data), job.samples(one.data))
    measures(resolved, keys(resolved, data, tiny))
    if resolved.data.limit is None:
        resolved = resolved.model_copy(update={"data": resolved.data.model_copy(update={"limit": len(data.samples)})})
    return Job(resolved, recipe, folder, data, tiny)


def _check_images(recipe: Recipe, data: Data) -> None:
    """Raise a RecipeError where a model would be asked about a picture that it does not get."""
    kind = recipe.model.kind
    if kind == "vlm":
        blind = [s["id"] for s in data.samples if "image" not in s]
        if blind:
            raise RecipeError(
                f"data: {len(blind)} of {len(data.samples)} samples have no image, {blind[0]} the first; a model of kind vlm is "
                "asked about one image each. Name its column: columns: {image: NAME}."
            )
    if kind == "lm" and any("image" in s for s in data.samples):
        raise RecipeError(
            "data: the samples are about images, which a model of kind lm does not see; model.kind is lm."
        )


def keys(recipe: Recipe, data: Data, tiny: bool) -> list[str]:
    """What every record will have."""
    task = get_task(recipe.task)
    out = ["arm", "seed", "id", *(k for k in task.SAMPLE_KEYS if all(k in s for s in data.samples)), *task.RECORD_KEYS]
    if recipe.task == "image":
        if tiny or recipe.model.zoo is not None:
            out += task.DETECTED
        out += scorers.record_keys(recipe)
    return out
