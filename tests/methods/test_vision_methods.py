"""VAR and VHR: hand-computed vectors, presets, layers, what they refuse, and how often the image-free prompt runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import (
    ADHH,
    HGAI,
    PAI,
    PAINT,
    SPIN,
    VAR,
    VHR,
    HeadSet,
    Intervention,
    VisualHighlight,
    VisualKnockout,
    Where,
    ZeroTuning,
    steer,
)
from attnsteer.errors import AttnSteerError, CompositionError, SelectionError, UnsupportedHost
from attnsteer.methods.var import placebo, sink_tokens
from attnsteer.methods.vhr import above_median, divergence
from attnsteer.search.sink_dims import SinkDims
from attnsteer.site import Site
from attnsteer.testing.fingerprint import fingerprint
from tests.hosts.transformers.vision_families import VOCAB, build, prompts
from tests.reference import lvlm_methods

DIMS = (3, 17)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def sites_of(layers: int) -> list[Site]:
    vision = [Site(f"v.{i}", i, "self", 2, 2, "vision") for i in range(3)]
    return vision + [Site(f"t.{i}", i, "self", 4, 4, causal=True) for i in range(layers)]


# Definitions.


def test_the_reference_of_var_on_a_hand_computed_row() -> None:
    """Mass 0.3 on a text sink, 0.2 on a visual one, 0.4 on the image's rest, 0.1 on text; 0.6 of 0.5 is moved."""
    A = torch.tensor([[[[0.3, 0.2, 0.3, 0.1, 0.1]]]], dtype=torch.float64)
    S, V = torch.tensor([[1, 1, 0, 0, 0]]).bool(), torch.tensor([[0, 1, 1, 1, 0]]).bool()
    rows = torch.tensor([[True]])
    new = lvlm_methods.var(A, S, V, rows, rho=0.5, min_image_mass=0.2, c=0.6)
    assert torch.allclose(new, torch.tensor([[[[0.12, 0.08, 0.525, 0.175, 0.1]]]], dtype=torch.float64))
    assert torch.allclose(new.sum(-1), A.sum(-1))
    for options in ({"rho": 0.7, "min_image_mass": 0.2}, {"rho": 0.5, "min_image_mass": 0.61}):
        assert torch.equal(lvlm_methods.var(A, S, V, rows, c=0.6, **options), A)
    assert torch.equal(lvlm_methods.var(A, S, V, ~rows, rho=0.5, min_image_mass=0.2, c=0.6), A)


def test_sinks_are_strictly_above_tau() -> None:
    x = torch.ones(1, 3, 16)
    x[0, 1, 3], x[0, 2, 4] = 50.0, 50.0
    phi = 50.0 / ((50.0**2 + 15) / 16 + 1e-6) ** 0.5
    assert sink_tokens(x, (3,), phi - 0.01).tolist() == [[False, True, False]]
    assert not sink_tokens(x, (3,), phi + 0.01).any()
    assert torch.equal(sink_tokens(x, (3, 4), 3.0), lvlm_methods.sinks(x, (3, 4), 3.0))
    assert sink_tokens(x, (3, 4), 3.0).tolist() == [[False, True, True]]


def test_the_placebo_is_as_many_tokens_of_each_image() -> None:
    image = torch.tensor([[0, *[1] * 8, 0, *[1] * 3, 0], [0] * 4 + [1] * 10]).bool()
    sinks = torch.zeros_like(image)
    sinks[0, [0, 2, 5, 11, 12]], sinks[1, [4, 9]] = True, True
    found = placebo(sinks, image, 7)
    assert torch.equal(found, lvlm_methods.placebo(sinks, image, 7))
    # Two of the first image; of the second, which has two sinks, the only token that is none.
    assert found[0, 1:9].sum() == 2 and found[0, 10:13].tolist() == [True, False, False] and found[1].sum() == 2
    assert not (found & (sinks | ~image)).any()
    assert any(not torch.equal(placebo(sinks, image, s), found) for s in range(3))
    # What stands before an image, or behind it, has no say.
    assert torch.equal(placebo(sinks[:, 1:9], image[:, 1:9], 7)[0], found[0, 1:9])


def test_divergence_and_outliers() -> None:
    """The third head has the largest divergence and energy: an outlier; the fourth has the divergence only."""
    free = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.0, 0.5]]])
    seen = free + torch.tensor([0.1, 0.2, 4.0, 3.9, 0.3, 0.4])[None, :, None] * torch.tensor([1.0, 0.0])
    plain = divergence(seen, free, outliers=False)
    assert torch.allclose(plain, torch.tensor([[0.1, 0.2, 4.0, 3.9, 0.3, 0.4]]), atol=1e-6)
    ruled = divergence(seen, free)
    assert float(ruled[0, 2]) == 0.0 and torch.equal(ruled[0, [0, 1, 3, 4, 5]], plain[0, [0, 1, 3, 4, 5]])
    assert above_median(plain).tolist() == [[False, False, True, True, False, True]]
    assert above_median(ruled).tolist() == [[False, False, False, True, True, True]]
    for scores in (plain, ruled):
        assert torch.equal(above_median(scores), lvlm_methods.vhr_heads(scores))
    assert torch.allclose(lvlm_methods.vhd(seen, free).float(), ruled, atol=1e-6)


# Settings.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VAR(()), r"sink_dims=\(\)"),
        (lambda: VAR("12"), "sink_dims"),
        (lambda: VAR((1.5,)), "find_sink_dims"),
        (
            lambda: VAR(SinkDims((), {}, {}, 7.1, 1, (2,), "no sink dimensions: so it is")),
            "no sink dimensions: so it is. Search",
        ),
        (lambda: VAR((-1,)), "hidden dimensions"),
        (lambda: VAR(DIMS, tau=0.0), "tau=0.0"),
        (lambda: VAR(DIMS, tau=float("nan")), "tau=nan"),
        (lambda: VAR(DIMS, rho=1.5), "rho=1.5"),
        (lambda: VAR(DIMS, min_image_mass=-0.1), "min_image_mass=-0.1"),
        (lambda: VAR(DIMS, move_fraction=2.0), "move_fraction=2.0"),
        (lambda: VAR(DIMS, sinks="text"), "sinks='text'"),
        (lambda: VAR(DIMS, seed=-1), "seed=-1"),
        (lambda: VHR(float("inf")), "alpha=inf"),
        (lambda: VHR(True), "alpha=True"),
        (lambda: VHR(rows="first"), "rows='first'"),
        (lambda: VHR(last=0), "last=0"),
    ],
)
def test_values_out_of_range(make: Any, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        make()


def test_the_released_code_of_var() -> None:
    """rho is the sinks' share there, and p the fraction that is kept."""
    made = VAR.released_code(DIMS, rho=0.2, p=0.7)
    assert made.rho == pytest.approx(0.8) and made.move_fraction == pytest.approx(0.3) and made.released
    default = VAR.released_code(DIMS)
    assert (default.tau, default.rho, default.min_image_mass, default.move_fraction) == (20.0, 0.5, 0.2, 0.4)
    assert VAR(DIMS).move_fraction == 0.6 and not VAR(DIMS).released


def test_default_layers() -> None:
    every = sites_of(32)
    assert VAR(DIMS).default_where(every).layers == tuple(range(31))
    assert VAR.released_code(DIMS).default_where(every).layers == tuple(range(2, 32))
    assert VHR().default_where(every).layers == (1, *range(18, 32))
    assert VHR(last=18).default_where(every).layers == (1, *range(14, 32))
    model = build("llava")
    with steer(model, VAR(DIMS, 1.6, 0.2, 0.1)) as run:
        assert [s.layer for s in run.sites] == [0]
        model(**prompts("llava", [[2, "image", 3]])[0])


def test_round_trip(tmp_path: Any) -> None:
    for method in (
        VAR.released_code(DIMS, where=Where(layers=[1])),
        VAR(),
        VHR(0.5, rows="last", last=3, outliers=False),
    ):
        assert Intervention.from_pretrained(method.save_pretrained(tmp_path)) == method


# Bad input: an error before the first step, and the model as it was.

ON = Where(layers=[0, 1])
METHODS = {"VAR": VAR(DIMS, 1.6, 0.2, 0.1, where=ON), "VHR": VHR(where=ON)}


def refused(model: nn.Module, method: Intervention, kind: type[AttnSteerError], words: str, **inputs: Any) -> None:
    before = fingerprint(model)
    with pytest.raises(kind, match=words), steer(model, method):
        model(**inputs)
    assert fingerprint(model) == before
    with pytest.raises(kind, match=words), steer(model, method):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("name", METHODS)
def test_no_image_in_the_prompt(name: str) -> None:
    model = build("llava")
    text = {"input_ids": torch.randint(8, VOCAB, (2, 7))}
    model(**text)
    refused(model, METHODS[name], SelectionError, rf"{name}: there is no image in the prompts", **text)


def test_a_text_among_images_is_left_alone() -> None:
    """Row 1 has no image: its logits are those of the unsteered model in every step, and row 0's are not."""
    model, (inputs, _) = build("llava"), prompts("llava", [[2, "image", 3], [9]])
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = torch.stack(model.generate(**inputs, **options).logits)
    every = {
        **METHODS,
        "PAI": PAI(0.8, where=ON),
        "HGAI": HGAI(0.8, where=ON),
        "PAINT": PAINT([[0, 1, 2, 3], []], [[5], []], 0.9, 1.4, where=ON),
        "ADHH": ADHH([(0, 1), (1, 0), (1, 3)], 0.05),
        "SPIN": SPIN(0.5, 0.1, where=ON),
        "VisualKnockout": VisualKnockout([("last", "image"), ("generated", "image")], where=ON),
        "VisualHighlight": VisualHighlight(1.8, where=ON),
    }
    for name, method in every.items():
        with steer(model, method):
            out = torch.stack(model.generate(**inputs, **options).logits)
        assert torch.allclose(out[0, 1], plain[0, 1], atol=1e-6), name
        assert not torch.allclose(out[0, 0], plain[0, 0], atol=1e-6) or name == "ADHH", name
        same = out.argmax(-1)[:, 1] == plain.argmax(-1)[:, 1]
        assert same.all() and torch.allclose(out[:, 1], plain[:, 1], atol=1e-6), name


@pytest.mark.parametrize("name", METHODS)
def test_a_cut_image(name: str) -> None:
    model = build("llava")
    inputs, image = prompts("llava", [[2, "image"]])
    cut = {k: v[:, :-3] if v.ndim == 2 else v for k, v in inputs.items()}
    refused(model, METHODS[name], SelectionError, "sample 0 has 13 image tokens; each image has 16.*truncat", **cut)


@pytest.mark.parametrize("name", METHODS)
def test_a_language_model_is_asked_for_spans(name: str) -> None:
    model = build("llava").model.language_model
    with pytest.raises(SelectionError, match=r"run\.images"), steer(model, METHODS[name]):
        model(input_ids=torch.randint(8, VOCAB, (1, 7)))


@pytest.mark.parametrize("name", METHODS)
def test_a_model_whose_images_are_no_self_attention_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for Mllama and Idefics, whose images are in cross-attention layers."""
    from attnsteer.hosts.transformers import image_tokens as vision

    monkeypatch.setitem(vision.FAMILIES, "llava", vision.FAMILIES["mllama"])
    with pytest.raises(UnsupportedHost, match=rf"{name} acts on image tokens; .*cross-attention"):
        steer(build("llava"), METHODS[name])


def test_an_unknown_backbone_without_sink_dims() -> None:
    model = build("llava")
    before = fingerprint(model)
    with pytest.raises(SelectionError, match=r"sink dimensions of this backbone .*hidden_size=32.*find_sink_dims"):
        steer(model, VAR())
    assert fingerprint(model) == before


def test_sink_dims_and_tau_that_the_model_cannot_have() -> None:
    model, (inputs, _) = build("llava"), prompts("llava", [[2, "image", 3]])
    refused(model, VAR((40,), 1.6), SelectionError, r"\(40,\): the hidden states have 32 dimensions, 0 to 31", **inputs)
    refused(model, VAR(DIMS), SelectionError, r"tau=20\.0: .* at most 5\.7 .*scaled_tau", **inputs)


@pytest.mark.parametrize("name", METHODS)
def test_a_prefill_outside_of_the_steering(name: str) -> None:
    model, (inputs, _) = build("llava"), prompts("llava", [[2, "image", 3]])
    cache = model(**inputs, use_cache=True).past_key_values
    with (
        pytest.raises(AttnSteerError, match=r"inside the steering context|cache was filled before"),
        steer(model, METHODS[name]),
    ):
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)


def test_chunks_without_a_declared_length_are_refused_at_the_first_token() -> None:
    """VHR cannot know which chunk ends the prompt."""
    model, (inputs, _) = build("llava"), prompts("llava", [[2, "image", 6]])
    ids = inputs["input_ids"]

    def chunks(run: Any, total: int | None) -> Tensor:
        with run.chunked_prefill(tokens=total):
            cache = model(input_ids=ids[:, :20], pixel_values=inputs["pixel_values"], use_cache=True).past_key_values
            model(input_ids=ids[:, 20:], past_key_values=cache, use_cache=True)
        return model(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True).logits

    method = METHODS["VHR"].new(rows="last")
    with pytest.raises(UnsupportedHost, match=r"chunked_prefill\(tokens="), steer(model, method) as run:
        chunks(run, None)
    with steer(model, method) as run:
        out = chunks(run, ids.shape[1])
        cache = model(**inputs, use_cache=True).past_key_values
        whole = model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits
    assert torch.allclose(out, whole, atol=1e-5)


def test_the_last_token_must_be_in_the_last_chunk() -> None:
    """Padding on the right moves a short sample's last token into an earlier chunk."""
    model, (inputs, image) = build("llava"), prompts("llava", [[2, "image", 8], ["image", 2]], "right")
    ids, mask, n = inputs["input_ids"], inputs["attention_mask"], image.shape[1]
    first = {"pixel_values": inputs["pixel_values"], "attention_mask": mask[:, :20]}
    with steer(model, METHODS["VHR"], control=True) as run, run.chunked_prefill(tokens=n):
        cache = model(input_ids=ids[:, :20], **first, use_cache=True).past_key_values
        with pytest.raises(UnsupportedHost, match="Pad on the left"):
            model(input_ids=ids[:, 20:], attention_mask=mask, past_key_values=cache)


def test_the_image_free_prompt_needs_token_ids() -> None:
    model = build("llava").model.language_model
    embeds = torch.randn(1, 9, 32)
    run = steer(model, METHODS["VHR"], control=True)
    try:
        with pytest.raises(UnsupportedHost, match="built from input_ids"), run.images([[(2, 6)]]):
            model(inputs_embeds=embeds)
        with pytest.raises(UnsupportedHost, match="no token besides its image"), run.images([[(0, 5)]]):
            model(input_ids=torch.randint(8, VOCAB, (1, 5)))
    finally:
        run.remove()


def test_heads_that_are_compared_must_not_be_divided() -> None:
    model, (inputs, _) = build("llava"), prompts("llava", [[2, "image", 3]])
    with pytest.raises(CompositionError, match=r"VHR compares all of its heads .* ZeroTuning acts on some"):
        steer(model, METHODS["VHR"], ZeroTuning({0: [1]}, 3.0))
    both = [METHODS["VAR"], METHODS["VHR"]]
    with steer(model, *both) as run:
        fast = model(**inputs).logits
        assert all(run.audit.fired(i) for i in (0, 1))
    with steer(model, *both, reference=True):
        assert torch.allclose(model(**inputs).logits, fast, atol=1e-5)


# Cost and isolation of the image-free prompt.


def test_the_image_free_prompt_runs_once_per_sequence() -> None:
    model, (inputs, _) = build("llava"), prompts("llava", [[2, "image", 3], [4, "image", 1]])
    counts = {"layer": 0, "vision": 0}

    def count(name: str) -> Any:
        return lambda *_: counts.update({name: counts[name] + 1})

    hooks = [
        model.model.language_model.layers[1].mlp.register_forward_hook(count("layer")),
        model.model.vision_tower.register_forward_hook(count("vision")),
    ]
    try:
        for _ in range(2):
            counts.update(layer=0, vision=0)
            with steer(model, METHODS["VHR"]):
                model.generate(**inputs, max_new_tokens=5, do_sample=False)
            assert counts == {"layer": 6, "vision": 1}  # five steps and the image-free prompt
    finally:
        for hook in hooks:
            hook.remove()


def test_the_image_free_prompt_is_not_recorded_and_leaves_nothing() -> None:
    model, (inputs, _) = build("qwen2_vl"), prompts("qwen2_vl", [[2, "image", 3]])
    plain = model(**inputs, output_hidden_states=True)
    mark, deltas = fingerprint(model), model.model.rope_deltas.clone()
    with steer(model, METHODS["VHR"]):
        out = model(**inputs, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [h.shape for h in plain.hidden_states]
    assert torch.equal(out.hidden_states[0], plain.hidden_states[0])
    assert fingerprint(model) == mark and torch.equal(model.model.rope_deltas, deltas)
    assert torch.equal(model(**inputs).logits, plain.logits)


def test_a_generated_token_never_becomes_a_sink() -> None:
    """Decoding row by row equals a forward over prompt and continuation in which only prompt tokens can be sinks."""
    model, (inputs, image) = build("llava"), prompts("llava", [[2, "image", 4]])
    method, n = METHODS["VAR"], image.shape[1]
    seen: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class Watching(VAR):
        def weights(self, call: Any) -> Any:
            edit = super().weights(call)
            seen.append(call.state["sinks"].shape[1])
            return edit

    watching = Watching(DIMS, 1.6, 0.2, 0.1, where=ON)
    with steer(model, watching):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert set(seen) == {n} and method.tau == watching.tau


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (ADHH.llava_15_7b(), r"another model"),
        (ADHH(HeadSet({0: [9]})), r"\[9\].*another model"),
        (PAI(0.2, HeadSet({0: [0]}, shape=(32, 32))), "32, 32"),
        (PAINT([[0]], [[]], 0.2, 0.1, heads=HeadSet({31: [0]})), r"\[31\].*another model"),
        (VAR(sink_dims=(3,), where=Where(heads=HeadSet({0: [9]}))), r"\[9\].*another model"),
        (VHR(2.0, where=Where(heads=HeadSet({31: [0]}))), r"\[31\].*another model"),
        (VisualKnockout([("last", "image")], where=Where(layers=[31])), r"31"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_heads_and_layers_of_another_model_are_refused_when_attached(method: Any, words: str) -> None:
    model = build("llava")
    with pytest.raises(SelectionError, match=words):
        steer(model, method)
