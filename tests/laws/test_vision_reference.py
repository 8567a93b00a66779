"""VAR and VHR on real model code against the dense reference, to 1e-5 in fp32: prefill, chunks, decoding, beams, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import VAR, VHR, Intervention, Where, steer
from tests.hosts.transformers.vision_families import IMAGE, build, prompts
from tests.laws.dense_vision import DenseVision, choose_vhr, with_var, with_vhr

TOLERANCE = 1e-5
LAYERS = [0, 1]
DIMS, TAU = (3, 17), 1.6
VAR_OPTIONS = {"rho": 0.4, "min_image_mass": 0.3}
# One image; two images; a wide image (other length) elsewhere.
LAYOUTS: dict[str, list[list[Any]]] = {
    "one": [[3, "image", 4]],
    "places": [[2, "image", 6], [7, "image", 2], [1, "image", 3]],
    "several": [[2, "image", 3, "image", 4], [5, "image", 2]],
    "lengths": [[2, "wide", 3], [1, "image", 2, "wide", 2], [4, "image", 5]],
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(
        m.layers
        for n, m in model.named_modules()
        if n.endswith(("language_model", "text_model", "language_model.model")) and hasattr(m, "layers")
    )


class Setup:
    """A model, prompts, a method, and the same method in the dense model."""

    def __init__(self, name: str, layout: str, padding: str = "left"):
        self.name, self.model = name, build(name)
        self.inputs, self.image = prompts(name, LAYOUTS[layout], padding, seed=3)
        self.valid = self.inputs["attention_mask"].bool()
        self.counts: dict[str, int] = {}

    def dense(self) -> DenseVision:
        dense = DenseVision(self.model, layers_of(self.model))
        dense.image, dense.valid = self.image, self.valid
        return dense

    def var(self, dense: DenseVision, released: bool = False, sinks: str = "all") -> Intervention:
        c = 0.4 if released else 0.6
        self.counts = with_var(dense, LAYERS, DIMS, TAU, sinks, c=c, released=released, **VAR_OPTIONS)
        options = {"released": released, "sinks": sinks, "seed": 7 if sinks == "placebo" else 0}
        return VAR(DIMS, TAU, move_fraction=c, where=Where(layers=LAYERS), **options, **VAR_OPTIONS)

    def vhr(self, dense: DenseVision, **options: Any) -> Intervention:
        alpha = 1.7
        chosen = choose_vhr(dense, lambda: self.model(**self.inputs), self.text, LAYERS, alpha, **_short(options))
        assert all(0 < int(keep.sum()) < keep.numel() for keep in chosen.values())
        with_vhr(dense, LAYERS, alpha, chosen, options.get("rows", "all"))
        return VHR(alpha, where=Where(layers=LAYERS), **options)

    def text(self, b: int) -> None:
        keep = self.valid[b] & ~self.image[b]
        inputs = {"input_ids": self.inputs["input_ids"][b : b + 1, keep]}
        if self.name == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        if self.name == "instructblip":
            self.model.language_model(**inputs)
        else:
            self.model(**inputs)

    def generate(self, **options: Any) -> Any:
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, **options}
        return self.model.generate(**self.inputs, **options, return_dict_in_generate=True)


def _short(options: dict[str, Any]) -> dict[str, Any]:
    names = {"reinforce_both": "both"}
    return {names.get(k, k): v for k, v in options.items()}


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative where b is above one: Gemma 3's logits reach 37, of which fp32 keeps 4e-6."""
    assert torch.isfinite(a).all()
    return float(((a - b).abs() / b.abs().clamp_min(1.0)).max())


def forward(setup: Setup) -> Tensor:
    out = setup.model(**setup.inputs)
    return out.logits[setup.valid]


def check_forward(setup: Setup, make: Any, moved: float = 100 * TOLERANCE) -> None:
    plain, dense = forward(setup), setup.dense()
    with dense.on():
        assert far(forward(setup), plain) <= TOLERANCE
        method = make(dense)
        theirs = forward(setup)
    with steer(setup.model, method):
        ours = forward(setup)
    assert far(ours, theirs) <= TOLERANCE
    assert far(plain, theirs) > moved, "the edit does nothing here; the test would be vacuous"


VAR_CASES = [
    ("llava", "places"), ("llava", "several"), ("qwen2_vl", "lengths"), ("qwen3_vl", "several"), ("internvl", "places"),
    ("idefics3", "several"), ("gemma3", "several"), ("paligemma", "one"), ("instructblip", "places"),
]  # fmt: skip


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("name", "layout"), VAR_CASES)
def test_var_prefill(name: str, layout: str, padding: str) -> None:
    setup = Setup(name, layout, padding)
    check_forward(setup, setup.var)
    assert setup.counts["edited"] > 0 and setup.counts["left"] > 0


@pytest.mark.parametrize("layout", ["one", "several"])
def test_var_released_code(layout: str) -> None:
    setup = Setup("llava", layout)
    check_forward(setup, lambda dense: setup.var(dense, released=True))
    assert setup.counts["edited"] > 0 and setup.counts["left"] > 0
    check_generation(setup, lambda dense: setup.var(dense, released=True), {}, {})


@pytest.mark.parametrize("sinks", ["visual", "placebo"])
def test_var_on_visual_sinks_and_on_a_placebo(sinks: str) -> None:
    """Whole, and in chunks that cut images in two."""
    setup = Setup("llava", "several")
    check_forward(setup, lambda dense: setup.var(dense, sinks=sinks))
    assert setup.counts["edited"] > 0 and setup.counts["left"] > 0
    check_generation(setup, lambda dense: setup.var(dense, sinks=sinks), {"prefill_chunk_size": 9}, {})


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "layout"), [("llava", "places"), ("qwen2_vl", "lengths"), ("gemma3", "several"), ("paligemma", "one")]
)
def test_vhr_prefill(name: str, layout: str, padding: str) -> None:
    setup = Setup(name, layout, padding)
    check_forward(setup, setup.vhr)


@pytest.mark.parametrize("name", ["instructblip", "qwen3_vl", "idefics3", "internvl", "llava_next"])
def test_vhr_prefill_of_other_types(name: str) -> None:
    setup = Setup(name, "several")
    check_forward(setup, setup.vhr)


@pytest.mark.parametrize("options", [{"rows": "last"}, {"outliers": False}, {"reinforce_both": False}], ids=str)
def test_vhr_options(options: dict[str, Any]) -> None:
    setup = Setup("llava", "places")
    check_forward(setup, lambda dense: setup.vhr(dense, **options))


GENERATED = [("llava", "several"), ("qwen2_vl", "lengths"), ("gemma3", "several")]


@pytest.mark.parametrize("method", ["var", "vhr"])
@pytest.mark.parametrize(("name", "layout"), [*GENERATED, ("instructblip", "places")])
def test_cached_decoding(name: str, layout: str, method: str) -> None:
    setup = Setup(name, layout)
    check_generation(setup, getattr(setup, method), {}, {})


@pytest.mark.parametrize("size", [9, 13])
@pytest.mark.parametrize("method", ["var", "vhr-last", "vhr"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_chunked_prefill(name: str, method: str, size: int) -> None:
    """Chunks that cut images in two; all but VHR with rows="all" must equal one whole prefill."""
    setup = Setup(name, "several")
    make = {"var": setup.var, "vhr-last": lambda dense: setup.vhr(dense, rows="last"), "vhr": setup.vhr}[method]
    chunks = {"prefill_chunk_size": size}
    check_generation(setup, make, chunks, chunks if method == "vhr" else {})


@pytest.mark.parametrize("method", ["var", "vhr"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_beams(name: str, method: str) -> None:
    setup = Setup(name, "several")
    dense = setup.dense()
    options = {"num_beams": 3, "max_new_tokens": 5, "output_scores": True}
    plain = setup.generate(**options)
    with dense.on():
        made = getattr(setup, method)(dense)
        theirs = setup.generate(**options)
    with steer(setup.model, made):
        ours = setup.generate(**options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert far(ours.sequences_scores, theirs.sequences_scores) <= TOLERANCE
    assert not torch.equal(plain.sequences_scores, theirs.sequences_scores)


@pytest.mark.parametrize("method", ["var", "vhr"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_static_caches(name: str, method: str) -> None:
    """A static cache has slots for tokens to come, and its masks are four-dimensional."""
    setup = Setup(name, "places" if name == "llava" else "lengths")
    made = getattr(setup, method)(setup.dense()) if method == "var" else VHR(1.7, where=Where(layers=LAYERS))
    with steer(setup.model, made):
        dynamic = setup.generate()
        static = setup.generate(cache_implementation="static", disable_compile=True)
    assert torch.equal(static.sequences, dynamic.sequences)
    assert far(torch.stack(static.logits), torch.stack(dynamic.logits)) <= TOLERANCE


def check_generation(setup: Setup, make: Any, ours_with: dict[str, Any], theirs_with: dict[str, Any]) -> None:
    dense = setup.dense()
    plain = setup.generate()
    with dense.on():
        method = make(dense)
        theirs = setup.generate(**theirs_with)
    with steer(setup.model, method):
        ours = setup.generate(**ours_with)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert far(torch.stack(ours.logits), torch.stack(theirs.logits)) <= TOLERANCE
    assert far(plain.logits[0], theirs.logits[0]) > 100 * TOLERANCE


def test_a_batch_equals_its_samples_alone() -> None:
    """Images of other length and place beside a sample change nothing in it."""
    setup = Setup("qwen2_vl", "lengths", "right")
    for method in (setup.var(setup.dense()), VHR(1.7, where=Where(layers=LAYERS))):
        with steer(setup.model, method):
            together = setup.model(**setup.inputs).logits
        for b in range(3):
            one, image = prompts("qwen2_vl", LAYOUTS["lengths"][b : b + 1])
            n = image.shape[1]
            assert torch.equal((setup.inputs["input_ids"][b, :n] == IMAGE), image[0])
            one["input_ids"] = setup.inputs["input_ids"][b : b + 1, :n]
            sizes = setup.inputs["image_grid_thw"].prod(dim=-1)
            counts = [sum(isinstance(p, str) for p in s) for s in LAYOUTS["lengths"]]
            at = sum(counts[:b])
            one["pixel_values"] = setup.inputs["pixel_values"].split(sizes.tolist())[at : at + counts[b]]
            one["pixel_values"] = torch.cat(one["pixel_values"])
            with steer(setup.model, method):
                alone = setup.model(**one).logits
            assert far(alone[0], together[b, :n]) <= TOLERANCE
