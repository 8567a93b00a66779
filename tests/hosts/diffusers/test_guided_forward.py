"""What an `around` method may not return or ask: every wrong prediction raises, naming method and denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from attnsteer import PAG, SLG, HeadGate, Intervention, Where, steer
from attnsteer.branches import Prediction
from attnsteer.errors import ContractError, UnsupportedHost
from attnsteer.testing import tiny_pipeline

from ...methods.latent_common import call_of

Edit = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Around(Intervention):
    """Answers with `edit(forward, inputs, p)`, p the strong prediction."""

    edit: Edit

    def around(self, forward: Any, inputs: Any, run: Any) -> Any:
        return self.edit(forward, inputs, forward(inputs))


def sample(change: Callable[[Any], Any]) -> Edit:
    return lambda forward, inputs, p: p.with_sample(change(p.sample))


def generator(forward: Any, inputs: Any, p: Any) -> Any:
    yield p


def without_forward(self: Any, forward: Any, inputs: Any, run: Any) -> Any:
    return Prediction(torch.zeros(2, 4, 8, 8))


WRONG: dict[str, tuple[Edit, str]] = {
    "NaN": (sample(lambda s: s * float("nan")), "NaN or infinite"),
    "infinite": (sample(lambda s: s / 0), "NaN or infinite"),
    "one channel": (sample(lambda s: s[:, :1]), "returned shape"),
    "one column": (sample(lambda s: s[..., :1]), "returned shape"),
    "one row": (sample(lambda s: s[:1]), "returned shape"),
    "half": (sample(torch.Tensor.half), "returned dtype torch.float16"),
    "double": (sample(torch.Tensor.double), "returned dtype torch.float64"),
    "integers": (sample(torch.Tensor.long), "of torch.int64"),
    "complex": (sample(lambda s: s.to(torch.complex64)), "of torch.complex64"),
    "elsewhere": (sample(lambda s: s.to("meta")), "on meta"),
    "sparse": (sample(torch.Tensor.to_sparse), "stored as torch.sparse"),
    "no sample": (sample(lambda s: None), "a prediction of a NoneType"),
    "a word": (sample(lambda s: "x"), "a prediction of a"),
    "None": (lambda forward, inputs, p: None, "returned a NoneType"),
    "a str": (lambda forward, inputs, p: "x", "returned a str"),
    "a list": (lambda forward, inputs, p: [p], "returned a list"),
    "a tensor": (lambda forward, inputs, p: p.sample, "returned a Tensor"),
    "a generator": (generator, "returned a generator"),
    "forward of None": (lambda forward, inputs, p: forward(None), "called forward with a NoneType"),
    "forward of nothing": (lambda forward, inputs, p: forward(), "called forward with a NoneType"),
    "forward of a tensor": (lambda forward, inputs, p: forward(p.sample), "called forward with a Tensor"),
    "in place": (sample(torch.Tensor.zero_), "changed a strong prediction in place"),
    "in place and nothing": (lambda f, i, p: (p, p.sample.mul_(2.0))[0], "in place"),
    "in place below": (lambda f, i, p: (p, p.sample.data.mul_(2.0))[0], "in place"),
    "inputs in place": (
        lambda f, i, p: (p, i.values["sample"].mul_(2.0))[0],
        "changed inputs.values of sample in place",
    ),
    "inputs below, before a pass": (
        lambda f, i, p: (i.values["sample"].data.mul_(2.0), f(i))[1],
        "changed inputs.values of sample in place",
    ),
    "the pass of a part": (lambda f, i, p: f(i.only("cond")), "a pass over 1 of 2 rows"),
}


def call(steps: int) -> dict[str, Any]:
    given = call_of("sd", steps=steps)
    return given | {"latents": given["latents"].float()}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_prediction(pipe: Any, name: str, mode: Any) -> None:
    edit, words = WRONG[name]
    with (
        mode(),
        pytest.raises(ContractError, match=rf"^Around\.around at UNet2DConditionModel: .*{words}"),
        steer(pipe, Around(edit)),
    ):
        pipe(**call(steps=1))


@pytest.mark.parametrize(
    ("around", "words"),
    [
        (
            lambda self, f, inputs, run: f(inputs.only("text")),
            r"inputs has no part 'text'; this call has 'uncond', 'cond'\.",
        ),
        (lambda self, f, inputs, run: f(inputs.only("Cond")), "Did you mean 'cond'"),
        (lambda self, f, inputs, run: run.inside(self.new()).__enter__(), r"run\.inside\(Wrong\(.*run\.inside\(self\)"),
    ],
)
def test_a_wrong_question(pipe: Any, around: Edit, words: str) -> None:
    method = dataclass(frozen=True)(type("Wrong", (Intervention,), {"around": around}))()
    with pytest.raises(ContractError, match=words) as caught, steer(pipe, method):
        pipe(**call(steps=1))
    assert caught.value.__notes__ == ["attnsteer: raised in Wrong.around of UNet2DConditionModel."]


def test_a_prediction_without_a_pass(pipe: Any) -> None:
    method = type("Idle", (Intervention,), {"around": without_forward})()
    with pytest.raises(ContractError, match=r"^Idle\.around at .*call forward\(inputs\) first"), steer(pipe, method):
        pipe(**call(steps=1))


def test_a_kind_that_is_wrong_later(pipe: Any) -> None:
    asked: list[int] = []

    def edit(forward: Any, inputs: Any, p: Any) -> Any:
        asked.append(1)
        return p.with_sample(p.sample * 1.1) if len(asked) == 1 else None

    with pytest.raises(ContractError, match="returned a NoneType"), steer(pipe, Around(edit)):
        pipe(**call(steps=2))
    assert len(asked) == 2


def test_right_predictions_pass(pipe: Any) -> None:
    """Of all rows at once, and put together from the parts."""

    def parts(forward: Any, inputs: Any, p: Any) -> Any:
        each = [forward(inputs.only(name)) for name in inputs.layout]
        return each[-1].with_sample(torch.cat([e.sample for e in each]) * 1.1)

    found = []
    for edit in (sample(lambda s: s * 1.1), parts):
        with steer(pipe, Around(edit)):
            found.append(pipe(**call(steps=2))[0])
    assert float((torch.as_tensor(found[0]) - torch.as_tensor(found[1])).abs().max()) <= 1e-4


@pytest.mark.parametrize("method", [HeadGate({(0, 0): 0.5}), PAG(2.0, where=Where(layers=[1]))])
def test_a_denoiser_without_weights_says_so(method: Intervention) -> None:
    unet = tiny_pipeline("sd").unet.to("meta")
    given = [torch.zeros(shape, device="meta") for shape in ((2, 4, 8, 8), (), (2, 7, unet.config.cross_attention_dim))]
    with (
        steer(unet, method, control=True),
        pytest.raises(UnsupportedHost, match="runs on the meta device, which computes nothing"),
    ):
        unet(*given)


@pytest.mark.parametrize("method", [PAG(2.0, where=Where(layers=[1])), SLG(2.0, None, None, where=Where(layers=[1]))])
def test_guidance_of_an_autoencoder_is_refused_when_attached(method: Intervention) -> None:
    """An autoencoder's `decode` is not its `forward`: nothing would be guided, and nothing said until the end."""
    vae = tiny_pipeline("sd").vae
    before = {name: type(m.processor) for name, m in vae.named_modules() if hasattr(m, "processor")}
    assert before
    with pytest.raises(UnsupportedHost, match=r"AutoencoderKL encodes and decodes.* Steer the denoiser"):
        steer(vae, method)
    assert before == {name: type(m.processor) for name, m in vae.named_modules() if hasattr(m, "processor")}
    latent = torch.zeros(1, 4, 4, 4)
    plain = vae.decode(latent).sample
    with steer(vae, HeadGate({(1, 0): 0.0})):
        assert not torch.equal(vae.decode(latent).sample, plain)
