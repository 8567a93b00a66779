"""Parameters of a method from what a recipe says: names and types checked, values of samples filled in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import AttnSteerError, RecipeError, did_you_mean, listing
from ..heads import HeadSet
from ..intervention import Intervention
from ..parameters import Choice, Flag, Number, declared
from ..registry import get_method
from ..where import Where
from .schema import InterventionSpec, ModelSpec

Sample = Mapping[str, Any]
# The strength at which a method does nothing; the laws' "identity" holds each of them to it.
ZERO: dict[str, dict[str, Any]] = {
    "ACT": {"beta": 1.0},
    # A share above 1 is never reached.
    "ADHH": {"threshold": 1.1},
    "AttendAndExcite": {"step_size": 0.0},
    "AttentionRefocusing": {"step_size": 0.0},
    "AttentionRegulation": {"strength": 0.0},
    "BlockMask": {"top_k": None, "threshold": 1.0},
    "CONFORM": {"step_size": 0.0},
    "HGAI": {"alpha": 0.0},
    "InjectMap": {"strength": 0.0},
    "InstABoost": {"factor": 1.0},
    "NAG": {"scale": 0.0},
    "PAG": {"scale": 0.0},
    "PAI": {"alpha": 0.0},
    "PAINT": {"alpha": 0.0, "beta": 0.0},
    "PASTA": {"alpha": 1.0},
    "PatchHeads": {"strength": 0.0},
    "SEG": {"scale": 0.0},
    "SLG": {"scale": 0.0},
    "SPIN": {"scale": 1.0},
    # All rows and keys in one cluster.
    "Scatterbrain": {"n_hashes": 2, "cluster_size": 1 << 30},
    "SoftPAG": {"scale": 0.0},
    "SpotLight": {"target": 0.0},
    "StoryAdapter": {"scale": 0.0},
    "TokenMerge": {"ratio": 0.0},
    "VAR": {"move_fraction": 0.0},
    "VHR": {"alpha": 1.0},
    "VisualHighlight": {"value": 1.0},
    "VisualKnockout": {"blocks": []},
    "VisualTokenMerge": {"keep": None, "ratio": 1.0},
    "ZeroTuning": {"gamma": 1.0},
}
# What stands for a sample's value while a recipe is checked, by the name of the parameter.
PLACEHOLDERS: dict[str, Any] = {
    "spans": ["word"],
    "words": ["word"],
    "groups": [["word"], ["other"]],
    "boxes": {"word": [0.0, 0.0, 1.0, 1.0]},
}
_SIMPLE = {"float": (int, float), "int": (int,), "str": (str,), "bool": (bool,), "None": (type(None),)}
ZOO = "zoo:"
# The parameter that marks tokens.
SPANS = "spans"


@dataclass(frozen=True)
class Method:
    """One intervention of an arm, before it meets samples.

    Attributes:
        name, cls: of the method. params: as the recipe has them. heads, where: the selection. place: in the recipe.
        random_spans: a draw, from 1: other spans of the same lengths take the place of the marked ones; 0: none.
    """

    name: str
    cls: type[Intervention]
    params: dict[str, Any]
    heads: HeadSet | None
    where: Where
    place: str
    random_spans: int = 0

    def per_sample(self) -> tuple[str, ...]:
        """Keys of a sample that parameters are taken from."""
        return tuple(v["sample"] for v in self.params.values() if is_sample(v))

    def make(self, samples: Sequence[Sample], context: Any = None) -> Intervention:
        """The intervention for a batch.

        Args:
            samples: of the batch, in order. context: has `tokenizer` and `processor`, for methods on texts.

        Raises:
            RecipeError: a sample lacks a key, or the values do not make the method.
        """
        values = {name: value(v, samples, f"{self.place}.params.{name}") for name, v in self.params.items()}
        if self.random_spans:
            values[SPANS] = [
                random_spans(spans, s, self.random_spans, _tokenizer(context), self.place)
                for spans, s in zip(values[SPANS], samples, strict=True)
            ]
        return self.built(values, context, self.heads)

    def placeholder(self) -> Intervention | None:
        """The method with made-up values in place of samples'; None where nothing is known to stand for them."""
        values = {}
        for name, given in self.params.items():
            if is_sample(given) and name not in PLACEHOLDERS:
                return None
            values[name] = [PLACEHOLDERS[name]] if is_sample(given) else value(given, (), name)
        return self.built(values, None, self.heads)

    def built(self, values: dict[str, Any], context: Any, heads: Any) -> Intervention:
        """The intervention with these values of its parameters, and these heads (or a set for each sample).

        Raises:
            RecipeError: they do not make the method.
        """
        names = {f.name for f in fields(self.cls)}
        where = self.where
        if heads is not None and "heads" in names:
            values["heads"] = heads
        try:
            if heads is not None and "heads" not in names:
                where = where & Where(heads=heads)
            if "tokenizer" in names:
                values["tokenizer"] = _tokenizer(context)
            return self.cls(**values, where=where)
        except (AttnSteerError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise RecipeError(f"{self.place} ({self.name}): {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: what `arms.json` says, and by which two arms are the same."""
        return {
            "method": self.name,
            "params": self.params,
            "heads": None if self.heads is None else self.heads.to_json(),
            "where": {k: v.to_json() if isinstance(v, HeadSet) else v for k, v in self.where.to_dict().items()},
            **({"random_spans": self.random_spans} if self.random_spans else {}),
        }


def random_spans(spans: Any, sample: Sample, draw: int, tokenizer: Any, place: str) -> Any:
    """Spans of the same lengths elsewhere in the prompt, placed by hash: no generator's state, and the same on every machine.

    Args:
        spans: (start, stop) in tokens; None or none at all: the sample is left alone, as it was. draw: from 1.

    Raises:
        RecipeError: they are not ranges of tokens, or there is no tokenizer that tells how long the prompt is.
    """
    if spans is None or not spans:
        return spans
    if any(not isinstance(s, (list, tuple)) or len(s) != 2 or not all(isinstance(i, int) for i in s) for s in spans):
        raise RecipeError(f"{place}.params.{SPANS}: {spans!r} are no ranges of tokens, so none can be drawn at random.")
    if tokenizer is None:
        raise RecipeError("controls.random_spans: without a tokenizer it is not known how many tokens a prompt has.")
    count = len(tokenizer(sample["prompt"]).input_ids)
    found = []
    for number, (start, stop) in enumerate(spans):
        length = min(stop - start, count)
        key = hashlib.sha256(f"{draw}:{sample['id']}:{number}".encode()).digest()
        first = int.from_bytes(key[:8], "big") % (count - length + 1)
        found.append([first, first + length])
    return found


def _tokenizer(context: Any) -> Any:
    found = getattr(context, "tokenizer", None)
    return getattr(getattr(context, "processor", None), "tokenizer", None) if found is None else found


def is_sample(value: Any) -> bool:
    """Whether a value of a recipe stands for a key of each sample."""
    return isinstance(value, Mapping) and set(value) == {"sample"}


def value(given: Any, samples: Sequence[Sample], place: str) -> Any:
    """A value of a recipe as a method takes it: `{sample: key}` becomes a list with one item per sample; mappings with keys
    that are no texts, and infinities, are written as `steer.json` writes them ($pairs, $float)."""
    if is_sample(given):
        return [_of_sample(s, given["sample"], place) for s in samples]
    if isinstance(given, Mapping):
        if set(given) == {"$pairs"}:
            return {_key(k): value(v, samples, place) for k, v in given["$pairs"]}
        if set(given) == {"$float"}:
            return float(given["$float"])
        return {k: value(v, samples, place) for k, v in given.items()}
    return [value(v, samples, place) for v in given] if isinstance(given, list) else given


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def _of_sample(sample: Sample, key: str, place: str) -> Any:
    if key not in sample:
        raise RecipeError(
            f"{place}: sample {sample.get('id')!r} has no {key!r}; it has {listing(sample)}.{did_you_mean(key, sample)}"
        )
    return sample[key]


def method(spec: InterventionSpec, place: str, folder: Path, model: ModelSpec, calibrated: HeadSet | None) -> Method:
    """An intervention of a recipe.

    Args:
        place: its path in the recipe, for messages. folder: what files are relative to. model: for heads of the zoo.
        calibrated: heads that a search found.

    Raises:
        RecipeError: an unknown method, parameter or selection, a wrong type, a file of heads that cannot be read.
    """
    try:
        cls = get_method(spec.method)
    except AttnSteerError as error:
        raise RecipeError(f"{place}.method: {error}") from error
    check_names(cls, spec.method, spec.params, f"{place}.params")
    required = [f.name for f in settable(cls).values() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in spec.params]
    if missing:
        raise RecipeError(f"{place}.params: {spec.method} needs {listing(missing)}.")
    heads = head_set(spec.heads, f"{place}.heads", folder, model, calibrated)
    return Method(spec.method, cls, dict(spec.params), heads, where(spec.where, f"{place}.where"), place)


def settable(cls: type[Intervention]) -> dict[str, Field[Any]]:
    """Fields that `params` may have: `heads` and `where` have sections of their own, objects have no form in YAML."""
    return {f.name: f for f in fields(cls) if f.metadata.get("save", True) and f.name not in ("heads", "where")}


def check_names(cls: type[Intervention], name: str, params: Mapping[str, Any], place: str) -> None:
    """Raise a RecipeError for a parameter that the method does not have, or whose type cannot be its own."""
    known = settable(cls)
    for key, given in params.items():
        if key not in known:
            other = (
                f" It has a place of its own, {place.rpartition('.')[0]}.{key}." if key in ("heads", "where") else ""
            )
            raise RecipeError(
                f"{place}.{key}: {name} has no such parameter; there are {', '.join(known)}.{other or did_you_mean(key, known)}"
            )
        if is_sample(given):
            if not isinstance(given["sample"], str):
                raise RecipeError(f"{place}.{key}: {{sample: {given['sample']!r}}}: give the name of a key.")
            form = declared(cls, key)
            if isinstance(form, (Number, Choice, Flag)) and not form.per_sample:
                raise RecipeError(
                    f"{place}.{key}: {name} takes one {key} for all samples ({form.describe()}), not one for each."
                )
            continue
        _check_form(given, f"{place}.{key}")
        _check_type(known[key], given, f"{place}.{key}")


def _check_form(given: Any, place: str) -> None:
    """Raise a RecipeError for a $pairs or $float that is none."""
    if isinstance(given, list):
        for item in given:
            _check_form(item, place)
    if not isinstance(given, Mapping):
        return
    if is_sample(given):
        raise RecipeError(f"{place}: {{sample: ...}} stands for a whole parameter, not for a part of one.")
    if "$pairs" in given:
        pairs = given["$pairs"]
        if len(given) > 1 or not isinstance(pairs, list) or any(not isinstance(p, list) or len(p) != 2 for p in pairs):
            raise RecipeError(f"{place}: $pairs is a list of [key, value], and stands alone.")
        if any(isinstance(k, Mapping) or (isinstance(k, list) and not _flat(k)) for k, _ in pairs):
            raise RecipeError(f"{place}: a key of $pairs is a text, a number, or a list of these.")
    elif "$float" in given:
        if len(given) > 1 or given["$float"] not in ("inf", "-inf"):
            raise RecipeError(f'{place}: $float is "inf" or "-inf", and stands alone.')
    for item in given.values():
        _check_form(item, place)


def _flat(items: list[Any]) -> bool:
    return not any(isinstance(i, (list, Mapping)) for i in items)


def _check_type(field: Field[Any], given: Any, place: str) -> None:
    """Check annotations made of plain types; others are left to the method."""
    names = [n.strip() for n in str(field.type).split("|")]
    if not set(names) <= set(_SIMPLE):
        return
    plain = math.inf if isinstance(given, Mapping) and set(given) == {"$float"} else given
    allowed = tuple(t for n in names for t in _SIMPLE[n])
    # True is an int to Python.
    wrong = isinstance(plain, bool) and bool not in allowed
    if wrong or not isinstance(plain, allowed):
        raise RecipeError(f"{place}: {given!r} is {type(given).__name__}; {field.type} is needed.")


def where(given: Mapping[str, Any] | None, place: str) -> Where:
    """A `Where` from its fields.

    Raises:
        RecipeError: an unknown field, or a value that makes no selection.
    """
    known = [f.name for f in fields(Where)]
    for key in given or ():
        if key not in known:
            raise RecipeError(f"{place}.{key}: Where has {', '.join(known)}.{did_you_mean(key, known)}")
    values = dict(given or {})
    try:
        if isinstance(values.get("heads"), Mapping):
            values["heads"] = _inline(values["heads"])
        return Where(**values)
    except (AttnSteerError, TypeError, ValueError) as error:
        raise RecipeError(f"{place}: {error}") from error


def _inline(heads: Mapping[str, Any]) -> HeadSet:
    return HeadSet.from_json(heads)


def head_set(
    given: str | Mapping[str, Any] | None, place: str, folder: Path, model: ModelSpec, calibrated: HeadSet | None
) -> HeadSet | None:
    """Heads as a recipe names them.

    Raises:
        RecipeError: there is no such file, or it holds no head set; heads of the zoo for a model that is not of it.
    """
    if given is None or given == "calibrated":
        return calibrated if given else None
    try:
        if isinstance(given, Mapping):
            return _inline(given)
        if given.startswith(ZOO):
            return HeadSet.load(_zoo_file(given.removeprefix(ZOO), model))
        return HeadSet.load(folder / given)
    except (AttnSteerError, ValueError) as error:
        raise RecipeError(f"{place}: {error}") from error


def _zoo_file(name: str, model: ModelSpec) -> Path:
    from ..zoo.folders import folder

    if model.zoo is None:
        raise RecipeError(f"{ZOO}{name} are heads of an embedded model; this recipe has another one.")
    root = folder(model.zoo)
    found = sorted(p.parent.name for p in root.glob("*/heads.safetensors"))
    if name not in found:
        raise RecipeError(
            f"{model.zoo} has no heads {name!r}; it has {listing(found) or 'none'}.{did_you_mean(name, found)}"
        )
    return root / name / "heads.safetensors"
