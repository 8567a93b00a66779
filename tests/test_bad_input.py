"""Bad input: one clear error of the right kind, before anything runs where that can be, and the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import (
    ACT,
    PAG,
    PASTA,
    SEG,
    HeadGate,
    HeadSet,
    SpotLight,
    Where,
    ZeroTuning,
    detach,
    get_method,
    sites,
    steer,
)
from attnsteer.errors import AttnSteerError, CompositionError, NeverFired, SelectionError, UnknownName, UnsupportedHost
from attnsteer.testing import tiny_call, tiny_pipeline, tiny_transformers, tiny_transformers_inputs
from attnsteer.testing.fingerprint import fingerprint


@pytest.fixture(scope="module")
def model() -> Any:
    """Three layers of four heads."""
    return tiny_transformers("llama")


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    return tiny_transformers_inputs("llama", model, batch=2, length=8, padding="left")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd")


def state(target: Any) -> dict[str, Any]:
    """All that an attempt to steer could leave behind: more than what steering is known to touch."""
    parts = (
        {"": target}
        if isinstance(target, nn.Module)
        else {k: v for k, v in vars(target).items() if isinstance(v, nn.Module)}
    )
    found: dict[str, Any] = {"fingerprint": fingerprint(target), "names": sorted(vars(target))}
    for part, module in parts.items():
        config = getattr(module, "config", None)
        found[f"{part}.config"] = repr(config.to_dict() if hasattr(config, "to_dict") else config)
        for name, child in module.named_modules():
            found[f"{part}.{name}"] = (sorted(vars(child)), child.training, id(type(child)))
        found[f"{part}.parameters"] = [(n, id(p), p._version, p.requires_grad) for n, p in module.named_parameters()]
    return found


@pytest.fixture
def unchanged(model: Any, inputs: Any) -> Iterator[None]:
    """The shared model before and after a test: the same state, the same output bit for bit."""
    with torch.no_grad():
        before, out = state(model), model(**inputs).logits
        try:
            yield
            assert state(model) == before
            assert torch.equal(model(**inputs).logits, out)
        finally:
            # What a failed test has left must not fail the others.
            detach(model)


class Watched:
    """Counts forward passes, so that "before anything runs" can be checked."""

    def __init__(self, target: nn.Module):
        self.calls = 0
        self._hook = target.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def stop(self) -> int:
        self._hook.remove()
        return self.calls


def refused(kind: type[AttnSteerError], words: str, act: Callable[[], Any]) -> str:
    """`act` raises exactly `kind` with `words` (a pattern) in a message that reads as one sentence or more."""
    with pytest.raises(AttnSteerError) as caught:
        act()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert re.search(words, message), message
    assert message.rstrip().endswith((".", "?", ")", ":", '"')) and len(message) < 600, message
    return message


# ------------------------------------------------------------------------------------------------ the selection


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ACT(where=Where(layers=3)), r"names layers \[3\]; the selected sites have layers \[0, 1, 2\]"),
        (lambda: ACT(where=Where(layers="0-7")), r"names layers \[3, 4, 5, 6, 7\]"),
        (lambda: ACT(where=Where(layers=-4)), r"names layers \[-4\]"),
        (lambda: ACT({1: [4]}), r"heads \[4\] of layer 1 do not exist.*4 heads \(0 to 3\)"),
        (lambda: ZeroTuning(where=Where(heads=[0, 9]), gamma=2.0), r"heads \[9\] of layer 0 do not exist"),
        (lambda: HeadGate({(3, 0): 0.5}), r"HeadSet names layers \[3\].*another model"),
        (lambda: ACT(HeadSet({0: [0]}, shape=(32, 32))), r"found on a model of shape \(32, 32\).*has \(3, 4\)"),
        (lambda: ACT(HeadSet({0: [0]}, shape=(32, 4))), r"found on a model of shape \(32, 4\)"),
        (lambda: ACT(HeadSet([])), "HeadSet is empty"),
        (lambda: ACT({0: [0]}, where=Where(heads={1: [1]})), "two selections name heads"),
        (lambda: ACT({0: [0], 2: [1]}, where=Where(layers=0)), r"names layers \[2\].*have layers \[0\]"),
        (lambda: ZeroTuning(gamma=2.0, where=Where(modules="self_attn")), r"whole path.*model\.layers\.0\.self_attn"),
        (lambda: HeadGate({(0, 0): 0.5}, where=Where(kinds="cross")), r"kinds.*what exists: self"),
        (lambda: ACT(where=Where(kinds="cross")), r"defined on \('self',\) attention, not on \['cross'\]"),
        (lambda: HeadGate({(0, 0): 0.5}, where=Where(modalities="vision")), r"modality \('vision',\).*\['text'\]"),
        (lambda: ZeroTuning(gamma=2.0, where=Where(steps=[0])), "LlamaForCausalLM has no steps; it has phases"),
        (lambda: ZeroTuning(gamma=2.0, where=Where(branches="cond")), "has no branches; it has phases"),
        (lambda: ZeroTuning(gamma=2.0, where={"layers": [0]}), "give a Where"),
        (lambda: ZeroTuning, r"It is a class: make an instance"),
        (lambda: Where(layers=1), "no Intervention"),
        (lambda: "ACT", "'ACT', which is no Intervention"),
    ],
)  # fmt: skip
def test_a_wrong_selection(build: Any, words: str, model: Any, unchanged: None) -> None:
    watched = Watched(model)
    refused(SelectionError, words, lambda: steer(model, build()))
    # Also behind a good one, whose sites must not stay patched.
    refused(SelectionError, words, lambda: steer(model, ZeroTuning(gamma=2.0), build()))
    assert watched.stop() == 0


def test_no_intervention_at_all(model: Any, unchanged: None) -> None:
    refused(SelectionError, "no intervention", lambda: steer(model))


@pytest.mark.parametrize(
    ("name", "words"),
    [("Zero_Tuning", "Did you mean 'ZeroTuning'"), ("", "there are ACT, "), ("attnsteer.methods.act:ACT", "no method")],
)
def test_an_unknown_method(name: str, words: str) -> None:
    refused(UnknownName, words, lambda: get_method(name))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ACT(beta=1.4), "beta=1.4"),
        (lambda: ACT(threshold=0.1, alpha=2.0), "give one of the two"),
        (lambda: ACT(threshold=float("nan")), "nan"),
        (lambda: ACT(decode="froze"), "froze"),
        (lambda: ACT({0: [-1]}), "non-negative"),
        (lambda: ZeroTuning(gamma=0.0), "gamma=0.0"),
        (lambda: HeadGate({}), "at least one head"),
        (lambda: HeadGate({(0, 0): float("inf")}), "finite"),
        (lambda: PASTA([]), r"PASTA\(spans="),
        (lambda: PASTA("a", alpha=0.0), "alpha=0.0"),
        (lambda: SpotLight(None), r"SpotLight\(spans=None\)"),
        (lambda: SpotLight("a", target=1.0), "target=1.0"),
        (lambda: SpotLight([[(3, 1)]]), "0 <= start < stop"),
        (lambda: SpotLight([[(-3, 1)]]), "0 <= start < stop"),
        (lambda: PASTA([["fox", (1.5, 3)]]), "start, stop"),
        (lambda: SpotLight([[7]]), "start, stop"),
        (lambda: PASTA([(0, 4)]), r"one list of ranges per sample, e\.g\. \[\[\(0, 4\)\]\]"),
        (lambda: SpotLight(["fox", [(0, 4)]]), r"SpotLight\(spans="),
        (lambda: PAG(float("nan")), "finite"),
        (lambda: SEG(sigma=0.0), "sigma=0.0"),
        (lambda: Where(layers="1-"), "FIRST-LAST"),
    ],
)
def test_a_wrong_value_is_refused_when_the_object_is_made(build: Any, words: str) -> None:
    refused(SelectionError, words, build)


# ------------------------------------------------------------------------------------------------ the target


class NoAttention(nn.Module):
    """A model that mixes tokens without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


class OwnAttention(NoAttention):
    """Attention written out: no primitive that could be exchanged."""

    num_heads = 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-1, -2), dim=-1) @ x


@pytest.mark.parametrize("cls", [NoAttention, OwnAttention])
def test_a_module_without_attention_that_can_be_reached(cls: type[nn.Module]) -> None:
    target, x = cls(), torch.randn(2, 4, 8)
    before, out = state(target), target(x)
    words = f"nothing here can steer a .*{cls.__name__}.*scaled_dot_product_attention"
    refused(UnsupportedHost, words, lambda: steer(target, HeadGate({(0, 0): 0.0})))
    refused(UnsupportedHost, words, lambda: sites(target))
    assert state(target) == before and torch.equal(target(x), out)


def test_attention_in_a_plain_container_is_named() -> None:
    class Listed(nn.Module):
        def __init__(self, held: Any) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.kept = held

    held = attention_module()
    for plain, whole in (([held], nn.ModuleList([held])), ({"a": held}, nn.ModuleDict({"a": held}))):
        words = f"inner.kept keeps modules in a plain {type(plain).__name__}.*found once it is an nn.Module"
        refused(UnsupportedHost, words, lambda p=plain: steer(Listed(p), HeadGate({(0, 0): 0.0})))
        # The way out that is named.
        assert len(sites(Listed(whole))) == 1


def attention_module() -> nn.Module:
    class Attention(nn.Module):
        num_heads = 2

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    return Attention()


def test_a_library_model_without_attention() -> None:
    from transformers import MambaConfig, MambaModel

    target = MambaModel(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4)).eval()
    before = state(target)
    words = "MambaModel has no attention that can be reached"
    refused(UnsupportedHost, words, lambda: steer(target, HeadGate({(0, 0): 0.0})))
    assert state(target) == before and len(sites(target)) == 0


def test_a_generic_module_that_does_not_say_its_heads() -> None:
    class Headless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    refused(UnsupportedHost, "no num_heads", lambda: steer(Headless(), HeadGate({(0, 0): 0.0})))


@pytest.mark.parametrize("target", [None, 3, "gpt2", {}, [], object(), torch.zeros(2)], ids=lambda t: type(t).__name__)
def test_a_target_of_another_type(target: Any) -> None:
    refused(UnsupportedHost, "nothing here can steer", lambda: steer(target, ZeroTuning(gamma=2.0)))
    refused(UnsupportedHost, "Give a transformers or diffusers model", lambda: sites(target))


def test_a_class_or_a_config_in_place_of_a_model(model: Any) -> None:
    for target in (type(model), model.config, model.state_dict()):
        refused(UnsupportedHost, "nothing here can steer", lambda t=target: steer(t, ZeroTuning(gamma=2.0)))


@pytest.mark.parametrize("method", [PAG(), SEG(), PAG(where=Where(layers=[0]))], ids=["pag", "seg", "pag-where"])
def test_guidance_on_a_language_model(method: Any, model: Any, unchanged: None) -> None:
    with pytest.raises(AttnSteerError, match=r"UNet middle block|diffusers"):
        steer(model, method)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("PAG", {}, "diffusers; LlamaForCausalLM is neither"),
        ("AttendAndExcite", {"words": ["cat"]}, "diffusers; LlamaForCausalLM is neither"),
        ("AttentionRefocusing", {"boxes": {"cat": (0.0, 0.0, 0.5, 0.5)}}, "diffusers; LlamaForCausalLM is neither"),
        ("VAR", {}, "LlamaForCausalLM has no images"),
        ("VHR", {}, "LlamaForCausalLM has no images"),
    ],
)
def test_the_kind_of_target_comes_before_layers_and_backbones(
    name: str, options: dict[str, Any], words: str, model: Any, unchanged: None
) -> None:
    refused(UnsupportedHost, words, lambda: steer(model, get_method(name)(**options)))
    refused(UnsupportedHost, words, lambda: steer(model, get_method(name)(**options, where=Where(layers=99))))


@pytest.mark.parametrize("backend", ["paged|sdpa", "kernels/some"])
def test_a_backend_that_cannot_be_exact(backend: str, model: Any, inputs: Any, unchanged: None) -> None:
    plain = model.config._attn_implementation_internal
    model.config._attn_implementation_internal = backend
    try:
        before, watched = state(model), Watched(model)
        words = rf"runs '{re.escape(backend)}' attention.*set_attn_implementation\(\"sdpa\"\)"
        refused(UnsupportedHost, words, lambda: steer(model, ZeroTuning(gamma=2.0)))
        assert watched.stop() == 0 and state(model) == before
    finally:
        model.config._attn_implementation_internal = plain


# ------------------------------------------------------------------------------------------------ composition


def test_nested_steering_of_one_site(model: Any, inputs: Any, unchanged: None) -> None:
    with steer(model, ZeroTuning(gamma=2.0, where=Where(layers=[0, 1]))):
        inside, out = state(model), model(**inputs).logits
        words = r"model\.layers\.1\.self_attn is steered already.*steer\(model, first, second\)"
        refused(CompositionError, words, lambda: steer(model, HeadGate({(1, 0): 0.5, (2, 0): 0.5})))
        assert state(model) == inside and torch.equal(model(**inputs).logits, out)
        with steer(model, HeadGate({(2, 0): 0.5})):
            assert not torch.equal(model(**inputs).logits, out)
        assert state(model) == inside and torch.equal(model(**inputs).logits, out)


def test_nested_steering_of_a_pipeline_and_its_model(pipe: Any) -> None:
    before = state(pipe)
    middle = next(s.layer for s in sites(pipe) if s.name.startswith("mid_block"))
    with pytest.raises(NeverFired), steer(pipe, PAG()):
        refused(CompositionError, "is steered already", lambda: steer(pipe.unet, HeadGate({(middle, 0): 0.5})))
        refused(CompositionError, "is steered already", lambda: steer(pipe, SEG()))
    assert state(pipe) == before


# ------------------------------------------------------------------------------------------------ the call


def run(model: Any, method: Any, **inputs: Any) -> Callable[[], None]:
    def act() -> None:
        with steer(model, method):
            model(**inputs)

    return act


def test_training_mode_with_dropout(inputs: Any) -> None:
    model = tiny_transformers("llama", attention_dropout=0.2)
    before, out = state(model), model(**inputs).logits
    model.train()
    refused(UnsupportedHost, r"dropout 0\.2; .*model\.eval\(\)", run(model, ZeroTuning(gamma=2.0), **inputs))
    model.eval()
    assert state(model) == before and torch.equal(model(**inputs).logits, out)


def test_training_mode_without_dropout_is_fine(model: Any, inputs: Any, unchanged: None) -> None:
    with steer(model, ZeroTuning(gamma=2.0)):
        expected = model(**inputs).logits
        model.train()
        assert torch.equal(model(**inputs).logits, expected)
        model.eval()


class Letters:
    """Decodes token ids as letters."""

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(chr(48 + i) for i in ids)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (SpotLight("xyz", tokenizer=Letters()), "'xyz' is not in the text of sample 0"),
        (SpotLight("xyz"), "give the method a tokenizer"),
        (PASTA([["xyz"], [(0, 1)]], tokenizer=Letters()), "not in the text of sample 0"),
        (SpotLight([[(0, 3)], [(2, 8)]]), r"span \(2, 8\) of sample 1 ends after its 7 tokens"),
        (PASTA([[(0, 9)], [(0, 1)]]), r"span \(0, 9\) of sample 0 ends after its 8 tokens"),
        (SpotLight([[(0, 1)], [(0, 1)], [(0, 1)]]), "spans has 3 samples, and this is a batch of 2 samples"),
        (ZeroTuning(gamma=2.0, where=Where(rows="image")), "row roles none"),
    ],
)
def test_a_span_or_role_that_the_batch_does_not_have(
    method: Any, words: str, model: Any, inputs: Any, unchanged: None
) -> None:
    watched = Watched(model.model.layers[0])
    refused(SelectionError, words, run(model, method, **inputs))
    assert watched.stop() == 0 or isinstance(method, ZeroTuning)


@torch.no_grad()
def test_spans_are_asked_for_only_where_the_method_acts(model: Any, inputs: Any, unchanged: None) -> None:
    later = SpotLight([[(0, 99)], [(0, 1)]], 0.5, where=Where(phases="decode"))
    with pytest.raises(NeverFired), steer(model, later):
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        refused(
            SelectionError,
            r"span \(0, 99\)",
            lambda: model(input_ids=inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache),
        )


def test_the_target_comes_first(model: Any, unchanged: None) -> None:
    refused(
        SelectionError, r"got a LlamaForCausalLM.*The target comes first", lambda: steer(ZeroTuning(gamma=2.0), model)
    )


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: steer(None), r"nothing here can steer a builtins\.NoneType"),
        (lambda: steer("x", "y"), r"nothing here can steer a builtins\.str"),
        (lambda: steer(nn.Linear(2, 2), ACT), r"nothing here can steer a torch\.nn\.modules\.linear\.Linear"),
        (lambda: steer(None, ACT(), measure="yes"), r"nothing here can steer a builtins\.NoneType"),
        (lambda: steer(ACT(), ACT()), r"nothing here can steer a attnsteer\.methods\.act\.ACT"),
    ],
)
def test_the_target_is_looked_at_first(act: Any, words: str) -> None:
    refused(UnsupportedHost, words, act)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesure": True}, r"steer\(\) has no parameter 'mesure'; .* Did you mean 'measure'\?"),
        ({"measure": "yes"}, r"steer\(measure='yes'\): give True or False"),
        ({"reference": 1}, r"steer\(reference=1\): give True or False"),
        ({"control": None}, r"steer\(control=None\): give True or False"),
    ],
)
def test_a_wrong_option_of_steer(options: Any, words: str, model: Any, unchanged: None) -> None:
    refused(SelectionError, words, lambda: steer(model, ZeroTuning(gamma=2.0), **options))
    refused(SelectionError, r"steer\(\) needs target", lambda: steer(**options) if "mesure" not in options else steer())


@pytest.mark.parametrize("method", [ACT, lambda **more: ACT(decode="prefill_only", **more)], ids=["frozen", "prefill"])
def test_a_selection_without_the_prompt(method: Any, model: Any, inputs: Any, unchanged: None) -> None:
    """What is found in the prompt is not known where it is left out; that the prompt ran inside does not help."""
    with steer(model, method(where=Where(phases="decode")), control=True):
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        act = lambda: model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)  # noqa: E731
        if method is ACT:
            words = r"^ACT at model\.layers\.0\.self_attn: Where\(phases=\('decode',\)\) leaves the prompt out.*Select both phases"
            refused(UnsupportedHost, words, act)
        else:
            act()


def test_a_string_span_without_token_ids(model: Any, inputs: Any, unchanged: None) -> None:
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    act = run(model, SpotLight("x", tokenizer=Letters()), inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    refused(SelectionError, "without input_ids", act)


def test_a_prompt_that_ran_before(model: Any, inputs: Any, unchanged: None) -> None:
    for method in (ACT(), PASTA([[(0, 2)]] * 2)):
        cache = model(input_ids=inputs["input_ids"], use_cache=True).past_key_values
        act = run(model, method, input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
        refused(UnsupportedHost, "cache was filled before steering began", act)
        assert not [name for name in vars(cache) if "attnsteer" in name]


def test_a_foreign_error_in_the_call_leaves_nothing_behind(model: Any, unchanged: None) -> None:
    with pytest.raises(IndexError), steer(model, ZeroTuning(gamma=2.0)):
        model(input_ids=torch.tensor([[10**6]]))
    with pytest.raises(KeyboardInterrupt), steer(model, ZeroTuning(gamma=2.0)):
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------ pipelines


class Odd:
    """An attention processor that reaches attention by neither primitive."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(
    ("build", "kind", "words"),
    [
        (lambda: PAG(where=Where(layers=99)), SelectionError, r"names layers \[99\]"),
        (lambda: PAG(where=Where(modules="mid_block")), SelectionError, r"whole path.*unet\.down_blocks"),
        (lambda: PAG(where=Where(phases="decode", layers=[0])), SelectionError, "no phases; it has steps, branches"),
        (lambda: PAG(where=Where(kinds="cross")), SelectionError, r"not on \['cross'\]"),
        (lambda: PAG(heads={0: [99]}), SelectionError, r"heads \[99\]"),
        (lambda: ZeroTuning(gamma=2.0), UnsupportedHost, "ZeroTuning needs tokens"),
        (lambda: ACT(), UnsupportedHost, "ACT needs tokens"),
    ],
)
def test_a_wrong_selection_on_a_pipeline(build: Any, kind: type[AttnSteerError], words: str, pipe: Any) -> None:
    before = state(pipe)
    refused(kind, words, lambda: steer(pipe, build()))
    assert state(pipe) == before


def test_a_processor_that_cannot_be_steered(pipe: Any) -> None:
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    plain = module.processor
    module.set_processor(Odd())
    try:
        before = state(pipe)
        words = r"Odd, which reaches attention neither through.*set_attn_processor"
        refused(UnsupportedHost, words, lambda: steer(pipe, PAG()))
        assert state(pipe) == before
    finally:
        module.set_processor(plain)


def test_guidance_without_a_default_needs_layers() -> None:
    flux = tiny_pipeline("flux")
    before = state(flux)
    refused(SelectionError, r"PAG needs where= on this model.*attnsteer\.sites\(pipe\)", lambda: steer(flux, PAG()))
    assert state(flux) == before


def test_fractions_of_a_schedule_and_branches_on_a_bare_denoiser(pipe: Any) -> None:
    from attnsteer.testing import tiny_denoiser, tiny_denoiser_inputs

    unet = tiny_denoiser("sd")
    inputs = tiny_denoiser_inputs("sd", unet)
    before = state(unet)
    gates = {(0, 0): 0.5}
    refused(
        SelectionError, "length of the schedule", run(unet, HeadGate(gates, where=Where(steps=(0.0, 0.5))), **inputs)
    )
    refused(SelectionError, r"run\.branches\(", run(unet, HeadGate(gates, where=Where(branches="cond")), **inputs))
    refused(UnsupportedHost, r"run\.branches\(", run(unet, PAG(), **inputs))
    assert state(unet) == before


@pytest.mark.parametrize("method", [PAG(), HeadGate({(0, 0): 0.5})], ids=["around", "inside"])
def test_an_error_in_the_middle_of_sampling_leaves_nothing_behind(method: Any, pipe: Any) -> None:
    out = pipe(**tiny_call("sd", steps=2))[0]
    before = state(pipe)

    def stop(*_: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), steer(pipe, method):
        pipe(**tiny_call("sd", steps=2), callback_on_step_end=stop)
    assert state(pipe) == before and torch.equal(pipe(**tiny_call("sd", steps=2))[0], out)
