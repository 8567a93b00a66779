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
    # Not torch.manual_seed: without a GPU that keeps a formatted stack of each call, for three kinds of device.
    torch.default_generator.manual_seed(0)


# `make test-quick` leaves out what is marked `slow` (by the test itself) or `full` (here, in one place).
# Laws: these of them, on these methods and hosts, one or more of each kind of host and each door.
LAWS_SAMPLE = ("fires", "identity", "reference", "padding", "cache", "ways", "packed", "undo")
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
# Cases of one test that are alike: every run has the first of each so many, `make test-long` the others too.
SAMPLED = {
    "laws/test_zoo.py::test_a_right_method_passes_or_the_law_does_not_apply": 3,
    "laws/test_dense_reference.py::test_cached_decoding": 3,
    "laws/test_dense_reference.py::test_prefill": 3,
    "laws/test_vision_reference.py": 2,
    "test_user_method.py::test_laws": 5,
    "test_contract.py::test_a_wrong_answer_to_the_prompt": 3,
    "test_contract.py::test_a_wrong_answer_that_is_the_first_in_decoding": 3,
    "test_composition.py": 2,
    "test_gradients.py::test_the_gradient_is_that_of_finite_differences": 3,
    "test_testing.py": 2,
    "kernels/test_blocks.py::test_every_answer": 2,
    "kernels/test_masks.py": 2,
    "methods/test_act_exact.py::test_peaked_maps": 4,
    "methods/test_latent.py": 2,
    "methods/test_latent_pipelines.py": 2,
    "methods/test_refocusing.py": 2,
    "methods/test_attention_regulation.py": 2,
    "methods/test_conform.py::test_equal_to_the_authors_loop": 2,
    "hosts/sdpa/test_host.py::test_compiled": 2,
    "hosts/transformers/test_host.py::test_flex_attention_equals_sdpa": 2,
    "hosts/transformers/test_requests.py::test_steps_under_autocast": 4,
    "hosts/transformers/test_continuous.py::test_a_prompt_stays_whole_where_it_must": 3,
    "hosts/transformers/test_continuous.py::test_other_caches_and_kernels": 2,
    "hosts/diffusers/test_parity.py": 3,
    "hosts/diffusers/test_compile.py": 2,
    "hosts/diffusers/test_copies.py": 2,
    "hosts/diffusers/test_rescale.py": 3,
    "hosts/diffusers/test_more_pipelines.py": 2,
    "hosts/diffusers/test_families.py": 2,
    "reference/test_guidance_loops.py": 2,
    "search/test_calibration.py": 3,
    "evals/test_lm_eval.py": 2,
    "evals/test_continuations.py": 3,
    "run/test_run_recipes.py::test_a_shipped_recipe_runs_tiny": 3,
    "recipe/test_recipes.py::test_a_shipped_recipe_resolves_and_round_trips": 2,
}
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
SLOW = {line for line in (HERE / "slow.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")}


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
    for name, same in cases.items():
        step = next((n for start, n in SAMPLED.items() if name.removeprefix("tests/").startswith(start)), 1)
        for i, item in enumerate(same):
            if i % step:
                item.add_marker("long")
        quick = {id(same[0]), id(same[len(same) // 2]), id(same[-1])}
        for item in same:
            if not _is_quick(item, len(same) <= FEW_CASES or id(item) in quick):
                item.add_marker("full")


def _is_quick(item: pytest.Item, sampled: bool) -> bool:
    if item.path.relative_to(HERE).as_posix().startswith(FULL):
        return False
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if given.keys() >= {"law", "method", "host"}:
        return given["law"] in LAWS_SAMPLE and (given["method"].name, given["host"].name) in LAW_SAMPLE
    return sampled and item.nodeid.partition("[")[0].removeprefix("tests/") not in SLOW
