"""The prepared script for GPUs: that it finds what is wrong, keeps a record after each part, and runs at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu


def test_a_wrong_result_is_found() -> None:
    bench = gpu.Bench("cpu", 60)
    wanted = torch.ones(4)
    assert bench.judge("right", wanted + 1e-6, wanted, 1e-5, moved=torch.zeros(4))["right"]
    assert not bench.judge("off", wanted + 1e-4, wanted, 1e-5)["right"]
    assert not bench.judge("idle", wanted, wanted, 1e-5, moved=wanted)["right"]
    assert not bench.judge("NaN", wanted * torch.nan, wanted, 1e-5)["right"]
    assert bench.wrong == ["off", "idle", "NaN"]


def test_a_part_that_fails_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu, "PARTS", {"kernels": fails, "methods": lambda bench: [{"what": "x", "right": True}]})
    path = tmp_path / "deep" / "gpu.json"
    assert gpu.main(["--cpu", "--json", str(path)]) == 1
    record = json.loads(path.read_text())
    assert "no kernel image" in record["parts"]["kernels"]["error"] and record["wrong"] == ["kernels"]
    assert record["parts"]["methods"]["results"] == [{"what": "x", "right": True}]
    assert {"device", "torch", "commit", "versions"} <= set(record)
    assert "wrong: kernels" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        assert gpu.main(["--budget", "0"]) == 0
        return
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--cpu" in capsys.readouterr().err


@pytest.mark.long
def test_every_part_runs(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--cpu", "--budget", "1000", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert set(record["parts"]) == set(gpu.PARTS) and all(p["results"] for p in record["parts"].values())
