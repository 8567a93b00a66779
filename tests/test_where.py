"""`Where`: forms of each field, what it selects, and what it refuses."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsteer import HeadSet, Where
from attnsteer.errors import SelectionError
from attnsteer.site import Site

DECODER = [Site(f"model.layers.{i}.self_attn", i, "self", 4, 2, causal=True) for i in range(12)]
VISION = [Site(f"vision.layers.{i}.attn", i, "self", 2, 2, modality="vision", stack="encoder") for i in range(3)]
UNET = [
    Site(f"{block}.attentions.0.blocks.0.attn{n}", layer, kind, 8, 8, "image", "denoiser", "unet")
    for layer, block in enumerate(("down_blocks.0", "mid_block", "up_blocks.0"))
    for n, kind in ((1, "self"), (2, "cross"))
]


def chosen(where: Where, sites: list[Site] = DECODER, main: tuple[str, ...] = ("text",)) -> dict[int, Any]:
    """Layer -> heads."""
    return {site.layer: heads for site, heads in where.resolve(sites, main)}


# ------------------------------------------------------------------------------------------------ forms of fields


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 30)), min_size=1, max_size=6), st.booleans())
def test_a_range_string_names_what_it_spells(parts: list[tuple[int, int]], spaced: bool) -> None:
    text = (", " if spaced else ",").join(f"{a}-{a + n}" if n else str(a) for a, n in parts)
    assert Where(layers=text).layers == tuple(sorted({i for a, n in parts for i in range(a, a + n + 1)}))


@given(st.text(alphabet="0123456789-, :x.", max_size=12))
def test_a_range_string_gives_layers_or_a_selection_error(text: str) -> None:
    try:
        layers = Where(layers=text).layers
    except SelectionError as error:
        assert repr(text) in str(error) or "layers" in str(error)
    else:
        assert layers and list(layers) == sorted(set(layers)) and min(layers) >= 0
        # every number that is spelled out is selected
        assert {int(n) for n in text.replace("-", ",").replace(" ", "").split(",")} <= set(layers)


@given(st.sets(st.integers(0, 50), min_size=1))
def test_all_forms_of_the_same_layers_are_equal(layers: set[int]) -> None:
    forms = [layers, sorted(layers), tuple(layers), ",".join(map(str, layers)), iter(layers)]
    assert len({Where(layers=form) for form in forms}) == 1


def test_an_int_and_a_range_are_layers() -> None:
    assert Where(layers=3).layers == (3,)
    assert Where(layers=range(2, 8, 3)).layers == (2, 5)
    assert Where(layers=[-1, 0]).layers == (-1, 0)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("layers", "3-1", "3-1"),
        ("layers", "", "FIRST-LAST"),
        ("layers", "1,,2", "FIRST-LAST"),
        ("layers", "0-99999999", "more than"),
        ("layers", "9" * 400, "FIRST-LAST"),
        ("layers", 1.5, "1.5"),
        ("layers", True, "True"),
        ("layers", [], "non-empty"),
        ("layers", [1, "2"], "ints"),
        ("heads", -1, "not negative"),
        ("heads", [0, 1.0], "ints"),
        ("heads", {0: [-1]}, "non-negative integers"),
        ("kinds", "cros", "Did you mean 'cross'"),
        ("kinds", [], "at least one"),
        ("kinds", 3, "kinds=3"),
        ("phases", "decoding", "Did you mean 'decode'"),
        ("branches", "conditional", "cond"),
        ("modalities", "pictures", "image"),
        ("modules", "attn(", "regular expression"),
        ("modules", [], "at least one pattern"),
        ("modules", 3, "modules=3"),
        ("modules", [3], "regular expression"),
        ("steps", -1, "not negative"),
        ("steps", (0.5, 0.2), "fractions"),
        ("steps", (0.0, 1.5), "fractions"),
        ("steps", (0.1,), "fractions"),
        ("rows", "first", "last"),
        ("rows", (3, 3), "start, stop"),
        ("rows", (-1, 3), "start, stop"),
        ("rows", (False, True), "start, stop"),
    ],
)
def test_a_wrong_value_is_refused_when_it_is_given(field: str, value: Any, words: str) -> None:
    with pytest.raises(SelectionError) as caught:
        Where(**{field: value})
    assert field.rstrip("s") in str(caught.value).lower() and words in str(caught.value)


@pytest.mark.parametrize(
    "field", ["layers", "heads", "kinds", "phases", "branches", "modalities", "modules", "steps", "rows", "parts"]
)
@pytest.mark.parametrize("value", [torch.tensor(1.0, requires_grad=True), torch.ones((), device="meta")])
def test_a_tensor_that_is_no_plain_number_is_refused(field: str, value: Any) -> None:
    with pytest.raises(SelectionError, match=rf"{field}="):
        Where(**{field: value})


def test_it_is_immutable_hashable_and_prints_what_is_set() -> None:
    where = Where(layers="1-3", kinds="self", heads=HeadSet({1: [0]}))
    with pytest.raises(FrozenInstanceError):
        where.layers = (4,)  # type: ignore[misc]
    assert hash(where) == hash(replace(where))
    assert repr(where) == "Where(layers=(1, 2, 3), heads=HeadSet({1: [0]}), kinds=('self',))"
    assert where.to_dict() == {"layers": [1, 2, 3], "heads": HeadSet({1: [0]}), "kinds": ["self"]}
    assert Where(**where.to_dict()) == where


def test_and_joins_fields_and_refuses_two_values_for_one() -> None:
    assert Where(layers=1) & Where(heads=[0]) == Where(layers=1, heads=0)
    assert Where(layers=1) & Where(layers="1") == Where(layers=1)
    with pytest.raises(SelectionError, match="two selections name layers"):
        Where(layers=1) & Where(layers=2)


# ------------------------------------------------------------------------------------------------- what it selects


def test_layer_one_is_not_ten_or_eleven() -> None:
    assert list(chosen(Where(layers=1))) == [1]
    assert list(chosen(Where(modules=r"model\.layers\.1\.self_attn"))) == [1]


def test_a_pattern_must_match_the_whole_path() -> None:
    with pytest.raises(SelectionError, match=r"whole path.*model\.layers\.0\.self_attn"):
        chosen(Where(modules=r"layers\.1"))
    assert len(chosen(Where(modules=r".*layers\.1.*"))) == 3
    assert len(Where(modules=r"unet\.mid_block\..*").resolve(UNET, ("image",))) == 2


def test_no_selection_is_the_main_modality() -> None:
    sites = [*DECODER, *VISION]
    assert {s.modality for s, _ in Where().resolve(sites, ("text",))} == {"text"}
    assert {s.modality for s, _ in Where(modalities=["vision", "text"]).resolve(sites, ("text",))} == {"text", "vision"}


def test_a_head_set_does_not_mean_layers_of_several_towers_at_once() -> None:
    sites, both = [*DECODER, *VISION], ("text", "vision")
    with pytest.raises(SelectionError, match=r"layer 1, of which there is one in each of text, vision.*modalities"):
        Where(heads=HeadSet({1: [0]}), modalities=both).resolve(sites, ("text",))
    # A layer that one tower alone has, and a set for each.
    assert [s.name for s, _ in Where(heads=HeadSet({7: [0]}), modalities=both).resolve(sites, ("text",))] == [
        DECODER[7].name
    ]
    assert [s.name for s, _ in Where(heads=HeadSet({1: [0]}), modalities="vision").resolve(sites, ())] == [
        VISION[1].name
    ]
    # Two experts of one pipeline are built alike, a prior and a denoiser are not.
    unets = [replace(s, component="unet_2") for s in UNET]
    found = Where(heads=HeadSet({1: [0]}), kinds="self").resolve([*UNET, *unets], ("image",))
    assert [s.component for s, _ in found] == ["unet", "unet_2"]
    with pytest.raises(SelectionError, match="layer 1, of which"):
        Where(heads=HeadSet({1: [0]}), kinds="self").resolve([*UNET, *unets[:4]], ("image",))


def test_negative_layers_count_from_the_end_of_each_stack() -> None:
    assert list(chosen(Where(layers=-1))) == [11]
    both = Where(layers=-1, modalities=("text", "vision")).resolve([*DECODER, *VISION], ("text",))
    assert [s.layer for s, _ in both] == [11, 2]


def test_negative_layers_mean_the_whole_stack_also_under_a_narrower_selection() -> None:
    pattern = r"model\.layers\.[0-3]\.self_attn"
    assert list(chosen(Where(modules=pattern, layers=-9))) == [3]
    with pytest.raises(SelectionError, match=r"names layers \[-1\]"):
        chosen(Where(modules=pattern, layers=-1))


def test_kinds_default_to_those_of_the_method() -> None:
    assert {s.kind for s, _ in Where().resolve(UNET, ("image",), kinds=("self",))} == {"self"}
    assert {s.kind for s, _ in Where(kinds="cross").resolve(UNET, ("image",))} == {"cross"}


def test_heads_are_the_same_in_each_layer_or_those_of_a_head_set() -> None:
    assert chosen(Where(layers="2-3", heads=[1, 0, 1])) == {2: (0, 1), 3: (0, 1)}
    assert chosen(Where(layers=2)) == {2: None}
    assert chosen(Where(heads=HeadSet({5: [3, 0], 2: [1]}))) == {2: (1,), 5: (0, 3)}
    assert chosen(Where(heads={5: [3]})) == {5: (3,)}


# ------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (Where(layers=12), ["[12]", "0, 1, 2", "11"]),
        (Where(layers=[3, 40, 50]), ["[40, 50]"]),
        (Where(layers=-13), ["[-13]"]),
        (Where(kinds="cross"), ["kinds", "self"]),
        (Where(modalities="image"), ["image", "text"]),
        (Where(heads=4), ["[4]", "4 heads", "0 to 3", "another model"]),
        (Where(heads=HeadSet({3: [2, 7]})), ["[7]", "layer 3"]),
        (Where(heads=HeadSet({12: [0]})), ["[12]", "another model"]),
        (Where(heads=HeadSet([])), ["empty"]),
        (Where(layers=2, heads=HeadSet({2: [0], 3: [0]})), ["[3]", "[2]"]),
        (Where(heads=HeadSet({0: [0]}, shape=(12, 8))), ["(12, 8)", "(12, 4)"]),
        (Where(heads=HeadSet({0: [0]}, shape=(32, 4))), ["(32, 4)", "(12, 4)"]),
        (Where(heads=HeadSet({0: [0]}, shape=(6, 4))), ["(6, 4)", "(12, 4)"]),
        (Where(layers=0, heads=HeadSet({0: [0]}, shape=(32, 4))), ["(32, 4)"]),
    ],
)
def test_what_does_not_exist_is_an_error_that_says_what_does(where: Where, words: list[str]) -> None:
    with pytest.raises(SelectionError) as caught:
        where.resolve(DECODER, ("text",))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_head_set_of_this_model_passes_also_with_fewer_layers() -> None:
    heads = HeadSet({0: [0], 3: [2]}, shape=(12, 4))
    assert chosen(Where(heads=heads)) == {0: (0,), 3: (2,)}
    assert chosen(Where(heads=heads, layers="0-3")) == {0: (0,), 3: (2,)}


# ------------------------------------------------------------------------------------------------ phases and steps


def test_phases_and_steps_hold_where_they_are_named() -> None:
    assert Where(phases="decode").active("decode", None, None)
    assert not Where(phases="decode").active("prefill", None, None)
    assert [s for s in range(10) if Where(steps=range(2, 4)).active(None, s, None)] == [2, 3]


@pytest.mark.parametrize(
    ("steps", "total", "expected"),
    [((0.0, 0.5), 10, range(5)), ((0.5, 1.0), 10, range(5, 10)), ((0.0, 0.25), 10, range(3)), ((0.25, 1.0), 3, [1, 2])],
)
def test_fractions_include_their_start_and_exclude_their_stop(steps: Any, total: int, expected: Any) -> None:
    assert [s for s in range(total) if Where(steps=steps).active(None, s, total)] == list(expected)


@given(st.floats(0.01, 0.99), st.integers(1, 60))
def test_two_fractions_that_meet_share_no_step_and_miss_none(cut: float, total: int) -> None:
    early, late = Where(steps=(0.0, cut)), Where(steps=(cut, 1.0))
    assert all(early.active(None, s, total) != late.active(None, s, total) for s in range(total))


def test_fractions_of_an_unknown_schedule_are_refused() -> None:
    with pytest.raises(SelectionError, match="length of the schedule"):
        Where(steps=(0.0, 0.5)).active(None, 0, None)
