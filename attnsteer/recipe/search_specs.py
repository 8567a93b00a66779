"""The searches that a recipe's calibration section can name, which of them it asks for, and the key of a result."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RecipeError, did_you_mean
from .parameters import Method, method
from .schema import CALIBRATED, Recipe, digest
from .sweep import points

# Names of a sample are not what it is.
NAMES = ("id", "group", "index")


@dataclass(frozen=True)
class SearchSpec:
    """What a recipe can say of a search; `attnsteer.run.searches` runs it.

    Attributes:
        kinds: of model. options: names that `calibration.options` may have. heads: whether it finds heads.
        for_method: whether the result depends on the method.
    """

    kinds: tuple[str, ...]
    options: tuple[str, ...]
    heads: bool = True
    for_method: bool = True


SEARCHES = {
    "calibrate_act": SearchSpec(("lm",), ("metric", "keep", "batch")),
    "calibrate_heads": SearchSpec(("lm",), ("metric", "keep", "batch")),
    "headhunter": SearchSpec(("image",), ("rounds", "steps", "rungs", "score", "batch")),
    "screen_heads": SearchSpec(("lm",), ("metric", "batch")),
    "michel": SearchSpec(("lm",), ("metric", "abs_over", "normalise", "least", "batch"), for_method=False),
    "hallucination_heads": SearchSpec(("vlm",), ("batch",), for_method=False),
    "vhd": SearchSpec(("vlm",), ("outliers", "layers", "batch"), for_method=False),
    "find_sink_dims": SearchSpec(("lm", "vlm"), ("tau", "layers", "drop", "batch"), heads=False, for_method=False),
}


def searches_of(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """The different searches of a recipe and its sweep: (key, the point's recipe); empty without a calibration."""
    if recipe.calibration is None:
        return []
    found: dict[str, Recipe] = {}
    for point in points(recipe):
        found.setdefault(calibration_key(point.recipe), point.recipe)
    return list(found.items())


def calibration_key(recipe: Recipe) -> str:
    """What the result of a recipe's search is known by: a hash of all that it depends on but samples and weights."""
    parts = recipe.dump()
    # The strength of the method that is searched for changes the result; that of another one does not.
    own = search_of(recipe).for_method
    searched = [s for s in parts["interventions"] if s["heads"] == CALIBRATED][:1] if own else []
    kept = ("calibration", "model", "decoding") if own else ("calibration", "model")
    return digest({"methods": searched, **{k: parts[k] for k in kept}})


def search_of(recipe: Recipe) -> SearchSpec:
    """The search that a recipe names, its options checked by name.

    Raises:
        RecipeError: it is not known, is for another kind of model, or has no such option.
    """
    spec = recipe.calibration
    if spec.search not in SEARCHES:
        raise RecipeError(
            f"calibration.search: there is no search {spec.search!r}; there are {', '.join(SEARCHES)}."
            f"{did_you_mean(spec.search, SEARCHES)}"
        )
    search = SEARCHES[spec.search]
    if recipe.model.kind not in search.kinds:
        raise RecipeError(
            f"calibration.search: {spec.search} is for models of kind {' or '.join(search.kinds)}; model.kind is "
            f"{recipe.model.kind}."
        )
    for name in spec.options:
        if name not in search.options:
            raise RecipeError(
                f"calibration.options.{name}: {spec.search} has {', '.join(search.options)}.{did_you_mean(name, search.options)}"
            )
    if search.heads != (spec.into == "heads"):
        kind = "heads" if search.heads else "no heads"
        raise RecipeError(f"calibration.into: {spec.search} finds {kind}; into is {spec.into!r}.")
    return search


def searched_method(recipe: Recipe) -> Method:
    """The method that a search is for: the first whose heads are to be found.

    Raises:
        RecipeError: its parameters depend on samples, so it cannot be built for all of them.
    """
    index = next(i for i, s in enumerate(recipe.interventions) if s.heads == CALIBRATED)
    found = method(recipe.interventions[index], f"interventions.{index}", recipe.folder, recipe.model, None)
    if found.per_sample():
        raise RecipeError(
            f"{found.place}: heads cannot be searched for a method whose parameters come from the samples."
        )
    return found
