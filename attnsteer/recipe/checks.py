"""What a recipe's text cannot show by itself: whether methods, parameters, metrics, heads and files exist."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import AttnSteerError, RecipeError, RegistrationError, did_you_mean, listing
from ..heads import HeadSet
from ..method_files import require
from .arms import at_zero_strength, methods_of, with_other_spans, with_random_heads, with_random_spans
from .parameters import Method, is_sample
from .resolved import METRIC_FILES, absolute_options, names_file, resolve
from .schema import RESERVED, Recipe
from .search_specs import calibration_key, search_of, searched_method
from .sweep import points
from .validate import with_values

# What stands for heads and dimensions that a search will find.
STAND_IN = HeadSet({0: [0]}, shape=(1, 2))


def check(recipe: Recipe, *, files: bool = True) -> list[str]:
    """The problems of a recipe, as sentences; none when it can be run.

    Args:
        files: whether files that have to be fetched first (data, annotations, features, model folders) must be there.
    """
    try:
        require(recipe.import_paths())
    except RegistrationError as error:
        # Without them no method is known, and nothing else can be said.
        return [f"imports: {error}"]
    problems: list[str] = []

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except AttnSteerError as error:
            problems.append(str(error))

    here = recipe if files else _without_missing_heads(recipe)
    for point in points(here):
        with noted():
            _check_arms(point.recipe)
        with noted():
            _check_decoding(point.recipe)
    if recipe.tiny:
        with noted():
            _check_arms(resolve(here, tiny=True))
    with noted():
        _check_metrics(recipe, files)
    with noted():
        _check_architecture(recipe)
    if files:
        problems += _missing_files(recipe)
    return list(dict.fromkeys(problems))


def _without_missing_heads(recipe: Recipe) -> Recipe:
    """The recipe with a head set in place of files of heads that have to be made first."""
    values = {
        f"interventions.{i}.heads": {"0": [0]}
        for i, s in enumerate(recipe.interventions)
        if names_file(s.heads) and not (recipe.folder / s.heads).is_file()
    }
    return with_values(recipe, values) if values else recipe


def _check_arms(recipe: Recipe) -> None:
    found: dict[str, Any] | None = None
    if recipe.calibration is not None:
        search = search_of(recipe)
        if search.for_method:
            searched_method(recipe)
        found = {calibration_key(recipe): STAND_IN if search.heads else (0,)}
    chosen = methods_of(recipe, found)
    for m in chosen:
        m.placeholder()
    if recipe.controls.zero:
        for m in at_zero_strength(recipe, chosen):
            m.placeholder()
    if recipe.calibration is not None and recipe.calibration.into != "heads":
        into = recipe.calibration.into
        if not any(into in m.params for m in chosen):
            raise RecipeError(f"calibration.into: no intervention has a parameter {into!r}.")
    for index, key in enumerate(recipe.controls.spans):
        with_other_spans(chosen, key, f"controls.spans.{index}")
    if recipe.controls.random_heads:
        # Sizes of layers come with the model; until then the chosen heads are all there are.
        sets = [m.heads for m in chosen if m.heads is not None and not m.heads.towers]
        least = {layer: max(heads[layer]) + 1 for heads in sets for layer in heads.layers}
        with_random_heads(chosen, least, 1)
    if recipe.prefix == "shared":
        _check_prefix(recipe, chosen)
    if recipe.controls.random_spans:
        if recipe.model.kind != "lm":
            raise RecipeError("controls.random_spans: is for language models; images take places in other prompts.")
        with_random_spans(chosen, 1)


def _check_prefix(recipe: Recipe, chosen: Sequence[Method]) -> None:
    """Raise where what the rows of a prompt's beginning get could depend on what follows, or where it could not be told apart."""
    from ..evals.beginnings import why_whole

    kind = recipe.model.kind
    if recipe.task not in ("choice", "answer") or kind not in ("lm", "vlm"):
        raise RecipeError(
            f"prefix: shared is for the tasks choice and answer with a language or vision-language model, not for {recipe.task} "
            f"with {kind}."
        )
    if recipe.share != "off":
        raise RecipeError("prefix: shared is for arms that answer by themselves; leave out share.")
    for m in chosen:
        # Prompts about one image share it where their values are the same.
        if kind == "lm" and any(is_sample(v) for v in m.params.values()):
            raise RecipeError(
                f"prefix: {m.place} has values by sample, which a shared beginning has not; leave out prefix."
            )
        made = m.placeholder()
        # Of one whose values no stand-in is known for, the run says so.
        if made is not None and (reason := why_whole(made)):
            raise RecipeError(f"prefix: {reason}; leave out prefix.")
    for place, given in (("decoding", recipe.decoding), ("baseline", recipe.baseline)):
        for name, value in given.items():
            if name not in DECODING or (name == "do_sample" and value):
                raise RecipeError(
                    f"prefix: shared is for greedy decoding, in which padding in the middle of a prompt plays no part; {place} has "
                    f"{name}. Leave out prefix."
                )


# Of decoding, what asks nothing of the prompt's tokens.
DECODING = ("max_new_tokens", "min_new_tokens", "do_sample", "pad_token_id")


def _check_decoding(recipe: Recipe) -> None:
    """What can be said of arguments of the model's call without the model; see `check_call` for pipelines."""
    reserved = RESERVED[recipe.task]
    for place, given in (("decoding", recipe.decoding), ("baseline", recipe.baseline)):
        if given and recipe.task == "choice":
            raise RecipeError(f"{place}: {listing(given)} has no meaning for the task choice, which writes nothing.")
        taken = [k for k in reserved if k in given]
        if taken:
            raise RecipeError(f"{place}: {listing(taken)} is set by the run itself.")
        if given and recipe.task in ("answer", "caption"):
            from transformers import GenerationConfig

            _check_arguments(place, given, sorted(set(GenerationConfig().to_dict()) - {*reserved, *_INTERNAL}))


# Of a generation config, what is no argument.
_INTERNAL = ("_from_model_config", "transformers_version")


def check_call(recipe: Recipe, pipe: Any) -> None:
    """Check that a pipeline takes the arguments that a recipe gives for its call, at every point of its sweep.

    Raises:
        RecipeError: it has no such argument.
    """
    found = list(inspect.signature(type(pipe).__call__).parameters.values())[1:]
    # Those with **kwargs take deprecated arguments by it, and pass over whatever else there is.
    names = [p.name for p in found if p.kind is not p.VAR_KEYWORD and p.name not in RESERVED["image"]]
    for point in points(recipe):
        for place in ("decoding", "baseline"):
            _check_arguments(place, getattr(point.recipe, place), names)


def _check_arguments(place: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise RecipeError(f"{place}.{name}: the model's call has no such argument.{did_you_mean(name, known)}")


def _check_metrics(recipe: Recipe, files: bool) -> None:
    from ..evals.metrics import get_metric

    known: dict[str, Any] = {}
    for index, spec in enumerate(recipe.metrics):
        options = absolute_options(spec.name, spec.options, recipe.folder)
        absent = [p for p in _files_of(spec.name, options) if not p.is_file()]
        if absent and files:
            raise RecipeError(f"metrics.{index} ({spec.name}): there is no file {listing(absent)}.")
        if absent:
            # It cannot be built without them, but its name can be looked up.
            from ..evals.metrics import METRICS

            if spec.name not in METRICS:
                get_metric(spec.name)
            known[spec.name] = None
            continue
        try:
            known[spec.name] = get_metric(spec.name, **options)
        except AttnSteerError as error:
            raise RecipeError(f"metrics.{index}: {error}") from error
    for place, name in [
        ("primary", recipe.primary),
        *((f"claims.{i}.metric", c.metric) for i, c in enumerate(recipe.claims)),
    ]:
        metric, _, estimate = name.partition(".")
        if metric not in known:
            raise RecipeError(f"{place}: {name!r} is of none of the metrics {', '.join(known)}.")
        built = known[metric]
        if built is not None and built.statistics and estimate not in built.statistics:
            there = built.statistics
            raise RecipeError(
                f"{place}: {metric} has no estimate {estimate!r}; there are {', '.join(there)}.{did_you_mean(estimate, there)}"
            )


def _files_of(name: str, options: dict[str, Any]) -> list[Path]:
    found: list[Path] = []
    for option in METRIC_FILES.get(name, ()):
        value = options.get(option)
        found += [Path(v) for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
    return found


def _check_architecture(recipe: Recipe) -> None:
    model = recipe.model
    if model.architecture is None and (model.embedded or model.vllm is not None):
        return
    if model.architecture is None:
        raise RecipeError("model.architecture: is needed for --tiny; the name of a tiny model of attnsteer.testing.")
    if recipe.model.kind == "image":
        from ..testing import PIPELINES as known
    else:
        from ..testing import TRANSFORMERS as known
    if model.architecture not in known:
        raise RecipeError(
            f"model.architecture: there is no tiny model {model.architecture!r}; there are {', '.join(known)}."
            f"{did_you_mean(model.architecture, known)}"
        )


def _missing_files(recipe: Recipe) -> list[str]:
    problems = []
    folder = recipe.folder
    if recipe.model.zoo is not None and not recipe.model.embedded:
        from ..zoo.folders import ASSEMBLED, present

        name = recipe.model.zoo
        if name not in present():
            problems.append(
                f"model.zoo: {name} is not on this machine; attnsteer zoo fetch {ASSEMBLED.get(name, name)}"
            )
    if recipe.model.path is not None and not (folder / recipe.model.path).is_dir():
        problems.append(f"model.path: there is no folder {folder / recipe.model.path}.")
    sections = [("data", recipe.data)]
    if recipe.calibration is not None:
        sections.append(("calibration.data", recipe.calibration.data))
    for place, data in sections:
        if data.file is not None and not (folder / data.file).is_file():
            problems.append(f"{place}.file: there is no file {folder / data.file}.")
        if data.images is not None and not (folder / data.images).is_dir():
            problems.append(f"{place}.images: there is no folder {folder / data.images}.")
    return problems
