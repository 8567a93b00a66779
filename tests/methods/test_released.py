"""The presets named after released code against the authors' arithmetic, on random configurations, in generation.

The whole model runs once with the preset and once with its full maps edited by `tests.reference.official`; the degenerate
cases are part of what is drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from attnsteer import ACT, PASTA, VAR, HeadSet, InstABoost, Intervention, SpotLight, Where, sites, steer
from attnsteer.errors import SelectionError
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.hosts.transformers.vision_families import build, prompts
from tests.laws.dense_model import Dense, Sequence, dense_model
from tests.laws.dense_vision import DenseVision
from tests.reference import llm_methods, official

HEADS = HeadSet({0: [1, 2], 2: [0, 1, 3]})
NEW = 4


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of each generated token, [B, NEW, V]."""
    out = model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, dim=1)


# Language models: GPT-2 in double precision, whose every operation is in it.

# [H, n, m] of one sample without padding, its number, the prompt's tokens -> the edited map.
Official = Callable[[Tensor, int, int], Tensor]


@functools.cache
def gpt2(times: float) -> nn.Module:
    """Query and key weights `times` as large make the maps peaked."""
    model = tiny_transformers("gpt2").double()
    for name, parameter in model.named_parameters():
        if "attn.c_attn" in name:
            parameter.data[..., : 2 * 64] *= times
    return model


@torch.no_grad()
def compare(times: float, lengths: tuple[int, ...], method: Intervention, edit: Official, heads: Any = HEADS) -> float:
    """The largest difference to the reference, relative to the largest logit; the effect of the preset is returned."""
    model, longest = gpt2(times), max(lengths)
    inputs = tiny_transformers_inputs("gpt2", model, batch=len(lengths), length=longest, seed=longest)
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    for b, n in enumerate(lengths):
        inputs["attention_mask"][b, : longest - n] = 0
    plain = logits_of(model, inputs)
    # What is drawn may be neutral: a threshold that no column reaches, spans that are the whole prompt.
    with steer(model, method, control=True):
        ours = logits_of(model, inputs)

    def on_samples(A: Tensor, seq: Sequence, memory: dict[str, Any]) -> Tensor:
        new, n = A.clone(), A.shape[2]
        for b, own in enumerate(lengths):
            start = longest - own
            rows = slice(start if n > 1 else 0, n)
            new[b, :, rows, start:] = edit(A[b, :, rows, start:], b, own)
        return new

    layers = {s.layer: s.name for s in sites(model)}
    wanted = (
        {layer: list(heads[layer]) for layer in heads.layers} if heads else {layer: list(range(4)) for layer in layers}
    )
    dense = Dense(model, {layers[layer]: (chosen, on_samples) for layer, chosen in wanted.items()}, {})
    configs = list({id(s.module.config): s.module.config for s in sites(model)}.values())
    with dense_model(model, dense, configs):
        valid = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), NEW)], dim=1).bool()
        # `_absolute` asks for the slots before a call: those that the map has beyond its rows.
        dense._absolute = lambda edit, A, visible, name: edit(A, Sequence(valid), {})
        theirs = logits_of(model, inputs)
    scale = theirs.abs().max()
    assert float((ours - theirs).abs().max() / scale) <= 1e-10
    return float((plain - theirs).abs().max() / scale)


LENGTHS = st.lists(st.integers(3, 14), min_size=1, max_size=3).map(tuple)
TIMES = st.sampled_from([1.0, 2.0, 3.0])


@settings(max_examples=30)
@given(
    times=TIMES, lengths=LENGTHS, beta=st.floats(0.0, 1.0, width=32, allow_subnormal=False), tau=st.floats(0.02, 0.9)
)
@example(times=3.0, lengths=(14, 9), beta=0.0, tau=0.05)
@example(times=1.0, lengths=(12,), beta=0.4, tau=1.0)
def test_act(times: float, lengths: tuple[int, ...], beta: float, tau: float) -> None:
    """Prompts of several lengths; above 1 no column is a hit."""

    def edit(A: Tensor, b: int, prompt: int) -> Tensor:
        if A.shape[1] != A.shape[2]:
            return A
        return torch.stack([llm_methods.act_released(head, beta, tau) for head in A])

    effect = compare(times, lengths, ACT.released_code(HEADS, beta, tau), edit)
    assert effect == 0.0 or tau < 1.0


@st.composite
def marked(draw: Any) -> tuple[tuple[int, ...], list[list[tuple[int, int]]]]:
    """(lengths, spans of each sample): they may overlap, repeat, or cover the prompt."""
    lengths, spans = draw(LENGTHS), []
    for n in lengths:
        ends = st.tuples(st.integers(0, n), st.integers(0, n)).filter(lambda s: s[0] != s[1])
        spans.append(draw(st.lists(ends.map(lambda s: (min(s), max(s))), min_size=1, max_size=3)))
    return lengths, spans


@settings(max_examples=30)
@given(times=TIMES, drawn=marked(), alpha=st.floats(0.01, 3.0), position=st.sampled_from(["exclude", "include"]))
@example(times=1.0, drawn=((12, 8), [[(2, 4), (6, 9)], [(0, 8)]]), alpha=0.01, position="exclude")
@example(times=1.0, drawn=((12,), [[(2, 6), (4, 9), (2, 6)]]), alpha=0.01, position="include")
def test_pasta(times: float, drawn: Any, alpha: float, position: str) -> None:
    lengths, spans = drawn
    edit = lambda A, b, prompt: official.pasta(A, spans[b], alpha, position, prompt)  # noqa: E731
    compare(times, lengths, PASTA.released_code(spans, HEADS, alpha, position), edit)
    if all(len(s) == 1 for s in spans):
        compare(times, lengths, PASTA(spans, HEADS, alpha, position), edit)


def test_pasta_several_spans_are_one_set_in_the_paper() -> None:
    spans = [[(2, 4), (6, 9)]]
    edit = lambda A, b, prompt: official.pasta(A, spans[b], 0.1, "exclude", prompt)  # noqa: E731
    with pytest.raises(AssertionError):
        compare(1.0, (12,), PASTA(spans, HEADS, 0.1), edit)
    assert compare(1.0, (12,), PASTA.released_code(spans, HEADS, 0.1), edit) > 1e-3


@settings(max_examples=30)
@given(times=TIMES, drawn=marked(), target=st.floats(0.01, 0.99))
def test_spotlight(times: float, drawn: Any, target: float) -> None:
    lengths, spans = drawn
    edit = lambda A, b, prompt: official.spotlight(A, spans[b], target)  # noqa: E731
    compare(times, lengths, SpotLight.released_code(spans, target), edit, heads=None)


@settings(max_examples=10)
@given(times=TIMES, drawn=marked(), factor=st.sampled_from([0.5, 3.0, 19.0]))
def test_instaboost(times: float, drawn: Any, factor: float) -> None:
    lengths, spans = drawn

    def edit(A: Tensor, b: int, prompt: int) -> Tensor:
        keys = torch.zeros(1, A.shape[2], dtype=torch.bool)
        for start, stop in spans[b]:
            keys[:, start:stop] = True
        return official.instaboost(A[None], keys, factor)[0]

    compare(times, lengths, InstABoost(spans, factor, exclude_first_token=False), edit, heads=None)
    prefixes = [max(stop for _, stop in row) for row in spans]
    spans = [[(0, stop)] for stop in prefixes]
    compare(times, lengths, InstABoost.released_prefix(prefixes, factor), edit, heads=None)


def test_guide_adds_its_constant_to_the_scores() -> None:
    spans = [[(2, 4)]]
    edit = lambda A, b, prompt: torch.softmax(A.log() + 1.3 * one_hot(A.shape[2], 2, 4), dim=-1)  # noqa: E731
    compare(1.0, (12,), InstABoost.guide(spans, 1.3), edit, heads=None)
    assert InstABoost.guide(spans).factor == pytest.approx(7.389056)
    assert InstABoost.guide([*spans, *spans], [0.0, 1.0]).factor.values == pytest.approx((1.0, 2.718282))
    delta = torch.tensor(0.5, requires_grad=True)
    assert InstABoost.guide(spans, delta).factor.given.requires_grad
    # The first token of a sample is part of the spans only where they are asked to hold it.
    assert InstABoost(spans).exclude_first_token and not InstABoost.guide(spans).exclude_first_token


def one_hot(size: int, start: int, stop: int) -> Tensor:
    at = torch.arange(size)
    return ((at >= start) & (at < stop)).double()


def test_spotlight_floor_of_the_official_code_is_all_that_is_left_out() -> None:
    A = torch.softmax(torch.randn(2, 6, 6, dtype=torch.float64), dim=-1).tril()
    A = A / A.sum(dim=-1, keepdim=True)
    exact, floored = (official.spotlight(A, [(1, 3)], 0.7, floor) for floor in (0.0, 1e-10))
    assert 0 < float((exact - floored).abs().max()) < 1e-8


def llama(layers: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("layers", "edited"), [(33, range(2, 31)), (32, range(2, 31)), (5, range(2, 5))])
def test_act_acts_on_the_layers_of_the_official_loop(layers: int, edited: range) -> None:
    """Heads and a selection of one's own are taken as they are; the paper's form knows no layers."""
    model = llama(layers)
    for method, expected in (
        (ACT.released_code(), edited),
        (ACT.released_code(beta=0.1, threshold=0.2), edited),
        (ACT.released_code({0: [1], 3: [0]}), [0, 3]),
        (ACT.released_code(where=Where(layers=[1])), [1]),
        (ACT(), range(layers)),
    ):
        with steer(model, method) as run, torch.no_grad():
            model(input_ids=torch.arange(5)[None])
        assert [s.layer for s in run.sites] == list(expected)


def test_a_model_without_layers_of_the_preset_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"layers \[0, 1\]"):
        steer(llama(2), ACT.released_code())
    with pytest.raises(SelectionError, match="third layer"):
        steer(build("llava"), VAR.released_code((3,), 4.0))


# Vision: a value far above all others in one dimension makes the chosen tokens sinks, in every layer.

DIM, TAU = 3, 4.5
BLOCK = 16
LAYOUTS = [
    [["image"]],
    [["image", 3]],
    [[3, "image"]],
    [[2, "image", 3]],
    [[2, "image", 2, "image", 2]],
    [["image", "image"]],
    [[1, "image", 4], [3, "image"]],
    [["image", 2], [2, "image", 1, "image", 3]],
]


@functools.cache
def llava() -> nn.Module:
    return build("llava")


class Massive:
    """Hooks that raise one dimension of chosen prompt tokens, as they enter the first layer."""

    def __init__(self, model: nn.Module, chosen: Tensor):
        self.chosen = chosen
        self.layers = next(m.layers for n, m in model.named_modules() if n.endswith("language_model"))
        stack = next(m for m in model.modules() if getattr(m, "layers", None) is self.layers)
        self.hook = stack.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        x = kwargs["inputs_embeds"]
        if x.shape[1] == self.chosen.shape[1]:
            x = x.clone()
            x[..., DIM] += 60.0 * self.chosen
        return args, {**kwargs, "inputs_embeds": x}


def picks(image: Tensor, valid: Tensor, text_sinks: int, image_sinks: int) -> Tensor:
    """bool [B, n]: the first `text_sinks` text tokens and every third image token, at most `image_sinks` of them."""
    chosen = torch.zeros_like(image)
    for b in range(len(image)):
        texts, images = (valid[b] & ~image[b]).nonzero()[:, 0], image[b].nonzero()[:, 0]
        chosen[b, texts[:text_sinks]] = True
        chosen[b, (images if image_sinks >= BLOCK else images[::3])[:image_sinks]] = True
        if image_sinks >= BLOCK:
            chosen[b, images] = True
    return chosen


@settings(max_examples=60)
@given(
    layout=st.sampled_from(LAYOUTS),
    text_sinks=st.sampled_from([0, 1, 2]),
    image_sinks=st.sampled_from([0, 1, 5, BLOCK]),
    only_first=st.booleans(),
    rho=st.sampled_from([0.2, 0.5, 0.95, 1.0]),
    summ=st.sampled_from([0.0, 0.2, 0.4]),
    p=st.floats(0.0, 0.95),
)
@example([[2, "image", 3]], 1, 0, False, 0.5, 0.0, 0.6)
@example([[2, "image", 3]], 1, BLOCK, False, 1.0, 0.0, 0.6)
@example([[1, "image", 4], [3, "image"]], 1, 5, True, 0.95, 0.0, 0.6)
@example([[2, "image", 2, "image", 2]], 1, 5, False, 0.95, 0.0, 0.3)
@torch.no_grad()
def test_var(
    layout: Any, text_sinks: int, image_sinks: int, only_first: bool, rho: float, summ: float, p: float
) -> None:
    """only_first: the later samples of a batch have no visual sinks."""
    model = llava()
    inputs, image = prompts("llava", layout, "left", seed=3)
    valid = inputs["attention_mask"].bool()
    chosen = picks(image, valid, text_sinks, image_sinks)
    if only_first:
        assume(len(layout) > 1)
        chosen[1:] &= ~image[1:]
    massive, edited = Massive(model, chosen), [0] * len(layout)
    try:
        plain = logits_of(model, inputs)
        method = VAR.released_code((DIM, 17), TAU, rho, p, min_image_mass=summ, where=Where(layers=[0, 1]))
        with steer(model, method, control=True):
            ours = logits_of(model, inputs)
        dense, found = DenseVision(model, massive.layers), {}
        dense.image, dense.valid = image, valid

        def edit(layer: int, A: Tensor, x: Tensor) -> Tensor:
            new, n = A.clone().double(), A.shape[2]
            for b in range(len(layout)):
                start = int(valid[b].int().argmax())
                if not dense.now:
                    found[layer, b] = official.var_sinks(x[b, start:], (DIM, 17), TAU)
                own = (image[b, start:].nonzero()[:, 0]).tolist()
                rows = slice(0 if dense.now else start, n)
                new[b, :, rows, start:], count = official.var(
                    A[b, :, rows, start:].double(), found[layer, b], own, not dense.now, rho, summ, p
                )
                edited[b] += count
            return new.to(A.dtype)

        dense.edit = edit
        with dense.on():
            theirs = logits_of(model, inputs)
    finally:
        massive.hook.remove()
    assert float((ours - theirs).abs().max()) <= 1e-5
    for b in range(len(layout)):
        if not edited[b]:
            assert torch.equal(ours[b], plain[b]), "a sample without an edited row is left alone"
    if image_sinks == 0:
        assert not any(edited)


@torch.no_grad()
def test_var_edits_generated_tokens_behind_a_visual_sink() -> None:
    """Behind an image that ends the prompt only they can be edited; the comparison above would be empty if none ever were."""
    model = llava()
    inputs, image = prompts("llava", [[2, "image"]], "left", seed=3)
    every = torch.ones_like(image)
    for sinks, moves in ((picks(image, every, 1, 5), True), (picks(image, every, 2, 0), False)):
        massive = Massive(model, sinks)
        method = VAR.released_code((DIM,), TAU, 0.95, min_image_mass=0.0, where=Where(layers=[0]))
        try:
            plain = logits_of(model, inputs)
            with steer(model, method, control=not moves):
                ours = logits_of(model, inputs)
        finally:
            massive.hook.remove()
        assert torch.equal(ours[:, 0], plain[:, 0])
        assert float((ours - plain)[:, 1].abs().max()) > 1e-4 if moves else torch.equal(ours, plain)
