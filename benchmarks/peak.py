"""One arm of a memory measurement, in a process of its own; prints one line of JSON (see `measure.peak_memory`)."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch

from attnsteer import steer
from benchmarks.cases import SINKS, act
from benchmarks.compose import chosen
from benchmarks.measure import peak, reset_peak, timed
from benchmarks.models import LlamaShape, llama, prompt


@torch.no_grad()
def main(request: dict[str, Any]) -> dict[str, Any]:
    """Build, run a short prompt so that one-off allocations are over, forget the peak, run the long one."""
    torch.set_num_threads(request["threads"])
    shape, tokens = LlamaShape(**request["shape"]), request["tokens"]
    model, ids = llama(shape, tokens), prompt(shape, tokens, SINKS)
    if "methods" in request:
        methods = chosen(tuple(request["methods"]), tokens)
    else:
        methods = (act(shape, request["share"]),) if request["arm"] == "steered" else ()
    with steer(model, *methods) if methods else contextlib.nullcontext():
        # Spans lie in the first quarter.
        model(ids[:, : max(32, tokens // 4 if "methods" in request else 0)], use_cache=True, logits_to_keep=1)
        baseline = reset_peak()
        outputs = []
        seconds, foreign = timed(lambda: outputs.append(model(ids, use_cache=True, logits_to_keep=1).logits))
    return {
        "bytes": peak() - baseline,
        "baseline": baseline,
        "seconds": seconds,
        "foreign": foreign,
        "finite": bool(torch.isfinite(outputs[0]).all()),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
