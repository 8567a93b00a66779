"""Frechet distance, precision and recall of sets, and CLIPScore: closed forms, slow definitions, and small vectors."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from attnsteer.errors import MissingExtra, RecordError
from attnsteer.evals.clip import Similarity, parts
from attnsteer.evals.features import extract, inception, save_reference
from attnsteer.evals.metrics import get_metric
from attnsteer.evals.significance import Interval

SQUARE = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])


def value(found: dict, key: str) -> float:
    return float(getattr(found[key], "value", found[key]))


def of(metric, features) -> dict:
    return metric.aggregate([metric.sample({"features": row}) for row in torch.as_tensor(features).tolist()])


def test_frechet_distance_by_hand() -> None:
    # Covariance 2/3 I, and 9 times that, moved by (3, 4): 25 + 2 (sqrt 6 - sqrt(2/3))^2 = 25 + 16/3.
    metric = get_metric("fid", reference=SQUARE, features="plane")
    assert of(metric, SQUARE) == {"frechet_distance": pytest.approx(0, abs=1e-12)}
    assert value(of(metric, SQUARE + torch.tensor([3.0, 4.0])), "frechet_distance") == pytest.approx(25)
    found = of(metric, 3 * SQUARE + torch.tensor([3.0, 4.0]))
    assert value(found, "frechet_distance") == pytest.approx(25 + 16 / 3)
    assert metric.note == "features: plane, 2 dimensions; reference of 4 images"


@pytest.mark.parametrize("count", [4, 60])
def test_frechet_distance_by_the_formula(count: int) -> None:
    """The root of S1 S2 from its eigenvalues, also where there are fewer images than dimensions."""
    g = torch.Generator().manual_seed(1)
    known = torch.randn(80, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6, generator=g, dtype=torch.float64)
    found = torch.randn(count, 6, generator=g, dtype=torch.float64) + 0.5
    roots = torch.linalg.eigvals(found.T.cov() @ known.T.cov()).real.clamp(min=0).sqrt().sum()
    slow = (found.mean(0) - known.mean(0)).square().sum() + found.T.cov().trace() + known.T.cov().trace() - 2 * roots
    assert value(of(get_metric("fid", reference=known), found), "frechet_distance") == pytest.approx(
        float(slow), rel=1e-6
    )


def test_the_p_value_of_a_distance_is_that_of_its_interval() -> None:
    g = torch.Generator().manual_seed(3)
    metric = get_metric("fid", reference=torch.randn(500, 3, generator=g))
    first, second = ([{"features": r} for r in (torch.randn(60, 3, generator=g) + m).tolist()] for m in (0.0, 0.6))
    found = metric.compare(first, second)["frechet_distance"]
    p = metric.p_value("frechet_distance", first, second)
    assert found.low > 0 and 0 < p < 0.05 and metric.p_value("frechet_distance", first, first) == 1.0
    # Three samples to a group are 20 groups, and as many are left out one at a time.
    assert metric.p_value("frechet_distance", first, second, groups=[i // 3 for i in range(60)]) < 0.05
    assert metric.p_value("frechet_distance", first[:9], second[:9]) is None


def test_the_interval_of_a_distance_covers_what_resampling_shows() -> None:
    """The jackknife's half width over the spread of the same figure on fresh sets."""
    g = torch.Generator().manual_seed(2)
    metric = get_metric("fid", reference=torch.randn(2000, 3, generator=g))
    found = [of(metric, torch.randn(200, 3, generator=g) * 1.3 + 0.4)["frechet_distance"] for _ in range(60)]
    spread = torch.tensor([f.value for f in found]).std()
    half = torch.tensor([(f.high - f.low) / 2 for f in found]).mean()
    assert 1.6 < float(half / spread) < 2.8


def test_sets_are_compared_in_pairs() -> None:
    g = torch.Generator().manual_seed(3)
    known, noise = torch.randn(500, 3, generator=g), torch.randn(100, 3, generator=g)
    metric = get_metric("fid", reference=known)
    before, after = ([metric.sample({"features": r}) for r in t.tolist()] for t in (noise + 0.5, noise + 0.3))
    found = metric.compare(before, after)["frechet_distance"]
    alone = [metric.aggregate(arm)["frechet_distance"] for arm in (before, after)]
    assert found.value == pytest.approx(alone[1].value - alone[0].value) and found.high < 0
    # The noise is the same in both, so the difference is known better than either.
    assert found.high - found.low < min(a.high - a.low for a in alone)
    assert metric.compare(before, before)["frechet_distance"] == Interval(0.0, 0.0, 0.0)
    few = metric.aggregate(before, groups=[i % 5 for i in range(100)])["frechet_distance"]
    assert isinstance(few, float) and few == pytest.approx(alone[0].value)
    with pytest.raises(RecordError, match="100 samples before and 99 after"):
        metric.compare(before, after[1:])
    with pytest.raises(RecordError, match="100 samples and 1 groups"):
        metric.aggregate(before, groups=[0])
    with pytest.raises(RecordError, match="at least two"):
        metric.aggregate(before[:1])


def test_precision_and_recall_by_hand() -> None:
    """On a line with k = 1: the reference 0, 1, 10 has the radii 1, 1, 9; the images 0.5, 2.5, -3 have 2, 2, 3.5."""
    metric = get_metric("precision_recall", reference=torch.tensor([[0.0], [1.0], [10.0]]), k=1)
    # 0.5 is in the balls of 0 and 1 (not of 10: 9.5 away); 2.5 in that of 10 (7.5); -3 in none.
    # The images' balls are [-1.5, 2.5], [0.5, 4.5], [-6.5, 0.5]: they hold 0 and 1, not 10.
    assert of(metric, [[0.5], [2.5], [-3.0]]) == {
        "precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3), "density": pytest.approx(1.0), "coverage": 1.0,
    }  # fmt: skip
    assert "k = 1" in metric.note
    with pytest.raises(RecordError, match="k = 3 with 3 images"):
        get_metric("precision_recall", reference=torch.zeros(3, 1))


def test_precision_and_recall_see_quality_and_variety() -> None:
    g = torch.Generator().manual_seed(4)
    known = torch.randn(300, 2, generator=g)
    metric = get_metric("precision_recall", reference=known)
    same, narrow, wide = (of(metric, s * torch.randn(300, 2, generator=g)) for s in (1.0, 0.1, 5.0))
    assert value(same, "precision") > 0.9 and value(same, "recall") > 0.9
    # Expected for equal distributions (Naeem et al., section 3.2): density 1, coverage about 1 - 2^-k.
    assert value(same, "density") == pytest.approx(1, abs=0.1) and value(same, "coverage") == pytest.approx(
        7 / 8, abs=0.05
    )
    assert value(narrow, "precision") > 0.9 and value(narrow, "recall") < 0.2
    assert value(wide, "precision") < 0.5 and value(wide, "recall") > 0.9
    assert same["precision"].low < same["precision"].value < same["precision"].high


def test_reference_files(tmp_path) -> None:
    path = tmp_path / "reference.safetensors"
    save_reference(path, SQUARE, "plane at abc")
    assert "plane at abc" in get_metric("fid", reference=path).note
    assert value(of(get_metric("fid", reference=str(path), features="plane at abc"), SQUARE), "frechet_distance") < 1e-9
    with pytest.raises(RecordError, match="features of 'plane at abc'; those of the records are of 'inception'"):
        get_metric("fid", reference=path, features="inception")
    (tmp_path / "broken").write_bytes(b"no tensors")
    for bad in ("broken", "missing"):
        with pytest.raises(RecordError, match="holds no reference features"):
            get_metric("fid", reference=tmp_path / bad)
    with pytest.raises(RecordError, match=r"shape \[1, 2\]"):
        get_metric("fid", reference=SQUARE[:1])
    metric = get_metric("fid", reference=SQUARE)
    for features in ([1.0], [1.0, float("nan")], [[1.0, 2.0]], "ab"):
        with pytest.raises(RecordError):
            metric.sample({"features": features})


def test_features_are_extracted_in_batches() -> None:
    images = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sizes = []

    def mean(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return batch.mean(dim=(2, 3))

    found = extract(images, mean, batch=3)
    assert sizes == [3, 3, 1] and found.dtype == torch.float64 and torch.equal(found.float(), images.mean(dim=(2, 3)))
    with pytest.raises(RecordError, match="one vector of finite numbers"):
        extract(images, lambda b: b)


def test_inception_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"attnsteer\[fid\]"):
        inception()

    class Fake(torch.nn.Module):
        def __init__(self, name: str, wanted: list[str], feature_extractor_weights_path: str | None):
            super().__init__()
            self.given = (name, wanted, feature_extractor_weights_path)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            assert images.dtype == torch.uint8 and self.given == ("inception-v3-compat", ["2048"], "here.pth")
            return (images.float().amax(dim=(2, 3)),)

    module = ModuleType(name)
    module.FeatureExtractorInceptionV3 = Fake
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, module)
    assert inception("here.pth")(torch.tensor([0.0, 0.5, 1.2]).view(1, 3, 1, 1)).tolist() == [[0, 128, 255]]


def test_clip_score() -> None:
    metric = get_metric("clip_score", model="tiny")
    samples = [
        metric.sample({"similarity": 0.3, "part_similarities": [0.2, 0.1]}),
        metric.sample({"similarity": -0.1}),
    ]
    found = metric.aggregate(samples, draws=100)
    assert found["cosine"].value == pytest.approx(0.1) and found["clip_score"].value == pytest.approx(0.375)
    assert found["min_object"].value == pytest.approx(0.1) and metric.note == "model: tiny"
    assert set(metric.aggregate(samples[1:], draws=10)) == {"cosine", "clip_score"}
    with pytest.raises(RecordError, match="no cosines"):
        metric.sample({"similarity": 31.0})


def test_similarity() -> None:
    words = {"a cat and a dog": (1.0, 1.0), "a cat": (1.0, 0.0), "a dog": (0.0, 2.0), "a bird": (-3.0, 0.0)}

    def embed(images: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return images[:, :2, 0, 0], torch.tensor([words[t] for t in texts])

    images = torch.tensor([[0.6, 0.8, 0], [1.0, 0, 0]]).view(2, 3, 1, 1)
    found = Similarity(embed, "toy")(images, ["a cat and a dog", "a bird"])
    assert found[0]["similarity"] == pytest.approx(1.4 / 2**0.5) and found[1] == {"similarity": pytest.approx(-1)}
    assert found[0]["part_similarities"] == pytest.approx([0.6, 0.8])
    assert parts("a cat with a hat") == ["a cat", "a hat"] and parts("a cat") == []
    with pytest.raises(RecordError, match="2 images and 1 prompts"):
        Similarity(embed, "toy")(images, ["a cat"])
    with pytest.raises(RecordError, match="embeddings of the shapes"):
        Similarity(lambda i, t: (i[:, 0], i[:, 0]), "toy")(images, ["a cat", "a bird"])


def test_similarity_of_a_transformers_model() -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {"vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 19, "bos_token_id": 18}
    config = CLIPConfig(text_config=text, vision_config=size | {"image_size": 8, "patch_size": 4}, projection_dim=8)
    model = CLIPModel(config).eval()
    seen = SimpleNamespace(images=None)

    def processor(text: list[str], images: list[torch.Tensor], return_tensors: str, padding: bool) -> dict:
        seen.images = images
        ids = torch.tensor([[18, *(len(w) % 17 + 1 for w in t.split()), 19] for t in text])
        return {"input_ids": ids, "pixel_values": torch.stack(images).float() / 255}

    images = torch.rand(2, 3, 8, 8)
    scorer = Similarity.of(model, processor, "tiny")
    found = scorer(images, ["red dog", "old cat"])
    assert all(i.dtype == torch.uint8 for i in seen.images) and scorer.name == "tiny"
    with torch.no_grad():
        inputs = processor(["red dog", "old cat"], [(i * 255).round().byte() for i in images], "pt", True)
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    assert [f["similarity"] for f in found] == pytest.approx(logits.diagonal().tolist(), abs=1e-5)
    with pytest.raises(RecordError, match="7 tokens; tiny reads 6"):
        scorer(images[:1], ["a b c d e"])
