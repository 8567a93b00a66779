"""Which tokens are images, for every model type of the table: forwards, `generate`, several images, padding, embeddings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import Intervention, Tokens, steer
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.hosts.transformers.image_tokens import FAMILIES as TABLE
from attnsteer.testing.fingerprint import fingerprint
from tests.hosts.transformers.vision_families import FAMILIES, IMAGE, VOCAB, build, prompts

SEEN: list[tuple[Tokens, str]] = []


@dataclass(frozen=True)
class Probe(Intervention):
    """Keeps what each call knows of its tokens; edits nothing."""

    kinds = ("self",)
    needs = ("tokens",)
    observes = True

    def output(self, call: Any, out: Tensor) -> None:
        if call.site.layer == 0:
            tokens = copy.copy(call.tokens)
            SEEN.append((tokens, call.phase))


@pytest.fixture(autouse=True)
def _clear() -> Iterator[None]:
    SEEN.clear()
    with torch.no_grad():
        yield


def image_seen(at: int = -1) -> Tensor:
    return SEEN[at][0].image


LAYOUT = [[2, "image", 3], [4, "image", 2, "image", 1]]
ALL = list(FAMILIES)


def run(model: nn.Module, **inputs: Any) -> None:
    with steer(model, Probe()):
        model(**inputs)


def test_every_type_of_the_table_is_tested() -> None:
    assert {n for n, f in TABLE.items() if f.refused is None} == set(ALL)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_forward(name: str, padding: str) -> None:
    model = build(name)
    inputs, image = prompts(name, LAYOUT, padding)
    model(**inputs)  # the library installs hooks of its own at the first call
    before = fingerprint(model)
    run(model, **inputs)
    assert fingerprint(model) == before
    (tokens, phase), valid = SEEN[0], inputs["attention_mask"].bool()
    assert phase == "prefill" and torch.equal(tokens.image, image)
    assert tokens.prompt == image.shape[1] and not tokens.generated().any()
    spans = tokens.image_spans()
    runs = {"idefics3": 2, "smolvlm": 2}.get(name, 1)
    assert [len(s) for s in spans] == [runs, 2 * runs]
    for b in range(2):
        assert sorted(i for s, e in spans[b] for i in range(s, e)) == image[b].nonzero()[:, 0].tolist()
        first, last = spans[b][0][0], spans[b][-1][1]
        here = valid[b].nonzero()[:, 0].tolist()
        assert tokens.before_image()[b].nonzero()[:, 0].tolist() == [i for i in here if i < first]
        assert tokens.after_image()[b].nonzero()[:, 0].tolist() == [i for i in here if i >= last]


@pytest.mark.parametrize("name", ALL)
def test_generate(name: str) -> None:
    """Images are encoded before the prefill, and InstructBLIP's language model is called with embeddings."""
    model = build(name)
    inputs, image = prompts(name, LAYOUT)
    n = image.shape[1]
    with steer(model, Probe()):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert [phase for _, phase in SEEN] == ["prefill", "decode", "decode"]
    for step, (tokens, _) in enumerate(SEEN):
        assert torch.equal(tokens.image[:, :n], image) and not tokens.image[:, n:].any()
        assert tokens.prompt == n and tokens.generated().sum() == 2 * step


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "instructblip"])
def test_beams_and_several_sequences(name: str) -> None:
    model = build(name)
    inputs, image = prompts(name, LAYOUT)
    n = image.shape[1]
    with steer(model, Probe()):
        model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        model.generate(**inputs, max_new_tokens=2, num_return_sequences=2, do_sample=True)
    for tokens, _ in SEEN:
        assert torch.equal(tokens.image[:, :n], image.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl", "internvl", "gemma3"])
def test_chunks_of_generate(name: str) -> None:
    """`generate` announces the whole prompt, so that a last chunk of one token is prefill."""
    model = build(name)
    inputs, image = prompts(name, [[3, "image", 2, "image", 4]])
    n = image.shape[1]
    size = next(s for s in range(5, n) if n % s == 1)
    with steer(model, Probe()):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=size)
    assert [phase for _, phase in SEEN] == ["prefill"] * (n // size + 1) + ["decode"]
    for tokens, _ in SEEN[:-1]:
        assert torch.equal(tokens.image, image[:, : tokens.length]) and tokens.prompt == tokens.length
        assert tokens.more_to_come is (tokens.length < n)
    assert SEEN[-1][0].prompt == n


def test_a_generated_placeholder_is_no_image() -> None:
    model = build("llava")
    inputs, image = prompts("llava", [[2, "image", 3]])
    with steer(model, Probe()):
        cache = model(**inputs, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[IMAGE]]), past_key_values=cache)
    assert torch.equal(image_seen()[:, :-1], image) and not image_seen()[:, -1].any()
    run(model, input_ids=inputs["input_ids"])
    assert not image_seen().any()


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("instructblip",)])
def test_embeddings_with_pixels(name: str) -> None:
    """Placeholder embeddings are recognised as the models recognise them."""
    model = build(name)
    inputs, image = prompts(name, LAYOUT)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    run(model, inputs_embeds=embeds, **inputs)
    assert torch.equal(image_seen(), image)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "internvl"])
def test_merged_embeddings_need_the_processor_output_or_spans(name: str) -> None:
    """Features are in place already, so nothing in the call tells where they are."""
    model = build(name)
    inputs, image = prompts(name, LAYOUT)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = torch.where(image[..., None], torch.randn_like(embeds), embeds)
    call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    run(model, **call)
    assert SEEN[-1][0].image is None
    with pytest.raises(SelectionError, match=r"run\.images"):
        SEEN[-1][0].image_spans()
    first = inputs["attention_mask"].argmax(dim=-1).tolist()
    spans = [[(s - at, e - at) for s, e in row] for row, at in zip(runs_of(image), first, strict=True)]
    for told in (inputs, spans):
        with steer(model, Probe()) as steering, steering.images(told):
            model(**call)
            assert torch.equal(image_seen(), image)
            if name != "gemma3":  # its `generate` takes no embeddings
                model.generate(**call, max_new_tokens=3, num_beams=2, do_sample=False)
                assert torch.equal(image_seen()[:, : image.shape[1]], image.repeat_interleave(2, dim=0))
                assert not image_seen()[:, image.shape[1] :].any()


def test_ids_beside_embeddings_in_generate() -> None:
    """The first forward gets the embeddings only; the ids that `generate` was given belong to it."""
    model = build("llava")
    inputs, image = prompts("llava", LAYOUT)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    inputs.pop("pixel_values")
    call = {"inputs_embeds": torch.where(image[..., None], torch.randn_like(embeds), embeds), **inputs}
    with steer(model, Probe()):
        model.generate(**call, max_new_tokens=2, do_sample=False)
    assert torch.equal(SEEN[0][0].image, image) and torch.equal(SEEN[0][0].ids, inputs["input_ids"])


def runs_of(image: Tensor) -> list[list[tuple[int, int]]]:
    out = []
    for row in image.tolist():
        edges = [i for i in range(len(row) + 1) if (row[i] if i < len(row) else 0) != (row[i - 1] if i else 0)]
        out.append(list(zip(edges[::2], edges[1::2], strict=True)))
    return out


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_token_types_mark_images_where_ids_are_missing(name: str) -> None:
    model = build(name)
    inputs, image = prompts(name, LAYOUT)
    types = FAMILIES[name].types
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    run(model, inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **{types: inputs[types]})
    assert torch.equal(image_seen(), image)


def test_a_text_model_is_asked_for_spans() -> None:
    model = build("llava").model.language_model
    ids = torch.randint(8, VOCAB, (2, 9))
    run(model, input_ids=ids)
    assert SEEN[-1][0].image is None
    with steer(model, Probe()) as steering, steering.images([[(1, 4)], [(2, 3), (5, 8)]]):
        model(input_ids=ids)
    assert SEEN[-1][0].image_spans() == [[(1, 4)], [(2, 3), (5, 8)]]
    with steer(model, Probe()) as steering, steering.images({"mm_token_type_ids": (ids > 30).long()}):
        model(input_ids=ids)
    assert torch.equal(image_seen(), ids > 30)


@pytest.mark.parametrize("wrong", [[], "image", [(1, 4)], [[(4, 1)]], {"pixel_values": torch.ones(1)}])
def test_what_images_refuses(wrong: Any) -> None:
    with (
        steer(build("llava"), Probe(), control=True) as steering,
        pytest.raises(SelectionError, match=r"run\.images|span"),
        steering.images(wrong),
    ):
        pass


def test_spans_beyond_the_prompt_are_refused() -> None:
    model = build("llava")
    steering = steer(model, Probe(), control=True)
    try:
        with steering.images([[(2, 40)]]), pytest.raises(SelectionError, match="ends after its 9 tokens"):
            model(input_ids=torch.randint(8, VOCAB, (1, 9)))
    finally:
        steering.remove()


@pytest.mark.parametrize("name", [n for n in ALL if n != "llava_next"])
def test_a_cut_image_is_an_error_before_the_first_step(name: str) -> None:
    model = build(name)
    inputs, image = prompts(name, [[2, "image"]])
    stop = int(image.nonzero()[-1, 1])  # the last image token is gone
    cut = {k: v[:, :stop] if v.ndim == 2 and v.shape[1] == image.shape[1] else v for k, v in inputs.items()}
    for call in (model, lambda **kw: model.generate(**kw, max_new_tokens=2)):
        steering = steer(model, Probe(), control=True)
        try:
            with pytest.raises(SelectionError, match=r"image span is cut: .* truncat"):
                call(**cut)
        finally:
            steering.remove()
    run(model, **inputs)
    assert torch.equal(image_seen(), image)


def test_a_copy_of_a_steered_model_generates_with_itself() -> None:
    model = build("llava")
    inputs, _ = prompts("llava", [[2, "image", 3]])
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, **options)
    with steer(model, Probe()):
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.add_(1.0)
        try:
            assert torch.equal(twin.generate(**inputs, **options), expected)
            assert not SEEN
        finally:
            for parameter in model.parameters():
                parameter.sub_(1.0)
        model.generate(**inputs, **options)
    assert SEEN


def test_a_config_without_placeholder_is_an_error() -> None:
    model = build("instructblip")
    inputs, _ = prompts("instructblip", [["image", 3]])
    marker, model.config.image_token_index = model.config.image_token_index, None
    steering = steer(model, Probe(), control=True)
    try:
        with pytest.raises(UnsupportedHost, match="image_token_id"):
            model(**inputs)
    finally:
        steering.remove()
        model.config.image_token_index = marker
