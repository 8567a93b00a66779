"""Importing the package is fast, loads no large library, and changes nothing anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGE = (
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "huggingface_hub",
    "numpy",
    "typer",
    "rich",
    "pydantic",
    "lm_eval",
)
# Seconds; the best of a few runs, because a busy machine can only make one slower.
LIMIT, RUNS = 0.15, 5


def python(code: str) -> str:
    """What a fresh interpreter prints when it runs `code`."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_is_fast() -> None:
    code = "import time; t = time.perf_counter(); import attnsteer; print(time.perf_counter() - t)"
    best = float("inf")
    for _ in range(RUNS):
        best = min(best, float(python(code)))
        if best < LIMIT:
            return
    raise AssertionError(f"import attnsteer takes {best:.3f} s at best")


@pytest.mark.parametrize("module", ["attnsteer", "attnsteer.testing", "attnsteer.errors", "attnsteer.registry"])
def test_the_import_loads_no_large_library(module: str) -> None:
    assert python(f"import sys, {module}; print(sorted(set({LARGE}) & set(sys.modules)))") == "[]"


def test_names_and_methods_are_listed_without_torch() -> None:
    code = "import sys, attnsteer; dir(attnsteer); attnsteer.methods(); print('torch' in sys.modules)"
    assert python(code) == "False"


def test_methods_and_selections_load_torch_only() -> None:
    code = f"""
import sys, attnsteer
for name in attnsteer.__all__: getattr(attnsteer, name)
attnsteer.ACT({{0: [1]}}), attnsteer.Where(layers=1)
print(sorted(set({LARGE}) & set(sys.modules) - {{"torch", "numpy"}}))
"""
    assert python(code) == "[]"


def test_a_model_of_neither_library_is_steered_without_loading_either() -> None:
    code = """
import sys, torch, attnsteer
class Attention(torch.nn.Module):
    num_heads = 2
    def forward(self, x):
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
model, x = Attention(), torch.randn(1, 3, 8)
with attnsteer.steer(model, attnsteer.HeadGate({(0, 1): 0.0})): y = model(x)
assert not y[..., 4:].any() and y[..., :4].any()
print(sorted({"transformers", "diffusers"} & set(sys.modules)))
"""
    assert python(code) == "[]"


def test_the_import_changes_nothing_in_the_libraries() -> None:
    code = """
import importlib, json, sys, warnings, logging
import torch, transformers, diffusers
from transformers import masking_utils, modeling_utils
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as backends

def state():
    return {
        "attention": {k: id(v) for k, v in modeling_utils.ALL_ATTENTION_FUNCTIONS.items()},
        "masks": {k: id(v) for k, v in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.items()},
        "backends": sorted(map(str, backends._backends)),
        "processors": {k: id(v) for k, v in vars(attention_processor).items()},
        "calls": {k: id(vars(v).get("__call__")) for k, v in vars(attention_processor).items() if isinstance(v, type)},
        "functional": {k: id(v) for k, v in vars(torch.nn.functional).items()},
        "module": {k: id(v) for k, v in vars(torch.nn.Module).items()},
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "seed": torch.initial_seed(),
        "rng": int(torch.get_rng_state().sum()),
        "filters": len(warnings.filters),
        "handlers": len(logging.getLogger().handlers),
        "hooks": [len(sys.meta_path), len(sys.path_hooks)],
    }

before = state()
import attnsteer
for name in attnsteer.__all__: getattr(attnsteer, name)
from attnsteer.hosts import diffusers, sdpa, transformers
for host in (diffusers, sdpa, transformers): importlib.import_module(host.__name__ + ".host")
import attnsteer.testing, attnsteer.kernels
after = state()
print(json.dumps([k for k in before if before[k] != after[k]]))
"""
    assert json.loads(python(code)) == []
