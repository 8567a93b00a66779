"""Engines in processes of their own: tensor and pipeline parallel workers, the second model runner, an interpreted backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.hosts.vllm import engines as E

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[3]
CLOSE = 1e-4
SECOND = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TEST_TRITON_ON_CPU": "1"}
CASES = {
    "two shards": dict(options=dict(tensor_parallel_size=2), env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
    "two stages": dict(
        options=dict(pipeline_parallel_size=2, enforce_eager=False), env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    ),
    "second runner": dict(options=dict(block_size=32, max_num_batched_tokens=96), env=SECOND, rounds=2),
    "triton": dict(options=dict(block_size=32), env=SECOND, triton=True, longest=60, tokens=3),
}


@pytest.mark.parametrize("case", CASES)
def test_an_engine_of_its_own(case: str, tmp_path: Path) -> None:
    model = E.saved("llama", tmp_path)
    work: dict[str, Any] = {
        "model": str(model),
        "count": 8,
        "seed": 4,
        "longest": 200,
        "rounds": 1,
        "tokens": E.TOKENS,
    }
    work |= {k: v for k, v in CASES[case].items() if k != "env"}
    prompts, chosen = E.requests(work["count"], seed=4, longest=work["longest"])
    wanted = E.oracle(model, prompts, chosen, work["tokens"])
    assert min(w[2] for w in wanted) > 2e-5
    asked = tmp_path / "work.json"
    asked.write_text(json.dumps(work))
    env = {**os.environ, **CASES[case]["env"], "PYTHONPATH": f"{ROOT}:{Path(__file__).parent / 'interpreted'}"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "run_engine.py"), str(asked)], env=env, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    found = json.loads(asked.read_text())
    for answers in found["answers"]:
        assert E.worst(answers, wanted) < CLOSE
    if "classes" in found:
        assert found["classes"] == (["TritonAttentionImpl"] if work.get("triton") else ["CPUAttentionBackendImpl"])
