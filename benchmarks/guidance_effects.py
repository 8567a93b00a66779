"""Why some methods show little on the embedded diffusion models: `python -m benchmarks.guidance_effects PART --out FOLDER`.

Parts: `push` (how far SEG's weak prediction is from the strong one, beside PAG's, by site and blur), `seg`, `refocusing`, `heads`
(HeadHunter on shapes-mmdit: found heads against random ones, the screened search against the exhaustive one), `nag` (whether a
negative prompt is obeyed without classifier-free guidance), `pairs` (CONFORM and Attention Regulation, two objects), `cosines`
(what CONFORM compares), `maps` (where words are attended to with both of them), `report`. Every arm has the same prompts and first
latents. One JSON file for each arm; pictures that are there already are not made again, so a part that was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnsteer import (
    CONFORM,
    NAG,
    PAG,
    SEG,
    AttentionRefocusing,
    AttentionRegulation,
    HeadSet,
    Intervention,
    SoftPAG,
    Where,
    steer,
    zoo,
)
from attnsteer.evals.detections import requested_layout
from attnsteer.evals.significance import paired_bootstrap, wilson
from attnsteer.run.data.zoo import layouts, prompts
from attnsteer.search import Rung, headhunter
from attnsteer.zoo.shapes.detect import detect
from attnsteer.zoo.shapes.layouts import exact, in_boxes, satisfied

PARTS = ("push", "seg", "refocusing", "heads", "nag", "pairs", "cosines", "maps", "report")
FREE = {"guidance_scale": 1.0}
SEARCH = "calibration"


@dataclass(frozen=True)
class Arm:
    """A way to make pictures: `make` gives the method for a batch of samples; None: as the pipeline is."""

    name: str
    make: Callable[[Sequence[Any]], Intervention] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)


def samples(kind: str, split: str, count: int) -> list[dict[str, Any]]:
    """ "prompts": two to four objects in turn; "layouts": two objects with their boxes."""
    return list(islice(prompts(split) if kind == "prompts" else layouts(split), count))


def read(sample: Mapping[str, Any], picture: Tensor) -> dict[str, float]:
    """What the detector finds, as shares and zeros and ones."""
    wanted, seen = requested_layout(sample), detect(picture)[0]
    there = [bool(seen.find(colour=p.colour, shape=p.shape)) for p in wanted.phrases]
    inside = in_boxes(wanted, seen.objects) if wanted.boxes else ()
    return {
        "valid": float(seen.valid),
        "right": float(satisfied(wanted, seen.objects)),
        "exact": float(seen.valid and exact(wanted, seen.objects)),
        "share": sum(there) / len(there),
        "first": float(there[0]),
        "second": float(there[1]),
        "in_box": sum(inside) / len(inside) if inside else 0.0,
        "objects": float(len(seen.objects)),
        "debris": float(seen.debris > 0),
    }


def run(pipe: Any, arm: Arm, items: Sequence[Any], path: Path, batch: int = 20, **call: Any) -> dict[str, Any]:
    """The records of an arm, by sample; those in the file are kept."""
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        if all(s["id"] in kept for s in part):
            continue
        noise = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        with contextlib.ExitStack() as stack:
            if arm.make is not None:
                stack.enter_context(steer(pipe, arm.make(part)))
            given = {"prompt": [s["prompt"] for s in part], "generator": noise, "output_type": "pt", **call, **arm.call}
            pictures = pipe(**given).images.float().cpu()
        kept |= {s["id"]: read(s, p) for s, p in zip(part, pictures, strict=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept))
        print(f"{path.stem}: {len(kept)}", flush=True)
    return kept


# SEG on shapes-sd: sites by size of map.
SITES = {
    "16x16 in": [0],
    "8x8 in": [1],
    "middle": [2],
    "8x8 out": [3, 4],
    "16x16 out": [5, 6],
    "all": [0, 1, 2, 3, 4, 5, 6],
}


def sited(method: type, layers: Sequence[int], scale: float, **more: Any) -> Any:
    """A method on the self-attention of some layers."""
    return method(scale, where=Where(layers=list(layers), kinds="self"), **more)


@torch.no_grad()
def push(out: Path, count: int = 8, steps: int = 8) -> None:
    """|term| / |prediction| along unsteered runs, and the cosine with PAG's term at the same sites."""
    pipe = zoo.load("shapes-sd")
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], args[1], kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    items = samples("prompts", SEARCH, count)
    noise = [torch.Generator().manual_seed(i) for i in range(count)]
    pipe([s["prompt"] for s in items], generator=noise, num_inference_steps=steps, output_type="latent", **FREE)
    hook.remove()
    plain = torch.stack([pipe.unet(*a[:2], encoder_hidden_states=a[2])[0] for a in seen])

    def term(method: Intervention) -> Tensor:
        with steer(pipe.unet, method) as handle, handle.branches("cond"):
            return torch.stack([pipe.unet(*a[:2], encoder_hidden_states=a[2])[0] for a in seen]) - plain

    size = lambda t: t.flatten(2).norm(dim=2)  # noqa: E731
    found = {}
    for name, layers in SITES.items():
        base = term(sited(PAG, layers, 1.0))
        found[name] = {"PAG": {"push": float((size(base) / size(plain)).mean())}}
        for sigma in (0.5, 1.0, 2.0, torch.inf):
            ours = term(sited(SEG, layers, 1.0, sigma=sigma))
            cosine = torch.cosine_similarity(ours.flatten(2), base.flatten(2), dim=2).mean()
            found[name][f"SEG {sigma:g}"] = {"push": float((size(ours) / size(plain)).mean()), "cosine": float(cosine)}
        print(name, found[name], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "push.json").write_text(json.dumps(found, indent=1))


def seg(out: Path, split: str, count: int) -> None:
    """Arms of SEG and PAG without classifier-free guidance, 12 steps."""
    pipe, items = zoo.load("shapes-sd"), samples("prompts", split, count)
    arms = [
        Arm("none"),
        Arm("PAG 2 at 16x16 out", lambda _: sited(PAG, [5, 6], 2.0)),
        Arm("SEG 2 at 16x16 out", lambda _: sited(SEG, [5, 6], 2.0)),
        # As far as PAG 2 pushes there, by `push`; twice as far.
        Arm("SEG 5.4 at 16x16 out", lambda _: sited(SEG, [5, 6], 5.4)),
        Arm("SEG 10.8 at 16x16 out", lambda _: sited(SEG, [5, 6], 10.8)),
        Arm("SEG 30 at middle", lambda _: sited(SEG, [2], 30.0)),
        Arm("SEG 8 at 8x8 out", lambda _: sited(SEG, [3, 4], 8.0)),
        Arm("SEG 3 at middle", lambda _: sited(SEG, [2], 3.0)),
    ]
    for arm in arms:
        run(pipe, arm, items, out / f"seg-{split}" / f"{arm.name}.json", num_inference_steps=12, **FREE)


def refocused(part: Sequence[Any], step: float, **more: Any) -> AttentionRefocusing:
    """The recipe's setting with another step size, and what else differs."""
    given = {"own": 0.0, "relative": True, "sharpness": None, "where": Where(layers=[0, 2, 3]), **more}
    return AttentionRefocusing([s["regions"] for s in part], step_size=step, **given)


def refocusing(out: Path, split: str, count: int, names: Sequence[str] | None = None) -> None:
    """Arms of AttentionRefocusing on shapes-mmdit, two objects, 25 steps, the pipeline's own guidance."""
    pipe, items = zoo.load("shapes-mmdit"), samples("layouts", split, count)
    arms = [
        Arm("none"),
        Arm("step 0.01", lambda p: refocused(p, 0.01)),
        Arm("step 0.005", lambda p: refocused(p, 0.005)),
        Arm("step 0.0025", lambda p: refocused(p, 0.0025)),
        Arm("step 0.01, first tenth", lambda p: refocused(p, 0.01, until=0.1)),
        Arm("step 0.01, stop at half inside", lambda p: refocused(p, 0.01, stop_share=0.5)),
    ]
    for arm in arms:
        if names is None or arm.name in names:
            path = out / f"refocusing-{split}" / f"{arm.name}.json"
            run(pipe, arm, items, path, batch=16, num_inference_steps=25, max_sequence_length=32)


def right(images: Any, texts: list[str]) -> list[float]:
    """The search's score: the share of a prompt's objects that are there, halved where the picture is not wholly valid."""
    by_prompt = {s["prompt"]: s for s in samples("prompts", SEARCH, 60)}
    found = [read(by_prompt[t], p) for p, t in zip(images, texts, strict=True)]
    return [f["share"] * (1.0 if f["valid"] else 0.5) for f in found]


# shapes-mmdit has six layers of six heads.
LAYERS, HEADS = 6, 6
TOP, SCALE = 4, 2.0


def perturbed(heads: HeadSet | None = None) -> SoftPAG:
    """SoftPAG on joint attention, image rows of all heads or of these."""
    more = {"where": Where(layers=list(range(LAYERS)))} if heads is None else {"heads": heads}
    return SoftPAG(scale=SCALE, strength=1.0, joint="joint_identity", **more)


def heads(out: Path, searched: int, tested: int) -> None:
    """Two searches on calibration prompts, and what their heads do on test prompts, beside random ones."""
    pipe = zoo.load("shapes-mmdit")
    short = {"max_sequence_length": 32, **FREE, "output_type": "pt"}
    texts = [s["prompt"] for s in samples("prompts", SEARCH, searched)]
    folder = out / "heads"
    folder.mkdir(parents=True, exist_ok=True)
    half = max(1, searched // 2)
    for name, rungs in {"screened": (Rung(half, 4, 0.3),), "exhaustive": ()}.items():
        if (folder / f"{name}.safetensors").is_file():
            continue
        found = headhunter(
            pipe, texts, right, perturbed(), rounds=1, top=TOP, steps=8, screen=rungs, options=short,
            batch=searched, state=folder / f"{name}-state", progress=False,
        )  # fmt: skip
        found.save(folder / f"{name}.safetensors")
        print(name, found, flush=True)
    sets = {name: HeadSet.load(folder / f"{name}.safetensors") for name in ("screened", "exhaustive")}
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    for draw in range(3):
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(draw)).tolist()[:TOP]
        chosen: dict[int, list[int]] = {}
        for i in order:
            chosen.setdefault(every[i][0], []).append(every[i][1])
        sets[f"random {draw + 1}"] = HeadSet(chosen)
    items = samples("prompts", "test", tested)
    arms = [Arm("none"), *(Arm(n, lambda _, h=h: perturbed(h)) for n, h in sets.items())]
    arms.append(Arm("all heads", lambda _: perturbed()))
    for arm in arms:
        run(pipe, arm, items, folder / f"{arm.name}.json", num_inference_steps=12, max_sequence_length=32, **FREE)


def nag(out: Path, count: int, steps: int = 25) -> None:
    """Two objects are asked for, and the second one is the negative prompt; no classifier-free guidance."""
    pipe, items = zoo.load("shapes-sd"), samples("layouts", "test", count)
    arms = [
        Arm("none"),
        Arm("NAG", lambda p: NAG([s["texts"][1] for s in p], 4.0, alpha=0.375)),
        Arm("NAG, first object", lambda p: NAG([s["texts"][0] for s in p], 4.0, alpha=0.375)),
    ]
    for arm in arms:
        run(pipe, arm, items, out / "nag" / f"{arm.name}.json", num_inference_steps=steps, **FREE)


BOTH = Where(modules=[r".*down_blocks\.1.*attn2", r".*up_blocks\.0.*attn2"])
LAST = Where(modules=[r".*up_blocks\.0\.attentions\.1.*attn2"])


def contrasted(part: Sequence[Any], step: float, where: Where = BOTH, **more: Any) -> CONFORM:
    """CONFORM with a group for each phrase, its step relative to the latent."""
    given = {"refine_at": (), "include": "words", "relative": True, "until": 0.3, **more}
    return CONFORM([s["groups"] for s in part], step_size=step, where=where, **given)


def regulated(part: Sequence[Any], words: str = "words", where: Where = BOTH, **more: Any) -> AttentionRegulation:
    """Attention Regulation of the nouns ("words") or of the whole phrases ("texts")."""
    return AttentionRegulation([s[words] for s in part], where=where, **{"until": 0.5, **more})


def pairs(out: Path, split: str, count: int, names: Sequence[str] | None = None) -> None:
    """CONFORM and Attention Regulation on shapes-sd, two objects, 25 steps, the pipeline's own guidance."""
    pipe, items = zoo.load("shapes-sd"), samples("layouts", split, count)
    arms = [
        Arm("none"),
        Arm("CONFORM 0.03", lambda p: contrasted(p, 0.03)),
        Arm("AR", lambda p: regulated(p)),
        Arm("CONFORM 0.03, sharp", lambda p: contrasted(p, 0.03, sharpness=100.0, smooth=False)),
        Arm("AR, phrases, 0.3", lambda p: regulated(p, "texts", strength=0.3)),
        Arm("CONFORM 0.01, last", lambda p: contrasted(p, 0.01, include="last")),
        Arm("CONFORM 0.03, last", lambda p: contrasted(p, 0.03, include="last")),
        Arm("CONFORM 0.01", lambda p: contrasted(p, 0.01)),
        Arm("CONFORM 0.003", lambda p: contrasted(p, 0.003)),
        Arm("AR, phrases", lambda p: regulated(p, "texts")),
    ]
    for arm in arms:
        if names is None or arm.name in names:
            run(pipe, arm, items, out / f"pairs-{split}" / f"{arm.name}.json", num_inference_steps=25)


def cosines(out: Path, count: int = 20) -> None:
    """What CONFORM compares: the mean cosine of words' maps within a group and across groups, at each of its calls."""
    from attnsteer.methods import conform

    pipe, items = zoo.load("shapes-sd"), samples("layouts", SEARCH, count)
    own, found = conform.contrast, {}
    forms = {"as it is": {}, "unsmoothed": {"smooth": False}, "sharp": {"sharpness": 100.0, "smooth": False}}
    for name, more in forms.items():
        seen: list[tuple[float, float]] = []

        def noted(vectors: Tensor, same: Tensor, *rest: Any, seen: list[Any] = seen) -> Tensor:
            s = torch.nn.functional.normalize(vectors.detach(), dim=1)
            s, pairs = s @ s.T, same & ~torch.eye(len(same), dtype=torch.bool)
            seen.append((float(s[pairs].mean()), float(s[~same].mean())))
            return own(vectors, same, *rest)

        conform.contrast = noted
        try:
            # A step of nearly nothing: the maps are those of the model alone.
            with steer(pipe, contrasted(items, 1e-6, **more), control=True):
                noise = [torch.Generator().manual_seed(i) for i in range(count)]
                pipe([s["prompt"] for s in items], generator=noise, num_inference_steps=25, output_type="latent")
        finally:
            conform.contrast = own
        calls = [seen[i : i + count] for i in range(0, len(seen), count)]
        found[name] = [[sum(v) / len(v) for v in zip(*call, strict=True)] for call in calls]
        print(name, found[name], flush=True)
    (out / "cosines.json").write_text(json.dumps(found))


EARLY, LATE, SIDE = range(8), range(8, 25), 16


def places(own: Tensor) -> int:
    """Separate places [h, w] in which a map has at least half of its largest value; neighbours share an edge."""
    left, found = own >= 0.5 * own.max(), 0
    while left.any():
        found, fresh = found + 1, [tuple(left.nonzero()[0].tolist())]
        while fresh:
            i, j = fresh.pop()
            if 0 <= i < left.shape[0] and 0 <= j < left.shape[1] and left[i, j]:
                left[i, j] = False
                fresh += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
    return found


def shaded(own: Tensor) -> Tensor:
    """A map as a picture [3, h, w]: white is 0, dark blue its largest value."""
    x, dark = (own / own.max())[None], torch.tensor([0.05, 0.2, 0.5])[:, None, None]
    return 1 - x * (1 - dark)


def maps(out: Path, count: int, shown: Sequence[int] = (14, 10, 12)) -> None:
    """The maps of two objects' last words without a method, with CONFORM and with Attention Regulation; some as a sheet."""
    from attnsteer.viz import contact_sheet, phrase_maps

    pipe, items = zoo.load("shapes-sd"), samples("layouts", "test", count)
    arms = {
        "without": lambda s: (),
        "CONFORM": lambda s: (contrasted([s], 0.03, include="last"),),
        "Attention Regulation": lambda s: (regulated([s]),),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    pictures, labels = [], []
    for i, sample in enumerate(items):
        words = [text.split()[-1] for text in sample["texts"]]
        for name, method in arms.items() if words[0] != words[1] else ():
            noise = torch.Generator().manual_seed(i)
            call = {"num_inference_steps": 25, "generator": noise, "output_type": "pt"}
            seen = phrase_maps(pipe, sample["prompt"], words, *method(sample), where=BOTH, **call)
            both = {n: seen.mean(steps=steps, size=(SIDE, SIDE))[0] for n, steps in (("early", EARLY), ("late", LATE))}
            told = read(sample, torch.as_tensor(seen.images[0]))
            for n, (a, b) in both.items():
                told[f"cosine {n}"] = float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
                told[f"places {n}"] = (places(a) + places(b)) / 2
            found[name].append(told)
            if i in shown:
                pictures.append([seen.images[0], *map(shaded, both["early"]), *map(shaded, both["late"])])
                labels.append((shown.index(i), f"{name}: {', '.join(sample['texts'])}"))
    for name, told in found.items():
        print(name, len(told), {k: round(sum(t[k] for t in told) / len(told), 3) for k in told[0]}, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "maps.json").write_text(json.dumps(found))
    order = sorted(range(len(labels)), key=lambda k: labels[k][0])
    columns = ["picture", *(f"{o} object, steps {t}" for t in ("1 to 8", "9 to 25") for o in ("first", "second"))]
    title = "Where the last word of each object is attended to (white 0, dark blue: its map's largest value)"
    rows = [labels[k][1] for k in order]
    contact_sheet([pictures[k] for k in order], rows, columns, out / "maps.webp", title=title)


def report(out: Path) -> Iterator[str]:
    """Every arm beside its folder's "none", in points with 95 % intervals."""
    for folder in sorted(p for p in out.iterdir() if (p / "none.json").is_file()):
        base = json.loads((folder / "none.json").read_text())
        for path in sorted(folder.glob("*.json")):
            here = json.loads(path.read_text())
            if not here or not isinstance(next(iter(here.values())), dict):
                continue
            both = [k for k in base if k in here]
            yield f"{folder.name}: {path.stem} ({len(both)})"
            for name in ("valid", "right", "exact", "share", "first", "second", "in_box"):
                before, after = ([r[k][name] for k in both] for r in (base, here))
                mean = wilson(round(sum(after)), len(after)) if set(after) <= {0.0, 1.0} else None
                shown = f"{100 * sum(after) / len(after):.1f}"
                shown += f" [{100 * mean.low:.1f}, {100 * mean.high:.1f}]" if mean is not None else ""
                d = paired_bootstrap(before, after)
                yield f"    {name:7} {shown}  {100 * d.value:+.1f} [{100 * d.low:.1f}, {100 * d.high:.1f}]"


def main() -> None:
    """Read the arguments and do one part."""
    parser = argparse.ArgumentParser("python -m benchmarks.guidance_effects", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("runs/guidance_effects"))
    parser.add_argument(
        "--split",
        default=SEARCH,
        choices=("calibration", "test"),
        help="of seg, refocusing and pairs; the others have theirs",
    )
    parser.add_argument("--count", type=int, default=40, help="samples of an arm")
    parser.add_argument("--searched", type=int, default=12, help="prompts of a search")
    parser.add_argument("--arm", action="append", help="only these arms, of refocusing and pairs")
    given = parser.parse_args()
    if given.part == "push":
        push(given.out)
    elif given.part == "seg":
        seg(given.out, given.split, given.count)
    elif given.part == "refocusing":
        refocusing(given.out, given.split, given.count, given.arm)
    elif given.part == "heads":
        heads(given.out, given.searched, given.count)
    elif given.part == "nag":
        nag(given.out, given.count)
    elif given.part == "cosines":
        cosines(given.out)
    elif given.part == "maps":
        maps(given.out, given.count)
    elif given.part == "pairs":
        pairs(given.out, given.split, given.count, given.arm)
    else:
        print("\n".join(report(given.out)))


if __name__ == "__main__":
    main()
