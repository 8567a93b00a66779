"""The public names are a promise: a change of this list is a change of the interface."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import attnsteer
from attnsteer import Intervention, errors

METHODS = [
    "ACT",
    "ADHH",
    "AttendAndExcite",
    "AttentionBuckets",
    "AttentionRefocusing",
    "AttentionRegulation",
    "BlockMask",
    "CONFORM",
    "FreezeMaps",
    "HeadGate",
    "HGAI",
    "InjectMap",
    "InstABoost",
    "NAG",
    "PAG",
    "PAI",
    "PAINT",
    "PASTA",
    "PatchHeads",
    "Scatterbrain",
    "SEG",
    "SLG",
    "SoftPAG",
    "SPIN",
    "SpotLight",
    "StoryAdapter",
    "TokenMerge",
    "VAR",
    "VHR",
    "VisualHighlight",
    "VisualKnockout",
    "VisualTokenMerge",
    "ZeroTuning",
]
# Readers: what they are made of is no intervention.
READERS = ["AttentionPrompting", "CARVE", "ControlMLLM", "RefAM", "TAG"]
NAMES = [
    "Captured",
    "HeadSet",
    "Intervention",
    "LatentLoss",
    "Site",
    "Steering",
    "Tokens",
    "Where",
    "bake",
    "capture",
    "detach",
    "errors",
    "flow",
    "get_method",
    "methods",
    "register_host",
    "register_method",
    "rollout",
    "sites",
    "steer",
    "story",
    "zoo",
    *METHODS,
    *READERS,
]
ERRORS = [
    "AttnSteerError", "CaptureTooLarge", "CompositionError", "ContractError", "HubError", "MissingExtra", "NeverFired", "NotFinite",
    "RecipeError", "RecordError", "RegistrationError", "RunError", "SelectionError", "SerializationError", "UnknownName",
    "UnsupportedHost", "ZooError",
]  # fmt: skip
WARNINGS = ["NothingChanged"]
# Positional parameters and defaults that code and saved recipes rely on.
LATENT = (
    "updates=1, relative=False, stop_loss=None, size=16, include='words', scaled=True, blind_calls=False, early_stop=True, "
    "checkpointing=False"
)
SIGNATURES = {
    "AttendAndExcite": "words, thresholds, max_refinements=20, *, where, step_size=20.0, decay=0.5, until=0.5, "
    f"{LATENT}, sharpness=100.0, compete=None, smooth=True",
    "CONFORM": "groups, refine_at=(0.0, 0.2, 0.4), refinements=20, *, where, step_size=20.0, decay=0.5, until=0.6, "
    f"{LATENT}, temperature=0.5, form='ntxent', anchor=None, sharpness=None, compete=None, smooth=True",
    "AttentionRegulation": "words, until=0.5, strength=1.0, *, where, iterations=20, rate=100.0, momentum=0.25, decay=0.99, "
    "keep=True, seed=0",
    "LatentLoss": f"*, where, step_size=20.0, decay=0.5, until=0.5, {LATENT}",
    "ACT": "heads=None, beta=0.4, threshold=None, alpha=None, decode='frozen', min_rows=1, *, where, exclude='first_token'",
    "HeadGate": "gates, *, where",
    "AttentionBuckets": "bases=(10000.0, 17500.0, 18000.0, 19000.0, 20000.0, 25000.0), mix='logits', *, where",
    "FreezeMaps": "source, heads=None, new_tokens='live', *, where, same_tokens=True",
    "InjectMap": "source, heads=None, mode='replace', strength=1.0, *, where, rows=None, keys=None, share=None, sums='refuse', "
    "spans=None, sentence_ends=(), head_map=None, tokenizer=None",
    "PatchHeads": "source=None, heads=None, what='output', *, where, rows=None, strength=1.0, basis=None, head_map=None, "
    "tokenizer=None",
    "InstABoost": "spans, factor=3.0, *, where, exclude_first_token=True, tokenizer=None",
    "NAG": "negative, scale=4.0, tau=2.5, alpha=0.25, *, where, norm='l1'",
    "PAG": "scale=3.0, strength=1.0, joint='ii_identity', *, where, adaptive=0.0, heads=None, target='identity'",
    "PASTA": "spans, heads=None, alpha=0.01, scale_position='exclude', *, where, released=False, tokenizer=None",
    "SEG": "scale=3.0, sigma=inf, *, where, adaptive=0.0, heads=None",
    "SLG": "scale=2.8, start=0.01, stop=0.2, *, where, adaptive=0.0, heads=None",
    "SoftPAG": "scale=3.0, strength=1.0, joint='joint_identity', *, where, adaptive=0.0, heads=None, target='identity'",
    "SpotLight": "spans, target=0.2, pooled=False, *, where, tokenizer=None",
    "StoryAdapter": "scale=0.3, *, where, frames=None",
    "VAR": "sink_dims=None, tau=20.0, rho=0.5, min_image_mass=0.2, move_fraction=0.6, *, where, released=False, "
    "sinks='all', seed=0",
    "BlockMask": "block_size=512, top_k=None, threshold=0.25, select='query_head', *, where, released=False",
    "Scatterbrain": "nb_features=None, n_hashes=2, cluster_size=64, seed=0, *, where",
    "TokenMerge": "ratio=0.5, stride=(2, 2), use_rand=True, size_bias=True, *, where, match='grid', grid=None, frames=1, "
    "special=0, "
    "protect=0.0, seed=0",
    "VisualTokenMerge": "keep=None, ratio=0.25, method='cluster', layer=0, positions='keep', *, where, contextual=0, seed=0",
    "ADHH": "heads=None, threshold=0.4, *, where",
    "HGAI": "alpha=0.5, *, where",
    "PAI": "alpha=0.5, heads=None, *, where",
    "PAINT": "local, summary, alpha=0.7, beta=0.3, heads=None, *, where",
    "SPIN": "keep=0.95, scale=0.08, *, where, by='scores'",
    "VisualHighlight": "value, heads=None, *, where, step='all'",
    "VisualKnockout": "blocks=(('last', 'image'), ('generated', 'image')), *, where",
    "VHR": "alpha=2.0, *, where, rows='all', last=14, outliers=True, reinforce_both=True",
    "ZeroTuning": "heads=None, gamma=1.0, *, where",
    "Where": "layers=None, heads=None, kinds=None, modules=None, phases=None, steps=None, branches=None, rows=None, "
    "modalities=None, parts=None",
    "HeadSet": "heads, *, scores=None, shape=None, provenance=None",
    "capture": "target, where=None, *interventions, rows=None, what='map', keys=None, to='cpu', gradients=False, limit=None, "
    "tokenizer=None",
    "bake": "model, gates, *, inputs=None, inplace=False, save_to=None",
    "steer": "target, *interventions, measure=False, reference=False, control=False, named=None",
    "detach": "target",
    "sites": "target",
    "get_method": "name",
    "register_method": "cls=None, *, name=None",
    "register_host": "cls=None, *, name=None",
}


def signature(thing: object) -> str:
    """Names and defaults, without annotations; a default made by a factory is left out."""
    parts, starred = [], False
    for p in inspect.signature(thing).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            starred = True
            parts.append("*")
        made = p.default is p.empty or "factory" in repr(p.default)
        starred = starred or p.kind is p.VAR_POSITIONAL
        parts.append(f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name if made else f"{p.name}={p.default!r}")
    return ", ".join(parts)


def test_the_list_of_public_names() -> None:
    assert sorted(attnsteer.__all__) == sorted([*NAMES, "__version__"])
    assert sorted(dir(attnsteer)) == sorted(attnsteer.__all__)
    namespace: dict[str, object] = {}
    exec("from attnsteer import *", namespace)
    assert set(NAMES) <= set(namespace)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_loads_and_is_documented(name: str) -> None:
    thing = getattr(attnsteer, name)
    assert inspect.getdoc(thing) and thing is getattr(attnsteer, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    assert signature(getattr(attnsteer, name)) == SIGNATURES[name]


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'sterr'.*steer"):
        attnsteer.sterr  # noqa: B018
    with pytest.raises(ImportError):
        from attnsteer import sterr  # noqa: F401


def test_methods_is_a_function_and_a_package() -> None:
    assert isinstance(attnsteer.methods, ModuleType)
    assert set(METHODS) <= set(attnsteer.methods())
    from attnsteer.methods import ACT
    from attnsteer.methods.act import ACT as direct

    assert ACT is direct is attnsteer.ACT is attnsteer.methods.ACT is attnsteer.get_method("ACT")
    with pytest.raises(AttributeError, match="Did you mean 'ACT'"):
        attnsteer.methods.Act  # noqa: B018


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_frozen_interventions_with_a_paper(name: str) -> None:
    from attnsteer.catalogue import describe

    cls = attnsteer.get_method(name)
    assert issubclass(cls, Intervention) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    entry = describe(name, cls)
    assert entry.summary and "20" in entry.paper and entry.doors and entry.hosts


@pytest.mark.parametrize("package", ["", ".reading", ".recipe", ".results", ".run", ".search", ".viz"])
def test_a_package_shows_its_public_names_and_no_others(package: str) -> None:
    module = importlib.import_module(f"attnsteer{package}")
    assert dir(module) == sorted(module.__all__) == sorted(set(module.__all__))
    inner = {m.name for m in pkgutil.iter_modules(module.__path__)}
    for name in module.__all__:
        found = getattr(module, name)
        # A submodule of that name would stand in its place once it is imported.
        assert name not in inner or isinstance(found, ModuleType), name
    assert dir(module) == sorted(module.__all__)


def test_errors_are_one_family() -> None:
    found = [n for n, v in vars(errors).items() if isinstance(v, type) and v.__module__ == "attnsteer.errors"]
    assert sorted(found) == sorted([*ERRORS, *WARNINGS])
    assert all(issubclass(getattr(errors, n), Warning) for n in WARNINGS)
    assert all(issubclass(getattr(errors, n), errors.AttnSteerError) for n in ERRORS)
    assert issubclass(errors.SelectionError, ValueError) and issubclass(errors.UnknownName, KeyError)
    assert issubclass(errors.UnsupportedHost, TypeError) and issubclass(errors.NeverFired, RuntimeError)
    assert str(errors.UnknownName("two\nlines")) == "two\nlines"


def test_every_error_is_in_the_guide() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in guide for name in [*ERRORS, *WARNINGS])


def test_a_suggestion_is_for_close_names_only_and_ignores_case() -> None:
    assert errors.did_you_mean("softpag", ["SoftPAG", "PAG"]) == " Did you mean 'SoftPAG'?"
    assert errors.did_you_mean("xyz", ["SoftPAG", "PAG"]) == "" and errors.did_you_mean("x", []) == ""
    assert errors.listing(range(3)) == "0, 1, 2" and errors.listing(range(5), 2) == "0, 1, ... (3 more)"


def test_the_version_is_stated_once() -> None:
    from importlib.metadata import version

    assert attnsteer.__version__ == version("attnsteer")
