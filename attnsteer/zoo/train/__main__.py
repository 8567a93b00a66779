"""`python -m attnsteer.zoo.train shapes-sd --device auto`: train an embedded model again."""

from __future__ import annotations

import argparse
import importlib
import shutil
from pathlib import Path

import torch

from .. import MODELS, seal

CARD = "README.md"
STAGES = {
    "shapes-lm": "lm",
    "shapes-lvlm": "lvlm",
    "shapes-sd": "sd",
    "shapes-mmdit": "mmdit",
    "smollm2-llava": "llava",
}


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser("python -m attnsteer.zoo.train", description=__doc__)
    parser.add_argument("model", choices=STAGES)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"), help="auto takes a GPU where there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="checkpoints, curves and the finished model")
    parser.add_argument("--steps", type=int, help="steps of each stage instead of the full plan, to try it out")
    parser.add_argument("--install", action="store_true", help="put the finished model into the package")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    train = importlib.import_module(f".{STAGES[args.model]}", __package__).train
    folder = train(args.out, device=args.device, steps=args.steps)
    if args.install:
        folder = install(folder)
    print(folder)


def install(folder: Path) -> Path:
    """Put a finished model folder into the package, in place of the one there, whose card stays where the new one has none."""
    target = MODELS / folder.name
    card = target / CARD
    if card.is_file() and not (folder / CARD).exists():
        shutil.copy(card, folder / CARD)
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(folder, target)
    seal(target)
    return target


if __name__ == "__main__":
    main()
