"""The cases of methods that approximate attention: what they save, behind a gate that compares them with their definition.

    python -m benchmarks.efficiency [--tokens 1024,4096,16384,32768] [--embedded] [--out FILE]   # curves, as JSON lines
    python -m benchmarks.efficiency --plot docs/images/efficiency FILE                            # pictures of them

Times are of one thread's processor, in turns within one run, so that other processes do not count.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnsteer import BlockMask, Intervention, Scatterbrain, TokenMerge, VisualTokenMerge, Where, steer
from attnsteer.kernels import Attention, KeyBlocks, attend_blocks
from benchmarks.measure import Times, interleaved
from benchmarks.models import LlamaShape, UNetShape, twin, unet
from benchmarks.parts import TOLERANCE, Check, Gate, Outcome, Size, error

HEADS, DIM = 4, 64


class SelfAttention(nn.Module):
    """A self-attention module with projections, of an image's tokens."""

    def __init__(self, heads: int = 8, dim: int = 40):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.out = nn.Linear(heads * dim, 3 * heads * dim), nn.Linear(heads * dim, heads * dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, C]."""
        B, n, C = x.shape
        q, k, v = self.qkv(x).view(B, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(B, n, C))


class Plain(nn.Module):
    """Attention of given queries, keys and values."""

    def __init__(self, heads: int = HEADS):
        super().__init__()
        self.num_heads = heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, n, d] each."""
        return F.scaled_dot_product_attention(q, k, v)


def clustered(n: int, block: int, sharp: float = 1.0, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Keys around a centre for each block, queries near one of the centres: where choosing blocks has something to choose."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(1, heads, n // block, DIM, generator=g)
    k = 0.8 * centres.repeat_interleave(block, dim=2) + 0.6 * torch.randn(1, heads, n, DIM, generator=g)
    at = torch.randint(0, n // block, (1, heads, n, 1), generator=g)
    q = sharp * centres.gather(2, at.expand(-1, -1, -1, DIM)) + 0.5 * torch.randn(1, heads, n, DIM, generator=g)
    return q, k, torch.randn(1, heads, n, DIM, generator=g)


def smooth(side: int, channels: int = 320) -> Tensor:
    """Tokens of an image [1, side * side, C] that are like their neighbours."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, channels, side // 4, side // 4, generator=g)
    fine = F.interpolate(coarse, size=(side, side), mode="bilinear") + 0.3 * torch.randn(
        1, channels, side, side, generator=g
    )
    return fine.flatten(2).transpose(1, 2)


# BlockMask. `tokens` of a size are those of the long call; a quarter of the blocks is kept.


def _chosen(q: Tensor, k: Tensor, block: int, keep: int, causal: bool) -> KeyBlocks:
    """Own block and the best others, as `BlockMask` chooses."""
    n = q.shape[2]
    own, ids = torch.arange(n) // block, torch.arange(n // block)
    gate = q @ k.unflatten(2, (-1, block)).mean(3).mT
    gate = gate.masked_fill(ids == own[:, None], torch.inf)
    gate = gate.masked_fill(ids > own[:, None], -torch.inf) if causal else gate
    best = gate.topk(keep, dim=-1)
    kept = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, best.indices, best.values > -torch.inf)
    return KeyBlocks(own[None], kept)


def sparse(q: Tensor, k: Tensor, v: Tensor, block: int, keep: int, causal: bool) -> Tensor:
    """The choice and the attention."""
    att = Attention(q, k, v, q.shape[-1] ** -0.5, causal=causal)
    return attend_blocks(att, _chosen(q, k, block, keep, causal))[0]


@functools.lru_cache
def gate_blocks(tokens: int) -> Gate:
    """Against a boolean mask of all rows and keys; the steered call, and the causal kernel."""
    block = tokens // 8
    q, k, v = clustered(tokens, block)
    plain, worst, least = F.scaled_dot_product_attention(q, k, v), 0.0, float("inf")
    lower = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for causal in (False, True):
        mask = _chosen(q, k, block, 2, causal).seen()
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask & lower if causal else mask)
        worst = max(worst, error(sparse(q, k, v, block, 2, causal), want))
        least = min(least, error(want, plain))
        if not causal:
            model = Plain()
            with steer(model, BlockMask(block, top_k=2)):
                worst = max(worst, error(model(q, k, v), want))
    return Gate(worst, TOLERANCE, least, "a boolean mask of rows and keys, full and causal")


def measure_blocks(size: Size, threads: int) -> Outcome:
    """A quarter of the blocks over SDPA: full and causal, and causal at a quarter of the length."""
    times, n = {}, size.tokens
    for tokens, causal in ((n, False), (n, True), (n // 4, True)):
        q, k, v = (torch.randn(1, HEADS, tokens, DIM) for _ in range(3))
        block = min(512, tokens // 8)
        arms = {
            "SDPA": functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal),
            "blocks": functools.partial(sparse, q, k, v, block, tokens // block // 4, causal),
        }
        times[f"{tokens}{' causal' if causal else ''}"] = interleaved(arms, size.repeats, patience=size.patience)
    ratios = {name: t.ratio("blocks", "SDPA") for name, t in times.items()}
    full, causal, short = ratios.values()
    checks = [
        Check("over causal SDPA", causal, 0.7),
        Check(f"the same at {n // 4} tokens", short, 0.9),
    ]
    return Outcome(full, checks, times, {"ratios": ratios})


# TokenMerge. `tokens` of a size are those of the module, `gate` those of the gate; the shape is that of the UNet.


@functools.lru_cache
def gate_merge(tokens: int) -> Gate:
    """Tokens that come in equal pairs: merging them by size gives exact attention."""
    side = round(tokens**0.5)
    module = SelfAttention().eval()
    x = smooth(side).unflatten(1, (side, side))
    # Both tokens of a pair, one of which is a destination of the first column of each cell.
    x = x[:, :, ::2].repeat_interleave(2, dim=2).flatten(1, 2)
    plain = module(x)
    method = TokenMerge(0.5, (1, 2), use_rand=False, grid=(side, side))
    with steer(module, method):
        merged = module(x)
    with steer(module, method.new(size_bias=False, stride=(2, 2), ratio=0.7)):
        moved = error(module(x), plain)
    return Gate(error(merged, plain), TOLERANCE, moved, "exact attention of tokens in equal pairs")


def measure_merge(size: Size, threads: int) -> Outcome:
    """Half of the tokens: one module, and a step of the UNet with the top level's modules merged."""
    side = round(size.tokens**0.5)
    module, x = SelfAttention().eval(), smooth(side)
    with steer(twin(module), TokenMerge(0.5, grid=(side, side))) as run:
        arms = {"plain": lambda: module(x), "merged": lambda: run.target(x)}
        alone = interleaved(arms, size.repeats, patience=size.patience)
    plain = unet(size.shape)
    latent = torch.randn(2, 4, size.shape.latent, size.shape.latent)
    text = torch.randn(2, 77, size.shape.text_dim)
    top = Where(modules=r"(down_blocks\.0|up_blocks\.3)\..*attn1", kinds="self")
    with steer(twin(plain), TokenMerge(0.5, where=top)) as run:
        arms = {"plain": lambda: plain(latent, 10, text), "merged": lambda: run.target(latent, 10, text)}
        step = interleaved(arms, size.repeats, patience=size.patience)
    checks = [Check("a step of the UNet, times faster", step.ratio("plain", "merged"), 1.2, at_least=True)]
    return Outcome(alone.ratio("merged", "plain"), checks, {"module": alone, "step": step})


# VisualTokenMerge. `tokens` of a size are the whole prompt, of which 576 (or the same share) are the image's.


@functools.lru_cache
def llava(shape: LlamaShape, patches: int, tower: tuple[int, int] = (2, 4)) -> nn.Module:
    """A LLaVA of these proportions, with a small image tower of so many layers and heads of 16."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16 * tower[1], intermediate_size=128, num_hidden_layers=tower[0], num_attention_heads=tower[1],
            image_size=14 * patches, patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=shape.hidden, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, intermediate_size=shape.mlp, num_hidden_layers=shape.layers, vocab_size=shape.vocab,
        ),
        image_token_id=3,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def picture(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    """A prompt with one image behind a few words."""
    vision = model.config.vision_config
    image = (vision.image_size // vision.patch_size) ** 2
    g = torch.Generator().manual_seed(0)
    words = torch.randint(4, model.config.text_config.vocab_size, (1, tokens - image), generator=g)
    first = min(35, (tokens - image) // 2)
    ids = torch.cat([words[:, :first], torch.full((1, image), 3), words[:, first:]], dim=1)
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _eager_fastv(model: nn.Module, inputs: dict[str, Tensor], k: int, share: float) -> Tensor:
    """Last logits of FastV as its users run it: eager weights of layer k - 1, then the rows by hand."""
    eager = twin(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        found = eager(**inputs, output_attentions=True, output_hidden_states=True)
        image = inputs["input_ids"][0] == 3
        average = found.attentions[k - 1].mean(dim=1)[0, -1].masked_fill(~image, -1.0)
        kept = average.topk(round(int(image.sum()) * share)).indices
        index = torch.cat([(~image).nonzero()[:, 0], kept]).sort().values
        hidden = found.hidden_states[k][:, index]
        text = eager.model.language_model
        rotary = text.rotary_emb(hidden, position_ids=index[None])
        seen = torch.ones(len(index), len(index), dtype=torch.bool).tril()
        mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        for layer in text.layers[k:]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=index[None])
        return eager.lm_head(text.norm(hidden)[:, -1])


def _side(size_tokens: int) -> int:
    return 24 if size_tokens > 600 else 8


@functools.lru_cache
def gate_visual(shape: LlamaShape, tokens: int) -> Gate:
    """Logits of the prompt's last token against FastV on eager weights."""
    model = llava(shape, _side(tokens))
    inputs = picture(model, tokens)
    plain = model(**inputs, logits_to_keep=1).logits[:, -1]
    with steer(model, VisualTokenMerge.fastv(2, 0.5)):
        ours = model(**inputs, logits_to_keep=1).logits[:, -1]
    theirs = _eager_fastv(model, inputs, 2, 0.5)
    return Gate(error(ours, theirs), TOLERANCE, error(ours, plain), "FastV on eager weights, logits of the last token")


class Idle(VisualTokenMerge):
    """Reads the scores, and keeps everything."""

    def around(self, forward: Callable[..., Any], inputs: Any, run: Any) -> Any:
        """As `VisualTokenMerge`, without dropping."""
        inputs.scores()
        return forward(inputs)


def measure_visual(size: Size, threads: int) -> Outcome:
    """The prefill with half of the image tokens from layer 2 on; and of one layer whose scores are read."""
    model = llava(size.shape, _side(size.tokens))
    inputs = picture(model, size.tokens)
    call = lambda m: functools.partial(m, **inputs, use_cache=True, logits_to_keep=1)  # noqa: E731
    with steer(twin(model), VisualTokenMerge.fastv(2, 0.5)) as run:
        times = interleaved({"plain": call(model), "pruned": call(run.target)}, size.repeats, patience=size.patience)
    with steer(twin(model), Idle(ratio=0.5, method="attention", layer=2), control=True) as run:
        whole = interleaved({"plain": call(model), "scored": call(run.target)}, size.repeats, patience=size.patience)
    # All of it is charged to one layer, of a layer's share of the prefill.
    layers = size.shape.layers
    scored = 1.0 + layers * (whole.ratio("scored", "plain") - 1.0)
    more = {"scores_over_a_layer_from_prefills": scored, "scores_over_a_layer": scores_alone(size)}
    checks = [Check("exact scores, over a layer", more["scores_over_a_layer"], 1.02)]
    return Outcome(times.ratio("pruned", "plain"), checks, {"prefill": times, "scores": whole}, more)


def scores_alone(size: Size) -> float:
    """1 + the time of the scores over that of the layer whose scores they are."""
    from attnsteer.kernels import dense

    model = llava(size.shape, _side(size.tokens)).model.language_model
    hidden = torch.randn(1, size.tokens, size.shape.hidden)
    rotary = model.rotary_emb(hidden, position_ids=torch.arange(size.tokens)[None])
    layer = functools.partial(model.layers[0], hidden, attention_mask=None, position_embeddings=rotary)
    q = torch.randn(1, size.shape.heads, size.tokens, size.shape.head_dim)
    k = torch.randn(1, size.shape.kv_heads, size.tokens, size.shape.head_dim)
    att = Attention(q[:, :, -1:], k, k, size.shape.head_dim**-0.5)
    times = interleaved({"layer": layer, "scores": lambda: dense(att)[:, :, 0].mean(dim=1)}, size.repeats, calls=3)
    return 1.0 + times.ratio("scores", "layer")


# Curves.


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """Median of processor time, after a first call."""
    taken: list[float] = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        call()
        taken.append(time.process_time() - begin)
    return statistics.median(taken[1:])


def curves(lengths: list[int]) -> Iterator[dict[str, Any]]:
    """Error and time of each method by budget and length, on tokens with structure: clustered keys, smooth images.

    Beyond 4,096 tokens of few heads, which changes no ratio of an attention that takes nearly all of the time.
    """
    for n in lengths:
        many = n > 4096
        rounds = 1 if n > 16384 else 2 if many else 3
        block, heads = 512 if n >= 4096 else 128, 1 if many else HEADS
        q, k, v = clustered(n, block, heads=heads)
        model = Plain(heads)
        plain = functools.partial(F.scaled_dot_product_attention, q, k, v)
        exact, took = plain(), seconds(plain, rounds)
        for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
            keep = round(n // block * share)
            if keep >= 1:
                method = BlockMask(block, top_k=keep)
                yield {"tokens": n} | _point(method, share, model, (q, k, v), exact, took, rounds)
        for features, size in ((64, 32), (256, 32), (256, 128)):
            method = Scatterbrain(features, 2, size)
            yield {"tokens": n} | _point(method, [features, size], model, (q, k, v), exact, took, rounds)
        side = round(n**0.5)
        module, x = SelfAttention(2 if many else 8).eval(), smooth(side, 80 if many else 320)
        exact, took = module(x), seconds(lambda: module(x), rounds)  # noqa: B023
        for ratio in (0.25, 0.5, 0.75):
            method = TokenMerge(ratio, grid=(side, side))
            yield {"tokens": side * side} | _point(method, ratio, twin(module), (x,), exact, took, rounds)
        if n <= 16384:
            yield from _pruned(n, rounds)


def _point(
    method: Intervention, budget: Any, model: Any, inputs: Any, exact: Tensor, took: float, rounds: int
) -> dict[str, Any]:
    """Error and time of a method in calls of a module."""
    with steer(model, method):
        out = model(*inputs)
        ratio = seconds(lambda: model(*inputs), rounds) / took
    wrong = float((out - exact).norm() / exact.norm())
    return {"method": type(method).__name__, "budget": budget, "error": wrong, "ratio": ratio, "plain_s": took}


PRUNED = LlamaShape(hidden=128, heads=2, kv_heads=2, head_dim=64, mlp=256, layers=4, vocab=256)


def _pruned(n: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Three quarters of a prompt are an image; some of its tokens are left out from layer 2 on. No error: weights are random."""
    patches = round((0.75 * n) ** 0.5)
    model = llava(PRUNED, patches, (1, 1))
    inputs = picture(model, n)
    call = lambda: model(**inputs, use_cache=True, logits_to_keep=1)  # noqa: E731
    took = seconds(call, rounds)
    for share in (0.25, 0.5, 0.75):
        with steer(model, VisualTokenMerge(ratio=share, method="attention", layer=2)):
            ratio = seconds(call, rounds) / took
        yield {"method": "VisualTokenMerge", "tokens": n, "budget": share, "ratio": ratio, "plain_s": took}


def embedded() -> Iterator[dict[str, Any]]:
    """The same on embedded models: error of what the model gives, |x' - x| / |x|, and time of a forward."""
    from attnsteer import zoo
    from attnsteer.run.data.zoo import image
    from attnsteer.zoo.shapes.reading import reading

    model, tokenizer = zoo.load("shapes-lm")
    passages = [
        tokenizer(reading("calibration", i, "one-shot").prompt, return_tensors="pt")["input_ids"] for i in range(6)
    ]
    passages = [p for p in passages if p.shape[1] >= 65]
    said = lambda: torch.cat([model(p, use_cache=False).logits[0] for p in passages])  # noqa: E731
    for keep in (1, 2, 4, 6):
        yield _whole("shapes-lm", BlockMask(16, top_k=keep), keep / 8, model, said)
    pipe = zoo.load("shapes-sd")
    g = torch.Generator().manual_seed(0)
    latent = pipe(
        "a large red circle and a small blue star", num_inference_steps=10, generator=g, output_type="latent"
    ).images
    text = pipe.encode_prompt("a large red circle and a small blue star", "cpu", 1, False)[0]
    at = torch.tensor([400])
    noised = pipe.scheduler.add_noise(latent, torch.randn(latent.shape, generator=g), at)
    drawn = lambda: pipe.unet(noised, at, text).sample  # noqa: E731
    top = Where(layers=[0, 1, 5, 6], kinds="self")
    for ratio in (0.1, 0.25, 0.5, 0.75):
        yield _whole("shapes-sd", TokenMerge(ratio, where=top), ratio, pipe, drawn)
    for features, size in ((64, 16), (256, 16), (256, 64), (256, 128)):
        yield _whole("shapes-sd", Scatterbrain(features, 2, size, where=top), [features, size], pipe, drawn)
    model, processor = zoo.load("shapes-lvlm")
    asked = [
        processor(images=image({"split": "calibration", "image": i}), text="<image> question is there a red circle ? answer",
                  return_tensors="pt")
        for i in range(8)
    ]  # fmt: skip
    heard = lambda: torch.cat([model(**a, logits_to_keep=1).logits[:, -1].softmax(-1) for a in asked])  # noqa: E731
    for how in ("cluster", "attention", "random"):
        for share in (0.0625, 0.125, 0.25, 0.5):
            options = {"layer": 1} if how == "attention" else {}
            method = VisualTokenMerge(ratio=share, method=how, **options)
            yield _whole("shapes-lvlm", method, share, model, heard) | {"how": how}


def _whole(name: str, method: Intervention, budget: Any, target: Any, call: Callable[[], Tensor]) -> dict[str, Any]:
    """Error and time of a method in calls of a whole model."""
    plain, took = call(), seconds(call, 3)
    with steer(target, method):
        out, ratio = call(), seconds(call, 3) / took
    wrong = float((out - plain).norm() / plain.norm())
    return {
        "model": name,
        "method": type(method).__name__,
        "budget": budget,
        "error": wrong,
        "ratio": ratio,
        "plain_s": took,
    }


def plot(points: list[dict[str, Any]], stem: str) -> list[Path]:
    """Two pictures: time by length with the error at each point, and error by budget on embedded models."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    names = ("BlockMask", "TokenMerge", "VisualTokenMerge", "Scatterbrain")
    budgets = ("share of blocks kept", "share merged", "share of the image kept", "features, cluster")
    made = []
    long, small = [p for p in points if "tokens" in p], [p for p in points if "model" in p]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axes, name, budget in zip(figure.subplots(2, 2).flat, names, budgets, strict=True):
        own = [p for p in long if p["method"] == name]
        for value in sorted({json.dumps(p["budget"]) for p in own}):
            line = sorted((p["tokens"], p["ratio"], p.get("error")) for p in own if json.dumps(p["budget"]) == value)
            axes.plot([t for t, _, _ in line], [r for _, r, _ in line], "o-", label=_said(value))
        axes.axhline(1.0, color="0.6", lw=0.8)
        axes.set(title=name, xscale="log", yscale="log", xlabel="tokens", ylabel="time over exact attention")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "23568" else ""))
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.set_xticks([1024, 4096, 16384, 32768], ["1k", "4k", "16k", "32k"])
        axes.margins(x=0.14, y=0.12)
        _beside(axes, [(p["tokens"], p["ratio"], f"{p['error']:.2g}") for p in own if p.get("error") is not None])
        axes.legend(title=budget, fontsize=8, title_fontsize=8)
    figure.suptitle("Time over length; beside the points the error of the outputs, |O' - O| / |O|")
    made.append((figure, Path(f"{stem}-length.webp")))
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axes, name, budget in zip(figure.subplots(2, 2).flat, names, budgets, strict=True):
        own = [p for p in small if p["method"] == name]
        for how in dict.fromkeys(p.get("how", "") for p in own):
            line = [p for p in own if p.get("how", "") == how]
            at = [_said(json.dumps(p["budget"])) for p in line]
            axes.plot(at, [p["error"] for p in line], "o-", label=how or "error")
        axes.set(title=f"{name}, {own[0]['model']}", xlabel=budget, ylabel="error of what the model gives")
        axes.margins(x=0.14, y=0.12)
        axes.set_ylim(bottom=0)
        places = list(dict.fromkeys(_said(json.dumps(p["budget"])) for p in own))
        _beside(axes, [(places.index(_said(json.dumps(p["budget"]))), p["error"], f"{p['ratio']:.2f}x") for p in own])
        if len({p.get("how") for p in own}) > 1:
            axes.legend(fontsize=8)
    figure.suptitle("Embedded models: error by budget; beside the points the time of a forward over the plain one")
    made.append((figure, Path(f"{stem}-embedded.webp")))
    for figure, path in made:
        figure.savefig(path, dpi=90)
    return [path for _, path in made]


def _beside(axes: Any, labels: list[tuple[float, float, str]]) -> None:
    """A text beside each point (x, y); those of one x stand above each other where their points are too near."""
    axes.autoscale_view()
    for x in {x for x, _, _ in labels}:
        free = -math.inf
        for _, y, text in sorted((own for own in labels if own[0] == x), key=lambda own: own[1]):
            at = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi
            free = max(at + 3, free + 9)
            clear = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.3}
            axes.annotate(text, (x, y), textcoords="offset points", xytext=(6, free - at), fontsize=7, bbox=clear)


def _said(budget: str) -> str:
    value = json.loads(budget)
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value:g}"


def main() -> None:
    """Print the curves."""
    parser = argparse.ArgumentParser(description="Error and time of approximating methods, by budget and length.")
    parser.add_argument("--tokens", default="1024,4096,16384,32768", help="lengths, with commas; empty: none")
    parser.add_argument("--embedded", action="store_true", help="embedded models too")
    parser.add_argument("--out", type=Path, help="file for the JSON lines")
    parser.add_argument("--plot", nargs=2, metavar=("STEM", "FILE"), help="draw the curves of a file")
    options = parser.parse_args()
    if options.plot:
        points = [json.loads(line) for line in Path(options.plot[1]).read_text(encoding="utf-8").splitlines()]
        print(*plot(points, options.plot[0]))
        return
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    lines = []
    some = curves([int(n) for n in options.tokens.split(",") if n])
    for point in itertools.chain(embedded() if options.embedded else (), some):
        lines.append(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in point.items()}))
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


__all__ = ["Times", "UNetShape", "curves", "gate_blocks", "gate_merge", "gate_visual"]

if __name__ == "__main__":
    main()
