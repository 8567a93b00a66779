"""Recorded maps are the model's own: compared with what eager attention hands out, and with softmax(q k^T) written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import ACT, HeadSet, SoftPAG, Where, steer, zoo
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.testing import tiny_call, tiny_pipeline, tiny_transformers, tiny_transformers_inputs
from attnsteer.viz import PhraseMaps, PhraseRecorder, box_ratio, phrase_maps, word_maps
from attnsteer.viz.record import _word_tokens

HEADS = HeadSet({1: [0, 3], 2: [2]})
WORDS = [20, 31, 44, 57]
CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def llava() -> Any:
    eager = {"text_config": "eager", "vision_config": "sdpa"}
    return tiny_transformers("llava"), tiny_transformers("llava", attn_implementation=eager)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd")


@pytest.fixture(scope="module")
def inputs(llava: Any) -> dict[str, Tensor]:
    return tiny_transformers_inputs("llava", llava[0], batch=1, length=7)


def slow_maps(eager: Any, inputs: dict[str, Tensor], *methods: Any) -> Tensor:
    """[words, 4, 4]: the whole sequence at once; row t - 1 chooses token t."""
    start = int((inputs["input_ids"][0] == 3).nonzero()[0])
    n = inputs["input_ids"].shape[1]
    rows = []
    for k in range(len(WORDS)):
        ids = torch.cat([inputs["input_ids"], torch.tensor([WORDS[:k]], dtype=torch.long)], dim=1)
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            maps = eager(**given, output_attentions=True).attentions
        rows.append(torch.stack([maps[layer][0, head, n + k - 1, start : start + 16] for layer, head in HEADS]).mean(0))
    return torch.stack(rows).unflatten(-1, (4, 4))


class TestWords:
    def test_equal_to_the_maps_of_the_eager_model(self, llava: Any, inputs: dict[str, Tensor]) -> None:
        found = word_maps(llava[0], inputs, heads=HEADS, continuation=WORDS)
        assert found.ids == WORDS and found.words == [str(w) for w in WORDS]
        assert torch.allclose(found.maps, slow_maps(llava[1], inputs), atol=1e-6)

    def test_after_a_steering_that_edits_the_map(self, llava: Any, inputs: dict[str, Tensor]) -> None:
        """ACT in another head of a recorded site too: head groups come one after the other and are joined."""
        method = ACT(heads=HeadSet({1: [0, 1], 2: [2]}), beta=0.2, threshold=0.03)
        found = word_maps(llava[0], inputs, method, heads=HEADS, continuation=WORDS)
        # With a cache, the sinks are the prompt's: each later row alone, over the map that the eager model hands out.
        with steer(llava[1], method), torch.no_grad():
            out = llava[1](**inputs, use_cache=True, output_attentions=True)
            maps, cache = [out.attentions], out.past_key_values
            for word in WORDS[:-1]:
                out = llava[1](input_ids=torch.tensor([[word]]), past_key_values=cache, output_attentions=True)
                maps.append(out.attentions)
        start = int((inputs["input_ids"][0] == 3).nonzero()[0])
        want = torch.stack(
            [torch.stack([m[layer][0, head, -1, start : start + 16] for layer, head in HEADS]).mean(0) for m in maps]
        )
        assert torch.allclose(found.maps.flatten(1), want, atol=1e-6)
        plain = word_maps(llava[0], inputs, heads=HEADS, continuation=WORDS)
        assert (found.maps - plain.maps).abs().max() > 1e-3

    def test_the_models_own_words(self, llava: Any, inputs: dict[str, Tensor]) -> None:
        found = word_maps(llava[0], inputs, max_new_tokens=3)
        assert found.ids == llava[0].generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:].tolist()
        assert found.maps.shape == (3, 4, 4) and bool((found.maps.sum(dim=(1, 2)) < 1.0).all())

    def test_tokens_are_joined_to_words(self, llava: Any, inputs: dict[str, Tensor]) -> None:
        pieces = {20: " sm", 31: "all", 44: " red", 57: " star"}

        class Tokenizer:
            def decode(self, ids: list[int], **_: Any) -> str:
                return "".join(pieces[i] for i in ids)

        plain = word_maps(llava[0], inputs, heads=HEADS, continuation=WORDS)
        found = word_maps(llava[0], inputs, heads=HEADS, continuation=WORDS, tokenizer=Tokenizer())
        assert found.words == ["small", "red", "star"]
        assert torch.allclose(found.maps[0], plain.maps[:2].mean(0)) and torch.equal(found.maps[1:], plain.maps[2:])

    def test_bad_input(self, llava: Any, inputs: dict[str, Tensor]) -> None:
        with pytest.raises(SelectionError, match="got 2 samples"):
            word_maps(llava[0], tiny_transformers_inputs("llava", llava[0], batch=2, length=7))
        with pytest.raises(SelectionError, match="give image="):
            llama = tiny_transformers("llama")
            word_maps(llama, tiny_transformers_inputs("llama", llama, batch=1, length=7), max_new_tokens=1)
        with pytest.raises(SelectionError, match="has 15 cells, the image has 16"):
            word_maps(llava[0], inputs, max_new_tokens=1, grid=(3, 5))
        with pytest.raises(SelectionError, match="are no square"):
            word_maps(llava[0], inputs, max_new_tokens=1, image=(2, 4))


def plain_cross(pipe: Any, prompt: str, path: str, keys: list[int], **options: Any) -> list[Tensor]:
    """[K, n] per step: softmax(q k^T) of one cross-attention, mean over heads, from the module's own projections."""
    module, found = pipe.unet.get_submodule(path.removeprefix("unet.")), []

    def hook(attn: Any, args: Any, kwargs: Any) -> None:
        # The conditional row comes last.
        q, k = attn.to_q(args[0])[-1:], attn.to_k(kwargs["encoder_hidden_states"])[-1:]
        q, k = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k))
        A = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        found.append(A[0, :, :, keys].mean(0).T)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        pipe(prompt=prompt, **options)
    finally:
        handle.remove()
    return found


class TestPhrases:
    def call(self, **more: Any) -> dict[str, Any]:
        return {**CALL, "generator": torch.Generator().manual_seed(0), **more}

    @pytest.mark.parametrize("scale", [1.0, 5.0])
    def test_equal_to_a_plain_softmax(self, pipe: Any, scale: float) -> None:
        options = {"guidance_scale": scale}
        found = phrase_maps(pipe, "a red circle", {"red": [2], "rest": [3, 4]}, **self.call(**options))
        assert found.steps == (0, 1) and len(found.sites) == 7 and len(found.images) == 1
        for path in (found.sites[0], found.sites[2]):
            want = plain_cross(pipe, "a red circle", path, [2, 3, 4], **self.call(**options))
            got = [r.maps[0].flatten(1) for r in found.records if r.site == path]
            assert len(got) == 2
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a, b, atol=1e-6)
        one = next(r for r in found.records if r.site == found.sites[0] and r.step == 1)
        mean = found.mean(sites=[one.site], steps=[1])
        assert mean.shape == (1, 2, *one.maps.shape[-2:])
        assert torch.allclose(mean[0, 1], one.maps[0, 1:3].mean(0)) and torch.allclose(mean[0, 0], one.maps[0, 0])
        assert found.mean(size=(5, 3)).shape == (1, 2, 5, 3)

    def test_words_are_found_in_the_prompt(self, pipe: Any) -> None:
        ids = pipe.tokenizer("a red circle")["input_ids"]
        found = phrase_maps(pipe, "a red circle", ["Red"], **self.call(num_inference_steps=1))
        same = phrase_maps(
            pipe, "a red circle", {"x": self.tokens_of(pipe, ids, "red")}, **self.call(num_inference_steps=1)
        )
        assert torch.equal(found.mean(), same.mean())
        with pytest.raises(SelectionError, match="not in the text"):
            phrase_maps(pipe, "a red circle", ["square"], **self.call())

    @staticmethod
    def tokens_of(pipe: Any, ids: list[int], word: str) -> list[int]:
        """Tokens that add a letter of the word to the decoded text."""
        at = pipe.tokenizer.decode(ids).find(word)
        ends = [len(pipe.tokenizer.decode(ids[: i + 1]).rstrip()) for i in range(len(ids))]
        return [i for i, end in enumerate(ends) if at < end <= at + len(word)]

    def test_guidance_in_some_heads_changes_nothing_but_the_image(self, pipe: Any) -> None:
        """A weak pass is not recorded."""
        options = {"guidance_scale": 4.0, "num_inference_steps": 1}
        method = SoftPAG(scale=2.0, heads=HeadSet({0: [1], 6: [0]}))
        plain = phrase_maps(pipe, "a red circle", {"red": [2]}, **self.call(**options))
        found = phrase_maps(pipe, "a red circle", {"red": [2]}, method, **self.call(**options))
        assert found.sites == plain.sites and len(found.records) == len(plain.records)
        assert torch.allclose(found.mean(), plain.mean(), atol=1e-6)
        assert not torch.allclose(found.images[0], plain.images[0], atol=1e-4)

    def test_joint_attention_and_its_head_groups(self) -> None:
        """In two-stream blocks, image rows and text keys; heads split by another method are joined again."""
        pipe = tiny_pipeline("sd3")
        call = tiny_call("sd3", steps=1, guidance_scale=4.0)
        seen = []
        for method in ((), (SoftPAG(scale=1.0, heads=HeadSet({0: [1]})),)):
            recorder = PhraseRecorder((0, 3))
            with steer(pipe, *method, recorder):
                pipe(**call)
            seen.append(recorder.records)
        assert [r.site for r in seen[0]] == [r.site for r in seen[1]]
        assert sorted(seen[1][0].heads) == list(seen[0][0].heads)
        for a, b in zip(*seen, strict=True):
            assert a.kind == "joint" and a.maps.shape[:2] == (1, 2) and torch.allclose(a.maps, b.maps, atol=1e-6)
        # Against the whole map of the last call.
        grabbed: list[Tensor] = []

        class Whole(PhraseRecorder):
            def _maps(self, call: Any) -> Tensor:
                image, text = call.segments["image"], call.segments["text"]
                A = call.map.dense()[:, :, image, text].mean(dim=1)[..., list(self.keys)]
                grabbed.append(A.transpose(1, 2).unflatten(-1, call.grid))
                return grabbed[-1]

        with steer(pipe, Whole((0, 3))):
            pipe(**call)
        assert torch.allclose(grabbed[-1][-1:], seen[0][-1].maps, atol=1e-6)

    def test_bad_input(self, pipe: Any) -> None:
        with pytest.raises(SelectionError, match="at least one text token"):
            PhraseRecorder(())
        with pytest.raises(SelectionError, match="text token 90 was asked for"):
            phrase_maps(pipe, "a", {"x": [90]}, **self.call())
        with pytest.raises(SelectionError, match="give a list of words"):
            phrase_maps(pipe, "a", "a", **self.call())
        unknown = pytest.raises(UnsupportedHost, match="which rows of the batch are conditional is not known")
        with unknown, steer(pipe.unet, PhraseRecorder((1,))):
            pipe(prompt="a", **self.call())
        with pytest.raises(SelectionError, match="is defined on"):
            phrase_maps(pipe, "a", {"x": [1]}, where=Where(kinds="self"), **self.call())


class TestBoxes:
    def test_share_of_the_mass_over_share_of_the_area(self) -> None:
        maps = torch.zeros(4, 4)
        maps[0, 1] = 3.0
        maps[3, 3] = 1.0
        assert float(box_ratio(maps, (0.25, 0.0, 0.5, 0.25))) == pytest.approx(0.75 * 16)
        assert float(box_ratio(maps, (0.0, 0.0, 1.0, 1.0))) == pytest.approx(1.0)
        # Half of a cell counts half.
        assert float(box_ratio(maps, (0.25, 0.0, 0.375, 0.25))) == pytest.approx(0.375 * 32)
        assert float(box_ratio(torch.ones(2, 5, 7), (0.13, 0.2, 0.71, 0.9))[1]) == pytest.approx(1.0, abs=1e-6)

    def test_table_by_site_and_step(self) -> None:
        from attnsteer.viz.record import PhraseMap

        flat, corner = torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
        corner[..., 0, 0] = 1.0
        records = (PhraseMap("a", 0, "cross", 0, (0,), flat), PhraseMap("a", 0, "cross", 1, (0,), corner))
        found = PhraseMaps({"x": (0, 1)}, records, []).ratios({"x": (0.0, 0.0, 0.5, 0.5)})
        assert found == {"x": {("a", 0): pytest.approx(1.0), ("a", 1): pytest.approx(4.0)}}
        with pytest.raises(SelectionError, match="no maps of"):
            PhraseMaps({"x": (0,)}, records, []).ratios({"y": (0.0, 0.0, 0.5, 0.5)})
        with pytest.raises(SelectionError, match="no maps of sites b"):
            PhraseMaps({"x": (0,)}, records, []).mean(sites=["b"])

    @pytest.mark.parametrize("box", [(0.5, 0.0, 0.5, 1.0), (-0.1, 0.0, 0.5, 1.0), (0.0, 0.0, 1.5, 1.0)])
    def test_a_box_outside_the_image(self, box: Any) -> None:
        with pytest.raises(SelectionError, match="in fractions of the image"):
            box_ratio(torch.ones(2, 2), box)


def test_a_word_is_not_looked_for_in_special_tokens() -> None:
    """The token "<|startoftext|>" of the embedded pipelines' tokenizer has a star in it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.folder("shapes-sd") / "tokenizer")
    ids = tokenizer("a red star")["input_ids"]
    found = _word_tokens("a red star", ["star", "red"], tokenizer)
    assert {w: tokenizer.decode([ids[i] for i in at]).strip() for w, at in found.items()} == {
        "star": "star",
        "red": "red",
    }
