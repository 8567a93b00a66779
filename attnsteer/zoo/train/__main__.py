"""`python -m attnsteer.zoo.train shapes-sd --device auto`: train an embedded model again."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

MODELS = {"shapes-lm": "lm", "shapes-lvlm": "lvlm", "shapes-sd": "sd", "shapes-mmdit": "mmdit"}


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser("python -m attnsteer.zoo.train", description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"), help="auto takes a GPU where there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="checkpoints, curves and the finished model")
    parser.add_argument("--steps", type=int, help="steps of each stage instead of the full plan, to try it out")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    train = importlib.import_module(f".{MODELS[args.model]}", __package__).train
    print(train(args.out, device=args.device, steps=args.steps))


if __name__ == "__main__":
    main()
