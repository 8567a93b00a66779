"""smollm2-llava: registers found by search, a projector fitted to words, then an adapter trained to read them through SmolLM2.

The projector stays as it was fitted: what it gives for a patch is near a word of a colour and a word of a shape at once. Half of
what is asked and absent has the colour of something that is there; a model that is not asked so answers by colour alone.

Many questions share one image: all stand in one row behind it, each sees the image and itself alone, and their positions go
on from the image. That is what the model sees in use, one question at a time.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import llava
from ..llava import ADAPTED, BEFORE, CORNERS, TOKENS
from ..shapes.language import caption
from ..shapes.questions import CLASSES, NEGATIVES, absent, colour, existence, picture
from ..shapes.render import render
from ..shapes.world import COLOUR_NAMES, SHAPES, rng
from .loop import Plan, fit, shorten
from .lvlm import labels

RANK = 8
# Scenes of the projector's fit, and of a step of the training.
POOL, BATCH = 3000, 3
FIT_PLAN = Plan(steps=1200, lr=2e-3, warmup=20, decay=0.02)
PLAN = Plan(steps=360, lr=2e-3, warmup=10, floor=0.05, decay=0.0, every=600.0)
# Scenes that the tower was not trained on.
FROM, FIT_FROM = 20_000_000, 30_000_000
# The word of an empty patch; patches with and without an object in a step of the fit; the share of their squared distance in its
# loss; of a caption's word in that of the training.
EMPTY, FULL, EMPTIES, NEAR, WORD = ",", 512, 192, 0.1, 0.3
# How many images go without registers, so that the model without them is one that was trained.
BARE = 0.2
# Scenes of the calibration split on which training is watched; settings of methods are chosen on others.
CHECKED, CHECK_FROM = 20, 50_000

# Registers: candidates of this norm, tried so many at a time; a sink has phi above TAU (Kang et al. 2025) in SINK_DIM.
CANDIDATES, AT_ONCE, NORM, SEED = 256, 64, 0.58, 3
SINK_DIM, TAU, LATE = 507, 20.0, slice(13, 28)


def vocabulary(tokenizer: Any, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of the colours [6, D], the shapes [6, D] and of an empty patch [D]; each is one token."""
    ids = [tokenizer(w).input_ids for w in (*(f" {c}" for c in COLOUR_NAMES), *(f" {s}" for s in SHAPES), EMPTY)]
    if any(len(i) != 1 for i in ids):
        raise ValueError("a word of the shapes world is several tokens of this text model.")
    found = table[[i[0] for i in ids]].float()
    return found[: len(COLOUR_NAMES)], found[len(COLOUR_NAMES) : -1], found[-1]


@torch.no_grad()
def phi(text: Any, before: Tensor, image: Tensor) -> Tensor:
    """|x_d| / rms(x) of the image's tokens in the states that enter the layers, [L, B, n] (Kang et al. 2025, equation 3)."""
    x = torch.cat([before.expand(len(image), -1, -1), image], dim=1).to(text.dtype)
    states = torch.stack(text.model(inputs_embeds=x, output_hidden_states=True, use_cache=False).hidden_states[:-1])
    states = states[:, :, before.shape[0] :].float()
    return states[..., SINK_DIM].abs() / (states.pow(2).mean(dim=-1) + 1e-6).sqrt()


@torch.no_grad()
def search(text: Any, before: Tensor, table: Tensor) -> tuple[Tensor, dict[str, int]]:
    """A vector [D] of norm `NORM` that is a sink in the late layers wherever it stands, and how many candidates did what."""
    g = torch.Generator().manual_seed(SEED)
    mean = table.float().mean(dim=0)
    kept = []
    for _ in range(CANDIDATES // AT_ONCE):
        v = torch.randn(1, AT_ONCE, len(mean), generator=g)
        v = v / v.norm(dim=-1, keepdim=True) * NORM
        kept.append(v[0, phi(text, before, v)[LATE.start + 1, 0] > TAU])
    candidates = torch.cat(kept)
    best, score, all_four = None, -1.0, 0
    for v in candidates:
        image = mean.expand(1, TOKENS, -1).clone()
        places = torch.randperm(TOKENS, generator=g)[:4]
        image[:, places] = v
        found = phi(text, before, image)[LATE, 0][:, places]
        share = (found > TAU).float().mean().item()
        all_four += share == 1.0
        # The firmest: by the least phi of its four places.
        value = share + found.min().item() / 100
        if value > score:
            best, score = v, value
    if best is None:
        raise ValueError("no candidate is a late sink; draw more.")
    return best, {"drawn": CANDIDATES, "late sinks": len(candidates), "in all of four places": all_four}


def codes(scenes: list[Any], words: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The vectors [B, 64, D] that patches are to be read as, and which of `book` each is, [B, 64]."""
    wanted = labels(scenes)
    which = torch.where(wanted[..., 0] > 0, (wanted[..., 1] - 1) * len(SHAPES) + wanted[..., 0] - 1, len(CLASSES))
    return book(words)[which], which


def book(words: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What a patch can be read as [37, D]: the sum of a colour's word and a shape's, and the word of an empty patch.

    Both words in one patch leave nothing to bind. They share the mean of all words, which counts once.
    """
    colours, shapes, empty = words
    both = colours[:, None] + shapes[None] - (colours.mean(dim=0) + shapes.mean(dim=0)) / 2
    return torch.cat([both.flatten(0, 1), empty[None]])


class Fit(nn.Module):
    """The projector alone, on patches of a pool of scenes."""

    def __init__(self, projector: nn.Module, tower: nn.Module, words: tuple[Tensor, Tensor, Tensor], pool: int) -> None:
        super().__init__()
        self.projector, self.book = projector, book(words)
        found = []
        for first in range(0, pool, 100):
            scenes = [picture("train", FIT_FROM + first + i) for i in range(min(100, pool - first))]
            found.append((features(tower, scenes), codes(scenes, words)[1]))
        self.patches, self.which = (torch.cat(x).flatten(0, 1) for x in zip(*found, strict=True))
        full = self.which < len(CLASSES)
        self.full, self.empty = full.nonzero()[:, 0], (~full).nonzero()[:, 0]

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        g = rng("train", FIT_FROM + step, stream=9)
        drawn = [x[torch.tensor(g.integers(len(x), size=n))] for x, n in ((self.full, FULL), (self.empty, EMPTIES))]
        which = self.which[torch.cat(drawn)]
        with torch.autocast("cpu", enabled=False):
            found = self.projector(self.patches[torch.cat(drawn)])
            away = torch.cdist(found, self.book).square()
        loss = nn.functional.cross_entropy(-away, which) + NEAR * away.gather(1, which[:, None]).mean()
        near = away[:FULL].argmin(dim=-1)
        right = {"shape right": near % len(SHAPES) == which[:FULL] % len(SHAPES), "class right": near == which[:FULL]}
        return loss, {k: v.float().mean().item() for k, v in right.items()}


@torch.no_grad()
def features(tower: nn.Module, scenes: list[Any]) -> Tensor:
    """The tower's patches [B, 64, 128]."""
    with torch.autocast("cpu", enabled=False):
        return tower(render(scenes) * 2 - 1).last_hidden_state[:, 1:].float()


class Lora(nn.Module):
    """A linear map with an addition of low rank."""

    def __init__(self, linear: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T


def alike(scene: Any, colour: str | None, shape: str | None, g: Any) -> tuple[str, str] | None:
    """A class that is not in the scene, of this colour or of this shape; None where all are there."""
    there = {(o.colour, o.shape) for o in scene.objects}
    free = [c for c in CLASSES if c not in there and colour in (None, c[0]) and shape in (None, c[1])]
    return free[int(g.integers(len(free)))] if free else None


def lesson(split: str, index: int) -> tuple[Any, list[tuple[str, str, float, str]]]:
    """A scene, and what is asked about it: (text, answer, weight of each token of the answer, kind)."""
    scene, g = picture(split, index), rng(split, index, stream=7)
    there = sorted({(o.colour, o.shape) for o in scene.objects})
    there = [there[int(i)] for i in g.permutation(len(there))[:4]]
    out = [(existence(scene, *c), "there") for c in there]
    for k, (c, s) in enumerate(there):
        # In turn: the colour is there in another shape; one of the kinds that are measured; the shape in another colour.
        which = (index + k) % 4
        found = alike(scene, c, None, g) if which in (0, 2) else alike(scene, None, s, g) if which == 3 else None
        kind = "same colour" if which in (0, 2) else "same shape" if which == 3 else "absent"
        out.append((existence(scene, *(found or absent(scene, NEGATIVES[(index + k) // 4 % 3], g))), kind))
    single = [s for s in sorted({o.shape for o in scene.objects}) if len(scene.find(shape=s)) == 1]
    out += [(colour(scene, single[int(i)]), "colour") for i in g.permutation(len(single))[:1]]
    asked = [(f"\n{q.prompt}", f" {q.answer}", 1.0, kind) for q, kind in out]
    single = [c for c in sorted({o.colour for o in scene.objects}) if len(scene.find(colour=c)) == 1]
    for i in g.permutation(len(single))[:2]:
        text = f"\nquestion what shape is the {single[int(i)]} object ? answer"
        asked.append((text, f" {scene.find(colour=single[int(i)])[0].shape}", 1.0, "shape"))
    # Every second image is described.
    said = [("\ncaption", f" {caption(scene.objects)}<|im_end|>", WORD, "caption")] if index % 2 else []
    return scene, [*asked, *said]


class Reader(nn.Module):
    """Tower, projector, register and text model with its adapter; the adapter is trained."""

    def __init__(self, text: Any, tokenizer: Any, tower: nn.Module, projector: nn.Module, register: Tensor) -> None:
        super().__init__()
        self.tokenizer, self.projector, self.tower = tokenizer, projector, tower.requires_grad_(False)
        self.text = text.requires_grad_(False)
        self.before = tokenizer(BEFORE).input_ids
        self.register_buffer("planted", register)
        for layer in text.model.layers:
            for name in ADAPTED:
                setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name)))

    def pack(self, lessons: list[list[tuple[str, str, float]]]) -> tuple[Tensor, ...]:
        """Token ids [B, T] of texts and answers, positions [B, P + T], mask [B, 1, P + T, P + T] of the rows behind P tokens of
        prefix; and for every token of an answer: row, place of the token before it, id, weight."""
        first = len(self.before) + TOKENS
        rows = []
        for texts in lessons:
            ids, positions, block, answers = [], [], [], []
            for k, (text, answer, weight) in enumerate(texts):
                asked, said = self.tokenizer(text).input_ids, self.tokenizer(answer).input_ids
                answers += [(len(ids) + len(asked) - 1 + j, t, weight) for j, t in enumerate(said)]
                # The last token of an answer is predicted, and never read.
                own = [*asked, *said[:-1]]
                ids += own
                positions += range(first, first + len(own))
                block += [k] * len(own)
            rows.append((ids, positions, block, answers))
        longest = max(len(r[0]) for r in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        places = torch.arange(first + longest).repeat(len(rows), 1)
        mask = torch.eye(first + longest, dtype=torch.bool).repeat(len(rows), 1, 1)
        mask[:, :first, :first] = torch.ones(first, first, dtype=torch.bool).tril()
        mask[:, first:, :first] = True
        marks = []
        for b, (own, positions, block, answers) in enumerate(rows):
            n, of = len(own), torch.tensor(block)
            ids[b, :n] = torch.tensor(own)
            places[b, first : first + n] = torch.tensor(positions)
            mask[b, first : first + n, first : first + n] = (of[:, None] == of) & torch.ones(n, n).bool().tril()
            marks += [(b, first + at, token, weight) for at, token, weight in answers]
        b, at, token, weight = zip(*marks, strict=True)
        return ids, places, mask[:, None], torch.tensor(b), torch.tensor(at), torch.tensor(token), torch.tensor(weight)

    def read(
        self, scenes: list[Any], asked: list[list[tuple[str, str, float, str]]], bare: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits [N, V] of every token of an answer, and what it is [N], its weight [N]; `bare` [B]: images without registers."""
        ids, places, mask, b, at, wanted, weight = self.pack([[t[:3] for t in own] for own in asked])
        with torch.autocast("cpu", enabled=False):
            image = self.projector(features(self.tower, scenes))
        corner = torch.zeros(1, TOKENS, 1, dtype=torch.bool)
        corner[:, list(CORNERS)] = True
        image = torch.where(corner & ~bare[:, None, None], self.planted.to(image.dtype), image)
        table = self.text.get_input_embeddings().weight
        before = table[self.before].expand(len(scenes), -1, -1)
        x = torch.cat([before, image.to(table.dtype), table[ids]], dim=1)
        # Not every processor has matrix units for bf16, and without them it is eight times slower than fp32.
        with torch.autocast("cpu", enabled=False):
            out = self.text.model(inputs_embeds=x, attention_mask=mask, position_ids=places, use_cache=False)
            return out.last_hidden_state[b, at] @ table.T, wanted, weight

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes, asked = zip(*(lesson("train", FROM + step * BATCH + i) for i in range(BATCH)), strict=True)
        bare = torch.tensor(rng("train", FROM + step, stream=8).random(BATCH) < BARE)
        logits, wanted, weight = self.read(list(scenes), list(asked), bare)
        each = nn.functional.cross_entropy(logits, wanted, reduction="none")
        right = (logits.detach().argmax(dim=-1) == wanted).float()
        answers = weight == 1.0
        values = {"answers right": right[answers].mean().item(), "caption words right": right[~answers].mean().item()}
        return (each * weight).sum() / weight.sum(), values

    @torch.no_grad()
    def check(self, model: nn.Module, step: int) -> None:
        """Print how much of each kind is answered right, on scenes of the calibration split."""
        found: dict[str, list[float]] = {}
        for first in range(0, CHECKED, 10):
            scenes, asked = zip(*(lesson("calibration", CHECK_FROM + i) for i in range(first, first + 10)), strict=True)
            logits, wanted, _ = self.read(list(scenes), list(asked), torch.zeros(10, dtype=torch.bool))
            kinds = [kind for own in asked for _, said, _, kind in own for _ in self.tokenizer(said).input_ids]
            for kind, hit in zip(kinds, (logits.argmax(dim=-1) == wanted).tolist(), strict=True):
                found.setdefault(kind, []).append(hit)
        print(json.dumps({"step": step, **{k: round(sum(v) / len(v), 3) for k, v in found.items()}}), flush=True)

    def tensors(self) -> dict[str, Tensor]:
        """What is shipped, in half precision."""
        out = {f"projector.{k}": v for k, v in self.projector.state_dict().items()} | {"register": self.planted}
        for i, layer in enumerate(self.text.model.layers):
            for name in ADAPTED:
                own = getattr(layer.self_attn, name)
                out |= {f"lora.{i}.{name}.a": own.a, f"lora.{i}.{name}.b": own.b}
        return {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in out.items()}


def train(out: Path, device: str = "auto", steps: int | None = None) -> Path:
    """Train and write the folder `out/smollm2-llava`; the text model must have been fetched."""
    from safetensors.torch import save_file

    from .. import load

    torch.manual_seed(PLAN.seed)
    text, tokenizer = load(llava.TEXT)
    text.requires_grad_(False)
    tower = load(llava.SIGHT).model.model.vision_tower
    table = text.get_input_embeddings().weight
    before = table[tokenizer(BEFORE).input_ids].float()
    register, counts = search(text, before, table)
    print(json.dumps(counts), flush=True)
    projector = llava.LlavaMultiModalProjector(llava.config(text.config, tower.config))
    for linear in (projector.linear_1, projector.linear_2):
        linear.reset_parameters()
    stage = Fit(projector, tower, vocabulary(tokenizer, table), POOL if steps is None else 20)
    fitted = fit("llava-projector", stage, stage.loss, shorten(FIT_PLAN, steps), out, device="cpu", log_every=100)
    # A resumed run draws what an uninterrupted one would have drawn.
    torch.manual_seed(PLAN.seed)
    reader = Reader(text, tokenizer, tower, projector.requires_grad_(False), register)
    plan, check = shorten(PLAN, steps), reader.check if steps is None else None
    curve = fit("llava", reader, reader.loss, plan, out, device="cpu", preview=check, log_every=5)
    folder = out / llava.NAME
    folder.mkdir(parents=True, exist_ok=True)
    save_file(reader.tensors(), folder / llava.WEIGHTS)
    record = {"registers": counts, "llava-projector": asdict(fitted), "llava": asdict(curve)}
    (folder / "training.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
