"""Settings that every test shares: no network, quiet libraries, fixed seeds, two threads."""

import os

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
