"""The training scripts: each runs for a few steps and writes what stock classes load; a resumed run is the whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attnsteer.zoo.train.loop import CHECKPOINT, Plan, fit


def line(model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=g)
    return (model(x) - x.sum(dim=1, keepdim=True)).square().mean(), {"step": float(step)}


def weights(steps: int, out: Path, every: float = 1e9, stop: int | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)

    def loss(m: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        if step == stop:
            raise KeyboardInterrupt
        return line(m, step)

    plan = Plan(steps=steps, lr=0.2, warmup=2, decay=0.0, ema=0.8, every=every)
    fit("line", model, loss, plan, out, device="cpu", log_every=1)
    return model.state_dict()


@pytest.mark.long
def test_training_learns_and_resumes_exactly(tmp_path: Path) -> None:
    whole = weights(30, tmp_path / "a")
    assert torch.allclose(whole["weight"], torch.ones(1, 4), atol=0.35)
    with pytest.raises(KeyboardInterrupt):
        weights(30, tmp_path / "b", every=0.0, stop=17)
    # A kill while a checkpoint was being written leaves a part beside the whole one.
    (tmp_path / "b" / "line" / f"{CHECKPOINT}.partial").write_bytes(b"cut")
    again = weights(30, tmp_path / "b")
    assert all(torch.equal(again[n], whole[n]) for n in whole)
    # A finished run does nothing more.
    assert all(torch.equal(weights(30, tmp_path / "b", stop=0)[n], whole[n]) for n in whole)


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    with pytest.raises(FloatingPointError, match="step 3"):
        fit(
            "bad", model, lambda m, s: (m(torch.ones(4)).sum() * (float("nan") if s == 3 else 1), {}), Plan(5), tmp_path
        )


def test_rate() -> None:
    plan = Plan(steps=100, lr=1.0, warmup=10, floor=0.1)
    assert plan.rate(0) == pytest.approx(0.1) and plan.rate(9) == pytest.approx(1.0)
    assert plan.rate(55) == pytest.approx(0.55) and plan.rate(100) == pytest.approx(0.1)


def test_batches_draw_single_objects_and_empty_captions_as_often_as_asked() -> None:
    from attnsteer.zoo.train.diffusion import Batches

    z, steps = torch.arange(500.0).view(-1, 1), range(12)
    plain, more = Batches(z, 32, 5), Batches(z, 32, 5, (0.5, 0.0, 0.0, 0.0, 0.0), 1 / 3)
    single = [[len(s.objects) == 1 for k in steps for s in b.scenes(k)] for b in (plain, more)]
    assert 0.2 < sum(single[0]) / len(single[0]) < 0.35 and 0.44 < sum(single[1]) / len(single[1]) < 0.6
    # Latents, scenes and captions are of the same rows, and an empty caption is one of a single object.
    drawn = [more(k) for k in steps]
    assert torch.equal(torch.cat([d[0] for d in drawn])[:, 0], z[[i for k in steps for i in more._draw(k)[1]], 0])
    empty = (torch.cat([d[1] for d in drawn]) == more.tokens([""])).all(dim=1).tolist()
    assert all(s for s, e in zip(single[1], empty, strict=True) if e)
    assert 0.4 < sum(empty) / sum(single[1]) < 0.6


@pytest.mark.long
def test_each_model_trains_for_a_few_steps(tmp_path: Path) -> None:
    """Also that a stock library loads what was written, and that it computes."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
    from transformers import AutoProcessor, AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration

    from attnsteer.zoo.train import lm, lvlm, mmdit, sd

    folder = lm.train(tmp_path, "cpu", steps=2)
    ids = AutoTokenizer.from_pretrained(folder)("a red star .", return_tensors="pt").input_ids
    assert LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.isfinite().all()
    folder = lvlm.train(tmp_path, "cpu", steps=2)
    batch = AutoProcessor.from_pretrained(folder)(
        images=torch.zeros(3, 64, 64, dtype=torch.uint8), text="<image> caption", return_tensors="pt"
    )
    assert batch.input_ids.shape == (1, 66)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert model(**batch).logits.isfinite().all()
    for train, kind, extra in (
        (sd.train, StableDiffusionPipeline, {"safety_checker": None}),
        (mmdit.train, StableDiffusion3Pipeline, {"text_encoder_3": None, "tokenizer_3": None}),
    ):
        folder = train(tmp_path, "cpu", steps=2)
        pipe = kind.from_pretrained(folder, **extra)
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a red star", num_inference_steps=2, output_type="pt").images
        assert image.shape == (1, 3, 64, 64) and image.isfinite().all()
        record = json.loads((folder / "training.json").read_text())
        assert record["vae"]["step"][-1] == 1 and (tmp_path / "vae" / "loss.png").exists()


def test_fillers_act_like_many_identical_tokens() -> None:
    """Training takes one filler token with a raised score; the pipeline gives the model n of them."""
    import math

    from attnsteer.hosts.sdpa.rebind import SDPA
    from attnsteer.zoo.train.mmdit import Model
    from attnsteer.zoo.train.precision import exchange, sdpa_in_fp32

    torch.manual_seed(0)
    model = Model().eval()
    z, t, tokens = torch.randn(2, 4, 16, 16), torch.tensor([300.0, 700.0]), torch.randint(0, 100, (2, 32))
    with torch.no_grad():
        many = model(z, t, tokens, fillers=50)

        def weighted(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **o: object) -> Tensor:
            bias = torch.zeros(1, 1, 1, key.shape[2])
            bias[..., -1] = math.log(50)
            return sdpa_in_fp32(query, key, value, bias, **o)

        exchange(model, {SDPA: weighted})
        assert torch.allclose(model(z, t, tokens, fillers=1), many, atol=1e-5)


def test_a_model_that_is_put_into_the_package_keeps_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnsteer.zoo.train import __main__ as command

    monkeypatch.setattr(command, "MODELS", tmp_path / "models")
    old, new = tmp_path / "models" / "m", tmp_path / "new" / "m"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(folder.parent.name)
    (old / command.CARD).write_text("card")
    assert command.install(new) == old and (old / "weights").read_text() == "new"
    assert (old / command.CARD).read_text() == "card" and (old / "sha256.json").is_file()
    # A card of its own wins.
    (new / command.CARD).write_text("own")
    assert (command.install(new) / command.CARD).read_text() == "own"
