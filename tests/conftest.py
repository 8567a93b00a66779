"""Settings that every test shares: no network, quiet libraries, fixed seeds, one thread; and which tests are quick."""

import gc
import os
from pathlib import Path

# before any import that reads them
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    DIFFUSERS_VERBOSITY="error",
)

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same examples in every run, and no deadline: the first call of a kernel may be slow.
settings.register_profile("attnsteer", deadline=None, derandomize=True)
settings.load_profile("attnsteer")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# `make test-quick` leaves out what is marked `slow` (by the test itself) or `full` (here, in one place).
# Laws: all of them, on these methods and hosts, one or more of each kind of host and each door.
LAW_SAMPLE = {
    ("HeadGate", "gpt2"),
    ("ACT", "llama"),
    ("ZeroTuning", "mistral"),
    ("SpotLight", "t5"),
    ("PASTA", "gpt_oss"),
    ("VAR", "llava"),
    ("HeadGate", "flux"),
    ("PAG", "sd-pipeline"),
}
# Any other test of more cases than this is quick for the first, the middle and the last of them only.
FEW_CASES = 3
# Whole runs, trainings, programs and browsers: the modules that they put together have quick tests of their own.
FULL = (
    "run/",
    "zoo/",
    "search/",
    "results/test_report_browser.py",
    "viz/test_pages_browser.py",
    "evals/test_lm_eval.py",
    "evals/test_lmms_eval.py",
    "test_benchmarks.py",
    "test_cli.py",
)
HERE = Path(__file__).parent


def pytest_collection_finish() -> None:
    """What the imports made stays to the end, so that no collection of garbage has to look through it."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out of `make test-quick`; given by tests/conftest.py only")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for same in cases.values():
        quick = {id(same[0]), id(same[len(same) // 2]), id(same[-1])}
        for item in same:
            if not _is_quick(item, len(same) <= FEW_CASES or id(item) in quick):
                item.add_marker("full")


def _is_quick(item: pytest.Item, sampled: bool) -> bool:
    if item.path.relative_to(HERE).as_posix().startswith(FULL):
        return False
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if given.keys() >= {"law", "method", "host"}:
        return given["law"] != "compile" and (given["method"].name, given["host"].name) in LAW_SAMPLE
    return sampled
