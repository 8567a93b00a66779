"""Head sets that recipes ship for embedded models."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnsteer import HeadSet, zoo
from attnsteer.search.state import model_digest
from attnsteer.steering import find_host

FILE = Path(__file__).parents[2] / "recipes" / "softpag" / "heads" / "shapes-sd.safetensors"


def test_headhunter_file() -> None:
    heads = HeadSet.load(FILE)
    assert heads.shape == (7, 4) and len(heads) == 6
    assert heads.provenance["search"] == "headhunter" and "calibration" in heads.provenance["note"]
    # Perturbing the chosen heads together is better than no guidance and than each of them alone.
    (joint,) = (r["joint"] for r in heads.provenance["rounds"])
    assert joint > max(heads.scores.values()) > heads.provenance["unguided"]


@pytest.mark.parametrize("name", [n for n in zoo.available() if n == "shapes-sd"])
def test_headhunter_file_is_of_this_model(name: str) -> None:
    """Heads of a model that was trained again mean nothing: search again."""
    host = find_host(zoo.load(name))
    assert HeadSet.load(FILE).provenance["model"] == model_digest(*host.models.values())
