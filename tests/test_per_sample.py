"""One value per sample: what a parameter keeps, which batches it is for, and who shares a value."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnsteer import (
    ACT,
    PASTA,
    SEG,
    AttendAndExcite,
    HeadGate,
    HeadSet,
    Intervention,
    SoftPAG,
    SpotLight,
    Where,
    ZeroTuning,
    steer,
)
from attnsteer.account import Samples
from attnsteer.errors import SelectionError, SerializationError, UnsupportedHost
from attnsteer.parameters import PerSample, is_all
from attnsteer.testing import HOSTS, tiny_call, tiny_pipeline

TEXT, SD = HOSTS["llama"], HOSTS["sd-pipeline"]
MIDDLE = Where(layers=[1], kinds="self")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return TEXT.build()


def prompts(model: nn.Module, batch: int) -> Tensor:
    return TEXT.inputs(model, batch, None, 0)["input_ids"]


# ------------------------------------------------------------------------------------------------ the value


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "NumPy", "torch"])
def test_lists_arrays_and_tensors_are_values_of_samples(form: Any) -> None:
    made = ZeroTuning(gamma=form([0.5, 2.0]))
    assert made == ZeroTuning(gamma=[0.5, 2.0]) and hash(made) == hash(ZeroTuning(gamma=[0.5, 2.0]))
    assert made.gamma == PerSample([0.5, 2.0]) and repr(made).endswith("gamma=[0.5, 2.0])")
    assert made != ZeroTuning(gamma=[0.5, 3.0]) and made != ZeroTuning(gamma=0.5)
    assert made.new(gamma=made.gamma) == made and made.sample_values == {"gamma": made.gamma}
    for again in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again == made and again.sample_values == made.sample_values
    with pytest.raises(AttributeError, match="immutable"):
        made.gamma.given = (1.0,)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ZeroTuning(gamma=[1.0, -1.0]), ["ZeroTuning(gamma=[1.0, -1.0])", "above 0, or one per sample"]),
        (lambda: ZeroTuning(gamma=[]), ["ZeroTuning(gamma=[])"]),
        (lambda: ZeroTuning(gamma=[[1.0]]), ["not list"]),
        (lambda: ZeroTuning(gamma=["a"]), ["not str"]),
        (lambda: ZeroTuning(gamma=torch.tensor([-1.0], requires_grad=True)), ["above 0"]),
        (lambda: ZeroTuning(gamma=torch.ones(1, 1, requires_grad=True)), ["ZeroTuning(gamma="]),
        (lambda: ACT(threshold=[0.1, None]), ["without a number for some sample", "None in beta"]),
        (lambda: ACT(min_rows=[1, 2]), ["integer of at least 1, not list"]),
        (lambda: SEG(sigma=torch.tensor(1.0, requires_grad=True)), ["needs a gradient"]),
        (lambda: HeadGate({(0, 0): [1.0, math.nan]}), ["(0, 0)"]),
        (lambda: ZeroTuning([{0: [1]}, (0, 1)], 2.0), ["one HeadSet or {layer: [head, ...]} for each sample"]),
    ],
)
def test_values_that_do_not_fit_are_refused(build: Any, words: list[str]) -> None:
    with pytest.raises(SelectionError) as caught:
        build()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_tensor_that_needs_a_gradient_stays_the_tensor() -> None:
    strength = nn.Parameter(torch.tensor([0.5, 2.0]))
    made = ZeroTuning(gamma=strength)
    assert made.gamma.given is strength and made.gamma.values == (0.5, 2.0)
    assert made == ZeroTuning(gamma=strength) and made != ZeroTuning(gamma=strength.detach().clone().requires_grad_())
    with torch.no_grad():
        strength += 1.0
    assert made.gamma.values == (1.5, 3.0)


def test_what_is_neutral() -> None:
    assert is_all(1.0, 1.0) and is_all(PerSample([1.0, None]), 1.0) and is_all(PerSample([None]), 1.0)
    assert not is_all(PerSample([1.0, 2.0]), 1.0) and not is_all(PerSample(torch.ones(2, requires_grad=True)), 1.0)


@pytest.mark.parametrize(
    "made",
    [
        ZeroTuning(gamma=[0.5, None, 2.0]),
        SEG([0.0, 3.0], [math.inf, 1.5]),
        HeadGate({(0, 1): [0.5, None], (1, 0): 2.0}),
        SpotLight([[(0, 1)], [(1, 2)]], [0.2, 0.4]),
        AttendAndExcite(["cat"], step_size=[1.0, None], stop_loss=[None, 0.5]),
    ],
    ids=lambda m: type(m).__name__,
)
def test_values_of_samples_are_saved(made: Intervention, tmp_path: Path) -> None:
    assert Intervention.from_pretrained(made.save_pretrained(tmp_path)) == made


def test_a_learned_strength_is_saved_as_its_numbers_and_heads_of_samples_are_not(tmp_path: Path) -> None:
    made = ZeroTuning(gamma=torch.tensor([0.5, 2.0], requires_grad=True))
    assert Intervention.from_pretrained(made.save_pretrained(tmp_path)) == ZeroTuning(gamma=[0.5, 2.0])
    shared = ZeroTuning(gamma=torch.tensor(0.5, requires_grad=True))
    assert Intervention.from_pretrained(shared.save_pretrained(tmp_path)) == ZeroTuning(gamma=0.5)
    with pytest.raises(SerializationError, match="a head set for each sample"):
        ZeroTuning([{0: [1]}, {0: [0]}], 2.0).save_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------ samples of a batch


def test_samples_of_rows() -> None:
    beams = Samples.repeated(2, 6)
    assert beams.rows(2) == (0, 0, 0, 1, 1, 1) and str(beams) == "a batch of 2 samples (6 rows)"
    assert beams.rows(2, 12) == (0,) * 6 + (1,) * 6
    assert beams.taken([4, 0]).rows(2) == (1, 0)
    assert Samples.repeated(4, 6).rows(6) == tuple(range(6)) and str(Samples.plain(1)) == "a batch of 1 sample"
    for count, batch in ((6, None), (3, None), (2, 7)):
        with pytest.raises(SelectionError):
            beams.rows(count, batch)


METHODS = {
    "strength": (ZeroTuning(gamma=[2.0, 0.5]), "ZeroTuning(gamma=...) has 2 values, and this is a batch of 4 samples"),
    "gate": (HeadGate({(1, 0): [2.0, 0.5]}), "HeadGate(gates[(1, 0)]=...) has 2 values"),
    "heads": (ZeroTuning([{1: [0]}, {1: [1]}], 2.0), "ZeroTuning(heads=...) has 2 values"),
    "learned": (ZeroTuning(gamma=torch.ones(2, requires_grad=True)), "ZeroTuning(gamma=...) has 2 values"),
    "more values": (ZeroTuning(gamma=[2.0] * 8), "has 8 values, and this is a batch of 4 samples"),
    "spans": (PASTA([[(1, 3)], [(2, 4)]], None, 0.1), "spans has 2 samples, and this is a batch of 4 samples"),
}


@pytest.mark.parametrize("name", METHODS)
def test_values_for_another_number_of_samples_are_refused_before_any_layer_runs(model: nn.Module, name: str) -> None:
    made, words = METHODS[name]
    ran: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(SelectionError) as caught, steer(model, made, control=True):
            model(prompts(model, 4))
    finally:
        hook.remove()
    assert words in str(caught.value) and not ran


def test_images_ranges_for_another_number_of_samples_are_refused() -> None:
    host = HOSTS["llava"]
    target = host.build()
    inputs = host.inputs(target, 4, None, 0)
    with (
        pytest.raises(SelectionError, match="ranges were given for 2 samples; this is a batch of 4 samples"),
        steer(target, HeadGate({(0, 0): 0.5}), control=True) as run,
        run.images([[(0, 2)], [(0, 2)]]),
    ):
        host.run(target, inputs)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_beams_share_the_value_and_the_spans_of_their_sample(model: nn.Module, options: dict[str, int]) -> None:
    ids, strengths, spans = prompts(model, 2), [0.05, 4.0], [[(1, 4)], [(2, 3), (5, 7)]]
    settings = {
        **options, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True,
        "output_scores": True, "eos_token_id": None,
    }  # fmt: skip
    each = options.get("num_return_sequences", 1)
    with steer(model, PASTA(spans, None, strengths)):
        both = model.generate(ids, **settings)
    for b in range(2):
        with steer(model, PASTA([spans[b]], None, strengths[b])):
            alone = model.generate(ids[b : b + 1], **settings)
        rows = slice(b * each, (b + 1) * each)
        assert torch.equal(both.sequences[rows], alone.sequences)
        torch.testing.assert_close(both.sequences_scores[rows], alone.sequences_scores)


def test_values_per_beam_are_refused(model: nn.Module) -> None:
    """Beams change places, so that a row has the history of another one."""
    words = r"4 values, and this is a batch of 2 samples \(4 rows\)"
    made = ZeroTuning(gamma=[1.0, 2.0, 3.0, 4.0])
    with pytest.raises(SelectionError, match=words), steer(model, made, control=True):
        model.generate(prompts(model, 2), num_beams=2, max_new_tokens=2, pad_token_id=0)


def test_a_prompt_whose_cache_is_repeated_keeps_its_value(model: nn.Module) -> None:
    """Several continuations of each sample are scored over its cache."""
    ids, made = prompts(model, 2), SpotLight([[(1, 4)], [(2, 3)]], [0.3, 0.7])
    with steer(model, made), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        more = prompts(model, 4)[:, :3]
        out = model(more, past_key_values=cache).logits
        picked = torch.tensor([3, 0])
        cache.batch_select_indices(picked)
        last = model(more[picked][:, :1], past_key_values=cache).logits
    for row, b in enumerate((0, 0, 1, 1)):
        with steer(model, SpotLight([made.spans[b]], made.target.values[b])), torch.no_grad():
            cache = model(ids[b : b + 1], use_cache=True).past_key_values
            alone = model(more[row : row + 1], past_key_values=cache).logits
            torch.testing.assert_close(out[row], alone[0], rtol=1e-5, atol=1e-5)
            if row in (3, 0):
                at = (3, 0).index(row)
                alone = model(more[row : row + 1, :1], past_key_values=cache).logits
                torch.testing.assert_close(last[at], alone[0], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ arms in one batch


def test_baseline_method_and_controls_run_in_one_batch(model: nn.Module) -> None:
    """Unedited, zero strength, method and control heads: each as by itself, the first two bit for bit as the model."""
    ids = prompts(model, 1).repeat(4, 1)
    heads: list[Any] = [None, HeadSet({1: [0]}), HeadSet({1: [0]}), HeadSet({0: [1], 1: [2]})]
    made = ZeroTuning(heads, [1.0, 1.0, 6.0, 6.0])
    with torch.no_grad():
        plain = model(ids).logits
        with steer(model, made):
            out = model(ids).logits
        assert torch.equal(out[:2], plain[:2])
        for b in (2, 3):
            with steer(model, ZeroTuning(heads[b], 6.0)):
                alone = model(ids[:1]).logits[0]
            torch.testing.assert_close(out[b], alone, rtol=1e-5, atol=1e-5)
            assert float((out[b] - plain[b]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["sd-pipeline", "sd3-pipeline"])
def test_heads_of_samples_in_guidance(name: str) -> None:
    host = HOSTS[name]
    pipe, where = host.build(), Where(layers=[1], kinds=("self", "joint"))
    inputs = host.inputs(pipe, 3, None, 0)
    plain = host.run(pipe, inputs)
    heads = [{1: [0]}, None, {1: [1]}]
    with steer(pipe, SoftPAG([2.0, 2.0, 1.0], 0.5, heads=heads, where=where)):
        out = host.run(pipe, inputs)
    assert torch.equal(out[1], plain[1])
    for b, scale in ((0, 2.0), (2, 1.0)):
        with steer(pipe, SoftPAG(scale, 0.5, heads=heads[b], where=where)):
            same = host.run(pipe, inputs)[b]
        torch.testing.assert_close(out[b], same, rtol=1e-5, atol=1e-5)
        assert float((out[b] - plain[b]).abs().max()) > 1e-3


def test_images_of_a_prompt_share_its_value_or_have_their_own() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", batch=2, steps=2, text=True)
    latents = tiny_call("sd", batch=4, steps=2)["latents"]
    call |= {"latents": latents, "num_images_per_prompt": 2}
    outs = {}
    for name, scales in {"prompts": [3.0, 0.5], "images": [3.0, 3.0, 0.5, 0.5], "mixed": [3.0, None, 0.5, 0.0]}.items():
        with steer(pipe, SoftPAG(scales, 0.5, where=MIDDLE)):
            outs[name] = pipe(**call)[0]
    plain = pipe(**call)[0]
    assert torch.equal(outs["prompts"], outs["images"])
    assert torch.equal(outs["mixed"][[0, 2]], outs["prompts"][[0, 2]])
    assert torch.equal(outs["mixed"][[1, 3]], plain[[1, 3]]) and not torch.equal(outs["prompts"][1], plain[1])
    for wrong in ([1.0, 2.0, 3.0], [1.0]):
        words, made = (
            f"has {len(wrong)} values?, and this is a batch of 2 or 4 samples",
            SoftPAG(wrong, 0.5, where=MIDDLE),
        )
        with pytest.raises(SelectionError, match=words), steer(pipe, made, control=True):
            pipe(**call)


def test_a_gate_of_each_sample_acts_on_both_guidance_rows() -> None:
    pipe, gate = SD.build(), {(1, 0): [0.0, None, 3.0]}
    inputs = SD.inputs(pipe, 3, None, 0)
    plain = SD.run(pipe, inputs)
    with steer(pipe, HeadGate(gate, where=Where(kinds="self"))):
        out = SD.run(pipe, inputs)
    assert torch.equal(out[1], plain[1])
    for b in (0, 2):
        with steer(pipe, HeadGate({(1, 0): gate[1, 0][b]}, where=Where(kinds="self"))):
            same = SD.run(pipe, inputs)[b]
        torch.testing.assert_close(out[b], same, rtol=1e-5, atol=1e-5)


def test_an_image_tower_has_no_samples() -> None:
    host = HOSTS["llava"]
    target = host.build()
    made = HeadGate({(0, 0): [0.5, 2.0]}, where=Where(modalities="vision"))
    with pytest.raises(UnsupportedHost, match="not one of samples"), steer(target, made, control=True):
        host.run(target, host.inputs(target, 2, None, 0))


def test_step_sizes_and_stop_losses_of_samples() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", batch=3, steps=2)
    plain = pipe(**call)[0]

    def excite(**options: Any) -> Intervention:
        fixed = {"compete": "all", "sharpness": 20.0, "until": 1, "where": Where(layers=[1], kinds="cross")}
        return AttendAndExcite([(2, 3), (4, 5)], {}, **fixed, **options)

    with steer(pipe, excite(step_size=[20.0, None, 5.0], stop_loss=[None, None, 1e9])):
        out = pipe(**call)[0]
    with steer(pipe, excite()):
        whole = pipe(**call)[0]
    assert torch.equal(out[1:], plain[1:]) and not torch.equal(out[0], plain[0])
    torch.testing.assert_close(out[0], whole[0])
