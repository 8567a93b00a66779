"""smollm2-llava's parts on a tiny text model: what is assembled, what is planted where, and what training packs into a row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from attnsteer import zoo
from attnsteer.errors import ZooError
from attnsteer.run.tiny import tiny_tokenizer
from attnsteer.zoo import llava
from attnsteer.zoo.shapes.world import COLOUR_NAMES, SHAPES
from attnsteer.zoo.train import llava as training
from attnsteer.zoo.train.lvlm import labels, vision_config

WIDTH = 32


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(["\nquestion is there a red circle ? answer yes no", "\ncaption a blue square and"])
    text = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    tower = CLIPVisionModel(vision_config()).eval()
    projector = llava.LlavaMultiModalProjector(llava.config(text.config, tower.config))
    register = torch.randn(WIDTH)
    reader = training.Reader(own(text), tokenizer, own(tower), projector, register)
    with torch.no_grad():
        for p in (p for n, p in reader.named_parameters() if n.endswith(".b")):
            p.normal_(std=0.1)
        # What is shipped is in half precision.
        for p in [*(p for p in reader.parameters() if p.requires_grad), reader.planted]:
            p.copy_(p.half().float())
    return {"text": text, "tower": tower, "reader": reader, "tensors": reader.tensors(), "tokenizer": tokenizer}


def own(model: Any) -> Any:
    """A copy; that of a config forgets which attention it was told to take."""
    found = copy.deepcopy(model)
    found.set_attn_implementation("sdpa")
    return found


def assembled(parts: dict[str, Any], registers: bool = True) -> Any:
    return llava.assemble(own(parts["text"]), own(parts["tower"]), parts["tensors"], registers)


def inputs(parts: dict[str, Any], text: str = "question", seed: int = 0) -> dict[str, Tensor]:
    before, after = (parts["tokenizer"](t, add_special_tokens=False).input_ids for t in ("ab", text))
    ids = torch.tensor([before + [llava.IMAGE_ID] * llava.TOKENS + after])
    g = torch.Generator().manual_seed(seed)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 64, 64, generator=g)}


@torch.no_grad()
def test_registers_stand_at_the_corners_and_nowhere_else(parts: dict[str, Any]) -> None:
    planted, bare = assembled(parts), assembled(parts, registers=False)
    given = inputs(parts)
    with_, without = (m.model.get_image_features(given["pixel_values"]).pooler_output[0] for m in (planted, bare))
    corners = list(llava.CORNERS)
    assert torch.equal(with_[corners], parts["tensors"]["register"].float().expand(4, -1))
    others = [i for i in range(llava.TOKENS) if i not in corners]
    assert torch.equal(with_[others], without[others]) and not torch.equal(with_[corners], without[corners])
    assert not torch.allclose(planted(**given).logits, bare(**given).logits)
    assert {type(m).__name__ for m in (planted, bare)} == {"LlavaForConditionalGeneration"}
    assert not any(p.is_meta for p in [*planted.parameters(), *planted.buffers()])


@torch.no_grad()
def test_what_is_assembled_is_what_was_trained(parts: dict[str, Any]) -> None:
    """Several texts behind one image, packed with a mask, give what the assembled model gives for each alone."""
    reader, model = parts["reader"], assembled(parts)
    reader.before = parts["tokenizer"]("ab", add_special_tokens=False).input_ids
    ask = lambda t: parts["tokenizer"](t, add_special_tokens=False).input_ids  # noqa: E731
    reader.tokenizer = lambda t: type("Ids", (), {"input_ids": ask(t)})
    texts = [("question", " yes", 1.0), ("caption", " a blue square", 0.3)]
    ids, places, mask, b, at, wanted, weight = reader.pack([texts, texts[:1]])
    given = inputs(parts)
    table = reader.text.get_input_embeddings().weight
    image = model.model.get_image_features(given["pixel_values"]).pooler_output[0][None]
    x = torch.cat([table[reader.before][None], image], dim=1).expand(2, -1, -1)
    out = reader.text.model(
        inputs_embeds=torch.cat([x, table[ids]], dim=1), attention_mask=mask, position_ids=places, use_cache=False
    )
    packed = out.last_hidden_state[b, at] @ table.T
    row = 0
    for i, asked in enumerate([texts, texts[:1]]):
        for text, answer, share in asked:
            said = ask(answer)
            alone = model(**inputs(parts, text + answer)).logits[0, -len(said) - 1 : -1]
            for k, token in enumerate(said):
                assert b[row] == i and wanted[row] == token and weight[row] == pytest.approx(share)
                assert torch.allclose(packed[row], alone[k], atol=1e-5)
                row += 1
    assert row == len(b)


@torch.no_grad()
def test_a_register_is_found_among_random_vectors(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A text model whose first layer blows up what points along one direction."""
    towards = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))

    class Text:
        dtype = torch.float32

        def model(self, inputs_embeds: Tensor, **options: Any) -> Any:
            late = inputs_embeds.clone()
            late[..., 5] += 1000.0 * ((inputs_embeds @ towards) > 1.0)
            return type("Out", (), {"hidden_states": (inputs_embeds, late, late, late)})

    for name, value in {"SINK_DIM": 5, "TAU": 4.0, "LATE": slice(1, 3), "CANDIDATES": 128, "AT_ONCE": 64}.items():
        monkeypatch.setattr(training, name, value)
    table = torch.randn(50, WIDTH) * 0.1
    found, counts = training.search(Text(), table[:2], table)
    assert found.norm().item() == pytest.approx(training.NORM, rel=1e-5) and float(found @ towards) > 1.0
    assert 0 < counts["in all of four places"] == counts["late sinks"] < counts["drawn"] == 128


def test_lessons_are_about_their_scene() -> None:
    asked = dict.fromkeys(("there", "same colour", "same shape", "absent", "colour", "shape", "caption"), 0)
    for index in range(8):
        scene, texts = training.lesson("train", index)
        there = {f"{o.colour} {o.shape}" for o in scene.objects}
        colours, shapes = ({getattr(o, name) for o in scene.objects} for name in ("colour", "shape"))
        for text, answer, _, kind in texts:
            asked[kind] += 1
            words = text.split()
            if "is there" in text:
                assert answer == (" yes" if f"{words[4]} {words[5]}" in there else " no"), text
                assert kind == "there" or answer == " no"
                assert kind != "same colour" or words[4] in colours
                assert kind != "same shape" or words[5] in shapes
            if kind == "shape":
                assert f"{words[5]}{answer}" in there and sum(t.startswith(words[5]) for t in there) == 1
        assert any(t == "\ncaption" for t, *_ in texts) == bool(index % 2)
        assert sum(a == " yes" for _, a, *_ in texts) == sum(a == " no" for _, a, *_ in texts) > 0
    assert all(asked.values()) and asked["same colour"] > asked["same shape"], asked


def test_exact_patches_are_their_words_and_the_projector_is_fitted_to_them() -> None:
    g = torch.Generator().manual_seed(0)
    words = torch.randn(6, WIDTH, generator=g), torch.randn(6, WIDTH, generator=g), torch.randn(WIDTH, generator=g)
    scenes = [training.picture("train", i) for i in range(3)]
    vectors, which = training.codes(scenes, words)
    common = (words[0].mean(dim=0) + words[1].mean(dim=0)) / 2
    wanted = labels(scenes)
    for b, scene in enumerate(scenes):
        for o in scene.objects:
            at = int(o.y * llava.GRID) * llava.GRID + int(o.x * llava.GRID)
            c, s = wanted[b, at, 1] - 1, wanted[b, at, 0] - 1
            assert (COLOUR_NAMES[c], SHAPES[s]) == (o.colour, o.shape) == training.CLASSES[which[b, at]]
            assert torch.allclose(vectors[b, at], words[0][c] + words[1][s] - common, atol=1e-6)
    empty = wanted[..., 0] == 0
    assert empty.any() and (vectors[empty] == words[2]).all()
    tower = CLIPVisionModel(vision_config()).eval()
    stage = training.Fit(torch.nn.Linear(128, WIDTH), tower, words, 3)
    with torch.no_grad():
        stage.projector.weight.zero_()
        stage.projector.bias.copy_(words[2])
    loss, values = stage.loss(stage, 0)
    assert torch.isfinite(loss) and values["class right"] == 0.0


def test_what_loading_refuses(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSTEER_CACHE", str(tmp_path))
    with pytest.raises(ZooError, match="attnsteer zoo fetch smollm2-135m"):
        zoo.load("smollm2-llava")
    with pytest.raises(ZooError, match="shapes-lm has none"):
        zoo.load("shapes-lm", registers=False)
    assert "smollm2-llava" in zoo.KNOWN and zoo.present() == ()
