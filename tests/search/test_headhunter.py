"""HeadHunter chooses what the plain greedy loop chooses, resumes, screens, draws, and refuses bad input."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attnsteer import ACT, HeadSet, SoftPAG, Where, steer
from attnsteer.errors import SelectionError, SerializationError, UnsupportedHost
from attnsteer.search import Rung, halving, headhunter
from attnsteer.testing import tiny_call, tiny_pipeline, tiny_transformers

PROMPTS = ["a red circle", ("a blue square", 7), "two green stars"]
SAMPLES = [("a red circle", 0), ("a blue square", 7), ("two green stars", 2)]
OPTIONS = {"height": 16, "width": 16, "guidance_scale": 1.0, "output_type": "pt"}
METHOD = SoftPAG(scale=2.0, strength=0.7, where=Where(modules=r".*up_blocks\.1.*attn1"))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd")


class Redness:
    """The mean of the red channel times ten; counts the images that it saw."""

    def __init__(self, fail_at: int = 10**9):
        self.images, self.done, self.fail_at = 0, 0, fail_at

    def __call__(self, images: list[Any], prompts: list[str]) -> list[float]:
        assert len(images) == len(prompts)
        self.images += len(images)
        if self.images > self.fail_at:
            raise KeyboardInterrupt
        self.done += len(images)
        return [float(i[0].mean()) * 10.0 for i in images]


@functools.cache
def slow_mean(pipe: Any, heads: tuple[tuple[int, int], ...], steps: int, count: int = 3) -> float:
    """One image at a time."""

    def image(sample: tuple[str, int]) -> Any:
        generator = torch.Generator().manual_seed(sample[1])
        return pipe(sample[0], num_inference_steps=steps, generator=generator, **OPTIONS).images[0]

    total = 0.0
    for sample in SAMPLES[:count]:
        if heads:
            with steer(pipe, METHOD.new(heads=HeadSet(heads))):
                total += float(image(sample)[0].mean()) * 10.0
        else:
            total += float(image(sample)[0].mean()) * 10.0
    return total / count


def candidates(pipe: Any) -> list[tuple[int, int]]:
    with steer(pipe, METHOD) as run:
        run.check_fired = lambda: None
        return sorted({(s.layer, h) for s in run.sites for h in range(s.heads)})


def hunt(pipe: Any, score: Any = None, method: Any = METHOD, **options: Any) -> HeadSet:
    defaults = {"rounds": 2, "top": 1, "steps": 2, "options": OPTIONS, "batch": 2, "progress": False}
    return headhunter(pipe, PROMPTS, Redness() if score is None else score, method, **defaults | options)


def test_equal_to_the_plain_greedy_loop(pipe: Any) -> None:
    every = candidates(pipe)
    first = {c: slow_mean(pipe, (c,), 2) for c in every}
    best = max(every, key=first.__getitem__)
    second = {c: slow_mean(pipe, (best, c), 2) for c in every if c != best}
    then = max(second, key=second.__getitem__)
    assert len(every) == len(set(first.values())) == 4
    found = hunt(pipe)
    assert set(found) == {best, then}
    assert found.scores[best] == pytest.approx(first[best], abs=1e-5)
    assert found.scores[then] == pytest.approx(second[then], abs=1e-5)
    facts = found.provenance
    assert facts["unguided"] == pytest.approx(slow_mean(pipe, (), 2), abs=1e-5)
    assert facts["rounds"][0]["joint"] == pytest.approx(first[best], abs=1e-5)
    for (layer, head), score in first.items():
        assert facts["rounds"][0]["scores"][layer][head] == pytest.approx(score, abs=1e-5)
    # The set goes into the method as it is, shape included, and steers to the score that the search reports.
    with steer(pipe, SoftPAG(scale=2.0, strength=0.7, heads=found)) as run:
        assert {s.layer for s in run.sites} == {best[0], then[0]}
        run.check_fired = lambda: None
    assert facts["rounds"][1]["joint"] == pytest.approx(slow_mean(pipe, (best, then), 2), abs=1e-5)
    assert facts["method"]["name"] == "SoftPAG" and facts["method"]["parameters"]["joint"] == "joint_identity"


def test_several_heads_per_round(pipe: Any) -> None:
    first = {c: slow_mean(pipe, (c,), 2) for c in candidates(pipe)}
    found = hunt(pipe, rounds=1, top=2)
    assert set(found) == set(sorted(first, key=lambda c: (-first[c], c))[:2])


def test_screened(pipe: Any) -> None:
    """One sample and one step first; the better half goes on to the full evaluation."""
    every = candidates(pipe)
    cheap = {c: slow_mean(pipe, (c,), 1, count=1) for c in every}
    half = sorted(every, key=lambda c: (-cheap[c], c))[: math.ceil(len(every) / 2)]
    full = {c: slow_mean(pipe, (c,), 2) for c in half}
    whole, screened = Redness(), Redness()
    found = hunt(pipe, screened, rounds=1, screen=[Rung(prompts=1, steps=1, keep=0.5)])
    assert list(found) == [max(half, key=full.__getitem__)]
    stage = found.provenance["rounds"][0]["screened"][0]
    assert all(stage[layer][head] == pytest.approx(cheap[layer, head], abs=1e-5) for layer, head in every)
    hunt(pipe, whole, rounds=1)
    assert screened.images == len(every) + 3 * len(half) + 3 < whole.images == 3 * len(every) + 3
    assert found.provenance["images"] == screened.images
    assert halving(20, 20) == (Rung(5, 10, 0.5), Rung(10, 10, 0.5))
    # As many as a round must choose are kept, whatever the share.
    assert len(hunt(pipe, rounds=1, top=3, screen=[Rung(1, 1, 0.01)])) == 3


def test_a_broken_search_goes_on_where_it_was(pipe: Any, tmp_path: Path) -> None:
    whole = Redness()
    want = hunt(pipe, whole)
    broken, state = Redness(fail_at=11), tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        hunt(pipe, broken, state=state)
    rest = Redness()
    found = hunt(pipe, rest, state=state)
    assert found == want and found.provenance == want.provenance
    # The batch that was broken off is the only one made twice.
    assert 0 < rest.images == whole.images - broken.done < whole.images
    again = Redness()
    assert hunt(pipe, again, state=state) == want and again.images == 0
    # More rounds build on what is known; another method does not.
    assert set(hunt(pipe, again, state=state, rounds=3)) > set(want)
    with pytest.raises(SerializationError, match=r"other settings \(method"):
        hunt(pipe, method=METHOD.new(strength=0.6), state=state)


def test_a_picture_per_round(pipe: Any, tmp_path: Path) -> None:
    from PIL import Image

    hunt(pipe, grids=tmp_path)
    pictures = sorted(tmp_path.iterdir())
    assert [p.name for p in pictures] == ["round-1.png", "round-2.png"]
    with Image.open(pictures[1]) as sheet:
        # Three columns of images, three rows (none, with one more, with all), labels beside and above.
        assert sheet.width > 3 * 128 and sheet.height > 3 * 128


@pytest.mark.parametrize("joint", ["joint_identity", "image_rows_identity"])
def test_joint_attention_by_name(joint: str) -> None:
    """A pipeline without text encoders, through `generate`; the two meanings of identity give different images."""
    sd3 = tiny_pipeline("sd3")
    method = SoftPAG(scale=2.0, joint=joint, where=Where(layers=[0, 1]))

    def generate(pipe: Any, prompts: list[str], seeds: list[int], steps: int) -> list[Any]:
        return list(pipe(**tiny_call("sd3", steps=steps, seed=seeds[0], guidance_scale=1.0))[0])

    def slow(heads: list[tuple[int, int]]) -> float:
        with steer(sd3, method.new(heads=HeadSet(heads), where=Where())):
            return float(generate(sd3, [], [0], 2)[0].float().abs().mean())

    def score(images: list[Any], prompts: list[str]) -> list[float]:
        return [float(i.float().abs().mean()) for i in images]

    found = headhunter(sd3, ["x"], score, method, rounds=1, top=1, steps=2, generate=generate, batch=1, progress=False)
    table = found.provenance["rounds"][0]["scores"]
    pairs = [(layer, head) for layer, row in enumerate(table) for head, s in enumerate(row) if s is not None]
    assert {layer for layer, _ in pairs} == {0, 1}
    for layer, head in pairs[::3]:
        assert table[layer][head] == pytest.approx(slow([(layer, head)]), abs=1e-6)


class TestBadInput:
    def test_a_test_split_that_overlaps(self, pipe: Any) -> None:
        for test in (["two green stars"], [("a blue square", 7)], ["new", ("a red circle", 0)]):
            with pytest.raises(SelectionError, match="samples of the test split are also used to choose heads"):
                hunt(pipe, test=test)
        hunt(pipe, rounds=1, test=["a new one", ("a blue square", 8)])

    def test_scores(self, pipe: Any) -> None:
        with pytest.raises(SelectionError, match=r"no guidance.*one finite number per image"):
            hunt(pipe, lambda images, prompts: [float("nan")] * len(images))
        with pytest.raises(SelectionError, match="one finite number per image"):
            hunt(pipe, lambda images, prompts: [1.0])
        with pytest.raises(SelectionError, match="2 prompts gave 1 images"):
            hunt(pipe, generate=lambda p, prompts, seeds, steps: [torch.zeros(3, 8, 8)])

    def test_options(self, pipe: Any) -> None:
        with pytest.raises(SelectionError, match="give a guidance method with heads"):
            hunt(pipe, method=ACT())
        with pytest.raises(SelectionError, match="all are 1 or more"):
            hunt(pipe, rounds=0)
        with pytest.raises(SelectionError, match="more than the"):
            hunt(pipe, rounds=50, top=50)
        with pytest.raises(SelectionError, match="one string of prompts"):
            headhunter(pipe, "a red circle", Redness(), METHOD)
        with pytest.raises(SelectionError, match=r"no \(prompt, seed\) twice"):
            headhunter(pipe, [("a", 1), ("a", 1)], Redness(), METHOD)
        with pytest.raises(SelectionError, match=r"give a prompt, or \(prompt, seed\)"):
            headhunter(pipe, [("a", -1)], Redness(), METHOD)
        with pytest.raises(SelectionError, match="keep is above 0"):
            Rung(1, 1, 1.0)
        with pytest.raises(UnsupportedHost, match="needs a pipeline"):
            headhunter(pipe.unet, PROMPTS, Redness(), METHOD)
        with pytest.raises(UnsupportedHost):
            headhunter(tiny_transformers("llama"), PROMPTS, Redness(), METHOD)
