"""`visual_heads` against eager maps summed in loops, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnsteer import HeadSet, Where
from attnsteer.analysis import visual_heads
from attnsteer.errors import SelectionError
from attnsteer.testing.fingerprint import fingerprint
from tests.hosts.transformers.vision_families import build, prompts

LAYOUT = [[4, "image", 3], [2, "image", 9], ["image", 2, "image", 1]]


def eager(model: Any, inputs: dict[str, Any], generated: bool) -> list[torch.Tensor]:
    """The row of the answer of each layer, [B, H, keys], from the model's own eager maps."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        if not generated:
            return [a[:, :, -1] for a in model(**inputs, output_attentions=True).attentions]
        out = model.generate(
            **inputs,
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
        return [a[:, :, 0] for a in out.attentions[1]]
    finally:
        model.set_attn_implementation(own)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("row", ["answer", "generated"])
def test_readings_are_those_of_the_eager_row(name: str, row: str) -> None:
    model = build(name)
    inputs, image = prompts(name, LAYOUT)
    model(**inputs)  # the library installs hooks of its own at the first call
    mark = fingerprint(model)
    counts = image.sum(dim=1).tolist()
    regions = [[0, 2], [1], [counts[2] - 1, 0]]
    right = [True, False, True]
    table = visual_heads(model, [inputs], row=row, regions=regions, right=right)
    assert fingerprint(model) == mark
    with torch.no_grad():
        rows = eager(model, inputs, row == "generated")
    for layer, A in enumerate(rows):
        for head in range(A.shape[1]):
            mass, narrow, score, share, on = [], [], [], [], []
            for b in range(3):
                p = [float(A[b, head, j]) for j in range(image.shape[1]) if image[b, j]]
                total = math.fsum(p)
                entropy = -math.fsum(x / total * math.log(x / total) for x in p if x > 0)
                mass.append(total)
                narrow.append(1 - entropy / math.log(len(p)))
                score.append(total * narrow[-1])
                on.append(math.fsum(p[j] for j in regions[b]))
                share.append(on[-1] / total)
            want = {
                "mass": sum(mass) / 3,
                "mass_right": (mass[0] + mass[2]) / 2,
                "mass_wrong": mass[1],
                "concentration": sum(narrow) / 3,
                "score": sum(score) / 3,
                "region": sum(share) / 3,
                "region_mass": sum(on) / 3,
            }
            for column, value in want.items():
                assert table[column][layer, head] == pytest.approx(value, abs=2e-5), (column, layer, head)
    valid = inputs["attention_mask"].sum(dim=1) + (row == "generated")
    assert float(table.column("mass").chance[0]) == pytest.approx(float((image.sum(dim=1) / valid).mean()))
    assert float(table.column("region").chance[0]) == pytest.approx(
        sum(len(r) / n for r, n in zip(regions, counts, strict=True)) / 3
    )
    best = table.to_heads("score", top=2)
    assert isinstance(best, HeadSet) and best.provenance["arxiv"] == "2412.18108" and best.provenance["row"] == row


def test_batches_are_their_samples_and_a_selection_is_part_of_the_whole() -> None:
    model = build("llava")
    both = prompts("llava", LAYOUT[:2])[0]
    pixels = both["pixel_values"]
    alone = []
    for b in range(2):
        kept = both["attention_mask"][b].bool()
        alone.append(
            {k: both[k][b : b + 1, kept] for k in ("input_ids", "attention_mask")} | {"pixel_values": pixels[b : b + 1]}
        )
    whole, parts = visual_heads(model, [both]), visual_heads(model, alone)
    some = visual_heads(model, [both], where=Where(layers=[1], heads=[1, 2]))
    assert some["mass"] == pytest.approx({p: whole["mass"][p] for p in ((1, 1), (1, 2))}, abs=1e-6)
    for column in ("mass", "concentration", "score"):
        torch.testing.assert_close(parts.column(column).top, whole.column(column).top, atol=1e-5, rtol=0)


def test_what_cannot_be_scored() -> None:
    model = build("llava")
    inputs, _ = prompts("llava", [["image", 3]])
    with pytest.raises(SelectionError, match="no batches"):
        visual_heads(model, [])
    with pytest.raises(SelectionError, match=r"row='last'\): one of answer, generated"):
        visual_heads(model, [inputs], row="last")
    with pytest.raises(SelectionError, match="sample 0 of 1 has no image"):
        visual_heads(model, [prompts("llava", [[5]])[0] | {"pixel_values": None}])
    with pytest.raises(SelectionError, match="2 regions for 1 samples"):
        visual_heads(model, [inputs], regions=[[0], [1]])
    with pytest.raises(SelectionError, match=r"regions\[0\]=.*image tokens 0 to 15"):
        visual_heads(model, [inputs], regions=[[16]])
    with pytest.raises(SelectionError, match="2 answers in right= for 1 samples"):
        visual_heads(model, [inputs], right=[True, False])
