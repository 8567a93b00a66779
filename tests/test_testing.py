"""The tiny models are reproducible, run on every shape, and attention matters in them; the laws run and report as they say."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attnsteer import HeadGate, Intervention, testing
from attnsteer.errors import SelectionError
from attnsteer.testing import (
    DENOISERS,
    HOSTS,
    LAWS,
    PIPELINES,
    SCHEDULERS,
    STOCHASTIC_SCHEDULERS,
    TRANSFORMERS,
    LawFailure,
    MethodCase,
    Setting,
    check_law,
    check_laws,
    official_pag,
    run_laws,
    self_attention_modules,
    tiny_call,
    tiny_clip_tokenizer,
    tiny_denoiser,
    tiny_denoiser_inputs,
    tiny_pipeline,
    tiny_scheduler,
    tiny_transformers,
    tiny_transformers_inputs,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and lose much when the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ROOT = Path(__file__).parents[1]
PAG = [name for name, tiny in PIPELINES.items() if tiny.pag_class]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_importing_the_package_imports_no_host_library() -> None:
    code = "import sys, attnsteer.testing; print({'torch', 'transformers', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


# ----------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module", params=TRANSFORMERS)
def text_model(request: pytest.FixtureRequest) -> tuple[str, torch.nn.Module]:
    return request.param, tiny_transformers(request.param)


@torch.no_grad()
def test_transformers_run_on_every_shape(text_model: tuple[str, torch.nn.Module]) -> None:
    name, model = text_model
    for batch in (1, 2, 4):
        for padding in (None, "left", "right"):
            inputs = tiny_transformers_inputs(name, model, batch, 12, padding)
            assert model(**inputs)[0].isfinite().all()
            if "attention_mask" in inputs and padding:
                mask = inputs["attention_mask"]
                assert (mask.shape[1] - mask.sum(1)).tolist() == list(range(batch))
            if TRANSFORMERS[name].decoder:
                start = inputs.get("decoder_input_ids", inputs["input_ids"])
                out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
                assert out.shape == (batch, start.shape[1] + 3)


def test_transformers_are_reproducible_and_small(text_model: tuple[str, torch.nn.Module]) -> None:
    name, model = text_model
    before = torch.get_rng_state()
    again = tiny_transformers(name)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert same_state(model, again)
    assert not same_state(model, tiny_transformers(name, seed=1))
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 1e6
    for tower in TRANSFORMERS[name].towers:
        model.get_submodule(tower)


@torch.no_grad()
def test_attention_maps_are_far_from_uniform_and_eager_agrees(
    text_model: tuple[str, torch.nn.Module],
) -> None:
    name, model = text_model
    eager = tiny_transformers(name, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    inputs = tiny_transformers_inputs(name, model)
    out = eager(**inputs, output_attentions=True)
    assert relative(out[0], model(**inputs)[0]) < 1e-5
    maps = [m for key in out if key.endswith("attentions") for m in out[key] if m is not None]
    assert maps
    for layer in maps:
        row = layer[..., -1, :].double()
        visible = (row > 0).sum(-1)
        entropy = -(row * row.clamp_min(1e-30).log()).sum(-1) / visible.clamp_min(2).log()
        assert entropy.mean() < 0.97


def padded_and_alone(name: str, padding: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each row: its outputs at valid positions in a padded batch, and when it runs alone, unpadded."""
    model = tiny_transformers(name)
    inputs = tiny_transformers_inputs(name, model, 3, 12, padding)
    out = model(**inputs)[0]
    for row in range(3):
        keep = inputs["attention_mask"][row] == 1
        alone = {}
        for key, value in inputs.items():
            alone[key] = value.chunk(3)[row]
            if value.shape == inputs["attention_mask"].shape:
                alone[key] = alone[key][:, keep]
        batched = out[row : row + 1]
        yield batched if "decoder_input_ids" in inputs else batched[:, keep], model(**alone)[0]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name != "vit"])  # images are not padded
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(name: str, padding: str) -> None:
    for row, (batched, alone) in enumerate(padded_and_alone(name, padding)):
        if name == "bart" and padding == "left" and row > 0:
            # BART counts positions from the first column, padding included, and takes no position ids
            assert relative(batched, alone) > 1e-2
        else:
            assert relative(batched, alone) < 1e-5


def test_overrides_reach_the_right_config() -> None:
    model = tiny_transformers(
        "llava",
        num_hidden_layers=2,
        vision_config={"num_hidden_layers": 4},
        attn_implementation={"text_config": "eager", "vision_config": "sdpa"},
    )
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.num_hidden_layers, vision.num_hidden_layers) == (2, 4)
    assert (text._attn_implementation, vision._attn_implementation) == ("eager", "sdpa")


def test_the_window_of_mistral_matters() -> None:
    inputs = tiny_transformers_inputs("mistral", tiny_transformers("mistral"))
    with torch.no_grad():
        narrow = tiny_transformers("mistral")(**inputs)[0]
        wide = tiny_transformers("mistral", sliding_window=64)(**inputs)[0]
    assert torch.allclose(narrow[:, :5], wide[:, :5], atol=1e-5)
    assert relative(narrow[:, 5:], wide[:, 5:]) > 0.1


# -------------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("name", DENOISERS)
@torch.no_grad()
def test_denoisers_run_and_are_reproducible(name: str) -> None:
    before = torch.get_rng_state()
    model = tiny_denoiser(name)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert same_state(model, tiny_denoiser(name))
    for batch in (1, 3):
        inputs = tiny_denoiser_inputs(name, model, batch)
        out = model(**inputs, return_dict=False)[0]
        assert out.shape[0] == batch and out.isfinite().all()
        assert 0.3 < float(out.std()) < 3


@pytest.mark.parametrize("name", PIPELINES)
def test_latents_depend_on_the_prompt_and_on_every_self_attention(name: str) -> None:
    pipe = tiny_pipeline(name)
    call = tiny_call(name, steps=3)
    latents = pipe(**call)[0]
    assert torch.equal(latents, pipe(**call)[0])
    assert torch.equal(latents, tiny_pipeline(name)(**tiny_call(name, steps=3))[0])

    other = {**call, "prompt_embeds": call["prompt_embeds"].roll(1, -1)}
    assert relative(pipe(**other)[0], latents) > 1e-2

    denoiser = getattr(pipe, PIPELINES[name].denoiser)
    modules = self_attention_modules(denoiser)
    assert modules
    for path, module in modules.items():
        weight = module.to_v.weight.detach().clone()
        with torch.no_grad():
            module.to_v.weight.zero_()
            moved = relative(pipe(**call)[0], latents)
            module.to_v.weight.copy_(weight)
        assert moved > 1e-2, path
    assert torch.equal(latents, pipe(**call)[0])


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_take_batches_and_oblong_images(name: str) -> None:
    scale = 32 if name == "sana" else 16
    size = {"height": 4 * scale, "width": 6 * scale}
    latents = tiny_pipeline(name)(**tiny_call(name, batch=2, steps=2, **size))[0]
    assert latents.shape[0] == 2 and latents.isfinite().all()


def test_guidance_can_be_switched() -> None:
    flux = tiny_pipeline("flux")
    plain = flux(**tiny_call("flux"))[0]
    assert torch.equal(plain, flux(**tiny_call("flux", guidance_scale=7.0))[0])
    assert relative(flux(**tiny_call("flux", true_cfg_scale=4.0))[0], plain) > 1e-2
    distilled = tiny_pipeline("flux", guidance_embeds=True)
    low, high = (distilled(**tiny_call("flux", guidance_scale=g))[0] for g in (1.5, 7.0))
    assert relative(low, high) > 1e-2
    sd = tiny_pipeline("sd")
    assert relative(sd(**tiny_call("sd", guidance_scale=1.0))[0], sd(**tiny_call("sd"))[0]) > 1e-2


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_of_stable_diffusion(kind: str) -> None:
    pipe = tiny_pipeline("sd", scheduler=kind)

    def run() -> torch.Tensor:
        extra: dict[str, Any] = {}
        if kind in STOCHASTIC_SCHEDULERS:
            extra["generator"] = torch.Generator().manual_seed(1)
        return pipe(**tiny_call("sd", **extra))[0]

    assert run().isfinite().all()
    assert torch.equal(run(), run())
    overrides = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    assert tiny_scheduler(kind, **overrides).config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", PAG)
def test_official_pag(name: str) -> None:
    pipe = tiny_pipeline(name)
    denoiser = getattr(pipe, PIPELINES[name].denoiser)
    processors = dict(denoiser.attn_processors)
    call = tiny_call(name)
    latents = pipe(**call)[0]
    pag = official_pag(name, pipe)
    assert torch.equal(pag(**call, pag_scale=0.0)[0], latents)
    assert relative(pag(**call, pag_scale=3.0)[0], latents) > 1e-2
    assert denoiser.attn_processors == processors
    assert torch.equal(pipe(**call)[0], latents)


def test_official_pag_says_what_exists() -> None:
    with pytest.raises(ValueError, match=r"sd3.*pixart"):
        official_pag("flux", tiny_pipeline("flux"))


@pytest.mark.parametrize("name", [name for name, tiny in PIPELINES.items() if tiny.text])
def test_prompts_as_strings(name: str) -> None:
    pipe = tiny_pipeline(name)
    first = pipe(**tiny_call(name, text=True))[0]
    second = pipe(**tiny_call(name, text=True, prompt=["a green dog"]))[0]
    assert relative(first, second) > 1e-2
    image = pipe(**tiny_call(name, text=True, steps=1, output_type="np"))[0]
    assert image.shape == (1, 128, 128, 3) and image.std() > 0.05


def test_the_tokenizer_has_words_of_one_and_of_several_tokens() -> None:
    tokenizer = tiny_clip_tokenizer()
    assert tokenizer.tokenize("a red cube") == ["a</w>", "red</w>", "cube</w>"]
    assert len(tokenizer.tokenize("zebra")) > 1
    ids = tokenizer("a fox", padding="max_length", max_length=77).input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id and ids[3] == tokenizer.eos_token_id == ids[-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["a", "fox"]


# ------------------------------------------------------------------------------------------- running the laws


def half(setting: Setting) -> HeadGate:
    return HeadGate({place: -0.5 for place in setting.heads})


GATE = MethodCase(HeadGate, acting=half, zero=lambda setting: HeadGate({place: 1.0 for place in setting.heads}))


def test_public_names_load_and_say_what_they_are() -> None:
    for name in testing.__all__:
        value = getattr(testing, name)
        assert isinstance(value, (dict, tuple)) or value.__doc__, name


def test_every_law_says_what_it_says_and_its_usual_cause_in_the_documentation_too() -> None:
    page = (ROOT / "docs" / "laws.md").read_text(encoding="utf-8")
    for name, law in LAWS.items():
        assert law.name == name and law.holds.__doc__
        assert f"\n| `{name}` | {law.says} |\n" in page, name
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == [*LAWS, *HOSTS]


def test_laws_and_hosts_can_be_chosen_and_results_are_a_list() -> None:
    results = check_laws(GATE, ["llama", "sd"], ["identity", "causal"])
    assert [(r.host, r.law, r.outcome) for r in results] == [
        ("llama", "identity", "pass"),
        ("llama", "causal", "pass"),
        ("sd", "identity", "pass"),
        ("sd", "causal", "not applicable"),
    ]
    assert str(results[-1]).endswith("HeadGate on sd: no causal decoder")


@pytest.mark.parametrize("asked", [{"hosts": "lama"}, {"hosts": "llama", "laws": ["pading"]}])
def test_an_unknown_name_says_what_exists(asked: dict[str, Any]) -> None:
    with pytest.raises(SelectionError, match=r"there is no (law|host).*Did you mean '(llama|padding)'"):
        check_laws(GATE, **asked)


def test_a_failure_says_law_method_host_difference_tolerance_and_usual_cause() -> None:
    lie = MethodCase(HeadGate, acting=half, zero=half)
    with pytest.raises(LawFailure) as failure:
        check_law("identity", lie, "llama")
    text = str(failure.value)
    assert text.startswith(
        "law identity does not hold for HeadGate on llama: the output at strength zero, padding None"
    )
    assert "tolerance 0" in text and LAWS["identity"].says in text and LAWS["identity"].usual_cause in text


def test_what_a_method_raises_is_a_failure_with_its_cause() -> None:
    @dataclasses.dataclass(frozen=True)
    class Raises(Intervention):
        observes = True

        def output(self, call: Any, out: torch.Tensor) -> None:
            raise TypeError("of mine")

    [result] = check_laws(MethodCase(Raises, acting=lambda setting: Raises()), "llama", "effect")
    assert result.outcome == "fail" and "raised TypeError: of mine" in result.message


def test_a_law_that_leaves_a_hook_does_not_hurt_the_next() -> None:
    @dataclasses.dataclass(frozen=True)
    class Breaks(Intervention):
        def output(self, call: Any, out: torch.Tensor) -> torch.Tensor:
            call.site.module.register_forward_hook(lambda *_: torch.zeros(()))
            return out * 2.0

    case = MethodCase(Breaks, acting=lambda setting: Breaks())
    assert check_laws(case, "llama", "undo")[0].outcome == "fail"
    assert [r.outcome for r in check_laws(GATE, "llama", ["identity", "undo"])] == ["pass", "pass"]


def test_a_method_without_selection_is_put_on_some_heads() -> None:
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Seen(Intervention):
        def output(self, call: Any, out: torch.Tensor) -> torch.Tensor:
            seen.append((call.site.layer, call.heads))
            return out * 2.0

    check_laws(MethodCase(Seen, acting=lambda setting: Seen()), "llama", "effect")
    assert set(seen) == {(1, (0, 2))}


def test_run_laws_is_a_parametrised_test() -> None:
    test = run_laws([GATE], hosts=["llama", "bert"], laws=["undo", "cache"])
    [mark] = test.pytestmark
    assert mark.args[0] == ("law", "method", "host")
    assert mark.kwargs["ids"] == [
        "undo-HeadGate-llama",
        "cache-HeadGate-llama",
        "undo-HeadGate-bert",
        "cache-HeadGate-bert",
    ]
    test("undo", GATE, HOSTS["llama"])
    with pytest.raises(pytest.skip.Exception, match="no KV cache"):
        test("cache", GATE, HOSTS["bert"])
