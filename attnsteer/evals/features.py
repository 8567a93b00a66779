"""Features of images, and metrics that compare a set of them with a reference set.

What features are is the caller's choice, and decides what a figure may be compared with: the embedded models and random
projections give figures for comparisons within one run, Inception's those of papers, if resizing and numbers agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import MissingExtra, RecordError
from .metrics.base import Metric, Sample
from .significance import Interval, jackknife, jackknife_p

# Groups left out in turn for an interval, and the least number of samples for one.
GROUPS, LEAST = 20, 10


def extract(images: Tensor, function: Callable[[Tensor], Tensor], batch: int = 50) -> Tensor:
    """Features of images.

    Args:
        images: [N, 3, H, W], values in [0, 1]. function: [B, 3, H, W] -> [B, d]; it resizes as it needs to. batch: B.

    Returns:
        fp64 [N, d], on the CPU.

    Raises:
        RecordError: the function gives another shape, or values that are not finite.
    """
    with torch.no_grad():
        found = torch.cat([function(images[i : i + batch]).double().cpu() for i in range(0, len(images), batch)])
    if found.ndim != 2 or len(found) != len(images) or not bool(found.isfinite().all()):
        raise RecordError(
            f"the features of {len(images)} images have the shape {list(found.shape)}; one vector of finite numbers each is needed."
        )
    return found


def inception(weights: str | Path | None = None, device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """The features of published FID: 2048 pooled values of torch-fidelity's port of the original Inception v3.

    It resizes to 299 x 299 itself, bilinearly as TensorFlow 1 did (another rule moves the figure). Extra `fid`.

    Args:
        weights: path of the weights; None lets torch-fidelity fetch them.

    Raises:
        MissingExtra: torch-fidelity is not installed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingExtra(
            "Inception features need torch-fidelity, which may replace the torch that is installed: "
            'pip install "attnsteer[fid]". Any other function of images works without it.'
        ) from error
    path = None if weights is None else str(weights)
    module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    module = module.eval().to(device)

    def features(images: Tensor) -> Tensor:
        return module((images.clamp(0, 1) * 255).round().to(device, torch.uint8))[0]

    return features


def embedded(device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """The features of shapes-lvlm's vision tower, the mean over its patches [B, 128]; images are resized to 64 x 64.

    It knows shapes on plain or textured ground and nothing else, so a distance by it says something in the shapes world only,
    and is no FID.
    """
    from .. import zoo

    model, processor = zoo.load("shapes-lvlm")
    tower = model.model.vision_tower.to(device)

    def features(images: Tensor) -> Tensor:
        pictures = [(i.clamp(0, 1) * 255).round().byte().cpu() for i in images]
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return tower(pixels.to(device)).last_hidden_state[:, 1:].float().mean(dim=1)

    return features


# What a recipe can name.
FUNCTIONS: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "shapes-lvlm": embedded,
    "inception": lambda device="cpu": inception(device=device),
}


def save_reference(path: str | Path, features: Tensor, name: str) -> None:
    """Write reference features [N, d] with the name of what made them, as safetensors."""
    save_file({"features": features.float().contiguous()}, str(path), metadata={"features": name})


def load_reference(source: str | Path | Tensor, name: str | None = None) -> tuple[Tensor, str]:
    """Reference features fp64 [N, d], and the name of what made them.

    Args:
        source: the features, or a file of `save_reference`. name: what the records' features are made by; where the file
            says something else, that is an error.

    Raises:
        RecordError: the file cannot be read, has other features, or fewer than two vectors.
    """
    stated = name or "not stated"
    if not isinstance(source, Tensor):
        try:
            with safe_open(str(source), "pt") as file:
                found, stated = file.get_tensor("features"), (file.metadata() or {}).get("features", stated)
        except (OSError, SafetensorError) as error:
            raise RecordError(f"{source} holds no reference features: {error}.") from error
        if name is not None and stated != name:
            raise RecordError(f"{source} has features of {stated!r}; those of the records are of {name!r}.")
        source = found
    if source.ndim != 2 or len(source) < 2 or not bool(source.isfinite().all()):
        raise RecordError(f"the reference has the shape {list(source.shape)}; finite [N, d] with N >= 2 is needed.")
    return source.double(), stated


@dataclass(frozen=True)
class SetMetric(Metric):
    """A metric of the set of all features, no function of sums.

    A sample is {"features": [d numbers]}. Intervals are those of the delete-a-group jackknife: a bootstrap would put one image
    into a set twice, which moves these figures by itself. They are about which samples were drawn; the bias of small sets
    stays, so compare sets of one size.

    Attributes:
        estimate: features [N, d] -> figures by name.
        dimensions: d.
    """

    estimate: Callable[[Tensor], Mapping[str, float]] = lambda features: {}
    dimensions: int = 0

    def _finite(self, found: Mapping[str, Any]) -> None:
        values = torch.as_tensor(found["features"], dtype=torch.float64)
        if values.ndim != 1 or len(values) != self.dimensions or not bool(values.isfinite().all()):
            raise RecordError(
                f"{self.name}: the features have the shape {list(values.shape)}; {self.dimensions} finite numbers, as in the "
                "reference, are needed."
            )

    def aggregate(
        self, samples: Sequence[Sample], *, groups: Sequence[Any] | None = None, draws: int = 0, seed: int = 0
    ) -> dict[str, Interval | float]:
        """Figures of the set; with an interval from 10 samples (or groups) on. `draws` and `seed` are not used."""
        features = self._stack(samples)
        return self._intervals(lambda rows: self.estimate(features[rows]), len(features), groups)

    def compare(
        self,
        before: Sequence[Sample],
        after: Sequence[Sample],
        *,
        groups: Sequence[Any] | None = None,
        draws: int = 0,
        seed: int = 0,
    ) -> dict[str, Interval | float]:
        """after - before; the same samples are left out of both arms. `draws` and `seed` are not used."""
        first, second = self._stack(before), self._stack(after)
        if len(first) != len(second):
            raise RecordError(f"{self.name}: {len(first)} samples before and {len(second)} after; as many are needed.")

        def difference(rows: list[int]) -> dict[str, float]:
            low, high = self.estimate(first[rows]), self.estimate(second[rows])
            return {k: high[k] - low[k] for k in high}

        return self._intervals(difference, len(first), groups)

    def p_value(
        self,
        estimate: str,
        before: Sequence[Sample],
        after: Sequence[Sample],
        *,
        groups: Sequence[Any] | None = None,
        draws: int = 0,
        seed: int = 0,
    ) -> float | None:
        """By Student's t, as the interval; None for fewer than 10 samples (or groups)."""
        found = self.compare(before, after, groups=groups).get(estimate)
        units = len(before) if groups is None else len(set(groups))
        return jackknife_p(found, min(GROUPS, units)) if isinstance(found, Interval) else None

    def _stack(self, samples: Sequence[Sample]) -> Tensor:
        if len(samples) < 2:
            raise RecordError(f"{self.name}: {len(samples)} samples; a set has at least two.")
        return torch.tensor([s["features"] for s in samples], dtype=torch.float64)

    def _intervals(
        self, figures: Callable[[list[int]], Mapping[str, float]], count: int, groups: Sequence[Any] | None
    ) -> dict[str, Interval | float]:
        if groups is not None and len(groups) != count:
            raise RecordError(f"{self.name}: {count} samples and {len(groups)} groups; give one group per sample.")
        units: dict[Any, list[int]] = {}
        for i in range(count):
            units.setdefault(i if groups is None else groups[i], []).append(i)
        members = list(units.values())
        whole = figures(list(range(count)))
        if len(members) < LEAST:
            return dict(whole)
        known: dict[tuple[int, ...], Mapping[str, float]] = {tuple(range(len(members))): whole}

        def of(chosen: list[int], key: str) -> float:
            # All figures of one subset come from one computation.
            if tuple(chosen) not in known:
                known[tuple(chosen)] = figures([i for unit in chosen for i in members[unit]])
            return known[tuple(chosen)][key]

        return {
            key: jackknife(len(members), lambda chosen, key=key: of(chosen, key), min(GROUPS, len(members)))
            for key in whole
        }
