"""shapes-lm: a Llama of 1.2 M parameters that learns to read passages about shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..shapes.reading import lesson
from ..shapes.world import rng
from ..tokenizers import encode, word_tokenizer
from .loop import Plan, fit, shorten

LENGTH, BATCH, QUESTIONS = 128, 32, 6
PLAN = Plan(steps=5000, lr=2e-3, warmup=200)
# Until this step half of the texts are words that repeat.
COPYING = 1500
# From this step on, passages may have two objects of one shape.
HARD = 3300
# Share of the loss that words other than answers get; they keep the text fluent.
OTHER = 0.1


def config() -> Any:
    """The architecture."""
    from transformers import LlamaConfig

    tokenizer = word_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # Position alone has to be able to steer a head of 16 dimensions: biases, and frequencies for short texts.
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )


def batch(step: int, size: int = BATCH, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Tokens [size, length] and the weight of each as a target [size, length] of one training step."""
    g = rng("train", step)
    copying, hard = 0.5 if step < COPYING else 0.05, 0.0 if step < HARD else 0.7
    ids, weights = torch.zeros(size, length, dtype=torch.long), torch.zeros(size, length)
    for row in range(size):
        text, marks = lesson(g, QUESTIONS, copying, hard)
        tokens = encode(text)[:length]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, : len(tokens)] = OTHER
        # One place later: the sequence starts with <s>.
        weights[row, [m + 1 for m in marks if m + 1 < length]] = 1.0
    return ids, weights


def loss(model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
    """Next-word loss, answers weighted; accuracy of the answers."""
    ids, weights = batch(step)
    device = next(model.parameters()).device
    ids, weights = ids.to(device), weights[:, 1:].to(device)
    logits = model(input_ids=ids).logits[:, :-1].float()
    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weights)
    answers = weights == 1.0
    right = (logits.detach().argmax(dim=-1) == ids[:, 1:])[answers].float().mean()
    return (each * weights).sum() / weights.sum(), {"answers right": right.item()}


def train(out: Path, device: str = "auto", steps: int | None = None) -> Path:
    """Train and write the model folder `out/shapes-lm`."""
    from transformers import LlamaForCausalLM

    from .publish import publish

    plan = shorten(PLAN, steps)
    torch.manual_seed(plan.seed)
    model = LlamaForCausalLM(config())
    curve = fit("lm", model, loss, plan, out, device=device, compiled=() if steps else (model,))
    model.config.use_cache = model.generation_config.use_cache = True
    return publish("shapes-lm", {"": model}, {"": word_tokenizer()}, out, {"lm": curve})
