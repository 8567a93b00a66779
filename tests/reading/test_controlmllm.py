"""ControlMLLM: the official loop and losses, gradients against eager attention, identities, and that the region is looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import ControlMLLM, zoo
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.reading.controlmllm import _State, distance, image_tokens, nearest
from attnsteer.run.data.zoo import image as scene_image
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.reference import reading as slow

PROMPT = "<image> question what colour is the circle ? answer"
BOX = {"box": (0.0, 0.0, 0.5, 0.5)}


@pytest.fixture(scope="module")
def lvlm() -> Any:
    return zoo.load("shapes-lvlm")


@pytest.fixture(scope="module")
def inputs(lvlm: Any) -> Any:
    image = scene_image({"split": "test", "image": 0})
    return lvlm.processor(images=image, text=PROMPT, return_tensors="pt")


class Table:
    """What an offset is made like."""

    def get_input_embeddings(self) -> Any:
        return torch.nn.Embedding(2, 3)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("stop", [1e9, 3.0])
def test_the_loop_is_the_official_one(accumulate: bool, stop: float) -> None:
    target = torch.linspace(-1, 1, 12).view(4, 3)
    loss = lambda x: ((x - target) ** 2).sum() + 1.0  # noqa: E731
    seen, final = slow.controlled(loss, 4, 3, 5, 0.05, 0.7, stop, accumulate)
    method = ControlMLLM(steps=5, lr=0.05, beta=0.7, accumulate=accumulate, stop=stop)
    state, losses, ours = _State(method), [], []
    for _ in range(5):
        offset = state.offset(Table(), 4)
        ours.append(offset.detach())
        value = loss(offset)
        losses.append(value.item())
        if method.stopped(losses):
            break
        state.step(*torch.autograd.grad(value, state.leaf))
    assert len(ours) == len(seen) and all((a - b).abs().max() < 1e-6 for a, b in zip(ours, seen, strict=True))
    assert (state.final(Table(), 4) - final).abs().max() < 1e-6
    assert (len(seen) < 5) == (stop == 3.0)


def test_offsets_of_a_constant_gradient() -> None:
    for accumulate, wanted in ((True, [0, -0.5, -1.5, -3, -5, -7.5]), (False, [0, -0.5, -1, -1.5, -2, -2.5])):
        state = _State(ControlMLLM(accumulate=accumulate))
        found = []
        for _ in range(5):
            offset = state.offset(Table(), 1)
            found.append(offset[0, 0].item())
            state.step(*torch.autograd.grad(offset.sum(), state.leaf))
        found.append(float(state.final(Table(), 1)[0, 0]))
        assert found == wanted
    state = _State(ControlMLLM.plus_plus())
    g = [torch.full((1, 3), v) for v in (1.0, 1e-3, 1e-5)]
    for one in g:
        state.offset(Table(), 1)
        state.step(one)
    assert (state.final(Table(), 1) - slow.adam(g, 0.03)).abs().max() < 1e-7
    first = [-float(slow.adam([one], 0.03)[0, 0]) for one in g]
    assert first == pytest.approx([0.029970, 0.015, 0.000297], rel=2e-3)


def test_losses_and_weights() -> None:
    a, w = torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    loss, rho = ControlMLLM().energy(a, [w])
    assert float(rho) == pytest.approx(0.3) and float(loss) == pytest.approx(196.0)
    assert float(ControlMLLM().energy(5 * a, [w, w])[0]) == pytest.approx(392.0)
    for sigma, peak in ((0.1, 3.989), (0.3, 1.330), (0.4, 0.997)):
        own = ControlMLLM(sigma=sigma).weight({"point": (0.5, 0.5)}, (65, 65), (65, 65))
        assert float(own.max()) == pytest.approx(peak, abs=1e-3) and int(own.argmax()) == 65 * 32 + 32
        assert float(ControlMLLM(sigma=sigma, peak=True).weight({"point": (0.5, 0.5)}, (9, 9), (9, 9)).max()) == 1.0
    box = ControlMLLM().weight({"box": (0.25, 0.5, 1.0, 1.0)}, (4, 4), (64, 64))
    assert box.tolist() == [[0, 0, 0, 0]] * 2 + [[0, 1, 1, 1]] * 2
    mask = torch.zeros(32, 32).bool()
    mask[:16, 16:] = True
    assert ControlMLLM().weight({"mask": mask}, (2, 2), (32, 32)).tolist() == [[0, 1], [0, 0]]
    line = ControlMLLM(peak=True).weight({"scribble": [(0.1, 0.1), (0.9, 0.1)]}, (4, 4), (40, 40))
    assert (line[0] > line[1]).all() and (line[1] > line[2]).all() and (line[0] > 0.7).all()
    marks = torch.zeros(5, 6).bool()
    marks[1, 2] = marks[4, 5] = True
    for y in range(5):
        for x in range(6):
            own = min(((y - a) ** 2 + (x - b) ** 2) ** 0.5 for a, b in ((1, 2), (4, 5)))
            assert float(distance(marks)[y, x]) == pytest.approx(own / 13**0.5, abs=1e-6)
    assert nearest(torch.arange(8.0)[None].expand(8, 8), (2, 2)).tolist() == [[2, 6], [2, 6]]


def eager_loss(model: Any, inputs: Any, image: Tensor, offset: Tensor, rows: Tensor, layers: Any) -> Tensor:
    model.set_attn_implementation("eager")
    try:
        features = model.get_image_features(inputs["pixel_values"])
        features = features if isinstance(features, (list, tuple)) else features.pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
        embeds[0, image] = torch.cat(list(features)) + offset
        maps = model.model.language_model(inputs_embeds=embeds, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    a = torch.stack([maps[n][0][:, rows][..., image].mean(dim=(0, 1)) for n in layers]).mean(dim=0)
    w = torch.zeros(8, 8)
    w[:4, :4] = 1.0
    return 400 * (1 - (a.view(8, 8) * w).sum() / a.sum()) ** 2


@pytest.mark.parametrize("method", [ControlMLLM(steps=1, stop=None), ControlMLLM(steps=1, rows="last", layers=[2, 3])])
def test_gradients_are_those_of_eager_attention(lvlm: Any, inputs: Any, method: ControlMLLM) -> None:
    model = lvlm.model
    image = image_tokens(model, inputs)
    n = len(image)
    rows = torch.arange(n)[-1:] if method.rows == "last" else torch.arange(int(image.nonzero()[-1]) + 1, n)
    layers = range(6) if method.layers is None else method.layers
    leaf = torch.zeros(64, 128, requires_grad=True)
    loss = eager_loss(model, inputs, image, leaf, rows, layers)
    (wanted,) = torch.autograd.grad(loss, leaf)
    found = method.optimise(model, inputs, BOX)
    assert found.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    # One step of size one, averaged by half: the first pass has the whole gradient.
    assert (found.offset + 0.5 * wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_has_no_step_is_the_plain_answer(lvlm: Any, inputs: Any) -> None:
    model = lvlm.model
    with torch.no_grad():
        plain = model(**inputs).logits
    for method in (ControlMLLM(steps=0), ControlMLLM(steps=2, lr=0.0), ControlMLLM(steps=0, optimiser="adam")):
        found = method.optimise(model, inputs, BOX)
        with torch.no_grad(), found.applied(model):
            assert torch.equal(model(**inputs).logits, plain)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    "method",
    [ControlMLLM(lr=0.1), ControlMLLM.released_code(), ControlMLLM.plus_plus()],
    ids=["plain", "released", "++"],
)
def test_the_region_is_looked_at(lvlm: Any, inputs: Any, method: ControlMLLM) -> None:
    model = lvlm.model
    found = method.optimise(model, inputs, BOX)
    assert found.losses[-1] < found.losses[0] and found.shares[-1] > found.shares[0] > 0
    with torch.no_grad():
        plain = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        with found.applied(model):
            moved = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            again = model(**inputs).logits[:, -1]
    assert not torch.equal(plain.logits[0], moved.logits[0]) and (moved.logits[0] - again).abs().max() < 1e-4


def test_a_model_with_three_position_axes_and_a_grid_of_its_own() -> None:
    model = tiny_transformers("qwen2_vl")
    inputs = tiny_transformers_inputs("qwen2_vl", model, batch=1, seed=1)
    with torch.no_grad():
        plain = model(**inputs).logits
    found = ControlMLLM(steps=3, lr=0.5, optimiser="adam", rows="last", stop=None).optimise(model, inputs, BOX)
    assert found.losses[-1] < found.losses[0] and len(found.offset) == int(found.image.sum())
    with torch.no_grad(), found.applied(model):
        assert not torch.equal(model(**inputs).logits, plain)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


def test_a_picture_and_a_box(lvlm: Any) -> None:
    image = scene_image({"split": "test", "image": 0})
    answer, found = ControlMLLM.plus_plus().ask(*lvlm, image, PROMPT, [BOX, {"point": (0.2, 0.3)}], max_new_tokens=1)
    assert answer and found.offset.shape == (64, 128) and len(found.losses) == 3


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ({"circle": 3}, "of the kind 'circle'"),
        ({"box": (0.5, 0.1, 0.2, 0.9)}, "x0 < x1"),
        ({"box": (10, 10, 40, 40)}, "fractions"),
        ({"box": (0.0, 0.0, 0.01, 0.01)}, "no cell"),
        ({"mask": torch.zeros(4, 4)}, "something in it"),
        ({"point": (1.5, 0.2)}, "fractions"),
        ({"scribble": []}, "points"),
        ([], "no region"),
        ([(0, 0, 1, 1)], "a region is one of"),
    ],
)
def test_bad_regions(lvlm: Any, inputs: Any, regions: Any, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        ControlMLLM().optimise(lvlm.model, inputs, regions)


def test_bad_calls(lvlm: Any, inputs: Any) -> None:
    model = lvlm.model
    text = lvlm.processor.tokenizer(
        "question is there a circle ? answer", return_tensors="pt", return_token_type_ids=False
    )
    with pytest.raises(SelectionError, match="no image"):
        ControlMLLM().optimise(model, text, BOX)
    with pytest.raises(SelectionError, match="2 samples"):
        ControlMLLM().optimise(model, {"input_ids": inputs["input_ids"].repeat(2, 1)}, BOX)
    with pytest.raises(UnsupportedHost, match="image_token_id"):
        ControlMLLM().optimise(model.model.language_model, text, BOX)
    with pytest.raises(SelectionError, match="do not add up"):
        ControlMLLM(optimiser="adam", accumulate=True)
    only = lvlm.processor(images=scene_image({"split": "test", "image": 0}), text="<image>", return_tensors="pt")
    with pytest.raises(SelectionError, match="no text behind"):
        ControlMLLM().optimise(model, only, BOX)
