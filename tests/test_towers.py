"""Head sets of several towers: their forms, what they select, and that they edit those heads and no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import ACT, HeadGate, HeadSet, Where, sites, steer
from attnsteer.errors import SelectionError, SerializationError
from attnsteer.intervention import Intervention
from attnsteer.recipe.parameters import where as recipe_where
from attnsteer.site import Site
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs

TEXT = [Site(f"model.layers.{i}.self_attn", i, "self", 4, 2, causal=True) for i in range(6)]
VISION = [
    Site(f"model.vision_tower.layers.{i}.attn", i, "self", 2, 2, modality="vision", stack="encoder") for i in range(3)
]
BOTH = HeadSet(
    {"vision_tower": {1: [0]}, "text": {1: [2, 3], 5: [0]}},
    scores={("text", 5, 0): 2.0, ("vision_tower", 1, 0): 1.0},
    shape={"text": (6, 4)},
    provenance={"from": "here"},
)

# ------------------------------------------------------------------------------------------------ forms


def test_mappings_triples_and_unions_are_one_form() -> None:
    triples = [("text", 5, 0), ("vision_tower", 1, 0), ("text", 1, 3), ("text", 1, 2), ("text", 1, 2)]
    assert HeadSet(triples).to_dict() == BOTH.to_dict() == {"text": {1: [2, 3], 5: [0]}, "vision_tower": {1: [0]}}
    assert HeadSet(BOTH) == BOTH and HeadSet(BOTH).shape == {"text": (6, 4)}
    assert HeadSet(triples[:2]) | HeadSet(triples[2:]) == HeadSet(triples)
    assert BOTH.towers == ("text", "vision_tower") and HeadSet({1: [0]}).towers == ()
    assert BOTH.tower("text").to_dict() == {1: [2, 3], 5: [0]} and BOTH.tower("text").shape == (6, 4)
    assert BOTH.tower("text").scores == {(5, 0): 2.0}
    assert list(
        HeadSet([("text", 0, 1), ("vision", 0, 1)], scores={("vision", 0, 1): 3, ("text", 0, 1): 1}).top(1)
    ) == [("vision", 0, 1)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": {1: [0]}, 2: [1]}, "name the tower of all heads, or of none"),
        ([("text", 1, 0), (1, 0)], "name the tower of all heads"),
        ([("", 1, 0)], "give .layer, head."),
        ([("1", 1, 0)], "give .layer, head."),
        ([("text", -1, 0)], "give .layer, head."),
        ({"text": {1: 0}}, "give a list of heads"),
        ({"text": [0]}, "give .layer, head."),
    ],
)
def test_what_is_no_set_of_towers_is_refused(given: Any, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        HeadSet(given)


def test_what_means_one_stack_names_the_way_out() -> None:
    for ask in (lambda: BOTH.layers, lambda: BOTH[1]):
        with pytest.raises(SelectionError, match=r"towers text, vision_tower.*heads\.tower\('text'\)"):
            ask()
    with pytest.raises(SelectionError, match=r"no tower 'txt'.*text"):
        BOTH.tower("txt")
    with pytest.raises(SelectionError, match=r"shape.*tower"):
        HeadSet({"text": {0: [0]}}, shape=(1, 1))
    with pytest.raises(SelectionError, match=r"head \('text', 0, 4\).*\(6, 4\)"):
        HeadSet({"text": {0: [4]}}, shape={"text": (6, 4)})


def test_files_keep_towers_and_those_without_stay_as_they_were(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    again = HeadSet.load(BOTH.save(tmp_path / "both.safetensors"))
    assert again == BOTH and again.shape == BOTH.shape and again.provenance == BOTH.provenance
    flat = HeadSet({3: [1, 2]}, shape=(4, 8))
    with safe_open(str(flat.save(tmp_path / "flat.safetensors")), framework="pt") as file:
        assert set(file.keys()) == {"heads", "scores"} and file.metadata()["schema"] == "1"
    assert HeadSet.load(tmp_path / "flat.safetensors") == flat
    assert HeadSet.from_json(BOTH.to_json()).to_dict() == BOTH.to_dict()
    assert recipe_where({"heads": BOTH.to_json()}, "here").heads.to_dict() == BOTH.to_dict()
    method = ACT(BOTH, beta=0.4)
    method.save_pretrained(tmp_path / "act")
    assert Intervention.from_pretrained(tmp_path / "act").heads == BOTH
    gate = HeadGate({("text", 1, 2): 0.5, ("vision", 0, 0): 0.0})
    gate.save_pretrained(tmp_path / "gate")
    assert Intervention.from_pretrained(tmp_path / "gate") == gate
    # Tampered places of towers.
    for wrong in ([7, 0], [-1, 0], [0]):
        save_file(
            {
                "heads": torch.tensor([[0, 0], [1, 0]]),
                "scores": torch.zeros(2, dtype=torch.float64),
                "towers": torch.tensor(wrong),
            },
            str(tmp_path / "wrong.safetensors"),
            metadata={"format": "attnsteer.headset", "schema": "2", "towers": '["text"]'},
        )
        with pytest.raises(SerializationError, match="does not hold a head set"):
            HeadSet.load(tmp_path / "wrong.safetensors")


# ------------------------------------------------------------------------------------------------ what it selects


def test_each_tower_has_the_layers_of_its_own_name() -> None:
    found = {s.path: heads for s, heads in Where(heads=BOTH).resolve([*TEXT, *VISION], ("text",))}
    assert found == {
        "model.layers.1.self_attn": (2, 3),
        "model.layers.5.self_attn": (0,),
        "model.vision_tower.layers.1.attn": (0,),
    }
    only = Where(heads=HeadSet({"vision.encoder": {2: [1]}})).resolve([*TEXT, *VISION], ("text",))
    assert [(s.path, heads) for s, heads in only] == [("model.vision_tower.layers.2.attn", (1,))]


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ({"audio": {0: [0]}}, r"tower 'audio'.*text\.decoder, vision\.encoder"),
        ({"vision": {5: [0]}}, r"tower 'vision'.*layers \[5\].*\[0, 1, 2\]"),
        ({"vision": {1: [3]}}, "heads .3. of layer 1 do not exist"),
        ({"vision": {1: [0]}, "encoder": {1: [1]}}, "in the tower 'encoder' and in 'vision'"),
        # A part of every path is no name of a tower.
        ({"model": {1: [0]}}, r"tower 'model'.*there is one in each of text, vision"),
    ],
)
def test_names_that_fit_none_or_several_are_refused(heads: Any, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        Where(heads=HeadSet(heads)).resolve([*TEXT, *VISION], ("text",))
    with pytest.raises(SelectionError, match="modality"):
        Where(heads=HeadSet({"vision": {1: [0]}}), modalities="audio").resolve([*TEXT, *VISION], ("text",))
    wrong = HeadSet({"vision": {1: [0]}}, shape={"vision": (9, 2)})
    with pytest.raises(SelectionError, match=r"shape \(9, 2\).*\(3, 2\)"):
        Where(heads=wrong).resolve([*TEXT, *VISION], ("text",))


def test_components_of_a_pipeline_are_towers() -> None:
    pair = [replace(TEXT[0], component=name, modality="image", stack="denoiser") for name in ("unet", "unet_2")]
    found = Where(heads=HeadSet({"unet_2": {0: [1]}, "unet": {0: [3]}})).resolve(pair, ("image",))
    assert [(s.component, heads) for s, heads in found] == [("unet", (3,)), ("unet_2", (1,))]


# ------------------------------------------------------------------------------------------------ what it edits


def _clip() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "projection_dim": 16}
    text = {**sizes, "num_attention_heads": 4, "vocab_size": 30, "eos_token_id": 2}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    return model, {"input_ids": torch.tensor([[5, 6, 7, 2]]), "pixel_values": torch.randn(1, 3, 16, 16)}


def _whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=30, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=10,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.tensor([[1, 5, 6]])}
    return WhisperModel(config).eval(), inputs


def _tiny(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = tiny_transformers(name)
    return model, tiny_transformers_inputs(name, model)


# Two names for towers that have a layer 1 of self-attention each.
CASES: Mapping[str, tuple[Callable[[], Any], str, str]] = {
    "clip": (_clip, "vision", "text"),
    "whisper": (_whisper, "audio", "text"),
    "llava": (lambda: _tiny("llava"), "vision_tower", "language_model"),
    "bart": (lambda: _tiny("bart"), "encoder", "decoder"),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_head_of_each_tower_is_gated_and_no_other(name: str) -> None:
    build, first, second = CASES[name]
    model, inputs = build()
    at = {
        t: next(s for s in sites(model) if s.in_tower(t) and s.layer == 1 and s.kind == "self") for t in (first, second)
    }
    assert at[first].path != at[second].path
    gates = {(first, 1, 0): 0.25, (second, 1, 1): -2.0}
    method = HeadGate(gates, where=Where(kinds="self"))

    def by_hand(site: Site, head: int, factor: float) -> Any:
        """Scale what enters the output projection for one head: a hook, and nothing of the library."""
        output = next(getattr(site.module, n) for n in ("out_proj", "o_proj") if hasattr(site.module, n))

        def scaled(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0].clone()
            width = x.shape[-1] // site.heads
            x[..., head * width : (head + 1) * width] *= factor
            return (x,)

        return output.register_forward_pre_hook(scaled)

    hooks = [by_hand(at[tower], head, gate) for (tower, _, head), gate in gates.items()]
    wanted = model(**inputs)
    for hook in hooks:
        hook.remove()
    plain = model(**inputs)
    with steer(model, method) as run:
        got = model(**inputs)
    assert {s.path for s in run.sites} == {at[first].path, at[second].path}
    pick = lambda out: out.get("logits", out.get("logits_per_image", out.get("last_hidden_state")))  # noqa: E731
    torch.testing.assert_close(pick(got), pick(wanted), atol=2e-6, rtol=2e-5)
    assert float((pick(plain) - pick(wanted)).abs().max()) > 1e-4


@torch.no_grad()
def test_a_set_for_each_sample_names_towers_too() -> None:
    from attnsteer import ZeroTuning

    model, inputs = _tiny("bart")
    inputs = {k: v[:1].repeat(2, 1) for k, v in inputs.items()}
    own = {"encoder": {1: [0]}, "decoder": {0: [1, 2]}}
    method = ZeroTuning(heads=[own, None], gamma=5.0, where=Where(kinds="self"))
    with steer(model, method):
        both = model(**inputs).logits
    with steer(model, method.new(heads=own)):
        alone = model(**{k: v[:1] for k, v in inputs.items()}).logits
    torch.testing.assert_close(both[:1], alone, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(both[1:], model(**inputs).logits[1:], atol=2e-6, rtol=2e-5)


# ------------------------------------------------------------------------------------------------ who writes it


def test_searches_write_the_tower_where_there_are_several() -> None:
    from attnsteer.search import michel

    model, inputs = _tiny("bart")
    ids = inputs["input_ids"][0].tolist()
    samples = [{"prompt": ids[:4], "candidates": [ids[4:5], ids[5:6]], "answer": 0}]
    found = michel(model, samples, where=Where(kinds="self"))
    assert found.towers == ("text.decoder", "text.encoder"), found
    assert set(found.shape) == set(found.towers) == set(found.provenance["importance"])
    with steer(model, HeadGate(dict.fromkeys(found.top(3), 0.0), where=Where(kinds="self"))):
        model(**inputs)


@torch.no_grad()
def test_a_profile_of_two_towers_has_a_row_for_each_head() -> None:
    from attnsteer.analysis import head_profile

    model, inputs = _tiny("bart")
    table = head_profile(model, [inputs], where=Where(kinds="self"))
    heads = {s.tower: s.heads for s in sites(model) if s.kind == "self"}
    assert {p[0] for p in table.heads} == set(heads) == set(table.shape)
    assert {"tower", "layer", "head", "entropy"} <= set(table.rows()[0])
    alone = head_profile(model, [inputs], where=Where(kinds="self", modules=r"(.*\.)?encoder\..*"))
    assert alone.heads == tuple(p[1:] for p in table.heads if p[0] == "text.encoder")
    assert alone["entropy"] == {p[1:]: v for p, v in table["entropy"].items() if p[0] == "text.encoder"}
    assert table.to_heads("entropy", top=4).towers


@torch.no_grad()
def test_gates_of_several_towers_are_baked() -> None:
    from attnsteer import bake

    model, inputs = _tiny("bart")
    gates = {("encoder", 1, 0): 0.25, ("decoder", 0, 1): 0.5}
    method = HeadGate(gates, where=Where(kinds="self"))
    with steer(model, method):
        wanted = model(**inputs).logits
    torch.testing.assert_close(bake(model, method, inputs=inputs)(**inputs).logits, wanted, atol=2e-6, rtol=2e-5)


@torch.no_grad()
def test_a_profile_beside_a_vision_tower_asks_for_no_tokens() -> None:
    from attnsteer.analysis import head_profile

    model, inputs = _tiny("llava")
    table = head_profile(model, [inputs], where=Where(kinds="self", modalities=("vision", "text")))
    assert {p[0] for p in table.heads} == {"vision", "text"} and "induction" not in table.columns


def test_what_draws_or_folds_one_stack_says_so() -> None:
    from attnsteer.errors import RecipeError
    from attnsteer.recipe.arms import random_heads, random_heads_of_all
    from attnsteer.viz import head_grid

    with pytest.raises(SelectionError, match=r"heads\.tower"):
        head_grid(BOTH)
    for draw in (random_heads, random_heads_of_all):
        with pytest.raises(RecipeError, match="sets of one tower"):
            draw(BOTH, {1: 4}, 1)
