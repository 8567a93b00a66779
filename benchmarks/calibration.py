"""Row-batched ACT calibration against one steered forward per head and sample: `python -m benchmarks.calibration`.

A Llama of 5 layers, 8 heads and 128 dimensions, 24 prompts of 120 tokens, one thread. How much is saved depends on how many
heads the method moves, so three models of that shape are timed: "random" has few sinks, "half" planted sinks above the
threshold in about two thirds of the heads, "all" in every head from the first tokens on, the worst case.
"""

from __future__ import annotations

import sys
import time

import torch

from attnsteer import ACT, steer
from attnsteer.search import Choice, calibrate_act, candidate_log_likelihoods
from attnsteer.search.alone import only
from attnsteer.testing import tiny_transformers
from benchmarks.models import LlamaShape, llama, prompt

SHAPE = LlamaShape(hidden=128, heads=8, kv_heads=4, head_dim=16, mlp=344, layers=5, vocab=64)
PAIRS = [(layer, head) for layer in range(SHAPE.layers) for head in range(SHAPE.heads)]
# Column means of the planted sinks lie between 0.1 and 0.2 at this length.
THRESHOLDS = {"random": 0.1, "half": 0.15, "all": 0.02}
TOLERANCE = 1e-5


def main(count: int = 24, length: int = 120) -> int:
    """Time and compare; 1 when a result differs."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    samples = [Choice(prompt(SHAPE, length, 4, seed=i)[0], [10, 11, 12, 13], i % 4) for i in range(count)]
    sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=344, num_hidden_layers=5, num_attention_heads=8)
    worst = 0.0
    for name, threshold in THRESHOLDS.items():
        model = tiny_transformers("llama", num_key_value_heads=4, **sizes) if name == "random" else llama(SHAPE, 128)
        method = ACT(threshold=threshold)
        plain = sum(candidate_log_likelihoods(model, s)[s.answer] for s in samples)
        # Processor time: other processes on the machine do not count.
        start, slow = time.process_time(), {}
        for pair in PAIRS:
            with steer(model, only(method, *pair)) as run:
                slow[pair] = sum(candidate_log_likelihoods(model, s, run)[s.answer] for s in samples)
        between = time.process_time()
        options = {"keep": "all", "metric": "log_likelihood", "progress": False}
        found = calibrate_act(model, samples, method, **options).scores
        end = time.process_time()
        error = max(abs(found[p] - (slow[p] - plain) / count) for p in PAIRS)
        worst = max(worst, error)
        moved = sum(found[p] != 0 for p in PAIRS)
        print(
            f"{name:7} {moved:2}/{len(PAIRS)} heads moved: {between - start:6.2f} s one by one, {end - between:6.2f} s batched, "
            f"{(between - start) / (end - between):5.1f}x, largest difference {error:.1e}"
        )
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
