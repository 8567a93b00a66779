"""What steering costs inside vLLM: python -m benchmarks.vllm, in the environment of `make test-vllm` (or with vLLM on a GPU).

One engine, the same requests over and over: as vLLM runs them, with the plug-in loaded and nobody steered, all steered by each
method in turn. Rounds alternate, so that what else the machine does falls on all alike; ratios are of medians.

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
        # How many new tokens each request has; 1 is the prompt alone.
        self.tokens = (args.tokens, 1) if args.prompts else (args.tokens,)

    def plug(self, on: bool) -> None:
        """Put the plug-in on the layers and the runner, or take it off (model runner V1)."""
        runner = vars(self.worker.model_runner)
        for impl, cls in zip(self.impls, self.classes, strict=True):
            impl.__class__ = cls if on else cls.__mro__[1]
        if self.built is not None:
            runner.pop("_build_attention_metadata", None)
            if on:
                runner["_build_attention_metadata"] = self.built

    def round(self, method: Any) -> list[float]:
        """[seconds of all requests, seconds of their prompts alone where that was asked for]."""
        from vllm import SamplingParams

        seconds = []
        for tokens in self.tokens:
            params = SamplingParams(
                temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
                extra_args=None if method is None else request_args(method),
            )  # fmt: skip
            start = time.perf_counter()
            self.llm.generate(self.prompts, params, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        return seconds


def main() -> None:
    """Measure, print a table, and write it as JSON where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=64)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument(
        "--prompts", action="store_true", help="measure prompts apart from decoding, in a run of their own"
    )
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as held:
        bench = Bench(model(Path(held), args.layers, args.channels), args)
    own = {k: m for k, m in methods(args.layers, args.channels // 64).items() if args.only in k}
    cases: dict[str, tuple[bool, Any]] = {"vLLM": (False, None), "nobody steered": (True, None)}
    cases |= {name: (True, method) for name, method in own.items()}
    for plugged, method in cases.values():
        bench.plug(plugged)
        bench.round(method)
    found: dict[str, list[list[float]]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, (plugged, method) in cases.items():
            bench.plug(plugged)
            found[name].append(bench.round(method))
            print(f"  {name}: {', '.join(f'{s:.2f} s' for s in found[name][-1])}", flush=True)
    table = {}
    medians = {name: [statistics.median(own) for own in zip(*values, strict=True)] for name, values in found.items()}
    plain, tokens = medians["vLLM"], args.requests * args.tokens
    for name, own in medians.items():
        table[name] = {"seconds": own[0], "ratio": own[0] / plain[0], "tokens per second": tokens / own[0]}
        text = f"{name:28s} {own[0]:8.2f} s  {own[0] / plain[0]:6.3f}x  {tokens / own[0]:.0f} tokens/s"
        if args.prompts:
            table[name] |= {"prompts": own[1] / plain[1], "decode": (own[0] - own[1]) / (plain[0] - plain[1])}
            text += f"  prompts {table[name]['prompts']:.3f}x  decode {table[name]['decode']:.3f}x"
        print(text)
    if args.out:
        shape = {k: str(v) for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"shape": shape, "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
