"""Saving and loading interventions: every method, broken and hostile files, and the same effect after a reload."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attnsteer import (
    ACT,
    ADHH,
    CONFORM,
    HGAI,
    NAG,
    PAG,
    PAI,
    PAINT,
    PASTA,
    SEG,
    SLG,
    SPIN,
    VAR,
    VHR,
    AttendAndExcite,
    AttentionBuckets,
    AttentionRefocusing,
    AttentionRegulation,
    BlockMask,
    FreezeMaps,
    HeadGate,
    HeadSet,
    InjectMap,
    InstABoost,
    Intervention,
    PatchHeads,
    Scatterbrain,
    SoftPAG,
    SpotLight,
    StoryAdapter,
    TokenMerge,
    VisualHighlight,
    VisualKnockout,
    VisualTokenMerge,
    Where,
    ZeroTuning,
    capture,
    get_method,
    methods,
    steer,
)
from attnsteer.errors import RegistrationError, SelectionError, SerializationError, UnknownName
from attnsteer.testing import tiny_call, tiny_pipeline, tiny_transformers, tiny_transformers_inputs

HEADS = HeadSet({0: [0, 3], 2: [1]}, scores={(0, 0): 0.5}, shape=(3, 4), provenance={"from": "a test"})

# At least one of each built-in method, with every kind of value that is saved.
LANGUAGE: dict[str, Intervention] = {
    "act": ACT(HEADS, 0.3, alpha=1.2, decode="running", min_rows=2),
    "act-released": ACT.released_code(HEADS),
    "zerotuning": ZeroTuning(gamma=0.5, where=Where(layers="1-2", heads=[0, 2], phases="prefill")),
    "pasta": PASTA([[(0, 3)], [(2, 4), (6, 7)]], HEADS, 0.1, "include"),
    "spotlight": SpotLight([[(1, 3)], [(1, 3)]], 0.4, where=Where(heads=HEADS)),
    "spotlight-pooled": SpotLight([[(1, 3)], [(1, 3)]], 0.5, pooled=True, where=Where(layers=-1, rows=(2, 9))),
    "headgate": HeadGate({(0, 1): -1.5, (2, 3): 0}, where=Where(rows="last")),
    "instaboost": InstABoost([[(1, 3)], [(1, 3)]], 4.0, exclude_first_token=True, where=Where(layers=[1])),
    "injectmap": InjectMap("block:2", {0: [1], 2: [3]}, strength=0.5),
    "injectmap-mask": InjectMap("span", HEADS, "mask", rows=[1, 2], spans=[[(0, 3)], [(1, 4)]], sums="keep"),
    "blockmask": BlockMask(2, top_k=2, where=Where(layers=[0])),
    "blockmask-released": BlockMask.released_code(2, 0.1),
    "buckets": AttentionBuckets((10000.0, 200.0), "probs"),
}
# On models with images; where they are is said for the language model of the other tests.
VISION: dict[str, Intervention] = {
    "var": VAR((3, 17), 1.6, 0.2, 0.1, where=Where(layers=[0, 2])),
    "var-released": VAR.released_code((3, 17), 1.6, rho=0.9, where=Where(heads=HEADS)),
    "vhr": VHR(0.5, rows="last", last=2, outliers=False),
    "pai": PAI(0.8, {1: [0]}),
    "hgai": HGAI(0.8, where=Where(layers=[1])),
    "paint": PAINT([[0, 3], []], [[1], [2, 4]], 0.9, 1.4),
    "adhh": ADHH(HEADS, 0.3),
    "spin": SPIN(0.5, 0.1, where=Where(layers=[0, 2])),
    "highlight": VisualHighlight(1.6, {1: [0, 2]}),
    "fewer": VisualTokenMerge.fastv(2, 0.25),
    "knockout": VisualKnockout([("last", "image"), ("question", "before")]),
}
GUIDANCE: dict[str, Intervention] = {
    "pag": PAG(2.0, where=Where(steps=(0.0, 0.5))),
    "softpag": SoftPAG(3.0, 0.4, "ii_identity", target="uniform", where=Where(modules=r"unet\.mid_block\..*attn1")),
    "seg": SEG(),
    "seg-blur": SEG(2.5, sigma=1.5, where=Where(modules=r".*mid_block.*attn1", branches="cond", steps=[0, 2])),
    "story": StoryAdapter(0.4, frames=3, where=Where(heads={1: [0]})),
    "nag": NAG(("dark", "blurry"), 2.0, norm="l2", where=Where(steps=(0.0, 0.25))),
    "slg": SLG(2.0, stop=None, where=Where(layers=[1, 2])),
    "slg-heads": SLG.released_code(heads={1: [0]}, where=Where()),
    "seg-adaptive": SEG(adaptive=0.001, heads=HeadSet({3: [0]})),
}
BOXES = {"red cube": (0.0, 0.0, 0.5, 0.5), ("ball", 1): [(0.5, 0.5, 1.0, 1.0), (0.0, 0.5, 0.5, 1.0)]}
LATENT: dict[str, Intervention] = {
    "excite": AttendAndExcite(("cube",), {0.0: 0.1, 3: 0.2}, include="last+1", where=Where(layers=[0])),
    "excite-released": AttendAndExcite.released_code([["cube", ("ball", 2)], [(3, 5)]]),
    "regulation": AttentionRegulation([["cube"], [("ball", 2), (3, 5)]], 5, seed=3, where=Where(layers=[0])),
    "conform": CONFORM([("red", ("cube", 1)), "ball"], temperature=0.2),
    "conform-released": CONFORM.released_code([[[(2, 3)], ["dog"]], ["cube", "ball"]]),
    "refocusing": AttentionRefocusing(BOXES, stop_share=0.6, schedule=[(0.0, 0.5, 4.0, 2)]),
    "refocusing-released": AttentionRefocusing.released_code([BOXES, {"fox": (0, 0, 1, 0.5)}]),
}
DENOISERS: dict[str, Intervention] = {
    "merge": TokenMerge(0.4, (2, 1), where=Where(kinds="self")),
    "merge-frames": TokenMerge.fastvggt((4, 6), 3),
    "merge-vit": TokenMerge.tome(0.2),
    "scatter": Scatterbrain(16, 1, 8, seed=2),
}
ALL = LANGUAGE | VISION | GUIDANCE | LATENT | DENOISERS
# What they hold is a run's, which has files of its own (`Captured.load`).
NOT_SAVED = {FreezeMaps, PatchHeads}


def test_every_built_in_method_is_here() -> None:
    known = {get_method(name) for name in methods()}
    assert {cls for cls in known if cls.__module__.startswith("attnsteer.")} == {
        type(m) for m in ALL.values()
    } | NOT_SAVED


def test_a_method_that_holds_a_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_transformers("llama")
    with torch.no_grad(), capture(model, what=("q", "k", "output")) as seen:
        model(**tiny_transformers_inputs("llama", model))
    for cls in NOT_SAVED:
        with pytest.raises(SerializationError, match="Captured cannot be saved"):
            cls(seen).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_is_equal(name: str, tmp_path: Path) -> None:
    method = ALL[name]
    loaded = Intervention.from_pretrained(method.save_pretrained(tmp_path / "a" / "b"))
    assert loaded == method and type(loaded) is type(method)
    assert loaded.to_dict() == method.to_dict()
    assert type(method).from_pretrained(tmp_path / "a" / "b") == method
    json.dumps(method.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ALL)
def test_the_folder_has_json_and_safetensors_only(name: str, tmp_path: Path) -> None:
    ALL[name].save_pretrained(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(files) <= {"steer.json", "heads.safetensors"}
    record = json.loads(files["steer.json"])
    assert record["schema"] == 1 and record["method"] == type(ALL[name]).__name__
    assert {"attnsteer", "torch"} <= set(record["versions"])


def test_the_head_set_keeps_scores_and_provenance(tmp_path: Path) -> None:
    for method in (ACT(HEADS), SpotLight("x", where=Where(heads=HEADS))):
        loaded = Intervention.from_pretrained(method.save_pretrained(tmp_path))
        heads = loaded.selection().heads
        assert heads == HEADS and heads.shape == (3, 4) and heads.provenance == {"from": "a test"}


def test_infinity_is_saved(tmp_path: Path) -> None:
    SEG(sigma=math.inf).save_pretrained(tmp_path)
    assert "Infinity" not in (tmp_path / "steer.json").read_text()
    assert SEG.from_pretrained(tmp_path).sigma == math.inf


def test_a_tokenizer_is_not_saved(tmp_path: Path) -> None:
    method = SpotLight("a fox", tokenizer=object())
    loaded = SpotLight.from_pretrained(method.save_pretrained(tmp_path))
    assert loaded.tokenizer is None and loaded == method


def test_two_different_head_sets_are_refused(tmp_path: Path) -> None:
    method = ACT(HEADS, where=Where(heads=HeadSet({1: [1]})))
    with pytest.raises(SerializationError, match="two different head sets"):
        method.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unregistered_class_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Own(Intervention):
        pass

    with pytest.raises(UnknownName, match="register_method"):
        Own().save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------- the same effect


@pytest.mark.parametrize("name", LANGUAGE)
@torch.no_grad()
def test_a_reloaded_method_acts_the_same_on_a_language_model(name: str, tmp_path: Path) -> None:
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model, padding="left")

    def steered(method: Intervention) -> torch.Tensor:
        with steer(model, method):
            return model(**inputs).logits

    expected = steered(LANGUAGE[name])
    assert not torch.equal(expected, model(**inputs).logits)
    LANGUAGE[name].save_pretrained(tmp_path)
    assert torch.equal(steered(Intervention.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("name", ["pag", "softpag", "seg", "seg-blur"])
def test_a_reloaded_method_acts_the_same_on_a_pipeline(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")

    def steered(method: Intervention) -> torch.Tensor:
        with steer(pipe, method):
            return pipe(**tiny_call("sd", steps=3))[0]

    expected = steered(GUIDANCE[name])
    assert not torch.equal(expected, pipe(**tiny_call("sd", steps=3))[0])
    GUIDANCE[name].save_pretrained(tmp_path)
    assert torch.equal(steered(Intervention.from_pretrained(tmp_path)), expected)


def test_heads_of_another_model_are_noticed_when_it_is_steered(tmp_path: Path) -> None:
    model = tiny_transformers("llama")
    for heads, words in ((HeadSet({0: [9]}), r"\[9\].*another model"), (HeadSet({0: [0]}, shape=(32, 32)), "32, 32")):
        loaded = ACT.from_pretrained(ACT(heads).save_pretrained(tmp_path))
        with pytest.raises(SelectionError, match=words):
            steer(model, loaded)


# --------------------------------------------------------------------------------------------- broken files


def edited(folder: Path, saved: Intervention = LANGUAGE["act"], **changes: Any) -> Path:
    """A saved method with parts of its record changed; None removes a part, parameters are merged."""
    saved.save_pretrained(folder)
    path = folder / "steer.json"
    record = json.loads(path.read_text())
    record["parameters"] |= changes.pop("parameters", {}) or {}
    for gone in changes.pop("without", ()):
        del record["parameters"][gone]
    record = {k: v for k, v in (record | changes).items() if v is not None}
    path.write_text(json.dumps(record))
    return folder


GATES = HeadGate({(0, 1): 0.5})


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (ACT(), {"parameters": {"betta": 0.5}}, ["betta", "Did you mean 'beta'?", "threshold"]),
        (ACT(), {"parameters": {"tokenizer": "x"}}, ["tokenizer"]),
        (ACT(), {"parameters": {"where": {"layer": [1]}}}, ["layer", "Did you mean 'layers'?"]),
        (ACT(), {"parameters": {"where": {"layers": ["one"]}}}, ["where", "layers"]),
        (ACT(), {"parameters": {"where": {"kinds": ["crossed"]}}}, ["where", "Did you mean 'cross'"]),
        (ACT(), {"parameters": {"where": 3}}, ["where", "3"]),
        (ACT(), {"schema": 2}, ["schema 2", "upgrade attnsteer"]),
        (ACT(), {"schema": 0}, ["schema 0"]),
        (ACT(), {"schema": "1"}, ["integer 'schema'"]),
        (ACT(), {"schema": None}, ["schema"]),
        (ACT(), {"method": None}, ["method"]),
        (ACT(), {"method": ["ACT"]}, ["method"]),
        (ACT(), {"parameters": {"beta": "0.4"}}, ["ACT", "str"]),
        (ACT(), {"parameters": {"beta": None}}, ["ACT"]),
        (ACT(), {"parameters": {"beta": [[0.4]]}}, ["ACT"]),
        (ACT(), {"parameters": {"beta": 7}}, ["ACT", "beta=7"]),
        (ACT(), {"parameters": {"threshold": {"$float": "large"}}}, ["threshold", "large"]),
        (ACT(), {"parameters": {"threshold": {"$float": [1]}}}, ["threshold"]),
        (ACT(), {"parameters": {"heads": {"0": [1]}}}, ["ACT", "HeadSet"]),
        (ACT(), {"parameters": {"heads": 5}}, ["ACT", "HeadSet"]),
        (ACT(), {"parameters": {"heads": {"$heads": "heads.safetensors"}}}, ["no file", "heads.safetensors"]),
        (ACT(), {"parameters": {"heads": {"$heads": "../heads.safetensors"}}}, ["../heads.safetensors"]),
        (ACT(), {"parameters": {"heads": {"$heads": "/etc/passwd"}}}, ["/etc/passwd"]),
        (ACT(), {"parameters": {"heads": {"$heads": None}}}, ["None"]),
        (ACT(), {"parameters": {"where": {"heads": {"$heads": "../x"}}}}, ["../x"]),
        (GATES, {"without": ["gates"]}, ["lacks", "gates", "HeadGate"]),
        (GATES, {"parameters": {"gates": {"$pairs": 3}}}, ["gates"]),
        (GATES, {"parameters": {"gates": {"$pairs": [[[0, 1]]]}}}, ["gates"]),
        (GATES, {"parameters": {"gates": {"$pairs": [[{"a": 1}, 2]]}}}, ["gates"]),
        (GATES, {"parameters": {"gates": {"$pairs": [[[0, -1], 2]]}}}, ["HeadGate"]),
        (GATES, {"parameters": {"gates": {"$pairs": [[[0, 1], "2"]]}}}, ["HeadGate"]),
        (GATES, {"parameters": {"gates": [[0, 1, 0.5]]}}, ["HeadGate"]),
        (SpotLight("a"), {"parameters": {"spans": 3}}, ["SpotLight", "spans=3"]),
        (SpotLight("a"), {"parameters": {"spans": []}}, ["SpotLight"]),
        (PAG(), {"parameters": {"scale": "3"}}, ["PAG"]),
        (PAG(), {"parameters": {"joint": 1}}, ["PAG", "joint"]),
    ],
)
def test_a_wrong_record_is_one_clear_error(
    tmp_path: Path, method: Intervention, changes: dict[str, Any], words: list[str]
) -> None:
    folder = edited(tmp_path, method, **changes)
    with pytest.raises(SerializationError) as caught:
        Intervention.from_pretrained(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"ACT"', b"\xff\xfe", b"\x80\x04}q\x00.", b"[" * 100_000]
)
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "steer.json").write_bytes(content)
    with pytest.raises(SerializationError, match=r"steer\.json"):
        Intervention.from_pretrained(tmp_path)


def test_a_missing_record_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(SerializationError, match=r"no .*steer\.json"):
        Intervention.from_pretrained(tmp_path)
    (tmp_path / "steer.json").mkdir()
    with pytest.raises(SerializationError, match=r"steer\.json"):
        Intervention.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["nobody/nothing", "/nowhere/at/all", "../..x", "a b"])
def test_neither_folder_nor_hub_id_is_refused(source: str) -> None:
    with pytest.raises(SerializationError, match="neither a folder nor a hub repository"):
        Intervention.from_pretrained(source)


def test_an_unknown_method_is_listed_and_nothing_is_imported_for_it(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"'Actt'.*ZeroTuning.*Did you mean 'ACT'"):
        Intervention.from_pretrained(edited(tmp_path, method="Actt"))
    with pytest.raises(UnknownName, match="os:system"):
        Intervention.from_pretrained(edited(tmp_path, method="os:system"))


def test_another_class_is_refused(tmp_path: Path) -> None:
    GATES.save_pretrained(tmp_path)
    with pytest.raises(SerializationError, match="holds a HeadGate"):
        ACT.from_pretrained(tmp_path)
    with pytest.raises(SerializationError, match="holds a HeadGate"):
        SoftPAG.from_pretrained(tmp_path)


def test_a_base_class_takes_its_children(tmp_path: Path) -> None:
    assert SoftPAG.from_pretrained(PAG(2.0).save_pretrained(tmp_path)) == PAG(2.0)


def test_a_truncated_head_set_is_refused(tmp_path: Path) -> None:
    LANGUAGE["act"].save_pretrained(tmp_path)
    path = tmp_path / "heads.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(SerializationError, match="not a whole safetensors file"):
        Intervention.from_pretrained(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    for name, method in ALL.items():
        assert Intervention.from_pretrained(method.save_pretrained(tmp_path / name)) == method


def test_a_pickle_in_place_of_the_head_set_is_not_run(tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    LANGUAGE["act"].save_pretrained(tmp_path)
    (tmp_path / "heads.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SerializationError):
        Intervention.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------- the object itself


@pytest.mark.parametrize("name", ALL)
def test_a_method_is_frozen_and_new_makes_a_variant(name: str) -> None:
    method = ALL[name]
    with pytest.raises(AttributeError):
        method.where = Where()  # type: ignore[misc]
    variant = method.new(where=Where(modules=".*"))
    assert variant.where == Where(modules=".*") and method != variant and variant.new(where=method.where) == method


def test_its_own_heads_and_where_are_one_selection() -> None:
    assert ACT(HEADS, where=Where(layers=[0, 2])).selection() == Where(layers=[0, 2], heads=HEADS)
    assert ACT({0: [1]}).selection() == Where(heads={0: [1]})
    with pytest.raises(SelectionError, match="two selections name heads"):
        ACT(HEADS, where=Where(heads=[1])).selection()


@pytest.mark.parametrize("needs", ["tokens", (3,), ("tokens", None)])
def test_needs_is_a_tuple_of_names(needs: Any) -> None:
    """A string would be taken for its letters."""
    with pytest.raises(RegistrationError, match=r'Odd\.needs is .*needs = \("tokens",\)'):
        type("Odd", (Intervention,), {"needs": needs})
