"""What the tests of runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run.running import recipe


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of the recipe of passages; tests leave it as it is."""
    from attnsteer.run import run

    base = tmp_path_factory.mktemp("whole")
    return run(recipe(base), base / "run", progress=False)
