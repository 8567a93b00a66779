"""Row-batched ACT calibration against one steered forward per head and sample: `python -m benchmarks.calibration`.

Four models, 24 prompts, one thread. "shapes-lm" is the embedded model (6 layers, 8 heads, 128 dimensions) on reading prompts of
38 to 64 tokens with ACT's defaults; all of its heads are moved. The others are random Llamas of 5 layers on prompts of 120
tokens, since how much is saved depends on how many heads the method moves: "random" has few sinks, "half" planted sinks
above the threshold in about two thirds of the heads, "all" in every head from the first tokens on, the worst case.

The two searches alternate, and the ratio is the median over the rounds: `python -m benchmarks.calibration 5` for five.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from attnsteer import ACT, steer, zoo
from attnsteer.search import Choice, calibrate_act, candidate_log_likelihoods
from attnsteer.search.alone import only
from attnsteer.testing import tiny_transformers
from attnsteer.zoo.shapes.reading import reading
from benchmarks.models import LlamaShape, llama, prompt

SHAPE = LlamaShape(hidden=128, heads=8, kv_heads=4, head_dim=16, mlp=344, layers=5, vocab=64)
# Column means of the planted sinks lie between 0.1 and 0.2 at this length.
THRESHOLDS = {"shapes-lm": 0.1, "random": 0.1, "half": 0.15, "all": 0.02}
COUNT, LENGTH = 24, 120
TOLERANCE = 1e-5


def case(name: str) -> tuple[Any, list[Choice]]:
    """The model and the samples of a case."""
    if name == "shapes-lm":
        model, tokenizer = zoo.load(name)
        items = [reading("calibration", i) for i in range(COUNT)]
        ids = tokenizer.convert_tokens_to_ids
        return model, [Choice(tokenizer(r.prompt).input_ids, ids(list(r.choices)), r.answer) for r in items]
    samples = [Choice(prompt(SHAPE, LENGTH, 4, seed=i)[0], [10, 11, 12, 13], i % 4) for i in range(COUNT)]
    sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=344, num_hidden_layers=5, num_attention_heads=8)
    model = tiny_transformers("llama", num_key_value_heads=4, **sizes) if name == "random" else llama(SHAPE, 128)
    return model, samples


def one_by_one(model: Any, samples: list[Choice], method: ACT, pairs: list[tuple[int, int]]) -> dict[Any, float]:
    """The gain of each head: a steered forward of batch one for each head and sample."""
    mean = lambda run: sum(candidate_log_likelihoods(model, s, run)[s.answer] for s in samples) / len(samples)  # noqa: E731
    plain, found = mean(None), {}
    for pair in pairs:
        with steer(model, only(method, *pair), control=True) as run:
            found[pair] = mean(run) - plain
    return found


def main(rounds: int = 3) -> int:
    """Time and compare; 1 when a result differs."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    options = {"keep": "all", "metric": "log_likelihood", "progress": False}
    worst = 0.0
    for name, threshold in THRESHOLDS.items():
        (model, samples), method = case(name), ACT(threshold=threshold)
        shape = model.config.num_hidden_layers, model.config.num_attention_heads
        pairs = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
        times = []
        for _ in range(rounds):
            # Processor time: other processes on the machine do not count.
            start = time.process_time()
            slow = one_by_one(model, samples, method, pairs)
            between = time.process_time()
            found = calibrate_act(model, samples, method, **options).scores
            times.append((between - start, time.process_time() - between))
            worst = max(worst, error := max(abs(found[p] - slow[p]) for p in pairs))
        slowly, fast = (statistics.median(t[i] for t in times) for i in (0, 1))
        moved = sum(found[p] != 0 for p in pairs)
        print(
            f"{name:9} {moved:2}/{len(pairs)} heads moved: {slowly:6.2f} s one by one, {fast:6.2f} s batched, "
            f"{statistics.median(a / b for a, b in times):5.1f}x, largest difference {error:.1e}",
            flush=True,
        )
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
