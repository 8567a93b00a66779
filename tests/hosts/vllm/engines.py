"""Tiny models, requests and engines of the tests of vLLM; the oracle: the same request alone in transformers, under attnsteer."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

# Read by vLLM when it is imported: one process, a small cache, no thread pinning.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
)

import torch

from attnsteer import PASTA, HeadGate, InstABoost, SpotLight, ZeroTuning, steer
from attnsteer.hosts.vllm.wire import request_args

VOCAB = 1000
TOKENS = 12
HEADS = {1: [0, 3], 2: [1], 3: [0, 1, 2, 3]}
COMMON = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    vocab_size=VOCAB, max_position_embeddings=2048, eos_token_id=2, bos_token_id=1, pad_token_id=0,
)  # fmt: skip


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=False))


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**COMMON, tie_word_embeddings=False))


def _gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    own = dict(sliding_window=48, query_pre_attn_scalar=64, attn_logit_softcapping=5.0, final_logit_softcapping=30.0)
    return Gemma2ForCausalLM(Gemma2Config(**COMMON, **own, tie_word_embeddings=True))


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**COMMON, sliding_window=48, tie_word_embeddings=False))


def _gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    own = {**COMMON, "max_position_embeddings": 4096}
    config = GptOssConfig(
        **own, sliding_window=48, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    )
    config.layer_types = ["sliding_attention", "full_attention"] * 2
    return GptOssForCausalLM(config)


FAMILIES = {
    "llama": (_llama, 2),
    "qwen3": (_qwen3, 2),
    "gemma2": (_gemma2, 3),
    "mistral": (_mistral, 2),
    "gpt_oss": (_gpt_oss, 2),
}


def saved(family: str, folder: Path) -> Path:
    """A tiny random model in `folder`, its weights scaled up so that attention is far from uniform."""
    path = folder / family
    if not path.exists():
        make, factor = FAMILIES[family]
        torch.manual_seed(0)
        model = make().float()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(factor)
        model.save_pretrained(path)
    return path


def steerings(n: int) -> list[Any]:
    """Eight steerings, one of them none, for a prompt of `n` tokens."""
    return [
        ZeroTuning(gamma=0.2, heads=HEADS),
        ZeroTuning(gamma=3.0, heads={0: [1, 2], 2: [0, 3]}),
        None,
        SpotLight(spans=[[(5, 12), (n - 9, n - 2)]], target=0.35),
        PASTA(spans=[[(3, n - 4)]], heads=HEADS, alpha=0.01),
        InstABoost(spans=[[(2, 9)]], factor=4.0),
        HeadGate({(0, 1): 0.0, (2, 2): -1.0}),
        ZeroTuning(gamma=0.6),
    ]


def requests(count: int, seed: int = 0, longest: int = 200) -> tuple[list[list[int]], list[Any]]:
    """(prompts, steerings): prompts of mixed lengths, some of which begin alike."""
    draw = random.Random(seed)
    base = [1] + [draw.randrange(3, VOCAB) for _ in range(longest - 1)]
    prompts, chosen = [], []
    for i in range(count):
        n = draw.choice([24, 40, longest // 2, longest - 30, longest])
        shared = draw.choice([0, n // 2, n - 8])
        prompt = base[:shared] + [draw.randrange(3, VOCAB) for _ in range(n - shared)]
        prompts.append([1, *prompt[1:]])
        chosen.append(steerings(n)[i % 8])
    return prompts, chosen


def oracle(
    path: Path, prompts: list[list[int]], chosen: list[Any], tokens: int = TOKENS, attn: str = "sdpa"
) -> list[Any]:
    """[(token ids, their log-probabilities, smallest gap between the two likeliest tokens)] of each request alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attn, dtype=torch.float32).eval()
    found = []
    for prompt, method in zip(prompts, chosen, strict=True):

        def go(prompt: list[int] = prompt) -> Any:
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_logits=True,
                return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            ids = out.sequences[0, len(prompt) :].tolist()
            logs = [torch.log_softmax(l[0].float(), -1)[i].item() for l, i in zip(out.logits, ids, strict=True)]
            top = [l[0].float().topk(2).values for l in out.logits]
            return ids, logs, min(float(t[0] - t[1]) for t in top)

        with torch.no_grad():
            if method is None:
                found.append(go())
            else:
                with steer(model, method, control=True):
                    found.append(go())
    return found


# Engines that this process has started.
_STARTED: list[Path] = []


def close(llm: Any) -> None:
    """End an engine, so that this process can start another one."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def engine(path: Path, steered: Any = True, **options: Any) -> Any:
    """An `LLM`; `steered`: the plug-in's settings, True for none in particular, False for an engine without it."""
    from vllm import LLM

    if _STARTED:
        # It is done once for a process, and fails a second time.
        from vllm.platforms import current_platform

        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
    _STARTED.append(path)
    settings = {} if steered is True else steered
    own = dict(
        skip_tokenizer_init=True, dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=64, disable_log_stats=True,
    )  # fmt: skip
    if steered is not False:
        own["additional_config"] = {"attnsteer": settings}
    return LLM(str(path), **{**own, **options})


def adapted(path: Path, folder: Path) -> tuple[Path, Path]:
    """(a random adapter of a model's queries and values, in the form of peft; the model with it merged)."""
    import json

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    adapter, merged, weights = folder / "adapter", folder / "merged", {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(1)
    rank, alpha = 8, 16
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            a, b = 0.1 * torch.randn(rank, module.in_features), 0.1 * torch.randn(module.out_features, rank)
            weights |= {f"base_model.model.{name}.lora_{x}.weight": w for x, w in (("A", a), ("B", b))}
            module.weight.data += alpha / rank * b @ a
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], bias="none")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM", "lora_dropout": 0.0}))
    model.save_pretrained(merged)
    return adapter, merged


def answers(
    llm: Any, prompts: list[list[int]], chosen: list[Any], tokens: int = TOKENS, fresh: bool = False, lora: Any = None,
    **sampling: Any,
) -> list[Any]:  # fmt: skip
    """[(token ids, their log-probabilities, tokens that came from the prefix cache)].

    Args:
        fresh: read nothing from the cache. lora: an adapter, or None, for each.
    """
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True, logprobs=1,
            extra_args=None if s is None else s if isinstance(s, dict) else request_args(s), **sampling,
        )
        for s in chosen
    ]  # fmt: skip
    if fresh:
        for own in params:
            own.skip_reading_prefix_cache = True
    more = {} if lora is None else {"lora_request": lora}
    outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False, **more)
    found = []
    for out in outs:
        own = out.outputs[0]
        logs = [step[i].logprob for i, step in zip(own.token_ids, own.logprobs, strict=True)]
        found.append((list(own.token_ids), logs, out.num_cached_tokens))
    return found


def worst(found: list[Any], wanted: list[Any]) -> float:
    """The largest difference of a log-probability; infinite where a token differs."""
    error = 0.0
    for f, w in zip(found, wanted, strict=True):
        if f[0] != w[0]:
            return float("inf")
        error = max(error, *(abs(a - b) for a, b in zip(f[1], w[1], strict=True)))
    return error


def ledger(llm: Any) -> Any:
    """The plug-in's account in the one worker of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.attnsteer_ledger
