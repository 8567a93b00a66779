"""AttentionRefocusing: CAR and SAR, in the paper's and the released form, against pixel-by-pixel loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import AttentionRefocusing, Where, steer
from attnsteer.errors import SelectionError
from attnsteer.maps.phrases import Prompt
from attnsteer.maps.words_to_image import Maps, SiteMaps, kernel, smoothed
from attnsteer.methods.bases.latent_loss import Plan
from attnsteer.site import Site
from tests.reference import latent_loops as slow

from .latent_common import EXACT, by_sample, call_of, cross_layers, double, far

GRID, KEYS = (6, 8), 9
BOXES = {(2, 4): (0.0, 0.0, 0.5, 0.5), (5, 6): [(0.5, 0.4, 1.0, 1.0), (0.1, 0.6, 0.4, 0.9)]}
# The words of BOXES in order, as their tokens and their boxes: the first phrase has two.
TOKENS = [[2], [3], [5]]
WORD_BOXES = [[BOXES[2, 4]], [BOXES[2, 4]], BOXES[5, 6]]


def maps_of(index: int = 0, length: int = 50, seed: int = 0, batch: int = 1, grid: tuple[int, int] = GRID) -> Maps:
    """Random maps of two cross- and two self-attentions, in double precision."""
    g = torch.Generator().manual_seed(seed)
    n, sites = grid[0] * grid[1], []
    for layer in range(2):
        for kind, keys in (("cross", KEYS), ("self", n)):
            logits = torch.randn(batch, 2, n, keys, generator=g, dtype=torch.float64)
            P = torch.softmax(0.1 * logits, dim=-1).requires_grad_(True)
            site = Site(f"block.{layer}.{kind}", layer, kind, 2, 2, "image", "denoiser")
            sites.append(SiteMaps(site, grid, P if kind == "cross" else None, None if kind == "cross" else P))
    return Maps(tuple(sites), Prompt(), index, length)


def slow_maps(maps: Maps, b: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """(blurred word maps, self-attention maps of each layer) of sample b."""
    A = slow.cross_map([m.text[b : b + 1] for m in maps.sites if m.text is not None], maps.sites[0].grid)
    return slow.word_maps(A, TOKENS, range(1, KEYS - 1)), [m.image[b] for m in maps.sites if m.image is not None]


def gradients(maps: Maps, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), [m.text if m.text is not None else m.image for m in maps.sites]))


def test_the_kernel_is_the_one_of_the_spec() -> None:
    k = kernel()
    assert torch.equal(k, slow.kernel())
    for place, value in (((1, 1), 0.3319), ((0, 1), 0.1221), ((1, 2), 0.1221), ((2, 0), 0.0449)):
        assert float(k[place]) == pytest.approx(value, abs=5e-5)
    m = torch.rand(1, 1, 5, 7, dtype=torch.float64)
    assert far(smoothed(m)[0, 0], slow.smooth(m[0, 0])) < 1e-15


@pytest.mark.parametrize("seed", [0, 1])
def test_paper_form(seed: int) -> None:
    maps = maps_of(seed=seed)
    words, S = slow_maps(maps)
    regions = [set().union(*(slow.centred(box, GRID) for box in boxes)) for boxes in WORD_BOXES]
    car, sar = slow.car_paper(words, regions), slow.sar_paper(S, regions, GRID)
    for cross, own in ((1.0, 0.0), (0.0, 1.0), (0.7, 2.0)):
        method, expected = AttentionRefocusing(BOXES, cross=cross, own=own), cross * car + own * sar
        ours = method.loss(maps)
        assert ours.shape == (1,) and far(ours[0], expected) < EXACT
        if own and cross:
            for a, b in zip(gradients(maps, ours), gradients(maps, expected), strict=True):
                assert far(a, b) < EXACT


@pytest.mark.parametrize("index", [0, 14, 15, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_released_form(seed: int, index: int) -> None:
    """The weights change at call 15 of 50, not before."""
    maps = maps_of(index, seed=seed)
    words, S = slow_maps(maps)
    boxes = [[slow.truncated(box, GRID) for box in parts] for parts in WORD_BOXES]
    car, least = slow.car_released(words, boxes, index)
    expected = car + slow.sar_released(S, boxes, GRID)
    method = AttentionRefocusing.released_code(BOXES)
    ours = method.loss(maps)
    assert far(ours[0], expected) < EXACT and float(method._inside(maps)) == pytest.approx(least, abs=1e-12)
    for a, b in zip(gradients(maps, ours), gradients(maps, expected), strict=True):
        assert far(a, b) < EXACT


@pytest.mark.parametrize(("value", "early", "late"), [(0.099, 6, 6), (0.101, 1, 1), (0.199, 1, 1), (0.201, 1, 0)])
def test_weights_of_the_released_form_at_their_thresholds(value: float, early: int, late: int) -> None:
    """One word whose map is `value` in its box and nothing elsewhere: CAR = weight * (1 - value)."""
    for index, weight in ((14, early), (15, late)):
        P = torch.zeros(1, 1, 16, 3, dtype=torch.float64)
        P[0, 0, [0, 1, 4, 5], 1] = value
        P[..., 2] = 1 - P[..., 1]
        site = SiteMaps(Site("a", 0, "cross", 1, 1, "image", "denoiser"), (4, 4), P)
        method = AttentionRefocusing.released_code(
            {(1, 2): (0.0, 0.0, 0.5, 0.5)}, own=0.0, sharpness=None, smooth=False
        )
        assert float(method.loss(Maps((site,), Prompt(), index, 50))) == pytest.approx(weight * (1 - value))
        expected, _ = slow.car_released(
            [P[0, 0, :, 1].reshape(4, 4)], [[slow.truncated((0, 0, 0.5, 0.5), (4, 4))]], index
        )
        assert float(expected) == pytest.approx(weight * (1 - value))


@pytest.mark.parametrize(("value", "early", "late"), [(0.149, 1, 1), (0.151, 4, 4), (0.099, 1, 0)])
def test_weights_of_leakage_into_another_box(value: float, early: int, late: int) -> None:
    """Two words; the first leaks `value` into the second's box, and both are full in their own."""
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    for index, weight in ((14, early), (15, late)):
        P = torch.zeros(1, 1, 16, 3, dtype=torch.float64)
        columns = torch.arange(16) % 4
        P[0, 0, columns < 2, 0] = 1.0
        P[0, 0, columns >= 2, 1] = 1.0
        P[0, 0, 2, 0] = value
        site = SiteMaps(Site("a", 0, "cross", 1, 1, "image", "denoiser"), (4, 4), P)
        method = AttentionRefocusing.released_code({(0, 1): left, (1, 2): right}, own=0.0, sharpness=None, smooth=False)
        assert float(method.loss(Maps((site,), Prompt(), index, 50))) == pytest.approx(weight * value / 2)


def test_masks_average_where_boxes_take_the_largest() -> None:
    maps = maps_of()
    mask = torch.zeros(*GRID)
    mask[1:3, 2:5] = 1.0
    words, _ = slow_maps(maps)
    region = {(y, x) for y in (1, 2) for x in (2, 3, 4)}
    ours = AttentionRefocusing({(5, 6): mask}, own=0.0).loss(maps)
    assert far(ours[0], slow.car_mask(words[2:], [region])) < EXACT
    # A mask at another resolution covers the same cells.
    fine = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert far(AttentionRefocusing({(5, 6): fine}, own=0.0).loss(maps), ours) == 0.0


def test_samples_with_layouts_of_their_own_are_independent() -> None:
    other = {(3, 4): (0.25, 0.25, 0.75, 0.75)}
    for form in (AttentionRefocusing, AttentionRefocusing.released_code):
        # What a method keeps in `memory` is its own.
        maps = maps_of(batch=4)
        both = form([BOXES, other]).loss(maps)
        for b in range(4):
            sites = tuple(
                SiteMaps(m.site, m.grid, *(None if t is None else t[b : b + 1] for t in (m.text, m.image)))
                for m in maps.sites
            )
            alone = form(BOXES if b < 2 else other).loss(Maps(sites, Prompt(), 0, 50))
            assert far(both[b], alone[0]) < 1e-14


@pytest.mark.parametrize("form", ["paper", "released"])
def test_equal_to_a_hand_written_loop_on_a_pipeline(form: str) -> None:
    """Three calls of a schedule written for 50, on cross- and self-attention of one resolution."""
    pipe, call = double("sd"), call_of("sd", batch=2, steps=3)
    layouts = [{(2, 3): (0.0, 0.0, 0.5, 0.5)}, {(4, 5): (0.25, 0.5, 1.0, 1.0), (1, 2): (0.0, 0.0, 0.5, 0.5)}]
    layers, grid = cross_layers(pipe, 16), (16, 16)
    own = [name.replace("attn2", "attn1") for name in layers]
    text = call["prompt_embeds"].shape[1]
    cells = slow.centred if form == "paper" else slow.truncated

    def loss(b: int, predict: Callable[[Tensor], Tensor], x: Tensor, i: int) -> tuple[Tensor, Any]:
        with slow.recorded(pipe.unet, [*layers, *own]) as maps:
            predict(x)
        words = [[start] for start, _ in layouts[b]]
        A = slow.word_maps(slow.cross_map([maps[n] for n in layers], grid), words, range(1, text - 1))
        boxes, S = [[cells(box, grid)] for box in layouts[b].values()], [maps[n][0] for n in own]
        if form == "paper":
            regions = [parts[0] for parts in boxes]
            return slow.car_paper(A, regions) + slow.sar_paper(S, regions, grid), None
        car, least = slow.car_released(A, boxes, 17 * i)
        return car + slow.sar_released(S, boxes, grid), least

    def rule(z: Tensor, one: slow.Loss, i: int, n: int, b: int) -> Tensor:
        for _ in range((2, 1, 0)[i]):
            z, value, least = slow.step(z, one, 4.0)
            if form == "released" and ((4 * float(value) <= 0.1 and i == 0) or least >= 0.2):
                break
        return z

    expected = slow.LOOPS["sd"](pipe, call, by_sample(rule, loss))
    method = (AttentionRefocusing if form == "paper" else AttentionRefocusing.released_code)(
        layouts, schedule=((0.0, 0.3, 4.0, 2), (0.3, 0.6, 4.0, 1)), aligned=0.2 if form == "released" else 1.0
    )
    plain = pipe(**call)[0]
    with steer(pipe, method) as run:
        ours = pipe(**call)[0]
    # In the released form both samples are inside after the first of two updates.
    assert run.audit.extra[0]["latent updates"] == {"paper": 6, "released": 4}[form]
    assert {r.site.name for r in run.runtimes.values() if run.audit.record(0, r.site.path).edits} == {*layers, *own}
    assert far(ours, expected) < EXACT and far(plain, expected) > 1e-2


@pytest.mark.parametrize("batch", [1, 2])
def test_released_code_on_the_authors_sampler(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLMS (PNDM here): a call more than steps, of which the second is not optimised."""
    pipe, call = double("sd", "pndm"), call_of("sd", batch=batch, steps=5)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        # Its coefficients are fp32 numbers otherwise.
        monkeypatch.setattr(pipe.scheduler, name, getattr(pipe.scheduler, name).double())
    layouts = [{(2, 3): (0.0, 0.0, 0.5, 0.5)}, {(4, 5): (0.25, 0.5, 1.0, 1.0), (1, 2): (0.0, 0.0, 0.5, 0.5)}][:batch]
    layers, grid, text = cross_layers(pipe, 16), (16, 16), call["prompt_embeds"].shape[1]
    own = [name.replace("attn2", "attn1") for name in layers]

    def loss(b: int, predict: Callable[[Tensor], Tensor], x: Tensor, i: int) -> tuple[Tensor, float]:
        with slow.recorded(pipe.unet, [*layers, *own]) as maps:
            predict(x)
        words = [[start] for start, _ in layouts[b]]
        A = slow.word_maps(slow.cross_map([maps[n] for n in layers], grid), words, range(1, text - 1))
        boxes = [[slow.truncated(box, grid)] for box in layouts[b].values()]
        # The weights of CAR change at step 15 of 50; step i is call i + 1 of 6 but for the first.
        car, least = slow.car_released(A, boxes, 50 * (i + 1) // 6 if i else 0)
        return car + slow.sar_released([maps[n][0] for n in own], boxes, grid), least

    sizes = {0: 4.0, 1: 3.0, 3: 2.0}

    def rule(z: Tensor, one: slow.Loss, i: int, n: int, b: int) -> Tensor:
        for _ in range(2 if i in sizes else 0):
            z, value, least = slow.step(z, one, sizes[i])
            if (i < 1 and sizes[i] * float(value) <= 0.1) or least >= 0.2:
                break
        return z

    expected = slow.plms_latents(pipe, call, by_sample(rule, loss))
    # Calls 0, 2 and 4 of 6.
    schedule = ((0.0, 0.2, 4.0, 2), (0.2, 0.4, 3.0, 2), (0.6, 0.7, 2.0, 2))
    method = AttentionRefocusing.released_code(layouts, schedule=schedule)
    plain = pipe(**call)[0]
    assert far(plain, slow.plms_latents(pipe, call, lambda z, *_: z)) < EXACT
    with steer(pipe, method):
        ours = pipe(**call)[0]
    assert far(ours, expected) < EXACT and far(plain, expected) > 0.1
    with steer(pipe, method.new(blind_calls=True, schedule=((0.0, 0.4, 4.0, 2),))):
        assert far(pipe(**call)[0], expected) > 0.1


def test_the_calls_of_plms_follow_the_released_table() -> None:
    """Call 1 of 51 belongs to step 0; from then on step i is call i + 1."""
    form = AttentionRefocusing.released_code(BOXES)
    assert not form.blind_calls
    for i in range(1, 50):
        assert form.plan(i + 1, 51) == form.plan(i, 50), i
        early = [float(form.loss(maps_of(call, length)).detach()) for call, length in ((i + 1, 51), (i, 50))]
        assert early[0] == early[1], i


def test_the_schedule_is_the_released_table_at_fifty_calls() -> None:
    for form in (AttentionRefocusing(BOXES), AttentionRefocusing.released_code(BOXES)):
        plans = [form.plan(i, 50) for i in range(50)]
        table = {0: (4, 2), 1: (4, 2)} | dict.fromkeys((2, 3, 4), (4, 6)) | dict.fromkeys(range(5, 10), (3, 3))
        table |= dict.fromkeys((10, 15), (3, 2)) | dict.fromkeys((20, 25, 30, 35), (1, 2))
        for i, plan in enumerate(plans):
            assert (plan.size, plan.refine) == table.get(i, (0.0, 0)), i
    targets = [p.target for p in plans]
    assert targets[0] == 0.1 / 4 and targets[9] == 0.1 / 3 and targets[10] == -1.0
    assert AttentionRefocusing(BOXES, step_size=2.0).plan(0, 50) == Plan(8.0, 2, -1.0, at_once=True)


def test_stop_rules() -> None:
    """Words that are inside are left alone: late in the paper's form, and by the share of their attention when asked."""
    maps = maps_of(index=10)
    inside = float(AttentionRefocusing(BOXES)._inside(maps))
    rule = lambda index, **options: AttentionRefocusing(BOXES, **options).satisfied(maps_of(index), torch.ones(1))  # noqa: E731
    assert bool(rule(10, aligned=inside - 1e-6)) and not bool(rule(10, aligned=inside + 1e-6))
    assert rule(9, aligned=0.0) is None
    words, valid = maps.words(AttentionRefocusing(BOXES).phrases())
    boxes = [set().union(*(slow.centred(box, GRID) for box in parts)) for parts in WORD_BOXES]
    share = min(float(sum(m[c] for c in box) / m.sum()) for m, box in zip(words[0].detach(), boxes, strict=True))
    assert bool(valid.all())
    assert bool(rule(0, stop_share=share - 1e-6)) and not bool(rule(0, stop_share=share + 1e-6))


def test_boxes_that_cannot_be_right_are_refused() -> None:
    for box, message in (
        ((0.5, 0.0, 1.2, 1.0), "not inside the image"),
        ((0.5, 0.0, 0.5, 1.0), "not inside the image"),
        ((0, 0, 256, 256), "not inside the image"),
        ((0.0, 0.0, 1.0), "not inside the image"),
        ((), "not inside the image"),
        (torch.zeros(4, 4), "neither empty nor full"),
    ):
        with pytest.raises(SelectionError, match=message):
            AttentionRefocusing({"cube": box})
    for boxes in ({}, [], "cube", {"": (0, 0, 1, 1)}, [("cube", (0, 0, 1, 1))]):
        with pytest.raises(SelectionError, match="boxes"):
            AttentionRefocusing(boxes)
    with pytest.raises(SelectionError, match="boxes only"):
        AttentionRefocusing.released_code({"cube": torch.eye(4)})
    for bad in (
        {"cross": 0.0, "own": 0.0},
        {"form": "other"},
        {"stop_share": 0.0},
        {"schedule": ((0.5, 0.2, 1.0, 1),)},
    ):
        with pytest.raises(SelectionError, match=next(iter(bad))):
            AttentionRefocusing(BOXES, **bad)


@pytest.mark.parametrize("form", [AttentionRefocusing, AttentionRefocusing.released_code])
def test_a_box_smaller_than_a_cell_is_refused_before_the_first_step(form: Any) -> None:
    pipe, call, steps = double("sd"), call_of("sd", text=True, steps=2), []
    method = form({"cube": (0.5, 0.5, 0.55, 0.9)})
    with (
        pytest.raises(SelectionError, match=r"'cube' is smaller than one cell of the 16 x 16 map"),
        steer(pipe, method),
    ):
        pipe(**call, callback_on_step_end=lambda p, i, t, k: steps.append(i) or k)
    assert not steps


def test_joint_attention_gives_both_terms() -> None:
    """SD3: one site, its image-text and its image-image block; the loss falls along the updates."""
    pipe, call = double("sd3"), call_of("sd3", steps=1)
    seen = []

    class Watched(AttentionRefocusing):
        def loss(self, maps: Maps) -> Tensor:
            value = super().loss(maps)
            (site,) = maps.sites
            assert site.text.shape == (1, 4, 64, 8) and site.image.shape == (1, 4, 64, 64)
            assert far(site.text.sum(dim=-1), torch.ones(1, 4, 64)) < 1e-12
            seen.append(float(value.detach()))
            return value

    method = Watched({(2, 3): (0.0, 0.0, 0.5, 0.5)}, compete="all", schedule=((0.0, 1.0, 1.0, 5),))
    with steer(pipe, method.new(where=Where(layers=[1]))):
        pipe(**call)
    assert len(seen) == 5 and seen[-1] < seen[0]


def test_a_site_without_a_map_is_refused() -> None:
    """Sana's self-attention is linear, so SAR has nothing to read there."""
    from attnsteer.errors import UnsupportedHost
    from attnsteer.testing import tiny_pipeline

    with pytest.raises(UnsupportedHost, match="linear attention"):
        steer(tiny_pipeline("sana"), AttentionRefocusing({(2, 3): (0, 0, 0.5, 0.5)}, where=Where(layers=[0, 1])))
