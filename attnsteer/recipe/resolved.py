"""A recipe with everything filled in that it leaves to be found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..heads import HeadSet
from .parameters import ZOO
from .schema import CALIBRATED, Recipe
from .validate import validate, with_values

# Options of metrics that are files, relative to the recipe.
METRIC_FILES = {
    "chair": ("synonyms", "instances", "captions"),
    "fid": ("reference",),
    "precision_recall": ("reference",),
}
TINY_SAMPLES, TINY_STEPS, TINY_TOKENS = 4, 2, 8


def resolve(recipe: Recipe, tiny: bool = False) -> Recipe:
    """The recipe that is run: paths absolute; with `tiny`, a few samples and steps, one seed, on the CPU.

    A tiny run tests the recipe, not the method: the model is the random one of `model.architecture` unless it is embedded,
    and `tiny` of the recipe says what does not fit it.

    Raises:
        RecipeError: a value does not fit.
    """
    folder = recipe.folder
    changed = with_values(recipe, recipe.tiny) if tiny else recipe
    data = changed.dump() | {"tiny": {}}
    put: Callable[[dict[str, Any], str], None] = lambda part, key: part.update(  # noqa: E731
        {key: str((folder / part[key]).absolute())} if part.get(key) is not None else {}
    )
    put(data["model"], "path")
    data["imports"] = [str(path.absolute()) for path in recipe.import_paths()]
    sections = [data["data"], *([data["calibration"]["data"]] if data["calibration"] else [])]
    for section in sections:
        put(section, "file")
        put(section, "images")
    for spec in data["interventions"]:
        if names_file(spec["heads"]):
            put(spec, "heads")
    data["metrics"] = [{"name": m.name, **absolute_options(m.name, m.options, folder)} for m in changed.metrics]
    if tiny:
        for section in sections:
            section["limit"] = min(section["limit"] or TINY_SAMPLES, TINY_SAMPLES)
        data["seeds"] = data["seeds"][:1]
        data["batch_size"] = min(data["batch_size"], 2)
        data["model"] |= {"dtype": "float32", "device": "cpu", "device_map": None}
        for decoding in (data["decoding"], data["baseline"]):
            for key, most in (("num_inference_steps", TINY_STEPS), ("max_new_tokens", TINY_TOKENS)):
                if isinstance(decoding.get(key), int):
                    decoding[key] = min(decoding[key], most)
    made = validate(data)
    made._source = recipe.source
    return made


def self_contained(recipe: Recipe) -> Recipe:
    """A resolved recipe with the heads of its files written out: what a run folder keeps, which other machines read.

    Raises:
        SerializationError: a file holds no head set.
    """
    data = recipe.dump()
    for spec in data["interventions"]:
        if names_file(spec["heads"]):
            spec["heads"] = HeadSet.load(spec["heads"]).to_json()
    made = validate(data)
    made._source = recipe.source
    return made


def names_file(heads: Any) -> bool:
    """Whether the value of `heads` is the path of a file."""
    return isinstance(heads, str) and heads != CALIBRATED and not heads.startswith(ZOO)


def absolute_options(name: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A metric's options with its files absolute."""
    out = dict(options)
    for option in METRIC_FILES.get(name, ()):
        value = out.get(option)
        if isinstance(value, str):
            out[option] = str((folder / value).absolute())
        elif isinstance(value, list):
            out[option] = [str((folder / v).absolute()) if isinstance(v, str) else v for v in value]
    return out
