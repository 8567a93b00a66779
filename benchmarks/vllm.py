"""What steering costs inside vLLM: python -m benchmarks.vllm, in the environment of `make test-vllm` (or with vLLM on a GPU).

One engine. Decoding: all requests go on together, and every other step runs with the plug-in taken off, so that what else the
machine does falls on both alike; the median step with it over the median step without. Prompts: rounds of requests with one new
token, as vLLM runs them and steered in turn; the median over rounds of the ratio within a round. Whole requests: both times put
together. In seconds of the clock and of the process. "Nobody steered" has the plug-in on and no steering.

The default shape: 8 layers of 1,024 channels, 16 heads, 4 key heads, 64 lanes, float32; 64 requests with prompts of 64 to 512
tokens, 32 new tokens each; no prefix cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from attnsteer import ACT, PASTA, HeadGate, InstABoost, SpotLight, ZeroTuning
from attnsteer.hosts.vllm.wire import request_args

VOCAB = 8192
# Of the clock, of the process.
Seconds = tuple[float, float]


def model(folder: Path, layers: int, channels: int) -> Path:
    """A random model of the shape of a Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = channels // 64
    config = LlamaConfig(
        hidden_size=channels, intermediate_size=channels * 11 // 4, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), head_dim=64, vocab_size=VOCAB, max_position_embeddings=4096, eos_token_id=2,
        bos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def methods(layers: int, heads: int) -> dict[str, Any]:
    """Name -> method; a quarter of the heads is every fourth one of each layer."""
    quarter = {layer: list(range(layer % 4, heads, 4)) for layer in range(layers)}
    return {
        "zerotuning, all heads": ZeroTuning(gamma=0.5),
        "zerotuning, 1/4 of heads": ZeroTuning(gamma=0.5, heads=quarter),
        "pasta, 1/4 of heads": PASTA(spans=[[(4, 30)]], heads=quarter, alpha=0.05),
        "instaboost, all heads": InstABoost(spans=[[(4, 30)]], factor=4.0),
        "spotlight, all heads": SpotLight(spans=[[(4, 30)]], target=0.3),
        "act, 1/4 of heads": ACT(heads=quarter, beta=0.4, threshold=0.02),
        "headgate, 1/4 of heads": HeadGate({(layer, h): 0.5 for layer, own in quarter.items() for h in own}),
    }


class Bench:
    """An engine whose plug-in can be taken off and put on again between rounds."""

    def __init__(self, path: Path, args: Any):
        from vllm import LLM

        self.llm = LLM(
            str(path), skip_tokenizer_init=True, dtype=args.dtype, max_model_len=2048, enforce_eager=args.eager, max_num_seqs=64,
            enable_prefix_caching=False, enable_chunked_prefill=False, max_num_batched_tokens=4096, disable_log_stats=True,
            additional_config={"attnsteer": {}},
        )  # fmt: skip
        self.worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        context = self.worker.vllm_config.compilation_config.static_forward_context
        self.impls = [layer.impl for layer in context.values() if hasattr(layer, "impl")]
        self.classes = [type(i) for i in self.impls]
        self.built = vars(self.worker.model_runner).get("_build_attention_metadata")
        draw = random.Random(0)
        sizes = [draw.randrange(args.shortest, args.longest) for _ in range(args.requests)]
        self.prompts = [{"prompt_token_ids": [1] + [draw.randrange(3, VOCAB) for _ in range(n - 1)]} for n in sizes]
        self.plain = args.plain
        self._core = self.llm.llm_engine.engine_core.engine_core
        self._step = self._core.step_fn

    def plug(self, on: bool) -> None:
        """Put the plug-in on the layers and the runner, or take it off (model runner V1)."""
        runner = vars(self.worker.model_runner)
        for impl, cls in zip(self.impls, self.classes, strict=True):
            impl.__class__ = cls if on else cls.__mro__[1]
        if self.built is not None:
            runner.pop("_build_attention_metadata", None)
            if on:
                runner["_build_attention_metadata"] = self.built

    def generate(self, method: Any, tokens: int) -> Seconds:
        """All requests to their end."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
                extra_args=None if method is None or i < self.plain else request_args(method),
            )
            for i in range(len(self.prompts))
        ]  # fmt: skip
        return timed(lambda: self.llm.generate(self.prompts, params, use_tqdm=False))

    def decode(self, method: Any, steps: int) -> tuple[list[Seconds], list[Seconds]]:
        """(steps with the plug-in, steps without): decode steps of all requests, in turn."""
        found: tuple[list[Seconds], list[Seconds]] = ([], [])
        scheduler = self._core.scheduler

        def step() -> Any:
            # A step of prompts needs the plug-in, for what methods keep of them; the first decode steps warm things up.
            waits = scheduler.waiting or any(r.is_prefill_chunk for r in scheduler.running)
            count["steps"] = 0 if waits else count["steps"] + 1
            timing = count["steps"] > 3
            on = not timing or count["steps"] % 2 == 0
            self.plug(on)
            done: list[Any] = []
            seconds = timed(lambda: done.append(self._step()))
            if timing and len(scheduler.running) == len(self.prompts):
                found[0 if on else 1].append(seconds)
            return done[0]

        count = {"steps": 0}
        self._core.step_fn = step
        try:
            self.generate(method, steps + 4)
        finally:
            self._core.step_fn = self._step
            self.plug(True)
        return found


def timed(run: Callable[[], Any]) -> Seconds:
    """How long it takes, by the clock and of this process."""
    clock, process = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - process


def middle(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def main() -> None:
    """Measure, print a table, and write it as JSON where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=64)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument(
        "--tokens", type=int, default=32, help="new tokens of a request, for the figure of whole requests"
    )
    parser.add_argument(
        "--steps", type=int, default=40, help="decode steps that are timed, half of them with the plug-in"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of prompts")
    parser.add_argument("--plain", type=int, default=0, help="requests that nobody steers, in the same steps")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--only", nargs="*", default=[""], help="methods whose name holds one of these")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as held:
        bench = Bench(model(Path(held), args.layers, args.channels), args)
    chosen = methods(args.layers, args.channels // 64).items()
    cases: dict[str, Any] = {"nobody steered": None}
    cases |= {name: method for name, method in chosen if any(own in name for own in args.only)}
    table: dict[str, dict[str, float]] = {}
    prompts: dict[str, list[tuple[Seconds, Seconds]]] = {name: [] for name in cases}
    steps = {}
    for name, method in cases.items():
        steps[name] = bench.decode(method, args.steps)
        clock, process = (
            middle([s[i] for s in steps[name][0]]) / middle([s[i] for s in steps[name][1]]) for i in (0, 1)
        )
        print(f"  decode, {name}: {clock:.3f}x of the clock, {process:.3f}x of the process", flush=True)
    for i in range(args.rounds + 1):
        for name, method in cases.items():
            pair = []
            # Which comes first changes.
            for on in (True, False) if i % 2 else (False, True):
                bench.plug(on)
                pair.append((on, bench.generate(method if on else None, 1)))
            own = dict(pair)
            print(f"  prompts, {name}: {own[True][1] / own[False][1]:.3f}x of the process", flush=True)
            # The first round warms things up.
            if i or not args.rounds:
                prompts[name].append((own[True], own[False]))
    print(f"{'':28s}     of the clock: whole prompts decode      of the process: whole prompts decode")
    for name in cases:
        table[name] = {}
        text = f"{name:28s}"
        for which, unit in enumerate(("clock", "process")):
            on, off = (middle([s[which] for s in own]) for own in steps[name])
            plain = middle([off[which] for _, off in prompts[name]])
            ratio = middle([on[which] / off[which] for on, off in prompts[name]])
            whole = (ratio * plain + args.tokens * on) / (plain + args.tokens * off)
            table[name][unit] = {
                "whole": whole,
                "prompts": ratio,
                "decode": on / off,
                "prompt seconds": plain,
                "step seconds": off,
            }
            text += f"  {whole:8.3f} {ratio:8.3f} {on / off:8.3f} ({plain:.2f} s + {args.tokens} x {1e3 * off:.1f} ms)"
        print(text, flush=True)
    if args.out:
        shape = {k: str(v) for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"shape": shape, "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
