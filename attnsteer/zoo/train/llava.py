"""smollm2-llava: registers found by search, a projector fitted to words, then projector and adapter trained through SmolLM2.

Many questions share one image: all stand in one row behind it, each sees the image and itself alone, and their positions go on
from the image. That is what the model sees in use, one question at a time.
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
from ..llava import ADAPTED, BEFORE, CORNERS, GRID, TOKENS
from ..shapes.language import caption
from ..shapes.questions import NEGATIVES, absent, colour, existence, picture
from ..shapes.render import render
from ..shapes.world import COLOUR_NAMES, SHAPES, rng
from .loop import Plan, fit, shorten
from .lvlm import labels

RANK = 8
# Of the projector's fit, and of the training.
FIT_BATCH, BATCH = 16, 3
FIT_PLAN = Plan(steps=400, lr=1.5e-3, warmup=10, decay=0.0)
PLAN = Plan(steps=220, lr=1.5e-3, warmup=15, decay=0.0, every=120.0)
# Scenes that the tower was not trained on.
FROM, FIT_FROM = 20_000_000, 30_000_000
# The word of an empty patch; loss weight of object patches; share of a caption's word in the loss.
EMPTY, FULL, WORD = ",", 3.0, 0.3
# How many images go without registers, so that the model without them is one that was trained.
BARE = 0.2

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


class Fit(nn.Module):
    """The projector alone, and what it is to give: object patches read as colour (even columns) or shape (odd ones)."""

    def __init__(self, projector: nn.Module, tower: nn.Module, words: tuple[Tensor, Tensor, Tensor]) -> None:
        super().__init__()
        self.projector, self.tower, self.words = projector, tower.requires_grad_(False), words

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes = [picture("train", FIT_FROM + step * FIT_BATCH + i) for i in range(FIT_BATCH)]
        wanted = labels(scenes)
        with torch.autocast("cpu", enabled=False):
            found = self.projector(features(self.tower, scenes))
        colours, shapes, empty = self.words
        full = (wanted[..., 0] > 0)[..., None]
        even = (torch.arange(TOKENS) % GRID % 2 == 0)[None, :, None]
        target = torch.where(even, colours[(wanted[..., 1] - 1).clamp(0)], shapes[(wanted[..., 0] - 1).clamp(0)])
        target = torch.where(full, target, empty)
        each = (found - target).pow(2).sum(dim=-1) * torch.where(full[..., 0], FULL, 1.0)
        book = torch.cat([colours, shapes, empty[None]])
        near = torch.cdist(found.detach(), book).argmin(-1) == torch.cdist(target, book).argmin(-1)
        return each.mean(), {"object patches right": near[full[..., 0]].float().mean().item()}


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


def lesson(index: int) -> tuple[Any, list[tuple[str, str, float]]]:
    """A scene, and what is asked about it: (text, answer, weight of each token of the answer)."""
    scene, g = picture("train", FROM + index), rng("train", FROM + index, stream=7)
    there = sorted({(o.colour, o.shape) for o in scene.objects})
    there = [there[int(i)] for i in g.permutation(len(there))[:3]]
    asked = [existence(scene, *c) for c in there]
    asked += [existence(scene, *absent(scene, NEGATIVES[(index + k) % 3], g)) for k in range(len(there))]
    single = [s for s in sorted({o.shape for o in scene.objects}) if len(scene.find(shape=s)) == 1]
    asked += [colour(scene, single[int(i)]) for i in g.permutation(len(single))[:2]]
    out = [(f"\n{q.prompt}", f" {q.answer}", 1.0) for q in asked]
    # Every second image is described.
    said = [("\ncaption", f" {caption(scene.objects)}<|im_end|>", WORD)] if index % 2 else []
    return scene, [*out, *said]


class Reader(nn.Module):
    """Tower, projector, register and text model with its adapter, as they are trained."""

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

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        drawn = [lesson(step * BATCH + i) for i in range(BATCH)]
        ids, places, mask, b, at, wanted, weight = self.pack([texts for _, texts in drawn])
        with torch.autocast("cpu", enabled=False):
            image = self.projector(features(self.tower, [s for s, _ in drawn]))
        g = rng("train", FROM + step, stream=8)
        bare = torch.tensor(g.random(BATCH) < BARE)[:, None, None]
        corner = torch.zeros(1, TOKENS, 1, dtype=torch.bool)
        corner[:, list(CORNERS)] = True
        image = torch.where(corner & ~bare, self.planted.to(image.dtype), image)
        table = self.text.get_input_embeddings().weight
        before = table[self.before].expand(BATCH, -1, -1)
        x = torch.cat([before, image.to(table.dtype), table[ids]], dim=1)
        # Not every processor has matrix units for bf16, and without them it is eight times slower than fp32.
        with torch.autocast("cpu", enabled=False):
            out = self.text.model(inputs_embeds=x, attention_mask=mask, position_ids=places, use_cache=False)
            logits = out.last_hidden_state[b, at] @ table.T
        each = nn.functional.cross_entropy(logits, wanted, reduction="none")
        right = (logits.detach().argmax(dim=-1) == wanted).float()
        answers = weight == 1.0
        values = {"answers right": right[answers].mean().item(), "caption words right": right[~answers].mean().item()}
        return (each * weight).sum() / weight.sum(), values

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
    stage = Fit(projector, tower, vocabulary(tokenizer, table))
    fitted = fit("llava-projector", stage, stage.loss, shorten(FIT_PLAN, steps), out, device="cpu")
    # A resumed run draws what an uninterrupted one would have drawn.
    torch.manual_seed(PLAN.seed)
    reader = Reader(text, tokenizer, tower, projector, register)
    plan = shorten(PLAN, steps)
    curve = fit("llava", reader, reader.loss, plan, out, device="cpu", log_every=5)
    folder = out / llava.NAME
    folder.mkdir(parents=True, exist_ok=True)
    save_file(reader.tensors(), folder / llava.WEIGHTS)
    record = {"registers": counts, "llava-projector": asdict(fitted), "llava": asdict(curve)}
    (folder / "training.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
