"""Which searches a recipe asks for, and under which key their results are kept."""

from __future__ import annotations

from ..errors import RecipeError, did_you_mean
from ..run.searches import SEARCHES, Search
from .parameters import Method, method
from .schema import CALIBRATED, Recipe, digest
from .sweep import points

# Names of a sample are not what it is.
NAMES = ("id", "group", "index")


def needed(recipe: Recipe) -> list[tuple[str, Recipe]]:
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


def search_of(recipe: Recipe) -> Search:
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
