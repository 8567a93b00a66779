"""attention.json: what is read from each kind of model, and that the report shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnsteer import ACT, HeadGate, HeadSet, SoftPAG, zoo
from attnsteer.errors import RunError
from attnsteer.results import attention_maps
from attnsteer.results.reports import report
from attnsteer.zoo.measure.text import inputs
from attnsteer.zoo.shapes.layouts import layout
from attnsteer.zoo.shapes.questions import picture
from attnsteer.zoo.shapes.reading import reading
from tests.results import folders

HEADS = HeadSet({1: [0, 2], 3: [1]})


@dataclass
class Arm:
    """As `attnsteer.run.build` makes them."""

    id: str
    methods: list[Any] = field(default_factory=list)
    decoding: dict[str, Any] = field(default_factory=dict)

    def make(self, samples: Any, context: Any) -> list[Any]:
        return list(self.methods)


@pytest.fixture(scope="module")
def lm() -> Any:
    model, tokenizer = zoo.load("shapes-lm")
    return SimpleNamespace(kind="lm", target=model, tokenizer=tokenizer, processor=None)


@pytest.fixture(scope="module")
def vlm() -> Any:
    model, processor = zoo.load("shapes-lvlm")
    return SimpleNamespace(kind="vlm", target=model, tokenizer=processor.tokenizer, processor=processor)


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = zoo.load("shapes-sd")
    return SimpleNamespace(kind="image", target=found, tokenizer=found.tokenizer, processor=None)


def text(i: int) -> dict[str, Any]:
    return {"id": f"r{i}", "prompt": reading("test", i).prompt}


def test_the_last_row_of_a_language_model(lm: Any) -> None:
    sample = text(0)
    found = attention_maps.collect(lm, [Arm("baseline"), Arm("method", [HeadGate({(0, 0): 0.0})])], [sample])
    (entry,) = found["samples"]
    part = entry["arms"]["baseline"]
    # Against the model's own maps.
    batch = lm.tokenizer(sample["prompt"], return_tensors="pt")
    lm.target.set_attn_implementation("eager")
    with torch.no_grad():
        maps = lm.target(input_ids=batch.input_ids, output_attentions=True).attentions
    lm.target.set_attn_implementation("sdpa")
    want = torch.stack([m[0, :, -1].mean(dim=0) for m in maps]).mean(dim=0)
    assert part["weights"] == pytest.approx(want.tolist(), abs=1e-4)
    assert part["labels"][1:] == sample["prompt"].split() and "all heads" in found["note"]
    assert entry["arms"]["method"]["weights"] != part["weights"]


def test_only_the_steered_heads_count_in_every_arm(lm: Any) -> None:
    sample = text(1)
    arms = [Arm("baseline"), Arm("method", [ACT(heads=HEADS, beta=0.4)])]
    found = attention_maps.collect(lm, arms, [sample])
    assert "the 3 steered heads" in found["note"]
    batch = lm.tokenizer(sample["prompt"], return_tensors="pt")
    lm.target.set_attn_implementation("eager")
    with torch.no_grad():
        maps = lm.target(input_ids=batch.input_ids, output_attentions=True).attentions
    lm.target.set_attn_implementation("sdpa")
    want = torch.stack([maps[layer][0, head, -1] for layer, head in HEADS]).mean(dim=0)
    assert found["samples"][0]["arms"]["baseline"]["weights"] == pytest.approx(want.tolist(), abs=1e-4)
    for part in found["samples"][0]["arms"].values():
        assert sum(part["weights"]) == pytest.approx(1.0, abs=1e-2)


def test_maps_over_an_image_for_the_same_words(vlm: Any) -> None:
    sample = {"id": "c0", "prompt": "caption", "image": 0}

    def make(samples: Any) -> Any:
        return inputs(vlm.processor, [picture("test", s["image"]) for s in samples], [s["prompt"] for s in samples])

    arms = [Arm("baseline", decoding={"max_new_tokens": 6}), Arm("method", [HeadGate({(0, 0): 0.0, (1, 1): 0.0})])]
    found = attention_maps.collect(vlm, arms, [sample], inputs=make)
    one, two = found["samples"][0]["arms"].values()
    # The second arm says what the first one said, however long it may go on.
    assert one["labels"] == two["labels"] and 1 <= len(one["labels"]) <= 6
    assert one["maps"] != two["maps"] and all(0 < sum(map(sum, m)) < 1 for m in one["maps"])
    with pytest.raises(RunError, match="needs inputs="):
        attention_maps.collect(vlm, arms, [sample])


def test_maps_of_the_words_of_a_prompt(pipe: Any) -> None:
    item = layout("test", 0)
    sample = {"id": "l0", "prompt": item.prompt, "words": [p.shape for p in item.phrases]}
    decoding = {"num_inference_steps": 2, "guidance_scale": 3.0}
    arms = [Arm("baseline", [], decoding), Arm("method", [SoftPAG(scale=1.0)], decoding)]
    found = attention_maps.collect(
        pipe,
        arms,
        [sample],
        generator=lambda s: torch.Generator().manual_seed(0),
        picture=lambda arm, s: f"images/{arm}/0/{s['id']}.png",
    )
    one, two = found["samples"][0]["arms"].values()
    assert one["labels"] == sample["words"] and len(one["maps"]) == 2
    assert one["image"] == "images/baseline/0/l0.png" and one["maps"] != two["maps"]
    with pytest.raises(RunError, match="names no words"):
        attention_maps.collect(pipe, arms, [{"id": "x", "prompt": "a"}])


def test_large_maps_keep_their_sum() -> None:
    maps = torch.rand(2, 64, 96)
    small = attention_maps._smaller(maps)
    assert small.shape == (2, 21, 32) and torch.allclose(small.sum(), maps.sum(), rtol=0.02)
    assert attention_maps._smaller(maps[:, :32, :32]).shape == (2, 32, 32)


def test_the_report_shows_it(lm: Any, tmp_path: Path) -> None:
    run = folders.text_run(tmp_path / "run")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()][:2]
    found = attention_maps.collect(lm, [Arm("baseline"), Arm("method", [ACT(heads=HEADS, beta=0.4)])], samples)
    assert attention_maps.save(run, found).name == "attention.json" and not list(run.glob(".attention*"))
    page = report(run).read_text()
    assert "The last token&#39;s attention over the prompt; mean over the 3 steered heads" in page
    assert page.count('<p class="heat">') == 4
