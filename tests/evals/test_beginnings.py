"""What prompts begin with is read once, and they are answered as apart: images that several questions are asked about."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import ACT, PAI, VAR, VHR, HeadGate, VisualKnockout, Where, ZeroTuning, steer
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.evals.beginnings import Beginnings, image_beginnings, laid_out
from attnsteer.evals.continuations import score_continuations
from attnsteer.methods.adhh import ADHH
from attnsteer.methods.paint import PAINT
from attnsteer.methods.spin import SPIN
from attnsteer.search import Choice, candidate_log_likelihoods
from tests.hosts.transformers.vision_families import FAMILIES, VOCAB, build, prompts

# Which image each question is about; the fourth has one of its own.
OF = (0, 0, 1, 2, 1, 0)
LENGTHS = (5, 2, 7, 4, 3, 2)


def asked(name: str, seed: int = 0) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[list[list[int]]]]:
    """(the batch, padded on the left; each question by itself; continuations of one token and of several).

    Those about the first image go on alike behind it; the second image is preceded by another text.
    """
    wide = "wide" if name.startswith("qwen") else "image"
    given, _ = prompts(name, [[2, "image", 3], [4, wide, 1], [2, "image", 2]], seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    draw = lambda n: torch.randint(8, VOCAB, (n,), generator=g)  # noqa: E731
    grid = given.get("image_grid_thw")
    pixels = given.pop("pixel_values")
    pixels = pixels.split(grid.prod(-1).tolist() if grid is not None else [1] * len(pixels))
    mask = given.pop("attention_mask").bool()
    types = {k: v for k, v in given.items() if v.shape == mask.shape and k != "input_ids"}
    apart = []
    for of, length in zip(OF, LENGTHS, strict=True):
        row = {
            "input_ids": torch.cat([given["input_ids"][of][mask[of]], draw(length)])[None],
            "pixel_values": pixels[of],
        }
        for k, v in given.items():
            if k in types:
                row[k] = torch.nn.functional.pad(v[of][mask[of]], (0, length))[None]
            elif k != "input_ids":
                row[k] = v[of : of + 1]
        apart.append(row)
    width = max(row["input_ids"].shape[1] for row in apart)
    left = lambda t: torch.nn.functional.pad(t, (width - t.shape[1], 0))  # noqa: E731
    batch = {k: torch.cat([left(r[k]) if k in ("input_ids", *types) else r[k] for r in apart]) for k in apart[0]}
    batch["attention_mask"] = torch.cat([left(torch.ones_like(r["input_ids"])) for r in apart])
    return batch, apart, [[draw(1 + (b + c) % 3).tolist() for c in range(2)] for b in range(len(OF))]


def one_by_one(model: Any, apart: Any, continuations: Any, method: Any) -> list[list[float]]:
    found = []
    for i, (row, own) in enumerate(zip(apart, continuations, strict=True)):
        inputs = dict(row)
        choice = Choice(tuple(inputs.pop("input_ids")[0].tolist()), tuple(map(tuple, own)), 0)
        own_method = None if method is None else method.of_sample(lambda name, count, i=i: i)
        if own_method is None:
            found.append(candidate_log_likelihoods(model, choice, None, inputs))
            continue
        with steer(model, own_method, control=True) as run:
            found.append(candidate_log_likelihoods(model, choice, run, inputs))
    return found


def shared(model: Any, batch: Any, continuations: Any, method: Any) -> tuple[list[list[float]], Beginnings | None]:
    contexts = [ids[own.bool()].tolist() for ids, own in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    if method is None:
        begun = image_beginnings(model, batch)
        scores = score_continuations(model, contexts, continuations, shared=begun)
    else:
        with steer(model, method, control=True) as run:
            begun = image_beginnings(model, batch, run)
            scores = score_continuations(model, contexts, continuations, run, shared=begun)
    return [[s.log_likelihood for s in own] for own in scores], begun


def close(found: list[list[float]], want: list[list[float]]) -> None:
    assert [v for own in found for v in own] == pytest.approx([v for own in want for v in own], abs=1e-5)


PATCHES = [[OF[i], 1 + OF[i]] for i in range(len(OF))]
METHODS = {
    "VAR": VAR((3, 7), tau=1.2, rho=0.0, min_image_mass=0.0),
    "VAR placebo": VAR((3, 7), tau=1.2, rho=0.0, min_image_mass=0.0, sinks="placebo"),
    "VAR released": VAR.released_code((3, 7), tau=1.2).new(where=Where(layers=[0, 1])),
    "VHR": VHR(3.0, rows="last", where=Where(layers=[0, 1])),
    "PAI": PAI(2.0, where=Where(layers=[0, 1])),
    "PAI by sample": PAI([2.0, 2.0, None, 1.0, 0.5, 2.0], where=Where(layers=[0, 1])),
    "PAINT": PAINT(PATCHES, [[3]] * len(OF), 3.0, 1.0, where=Where(layers=[0, 1])),
    "ADHH": ADHH(threshold=0.05, where=Where(layers=[0, 1])),
    "SPIN": SPIN(0.5, 0.1),
    "HeadGate": HeadGate({(0, 1): 0.0, (1, 0): 3.0}),
    "ZeroTuning": ZeroTuning(gamma=4.0),
    "VisualKnockout": VisualKnockout([("question", "image"), ("last", "before")]),
}
REFUSED = ("instructblip", "paligemma")
KNOWN = [
    pytest.param(name, marks=() if name in ("llava", "qwen2_5_vl") else pytest.mark.long)
    for name in sorted(set(FAMILIES) - {*REFUSED, "gemma3"})
]


@pytest.mark.parametrize("name", KNOWN)
def test_an_image_is_read_once(name: str) -> None:
    model, (batch, apart, continuations) = build(name), asked(name)
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    try:
        found, begun = shared(model, batch, continuations, None)
    finally:
        hook.remove()
    # Three images, with what is said alike around them; then six rests.
    assert begun is not None and begun.of == [0, 0, 1, 2, 1, 0]
    assert seen[:2] == [(3, max(map(len, begun.ids))), (6, 7)]
    close(found, one_by_one(model, apart, continuations, None))


def test_texts_are_written_as_apart() -> None:
    """`generate` over the cache of the beginnings, where padding stands in the middle."""
    for name in ("llava", "qwen2_5_vl"):
        model, (batch, apart, _) = build(name), asked(name)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        for method in (METHODS["VAR"], METHODS["PAINT"]) if name == "llava" else (None, METHODS["VHR"]):
            with steer(model, method) if method is not None else contextlib.nullcontext() as run, torch.no_grad():
                contexts = [
                    i[m.bool()].tolist() for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)
                ]
                laid = laid_out(model, contexts, image_beginnings(model, batch, run), run)
                given = {"input_ids": laid.ids, "attention_mask": laid.valid.long(), "past_key_values": laid.cache}
                found = model.generate(**given, **options, output_logits=True, return_dict_in_generate=True).logits
            for i, row in enumerate(apart):
                own = None if method is None else method.of_sample(lambda n, c, i=i: i)
                with steer(model, own) if own is not None else contextlib.nullcontext(), torch.no_grad():
                    row = {**row, "attention_mask": torch.ones_like(row["input_ids"])}
                    want = model.generate(**row, **options, output_logits=True, return_dict_in_generate=True).logits
                for step, other in zip(found, want, strict=True):
                    torch.testing.assert_close(step[i], other[0], atol=2e-5, rtol=0)


def test_what_is_not_shared() -> None:
    model, (batch, _, _) = build("llava"), asked("llava")
    one = [0, 2, 3]
    assert image_beginnings(model, {k: v[one] for k, v in batch.items()}) is None
    # A prompt that ends with its image.
    ended = {k: v[:2, :-2] if v.ndim == 2 else v[:2] for k, v in batch.items()}
    ids, mask = ended["input_ids"], ended["attention_mask"]
    ids[0], mask[0] = ids[0].roll(ids.shape[1] - int((ids[0] == 3).nonzero()[-1]) - 1), 1
    assert image_beginnings(model, ended) is None
    # Patches of two images for one prompt.
    with pytest.raises(UnsupportedHost, match="is not one image for each of 6 prompts"):
        image_beginnings(model, {**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)})


@pytest.mark.parametrize("name", REFUSED)
def test_types_whose_images_may_see_the_question_are_refused(name: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type=name))
    with pytest.raises(UnsupportedHost, match=r"not one of the types whose images.*qwen2_5_vl"):
        image_beginnings(model, {})


def test_windows_are_refused() -> None:
    batch, _, continuations = asked("gemma3")
    with pytest.raises(UnsupportedHost, match=r"where the cache is of plain layers.*DynamicSlidingWindowLayer"):
        shared(build("gemma3"), batch, continuations, None)


@pytest.mark.parametrize(
    "method",
    [ACT(), VHR(), HeadGate({(0, 0): 0.0}, where=Where(rows="last")), VAR((3,), where=Where(rows=(0, 2), layers=0))],
    ids=["ACT", "VHR", "rows of a gate", "rows of VAR"],
)
def test_methods_that_look_ahead_are_refused(method: Any) -> None:
    model, (batch, _, continuations) = build("llava"), asked("llava")
    with pytest.raises(
        SelectionError, match=f"{type(method).__name__} may act on the beginning .* read every prompt whole"
    ):
        shared(model, batch, continuations, method)


QUICK = {
    ("VAR", "llava"),
    ("VHR", "llava"),
    ("PAI by sample", "llava"),
    ("PAINT", "qwen2_5_vl"),
    ("ZeroTuning", "llava"),
}


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        pytest.param(name, m, marks=() if (m, name) in QUICK else pytest.mark.long)
        for name in ("llava", "qwen2_5_vl")
        for m in METHODS
    ],
)
def test_methods_act_as_apart(name: str, chosen: str) -> None:
    method = METHODS[chosen]
    model, (batch, apart, continuations) = build(name), asked(name)
    found, begun = shared(model, batch, continuations, method)
    want = one_by_one(model, apart, continuations, method)
    close(found, want)
    plain = one_by_one(model, apart, continuations, None)
    assert max(abs(a - b) for x, y in zip(plain, want, strict=True) for a, b in zip(x, y, strict=True)) > 1e-3
    # Samples with other values read the image by themselves.
    assert begun.of == ([0, 0, 1, 2, 3, 0] if chosen == "PAI by sample" else [0, 0, 1, 2, 1, 0])
