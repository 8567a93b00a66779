"""Stories of one character on shapes-sd and its IP-Adapter: `python -m benchmarks.stories --out FOLDER`.

A story is four prompts about "a star", whose colour no prompt says. The character is given by pictures of it (`first` of
`attnsteer.story`), and each later round takes the frames of the round before as references, as Story-Adapter does. Consistent is
a frame with one star, in the character's colour. Arms: `text` (no references), `story`, `other` (references of a star in another
colour, read against this story's own: what the prompts and chance give), `named` (no references, the colour said in the text: what
the model can do), `alone` (round 0 from text alone, as published). One JSON file for each arm and scale.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from attnsteer import story, zoo
from attnsteer.evals.significance import paired_bootstrap
from attnsteer.zoo.shapes.detect import detect
from attnsteer.zoo.shapes.language import Phrase
from attnsteer.zoo.shapes.render import render
from attnsteer.zoo.shapes.world import COLOUR_NAMES, rng
from attnsteer.zoo.train.adapter import HERO, OTHERS, WEIGHTS, scene

FRAMES, STEPS = 4, 25
ARMS = ("text", "story", "other", "named", "alone")


@dataclass(frozen=True)
class Tale:
    """The character's colour and size, another colour, and of each frame the companion, if any."""

    index: int
    colour: str
    size: str
    other: str
    companions: tuple[Phrase | None, ...]

    def prompts(self, named: bool = False) -> list[str]:
        """One for each frame; the companions' colours are said."""
        star = f"a {self.colour} {HERO}" if named else f"a {HERO}"
        return [star if c is None else f"{star} and {c}" for c in self.companions]


def tale(split: str, index: int) -> Tale:
    """Story `index` of a split; companions never have the character's colour."""
    g = rng(split, index, stream=80)
    colours = [COLOUR_NAMES[int(i)] for i in g.permutation(len(COLOUR_NAMES))]
    shapes = [OTHERS[int(i)] for i in g.permutation(len(OTHERS))]
    with_company = [Phrase(c, s) for c, s in zip(colours[2 : 1 + FRAMES], shapes, strict=False)]
    return Tale(index, colours[0], "large", colours[1], (None, *with_company))


def pictures(split: str, tale: Tale, colour: str) -> list[Any]:
    """Pictures of a star of this colour, as many as frames, alone, on one ground."""
    from PIL import Image

    g = rng(split, tale.index, stream=81)
    drawn, ground = [], None
    while len(drawn) < FRAMES:
        made = scene(g, colour, tale.size, ground)
        ground = made.ground
        if len(made.objects) == 1:
            drawn.append(made)
    return [Image.fromarray((p.permute(1, 2, 0) * 255).round().byte().numpy()) for p in render(drawn)]


def load(adapter: Path | None) -> Any:
    """The pipeline with the adapter, as any user would load them."""
    pipe = zoo.load("shapes-sd")
    adapter = zoo.folder("shapes-sd") / "ip_adapter" if adapter is None else adapter
    pipe.load_ip_adapter(str(adapter), subfolder="", weight_name=WEIGHTS, image_encoder_folder="image_encoder")
    return pipe


def read(tale: Tale, frames: Sequence[Any]) -> dict[str, Any]:
    """Per frame: the star's colour where there is one star, whether it is the character's, and what else is right."""
    images = torch.stack([torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8).view(*f.size, 3) for f in frames])
    seen = detect(images.permute(0, 3, 1, 2).float() / 255)
    stars = [s.find(shape=HERO) for s in seen]
    colours = [s[0].colour if len(s) == 1 else None for s in stars]
    pairs = list(combinations(colours, 2))
    company = [
        c is None or bool(s.find(colour=c.colour, shape=c.shape)) for c, s in zip(tale.companions, seen, strict=True)
    ]
    return {
        "same": sum(c == tale.colour for c in colours) / len(colours),
        "star": sum(c is not None for c in colours) / len(colours),
        "agree": sum(a is not None and a == b for a, b in pairs) / len(pairs),
        "company": sum(company) / len(company),
        "valid": sum(s.valid for s in seen) / len(seen),
        "colours": colours,
    }


def tell(pipe: Any, split: str, tale: Tale, arm: str, scale: float, rounds: int) -> Any:
    """The story of an arm."""
    more = {"seed": tale.index, "size": None, "batch_size": FRAMES, "num_inference_steps": STEPS}
    prompts = tale.prompts(arm == "named")
    if arm in ("text", "named"):
        return story(pipe, prompts, scales=(), **more)
    first = None if arm == "alone" else pictures(split, tale, tale.other if arm == "other" else tale.colour)
    return story(pipe, prompts, scales=(scale,) * rounds, first=first, **more)


def main() -> None:
    """Read the arguments, tell the stories, print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.stories", description=__doc__)
    parser.add_argument(
        "--adapter", type=Path, help="folder with ip-adapter.safetensors and image_encoder (default: that of shapes-sd)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/stories"))
    parser.add_argument("--split", default="calibration", choices=("calibration", "test"))
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arm", action="append", choices=ARMS)
    given = parser.parse_args()
    pipe, found = None, {}
    for arm in given.arm or ARMS:
        held = "" if arm in ("text", "named") else f" {given.scale:g} x {given.rounds}"
        path = given.out / given.split / f"{arm}{held}.json"
        kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        for index in range(given.count):
            if str(index) in kept:
                continue
            pipe = load(given.adapter) if pipe is None else pipe
            one = tale(given.split, index)
            told = tell(pipe, given.split, one, arm, given.scale, given.rounds)
            kept[str(index)] = read(one, told.frames)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(kept))
            if index < 3:
                for i, frame in enumerate(told.frames):
                    frame.save(path.parent / f"{arm}{held}-{index}-{i}.png")
        found[arm] = {k: v for k, v in kept.items() if int(k) < given.count}
        means = {
            n: sum(r[n] for r in found[arm].values()) / len(found[arm])
            for n in ("same", "star", "agree", "company", "valid")
        }
        print(f"{arm}{held}: " + ", ".join(f"{n} {100 * v:.1f}" for n, v in means.items()), flush=True)
    for arm in found:
        for against in ("text", "other"):
            if arm == "story" and against in found:
                for name in ("same", "agree", "valid"):
                    d = paired_bootstrap(*([r[name] for r in found[a].values()] for a in (against, arm)))
                    print(f"{arm} - {against}: {name} {100 * d.value:+.1f} [{100 * d.low:.1f}, {100 * d.high:.1f}]")


if __name__ == "__main__":
    main()
