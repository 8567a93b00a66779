"""Runs one engine in a process of its own: python run_engine.py WORK.json, which gets `answers` for each round of requests."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    """Answer the requests that `work` names, as often as it says."""
    from tests.hosts.vllm import engines as E

    work = json.loads(path.read_text())
    if work.get("triton"):
        triton_attention()
    prompts, chosen = E.requests(work["count"], seed=work["seed"], longest=work["longest"])
    llm = E.engine(Path(work["model"]), **work["options"])
    tokens = work.get("tokens", E.TOKENS)
    work["answers"] = [E.answers(llm, prompts, chosen, tokens) for _ in range(work["rounds"])]
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    if layers:
        # They are in this process.
        work["classes"] = sorted({type(l.impl).__mro__[1].__name__ for l in layers.values()})
    path.write_text(json.dumps(work))


def triton_attention() -> None:
    """vLLM's Triton attention, a backend of CUDA, in place of that of CPU."""
    import torch
    import vllm.v1.attention.backends.triton_attn as backend
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    name = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
    register_backend(AttentionBackendEnum.CPU_ATTN, name)
    backend.TritonAttentionBackend.supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]
    torch.cuda.get_device_capability = lambda *a, **k: (9, 0)
    type(current_platform).num_compute_units = classmethod(lambda cls, device_id=0: 4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
