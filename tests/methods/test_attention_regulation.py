"""Attention Regulation: its inner loop and whole runs against the authors' arithmetic over full maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import CONFORM, AttentionRegulation, Where, sites, steer
from attnsteer.errors import NotFinite, SelectionError, UnsupportedHost
from attnsteer.methods.attention_regulation import centred_bumps, descended
from attnsteer.testing import tiny_pipeline
from tests.reference import regulation as slow

from .latent_common import EXACT, call_of, double, far

LAYERS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
]
WHERE = Where(modules=[name.replace(".", r"\.") for name in LAYERS])


@pytest.mark.parametrize(("side", "count"), [(16, 49), (24, 121), (32, 49), (64, 49)])
def test_bumps(side: int, count: int) -> None:
    assert torch.allclose(centred_bumps((side, side)), slow.bumps(side)[0, ..., 0].flatten(1), rtol=0, atol=1e-14)
    assert len(centred_bumps((side, side))) == count
    assert len(centred_bumps((8, 12))) == 3 * 5


@pytest.mark.parametrize("targets", [[3], [2, 3, 7], [1, 2, 3, 4, 5, 6]])
def test_the_inner_loop(targets: list[int]) -> None:
    """With six targets theta is 1. The other columns are one sum for us."""
    noise = torch.Generator().manual_seed(len(targets))
    S = 2 * torch.randn(4, 256, 77, dtype=torch.float64, generator=noise)
    W = torch.rand(4, 49, len(targets), dtype=torch.float64, generator=noise)
    expected = slow.descend(S.unflatten(1, (16, 16)), targets, W[:, :, None, None]).flatten(1, 2)
    ours, loss = descended(S, targets, centred_bumps((16, 16)), W, 20, 100.0)
    assert far(ours, expected) < EXACT and 0 < float(loss) < 80


def fixed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Known first weights: (layer, step, ...) -> [H, C, T]."""

    def start(layer: int, step: int, heads: int, targets: int) -> Tensor:
        noise = torch.Generator().manual_seed(100 * layer + step)
        return torch.rand(heads, 49, targets, dtype=torch.float64, generator=noise)

    monkeypatch.setattr(
        AttentionRegulation,
        "start",
        lambda self, call, centres, n: start(call.site.layer, call.step, len(call.heads), n),
    )
    return start


def expected_of(pipe: Any, call: dict[str, Any], start: Any, targets: Any, ends: Any, until: int) -> Tensor:
    layers = {s.name: s for s in sites(pipe) if s.name in LAYERS}
    made = {
        name: slow.Processor(
            targets, ends, lambda step, i, s=site: start(s.layer, step, s.heads, len(targets[i])), until
        )
        for name, site in layers.items()
    }
    with slow.regulated(pipe.unet, made):
        return pipe(**call)[0]


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m"])
def test_equal_to_the_authors_processor(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of other words and lengths, two sites, four steps of which three are edited; with guidance."""
    pipe, start = double("sd", scheduler), fixed(monkeypatch)
    call = call_of("sd", text=True, steps=4)
    call["prompt"], call["negative_prompt"] = ["a red cube and a blue ball", "a small dog"], ["dark", "photo"]
    call["latents"] = torch.randn(2, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    plain = pipe(**call)[0]
    words = [["red cube", "ball"], ["dog"]]
    # The tokenizer of the tests has a token for each word.
    expected = expected_of(pipe, call, start, [[2, 3, 7], [3]], [8, 4], 3)
    with steer(pipe, AttentionRegulation(words, 3, where=WHERE)) as run:
        ours = pipe(**call)[0]
    assert far(ours, expected) < EXACT * max(1.0, float(expected.abs().max()))
    assert far(plain, expected) > 1e-3
    assert {r.site.name for r in run.runtimes.values()} == set(LAYERS)
    assert torch.equal(pipe(**call)[0], plain)


def test_without_kept_tokens_positions_are_enough() -> None:
    """Embeddings instead of a text: rows sum to one."""
    pipe, call = double("sd"), call_of("sd", steps=2)
    with steer(pipe, AttentionRegulation([(2, 3)], 1.0, keep=False, where=WHERE)):
        ours = pipe(**call)[0]
    assert far(ours, pipe(**call)[0]) > 1e-4
    with (
        pytest.raises(SelectionError, match="cannot be found"),
        steer(pipe, AttentionRegulation([(2, 3)], where=WHERE)),
    ):
        pipe(**call)


def test_each_sample_has_its_own_strength_and_two_runs_are_the_same() -> None:
    pipe, call = double("sd"), call_of("sd", batch=3, steps=2)
    plain, outs = pipe(**call)[0], {}
    for strength in (1.0, 0.5, (1.0, None, 0.5)):
        with steer(pipe, AttentionRegulation([(2, 3)], 1.0, strength, keep=False, where=WHERE)):
            outs[strength] = pipe(**call)[0]
            assert torch.equal(outs[strength], pipe(**call)[0])
    each = outs[1.0, None, 0.5]
    assert far(each[1], plain[1]) < 1e-12
    assert far(each[0], outs[1.0][0]) < EXACT and far(each[2], outs[0.5][2]) < EXACT
    assert far(outs[1.0], outs[0.5]) > 1e-4


def test_a_token_of_two_phrases_is_one_target() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=2)
    outs = []
    for words in (["red cube"], ["red cube", "cube"], [("cube", 1), "red"]):
        with steer(pipe, AttentionRegulation(words, 1.0, iterations=3, where=WHERE)):
            outs.append(pipe(**call)[0])
    assert torch.equal(outs[0], outs[1]) and far(outs[2], outs[0]) > 1e-6


def test_passes_of_other_rows_have_their_own_memory() -> None:
    """Of a method that takes gradients; and where guidance is switched off in the run, the sample finds its own."""
    pipe, call = double("sd"), call_of("sd", steps=3)
    rule = AttentionRegulation([(2, 3)], 1.0, keep=False, where=WHERE)
    latent = CONFORM([(2, 4), (5, 7)], (), until=2)
    outs = []
    for methods in ((rule, latent), (latent, rule), (latent,)):
        with steer(pipe, *methods):
            outs.append(pipe(**call)[0])
    assert torch.equal(outs[0], outs[1]) and far(outs[0], outs[2]) > 1e-4

    def off(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0
        return {**kwargs, "prompt_embeds": kwargs["prompt_embeds"][-1:]}

    # A first step whose guidance counts for nothing is one without guidance.
    with steer(pipe, rule):
        expected = pipe(**{**call, "guidance_scale": 1.0})[0]
        ours = pipe(
            **{**call, "guidance_scale": 1.0 + 1e-12},
            callback_on_step_end=off,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )[0]
    assert far(ours, expected) < 1e-6


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=2)
    with pytest.raises(SelectionError, match="needs where="):
        steer(pipe, AttentionRegulation(["cube"]))
    with pytest.raises(SelectionError, match="leave out"):
        AttentionRegulation(["cube"], where=Where(branches="cond"))
    with pytest.raises(SelectionError, match=r"kind|defined on"):
        steer(double("sd3"), AttentionRegulation(["cube"], where=Where(layers=[1])))
    for words, problem in ((["dog"], "is not in the prompt"), (["a"], "is 2 times in the prompt")):
        with pytest.raises(SelectionError, match=problem), steer(pipe, AttentionRegulation(words, where=WHERE)):
            pipe(**call)
    for words, keep, problem in (
        ([(0, 1)], True, "token 0 keeps the mass"),
        ([(8, 9)], True, "token 8 keeps the mass"),
        ([(2, 3), (80, 81)], False, "there are 77 text keys"),
    ):
        with (
            pytest.raises(SelectionError, match=problem),
            steer(pipe, AttentionRegulation(words, keep=keep, where=WHERE)),
        ):
            pipe(**call)
    with (
        pytest.raises(SelectionError, match="position 80: the denoiser sees 8 text keys"),
        steer(pipe, AttentionRegulation([(80, 81)], 1.0, keep=False, where=WHERE)),
    ):
        pipe(**call_of("sd", steps=1))
    compiled = tiny_pipeline("sd")
    compiled.unet.compile_repeated_blocks(backend="eager")
    with pytest.raises(UnsupportedHost, match="compiled"):
        steer(compiled, AttentionRegulation(["cube"], where=WHERE))
    monkeypatch.setattr(AttentionRegulation, "start", lambda self, call, c, n: torch.full((2, c, n), float("nan")))
    with (
        pytest.raises(NotFinite, match=r"down_blocks\.0.*step 0 of 2"),
        steer(pipe, AttentionRegulation(["cube"], where=WHERE)),
    ):
        pipe(**call)
