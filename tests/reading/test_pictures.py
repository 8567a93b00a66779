"""CARVE, TAG and attention prompting: the official arithmetic, and whole readings on the embedded model against eager maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attnsteer import CARVE, TAG, AttentionPrompting, ControlMLLM, HeadSet, zoo
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.reading._pictures import components, picture, pixels, quantile
from attnsteer.reading._vision import image_grid, over_image
from attnsteer.reading.tag import value_tokens
from attnsteer.run.data.zoo import image as scene_image
from tests.reference import reading as slow

PROMPT = "<image> question is there a red circle ? answer"
GENERAL = "<image> caption"


@pytest.fixture(scope="module")
def lvlm() -> Any:
    return zoo.load("shapes-lvlm")


@pytest.fixture(scope="module")
def scene() -> Any:
    return scene_image({"split": "test", "image": 0})


def eager(model: Any, inputs: Any, **more: Any) -> tuple[Any, ...]:
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**{**inputs, **more}, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")


# Tensor maths.


@pytest.mark.parametrize("size", [(64, 48), (20, 31)])
def test_carve_is_the_official_arithmetic(size: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    query, general = (torch.rand(n, 2, 6, 8, generator=g) for n in (3, 4))
    method = CARVE.released_code()
    S = method.contrast(query, general, (size[1], size[0]))
    theirs = slow.carve([list(m) for m in query], [list(m) for m in general], size, 1e-8)
    assert (S - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    # A ridge that is seen in the maps.
    S_ridge = CARVE(lam=0.3).contrast(query, general, (size[1], size[0]))
    theirs = slow.carve([list(m) for m in query], [list(m) for m in general], size, 0.3)
    assert (S_ridge - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    for share, regions, floor in ((0.2, 3, True), (0.4, 2, False), (0.1, 1, True)):
        own = CARVE(keep=share, regions=regions, at_least=floor).mask(S)
        assert torch.equal(own, slow.carve_mask(S, share, regions, floor))
    assert (quantile(S, 0.37) - float(np.percentile(S.numpy(), 37))).abs() < 1e-9
    first, last = (CARVE(steps=name).contrast(query, general, (6, 8)) for name in ("first", "last"))
    assert (first - (query[0].double() / general[0].double()).sum(0)).abs().max() < 1e-4 * first.max()
    assert (last - (query[2].double() / general[2].double()).sum(0)).abs().max() < 1e-4 * last.max()


def test_carve_refines_as_the_official_code(scene: Any) -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:20, 30:50] = True
    mask[15, 40] = False
    made, box = CARVE().refine(scene, mask)
    assert box == (30, 10, 50, 20)
    array = (np.array(scene) * np.stack([mask.numpy()] * 3, axis=-1)).astype(np.uint8)
    cut = Image.fromarray(array).crop(box)
    scale = max(64 / 20, 64 / 10)
    wanted = cut.resize((int(20 * scale), int(10 * scale)), Image.LANCZOS)
    assert np.array_equal(np.array(made), np.array(wanted))
    whole, box = CARVE().refine(scene, torch.ones(64, 64, dtype=torch.bool))
    assert box == (0, 0, 64, 64) and np.array_equal(np.array(whole), np.array(scene))


def test_the_same_question_twice_keeps_the_whole_picture(scene: Any) -> None:
    maps = torch.rand(2, 3, 8, 8) + 0.1
    S = CARVE(lam=0.0).contrast(maps, maps, (64, 64))
    assert (S - S.mean()).abs().max() < 1e-9
    assert CARVE().refine(scene, CARVE(keep=1.0).mask(S))[1] == (0, 0, 64, 64)


def test_components_are_those_of_a_flood() -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        mask = torch.rand(9, 12, generator=g) > 0.55
        for diagonal in (False, True):
            label = components(mask, diagonal)
            assert torch.equal(label > 0, mask)
            for y in range(9):
                for x in range(12):
                    for dy, dx in [(0, 1), (1, 0)] + ([(1, 1), (1, -1)] if diagonal else []):
                        a, b = y + dy, x + dx
                        if mask[y, x] and 0 <= a < 9 and 0 <= b < 12 and mask[a, b]:
                            assert label[y, x] == label[a, b]
        assert len(components(mask).unique()) >= len(components(mask, True).unique())
    snake = torch.tensor([[1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    assert int(components(snake).max()) == 1 and int(components(torch.eye(3).bool()).max()) == 3


def test_tag_is_the_official_arithmetic() -> None:
    found = torch.tensor([[0.1, 0.2, 0.1, 0], [0.2, 0.8, 0.6, 0], [0, 0.5, 0.1, 0], [0, 0, 0, 0.7]])
    theirs = slow.tag_boxes(found, 0.5)
    assert [b for b, _ in theirs] == [[14, 14, 41, 41], [42, 42, 55, 55]] and theirs[1][1] == pytest.approx(0.875)
    ours = TAG().point(found)
    # Their boxes end in the last pixel: half a pixel less than ours.
    assert [c * 56 - 0.5 for c in ours.point] == [27.5, 27.5]
    g = torch.Generator().manual_seed(2)
    for k in range(8):
        found = torch.rand(5, 7, generator=g) ** 3
        theirs = slow.tag_boxes(found, 0.4, side=3)
        ours = TAG(threshold=0.4).regions(found / found.max())
        boxes = {(tuple(3 * c for c in r.box), round(r.confidence, 5)) for r in ours}
        assert boxes == {((b[0], b[1], b[2] + 1, b[3] + 1), round(c, 5)) for b, c in theirs}
        rows = torch.rand(3, 6, 20, generator=g)
        merged = TAG(heads=2 + k % 3).merged(rows)
        wanted = slow.tag_map(rows, 2 + k % 3)
        assert (merged - wanted / wanted.max()).abs().max() < 1e-6


def test_tag_through_a_resampler() -> None:
    g = torch.Generator().manual_seed(3)
    slices = [torch.rand(2, 5, 4, generator=g) for _ in range(2)]
    C = [torch.rand(4, 8, generator=g) for _ in range(2)]
    found = TAG(heads=3).through(slices, C, [(2, 3), (2, 3)], (2, 1))
    every = torch.cat(slices, dim=-1)
    wanted = torch.zeros(2, 6)
    for t in range(2):
        best = sorted(range(5), key=lambda h: -float(every[t, h].sum()))[:3]
        for s in range(2):
            for h in best:
                wanted[:, 3 * s : 3 * s + 3] += (slices[s][t, h] @ C[s][:, :6]).view(2, 3)
    assert (found - wanted / wanted.max()).abs().max() < 1e-6
    with pytest.raises(SelectionError, match="tiles"):
        TAG().through(slices, C, [(2, 3)] * 2, (3, 1))


def test_prompting_is_the_official_arithmetic(scene: Any) -> None:
    found = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    method = AttentionPrompting()
    assert (method.enhanced(found) - torch.tensor([[0.0030, 0.1260], [0.8740, 0.9970]])).abs().max() < 5e-5
    g = torch.Generator().manual_seed(4)
    a, b = torch.rand(5, 6, generator=g), torch.rand(5, 6, generator=g)
    assert (method.of_rows(a) - slow.prompting(a, 5.0)).abs().max() < 1e-6
    joined = AttentionPrompting(contrast=10.0).joined(a, b)
    assert (joined - slow.soft_or(a, b, 10.0)).abs().max() < 1e-6
    assert (method.of_rows(torch.ones(4, 4)) == 0.5).all()
    dark = AttentionPrompting(grey=200.0).blended(scene, a)
    mask = Image.fromarray((a * 255).to(torch.uint8).numpy()).resize((64, 64), Image.LANCZOS)
    z = np.array(mask).astype(np.float32)[..., None] / 255.0
    wanted = (np.array(scene).astype(np.float32) * z + (1 - z) * 200).astype(np.uint8)
    assert np.abs(np.array(dark).astype(int) - wanted.astype(int)).max() <= 1
    assert torch.equal(pixels(picture(scene, pixels(scene))), pixels(scene))


# With models.


def test_rows_are_those_of_eager_maps(lvlm: Any, scene: Any) -> None:
    model, processor = lvlm
    inputs = processor(images=scene, text=PROMPT, return_tensors="pt")
    image = inputs["input_ids"][0] == model.config.image_token_index
    logits = model(**inputs).logits.detach()
    with torch.no_grad(), over_image(model, rows="last") as rows:
        assert torch.equal(model(**inputs).logits, logits)
    maps = eager(model, inputs)
    for r in rows:
        assert (r.map[:, 0] - maps[r.layer][0, :, -1, image]).abs().max() <= 1e-6

    # Steps over a cache are rows of one call without it.
    method = CARVE(layers=[2, 4])
    found, new = method.attention(model, inputs, max_new_tokens=3, eos_token_id=None)
    ids = torch.cat([inputs["input_ids"], new[None]], dim=1)
    whole = eager(
        model, {"pixel_values": inputs["pixel_values"], "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )
    image = ids[0] == model.config.image_token_index
    for t in range(3):
        for place, layer in enumerate((2, 4)):
            row = whole[layer][0, :, inputs["input_ids"].shape[1] - 1 + t, image].mean(dim=0)
            assert (found[t, place].flatten() - row).abs().max() <= 1e-6


def test_carve_asks_twice(lvlm: Any, scene: Any) -> None:
    model, processor = lvlm
    before = {n: p.clone() for n, p in model.named_parameters()}
    made = CARVE(layers=[1, 2], keep=0.4).ask(model, processor, scene, PROMPT, GENERAL, max_new_tokens=1)
    assert made.map.shape == made.mask.shape == (64, 64) and made.image.size[0] >= 64 and made.before in ("yes", "no")
    assert 0 < float(made.mask.float().mean()) <= 0.41 and made.answer
    general, _ = CARVE(layers=[1, 2]).attention(
        model, processor(images=scene, text=GENERAL, return_tensors="pt"), max_new_tokens=1
    )
    again = CARVE(layers=[1, 2], keep=0.4).ask(model, processor, scene, PROMPT, general, max_new_tokens=1)
    assert torch.equal(again.map, made.map) and again.answer == made.answer
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_tag_reads_the_words(lvlm: Any, scene: Any) -> None:
    model, processor = lvlm
    inputs = processor(images=scene, text=PROMPT, return_tensors="pt")
    maps = eager(model, inputs)
    image = inputs["input_ids"][0] == model.config.image_token_index
    # "red circle": the fourth and third token from the end.
    rows = torch.stack([torch.cat([A[0, :, i][:, image] for A in maps]) for i in (-4, -3)])
    wanted = slow.tag_map(rows, 10)
    found = TAG().ground(model, processor, scene, PROMPT, "red circle")
    assert (found.map.flatten() - wanted / wanted.max()).abs().max() <= 1e-5 and found.source == "prompt"
    assert 0 <= found.point[0] <= 1 and found.box[0] < found.point[0] < found.box[2]
    start = inputs["input_ids"].shape[1] - 4
    same = TAG().ground(model, processor, scene, PROMPT, (start, start + 2))
    assert torch.equal(same.map, found.map)
    chosen = TAG(heads=HeadSet({1: [3]})).ground(model, processor, scene, PROMPT, "red circle")
    own = maps[1][0, 3, -4:-2][:, image].mean(dim=0)
    assert (chosen.map.flatten() - own / own.max()).abs().max() <= 1e-5


def test_tag_reads_the_value_of_an_answer(lvlm: Any, scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [5, 6, 7, 8]
    pieces = {5: '{"element": "', 6: "red", 7: " circle", 8: '"}'}

    class Tokenizer:
        is_fast = False

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(pieces[i] for i in ids)

    assert value_tokens(ids, Tokenizer(), "element") == [1, 2] and not value_tokens(ids, Tokenizer(), "point")
    model, processor = lvlm
    monkeypatch.setattr("attnsteer.reading.tag.value_tokens", lambda ids, tokenizer, key: [0, 1])
    found = TAG().ground(model, processor, scene, PROMPT, "red circle", key="x", max_new_tokens=3, eos_token_id=None)
    inputs = processor(images=scene, text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        whole = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    maps = eager(
        model, {"input_ids": whole, "pixel_values": inputs["pixel_values"], "attention_mask": torch.ones_like(whole)}
    )
    image = whole[0] == model.config.image_token_index
    n = inputs["input_ids"].shape[1]
    wanted = slow.tag_map(torch.stack([torch.cat([A[0, :, i][:, image] for A in maps]) for i in (n, n + 1)]), 10)
    assert found.source == "answer" and (found.map.flatten() - wanted / wanted.max()).abs().max() <= 1e-5


def test_prompting_with_a_language_model(lvlm: Any, scene: Any) -> None:
    model, processor = lvlm
    made = AttentionPrompting(layer=2).prompt(model, processor, scene, PROMPT, max_new_tokens=1)
    inputs = processor(images=scene, text=PROMPT, return_tensors="pt")
    row = eager(model, inputs)[2][0, :, -1, inputs["input_ids"][0] == model.config.image_token_index]
    mean = (row / row.sum(dim=-1, keepdim=True)).mean(dim=0).view(8, 8)
    assert (made.map - slow.prompting(mean, 5.0)).abs().max() <= 1e-4
    assert made.image.size == scene.size


def test_prompting_with_clip() -> None:
    from transformers import CLIPConfig, CLIPModel

    sides = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = CLIPConfig(
        text_config={**sides, "vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 3, "bos_token_id": 1},
        vision_config={**sides, "image_size": 24, "patch_size": 8},
        projection_dim=10,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    pixel_values, ids = torch.randn(1, 3, 24, 24), torch.tensor([[1, 7, 9, 3]])
    own, complement = AttentionPrompting(layer=1).similarities(model, pixel_values, ids)

    # hook.py of yu-rp/apiprompting at eed9978, in loops.
    tower = model.vision_model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(pixel_values, output_attentions=True, output_hidden_states=True)
        attention = tower.encoder.layers[1].self_attn
        A = out.attentions[1][0]
        v = attention.v_proj(tower.encoder.layers[1].layer_norm1(out.hidden_states[1]))[0]
        final = out.hidden_states[-1][0, 0]
        norm, N, M = tower.post_layernorm, 10, 5
        mean, spread = final.mean(), (final.var(unbiased=False) + norm.eps).sqrt()
        text = model.get_text_features(ids)
        text = (text if isinstance(text, Tensor) else text.pooler_output)[0]
        text = text / text.norm()
        scale = model.visual_projection(norm(final)).norm()
        for j in range(1, N):
            c = attention.out_proj.bias / N
            for h in range(2):
                part = slice(8 * h, 8 * h + 8)
                c = c + A[h, 0, j] * (attention.out_proj.weight[:, part] @ v[j, part])
            u = norm.weight * (c - mean / (M * N)) / spread + norm.bias / (M * N)
            assert abs(model.visual_projection(u) @ text / scale - own.flatten()[j - 1]) <= 1e-5
            u = norm.weight * (out.hidden_states[2][0, j] - mean / M) / spread + norm.bias / M
            assert abs(model.visual_projection(u) @ text / scale - complement.flatten()[j - 1]) <= 1e-4
    with pytest.raises(SelectionError, match="3 blocks"):
        AttentionPrompting(layer=7).similarities(model, pixel_values, ids)
    with pytest.raises(UnsupportedHost, match="no CLIPModel"):
        AttentionPrompting().similarities(model.text_model, pixel_values, ids)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda m, p, i: TAG().ground(m, p, i, PROMPT), "double quotes"),
        (lambda m, p, i: TAG().ground(m, p, i, PROMPT, "blue star"), "is not in the text"),
        (lambda m, p, i: TAG().ground(m, p, i, PROMPT, (70, 99)), "ends after"),
        (lambda m, p, i: TAG().ground(m, p, i, "where", "where"), "no '<image>'"),
        (lambda m, p, i: TAG().ground(m, p, "picture.png", PROMPT, "red"), "PIL image"),
        (lambda m, p, i: TAG().ground(m, p, i, f"<image> {PROMPT}", "red"), "does not take the text"),
        (lambda m, p, i: TAG().ground(m, p, i, f"{PROMPT} \ud800", "red"), "half of a character"),
        (lambda m, p, i: CARVE().ask(m, p, i, None, GENERAL), "is no text"),
        (lambda m, p, i: CARVE().ask(m, p, i, PROMPT, GENERAL, max_new_tokens=0), "at least 1"),
        (lambda m, p, i: AttentionPrompting().prompt(m, p, i, PROMPT, num_return_sequences=2), "one answer is read"),
        (lambda m, p, i: ControlMLLM(steps=1).ask(m, p, i, PROMPT, None), "no region"),
        (lambda m, p, i: TAG().ground(m, p, i, PROMPT, "red", grid=(4, 8)), "64 image tokens"),
        (lambda m, p, i: TAG().ground(m, p, i, PROMPT, "red", grid=8), "height, width"),
        (lambda m, p, i: CARVE(layers=[77]).ask(m, p, i, PROMPT, GENERAL), "77"),
        (lambda m, p, i: AttentionPrompting(layer=99).prompt(m, p, i, PROMPT), "99"),
        (lambda m, p, i: AttentionPrompting(kernel=2), "odd"),
        (lambda m, p, i: TAG(heads=0), "HeadSet"),
        (lambda m, p, i: CARVE(keep=0.0), "keep"),
        (lambda m, p, i: CARVE(layers=["a"]), "layer numbers"),
        (lambda m, p, i: CARVE(kep=0.1), "keep"),
        (lambda m, p, i: TAG().point(torch.zeros(3, 3)), "nowhere"),
        (lambda m, p, i: CARVE().refine(i, torch.ones(3, 3).bool()), "64 x 64"),
    ],
)
def test_bad_input(lvlm: Any, scene: Any, ask: Any, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        ask(*lvlm, scene)


def test_options_of_generate_are_taken(lvlm: Any, scene: Any) -> None:
    """Sampling, and the answer in a form with more than its tokens."""
    want = CARVE(layers=[1]).ask(*lvlm, scene, PROMPT, GENERAL, max_new_tokens=2).answer
    options = {"do_sample": True, "top_k": 1, "return_dict_in_generate": True, "output_scores": True}
    assert CARVE(layers=[1]).ask(*lvlm, scene, PROMPT, GENERAL, max_new_tokens=2, **options).answer == want


def test_grids_are_never_guessed(lvlm: Any) -> None:
    model, _ = lvlm
    with pytest.raises(SelectionError, match="is not known"):
        image_grid(model, {}, 64)
    assert image_grid(model, {"pixel_values": torch.zeros(1, 3, 64, 64)}, 64) == (8, 8)
    with pytest.raises(SelectionError, match="8 x 4"):
        image_grid(model, {"pixel_values": torch.zeros(1, 3, 64, 32)}, 64)
