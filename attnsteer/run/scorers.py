"""Models that look at pictures while they are made, for metrics that need one: CLIPScore, and distances of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import AttnSteerError, RecipeError, did_you_mean
from ..recipe.schema import Recipe

# Pictures [B, 3, h, w] and their prompts -> what goes into the records.
Scorer = Callable[[Any, Sequence[str]], list[dict[str, Any]]]
SETS = ("fid", "precision_recall")


def record_keys(recipe: Recipe) -> tuple[str, ...]:
    """What a recipe's scorers put into its records.

    Raises:
        RecipeError: a metric does not say which model it needs.
    """
    clip, features = required_models(recipe)
    return ("similarity",) * (clip is not None) + ("features",) * (features is not None)


def required_models(recipe: Recipe) -> tuple[str | None, str | None]:
    """The CLIP model and the features that a recipe's metrics need.

    Raises:
        RecipeError: CLIPScore without a model; a distance without features, with unknown ones, or with others than another's.
    """
    if recipe.task != "image":
        return None, None
    from ..evals.features import FUNCTIONS

    clip, features = None, None
    for spec in recipe.metrics:
        if spec.name == "clip_score":
            clip = spec.options.get("model")
            if not isinstance(clip, str):
                raise RecipeError("metrics: clip_score needs a model: {name: clip_score, model: HUB-ID or folder}.")
        if spec.name in SETS:
            name = spec.options.get("features")
            if name not in FUNCTIONS:
                raise RecipeError(
                    f"metrics: {spec.name} has features {name!r}; {{name: {spec.name}, features: ..., reference: FILE}} takes "
                    f"{', '.join(FUNCTIONS)}.{did_you_mean(str(name), FUNCTIONS)}"
                )
            if features not in (None, name):
                raise RecipeError(f"metrics: features {features} and {name} in one run; a record has room for one.")
            features = name
    return clip, features


def load(recipe: Recipe, *, tiny: bool, device: Any) -> Scorer | None:
    """The scorers of a recipe as one.

    Raises:
        RecipeError: a model cannot be had, or is of another kind.
    """
    clip, features = required_models(recipe)
    scorers: list[Scorer] = []
    if clip is not None:
        scorers.append(_similarity(recipe, clip, tiny, device))
    if features is not None:
        scorers.append(_features(features, device))
    if not scorers:
        return None

    def score_pictures(pictures: Any, prompts: Sequence[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{} for _ in prompts]
        for one in scorers:
            for record, new in zip(found, one(pictures, prompts), strict=True):
                record.update(new)
        return found

    return score_pictures


def _features(name: str, device: Any) -> Scorer:
    from ..evals.features import FUNCTIONS, extract

    try:
        function = FUNCTIONS[name](device=device)
    except AttnSteerError as error:
        raise RecipeError(f"metrics: features {name}: {error}") from error
    return lambda pictures, prompts: [{"features": row} for row in extract(pictures, function).tolist()]


def _similarity(recipe: Recipe, name: str, tiny: bool, device: Any) -> Scorer:
    from ..evals.clip import Similarity

    if tiny:
        from .tiny import embed

        return Similarity(embed, f"stand-in for {name}")
    from transformers import AutoModel, AutoProcessor

    folder = recipe.folder / name
    source = str(folder) if folder.is_dir() else name
    try:
        model = AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False).eval().to(device)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RecipeError(
            f"metrics: the model {name} of clip_score cannot be had ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]})."
        ) from error
    if not hasattr(model, "get_image_features"):
        raise RecipeError(f"metrics: {name} is a {type(model).__name__}; clip_score needs a model of CLIP's kind.")
    return Similarity.of(model, processor, name)
