"""Models that judge pictures while they are made, for metrics that need one: CLIPScore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RecipeError
from .schema import Recipe

# Pictures [B, 3, h, w] and their prompts -> what goes into the records.
Judge = Callable[[Any, Sequence[str]], list[dict[str, Any]]]
WRITES = ("similarity",)


def wanted(recipe: Recipe) -> str | None:
    """The CLIP model that a recipe's metrics need, or None.

    Raises:
        RecipeError: CLIPScore without a model.
    """
    if recipe.task != "image":
        return None
    for spec in recipe.metrics:
        if spec.name == "clip_score":
            name = spec.options.get("model")
            if not isinstance(name, str):
                raise RecipeError("metrics: clip_score needs a model: {name: clip_score, model: HUB-ID or folder}.")
            return name
    return None


def load(recipe: Recipe, *, tiny: bool, device: Any) -> Judge | None:
    """The judge of a recipe.

    Raises:
        RecipeError: its model cannot be had, or is of another kind.
    """
    name = wanted(recipe)
    if name is None:
        return None
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
