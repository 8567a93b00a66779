"""`python -m attnsteer.zoo.measure shapes-sd`: measure a model and write its card.

Writes `metrics.json`, `README.md` (the card) and `picture.png` into the model's folder, and its hashes anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .. import MODELS, NAMES, load, seal
from .card import write_card


def main(argv: list[str] | None = None) -> None:
    """Read the arguments, measure, write."""
    parser = argparse.ArgumentParser("python -m attnsteer.zoo.measure", description=__doc__)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--count", type=int, help="test samples of each kind")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(run(args.model, args.count))


def run(name: str, count: int | None = None) -> Path:
    """Measure a model of this installation; returns the path of its card."""
    target = MODELS / name
    options = {} if count is None else {"count": count}
    loaded = load(name)
    if name in ("shapes-lm", "shapes-lvlm"):
        from . import text

        metrics = (text.measure_lm if name == "shapes-lm" else text.measure_lvlm)(*loaded, **options)
        picture = None
    else:
        from . import image_quality as images
        from .picture import map_picture

        metrics = images.measure(loaded, **options)
        metrics["maps"] = images.map_table(loaded)
        # The figures took minutes: they are kept whatever becomes of the picture.
        write(target, metrics)
        picture = map_picture(loaded, metrics["maps"])
    return write(target, metrics, picture)


def write(target: Path, metrics: dict[str, Any], picture: Any = None) -> Path:
    """Put figures, card and picture into a model folder."""
    (target / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    if picture is not None:
        picture.convert("P", palette=1, colors=128).save(target / "picture.png", optimize=True)
    card = write_card(target, metrics)
    seal(target)
    return card


if __name__ == "__main__":
    main()
