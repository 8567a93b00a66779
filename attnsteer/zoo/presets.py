"""Methods with the settings that were tuned for a model. They are written in one place: the recipe that measures them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ..errors import SelectionError, UnknownName, did_you_mean
from ..intervention import Intervention
from .folders import KNOWN

# Model -> method -> the recipe whose settings were chosen on a calibration split, and which says what they gain.
PRESETS: dict[str, dict[str, str]] = {
    "shapes-lm": {
        "ACT": "act/shapes-reading",
        "PASTA": "pasta/shapes-reading",
        "SpotLight": "spotlight/shapes-reading",
        "ZeroTuning": "zerotuning/shapes-reading",
    },
    "shapes-lvlm": {"VHR": "vhr/shapes-existence"},
    "shapes-sd": {
        "AttendAndExcite": "attend-and-excite/shapes-layouts",
        "AttentionRefocusing": "attention-refocusing/shapes-layouts",
        "SoftPAG": "softpag/shapes-prompts",
    },
    "shapes-mmdit": {"AttentionRefocusing": "attention-refocusing/shapes-mmdit"},
    "smollm2-135m": {
        "ACT": "act/smollm-facts",
        "PASTA": "pasta/smollm-facts",
        "SpotLight": "spotlight/smollm-facts",
        "ZeroTuning": "zerotuning/smollm-facts",
    },
}


def presets() -> list[tuple[str, str, str]]:
    """(model, method, recipe) of every preset; the recipe's README says what it gains."""
    return [(model, method, recipe) for model, own in PRESETS.items() for method, recipe in own.items()]


def preset(model: str, method: str | type[Intervention], **given: Any) -> Intervention:
    """A method with the settings that were tuned for a model of the zoo: parameters, heads and `where` of a recipe.

    Args:
        model: a name of the zoo. method: a name, or the class. given: what a prompt brings (spans, words, boxes, a tokenizer), and
            whatever else shall be otherwise.

    Raises:
        UnknownName: no such model, or nothing was tuned for this pair.
        SelectionError: something that a prompt brings is missing, or a parameter that the method does not have.
        RecipeError: values that do not make the method.
    """
    if model not in KNOWN:
        raise UnknownName(f"no model {model!r} in the zoo; there are {', '.join(KNOWN)}.{did_you_mean(model, KNOWN)}")
    name = method if isinstance(method, str) else method.__name__
    own = PRESETS.get(model, {})
    if name not in own:
        there = ", ".join(own) or "nothing yet"
        raise UnknownName(f"no settings of {name} were tuned for {model}; there are: {there}.{did_you_mean(name, own)}")
    from ..recipe.loading import load_recipe
    from ..recipe.parameters import is_sample, settable, value
    from ..recipe.parameters import method as of_recipe

    recipe = load_recipe(own[name])
    found = of_recipe(recipe.interventions[0], f"preset({model!r}, {name!r})", recipe.folder, recipe.model, None)
    known = (*settable(found.cls), "heads", "where", "tokenizer")
    for key in given:
        if key not in known:
            raise SelectionError(f"{found.place}: there is no parameter {key!r}.{did_you_mean(key, known)}")
    missing = [key for key, v in found.params.items() if is_sample(v) and key not in given]
    if missing:
        raise SelectionError(
            f"{found.place} speaks of the prompt; give {', '.join(f'{key}=...' for key in missing)} too."
        )
    context = SimpleNamespace(tokenizer=given.pop("tokenizer", None))
    heads = given.pop("heads", found.heads)
    found = replace(found, where=given.pop("where", found.where))
    tuned = {key: value(v, (), key) for key, v in found.params.items() if key not in given}
    return found.built({**tuned, **given}, context, heads)
