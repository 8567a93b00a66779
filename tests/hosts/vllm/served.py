"""A tiny trained model that vLLM serves, and its server: shapes-lm with heads twice as wide, which computes the same."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[3]


def widened(folder: Path) -> Path:
    """shapes-lm with 32 lanes a head in place of 16, which no CPU kernel of vLLM takes; its logits are the same."""
    from transformers import LlamaForCausalLM

    from attnsteer import zoo

    path = folder / "shapes"
    source = zoo.folder("shapes-lm")
    model = LlamaForCausalLM.from_pretrained(source).float().eval()
    config = copy.deepcopy(model.config)
    H, K, d, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
    config.head_dim = 2 * d
    wide = LlamaForCausalLM(config).eval()
    # Pair i of d lanes turns as fast as pair 2i of 2d.
    lane = torch.cat([2 * torch.arange(d // 2), d + 2 * torch.arange(d // 2)])
    weights = {}
    for name, w in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            heads = w.view(-1, d, *w.shape[1:])
            new = heads.new_zeros(len(heads), 2 * d, *w.shape[1:])
            new[:, lane] = heads * (2**0.5 if "q_proj" in name else 1.0)
            w = new.reshape(-1, *w.shape[1:])
        elif "v_proj" in name:
            new = w.new_zeros(K, 2 * d, *w.shape[1:])
            new[:, :d] = w.view(K, d, *w.shape[1:])
            w = new.reshape(-1, *w.shape[1:])
        elif "o_proj.weight" in name:
            new = w.new_zeros(D, H, 2 * d)
            new[:, :, :d] = w.view(D, H, d)
            w = new.reshape(D, -1)
        weights[name] = w
    wide.load_state_dict(weights, strict=False)
    wide.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(source) / name, path)
    return path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Client:
    """Requests to a server on this machine."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"

    def call(self, path: str, body: Any = None, data: bytes | None = None) -> tuple[int, Any]:
        """(status, JSON or text)."""
        data = json.dumps(body).encode() if body is not None else data
        asked = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=120) as answer:
                status, raw = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, raw = error.code, error.read()
        try:
            return status, json.loads(raw or b"{}")
        except ValueError:
            return status, raw.decode(errors="replace")


@contextlib.contextmanager
def server(path: Path, settings: Any, log: Path, *options: str) -> Iterator[Client]:
    """A server of `path`, ended by its own process id."""
    port = free_port()
    env = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--served-model-name", "shapes",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
        "--max-num-seqs", "32", "--additional-config", json.dumps({"attnsteer": settings}), *options,
    ]  # fmt: skip
    client = Client(port)
    with log.open("w") as out:
        running = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            end = time.monotonic() + 300
            while True:
                try:
                    if client.call("/health")[0] == 200:
                        break
                except OSError:
                    pass
                if running.poll() is not None or time.monotonic() > end:
                    raise AssertionError("the server did not start:\n" + log.read_text()[-3000:])
                time.sleep(0.5)
            yield client
        finally:
            running.terminate()
            try:
                running.wait(30)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
