"""The doctor's checks: they pass here, they fail when a kernel is wrong, and they leave the machine as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attnsteer import doctor, kernels
from attnsteer.doctor import CASES, TOLERANCE, Check, check, examine, example, partition_error, sdpa_backend


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return examine(["cpu"])


def test_everything_passes_here(report: doctor.Report) -> None:
    assert report.ok and [c for c in report.checks if not c.ok] == []
    assert {(c.dtype, c.case) for c in report.checks} == {
        (str(d).removeprefix("torch."), case) for d in TOLERANCE for case in CASES
    }


def test_both_sources_of_the_cpu_are_checked(report: doctor.Report) -> None:
    assert {c.source for c in report.checks} == {"cpu-flash", "blockwise"}
    assert {c.backend for c in report.checks if c.case == "plain"} == {"flash"}
    assert {c.backend for c in report.checks if c.case == "soft cap"} == {""}


def test_errors_are_measured_and_far_below_the_tolerance(report: doctor.Report) -> None:
    assert all(0.0 < c.error < 0.2 * c.tolerance for c in report.checks)


def test_it_is_json(report: doctor.Report) -> None:
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["ok"] and record["devices"].keys() == {"cpu"}
    assert {"python", "torch", "attnsteer", "transformers"} <= record["versions"].keys()
    assert record["checks"][0] == {**vars(report.checks[0]), "ok": True}


def test_it_says_what_works_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = {f.name: f for f in doctor.features()}
    assert found["language and vision-language models"].works and found["pipelines and denoisers"].works
    assert found["embedded models"].works and "shapes-sd" in found["embedded models"].detail
    assert found["runs in this folder"].detail == str(tmp_path)
    monkeypatch.setattr(
        doctor, "version", lambda name: {"transformers": "6.0.1", "torch": "2.10.0"}.get(name, "0.40.0")
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = {f.name: f for f in doctor.features()}
    assert (
        not found["language and vision-language models"].works
        and "below 6" in found["language and vision-language models"].detail
    )
    assert not found["everything"].works and found["pipelines and denoisers"].works
    assert not found["compiled models"].works and "install g++" in found["compiled models"].detail
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = {f.name: f for f in doctor.features()}
    assert found["attnsteer serve"].detail == "pip install 'attnsteer[serve]'" and not found["attnsteer serve"].works
    assert not doctor._writable("x", Path("/proc/nowhere")).works


def test_optional_packages_are_found_without_importing_them() -> None:
    found = doctor.optional_packages()
    assert found.keys() == doctor.OPTIONAL.keys()
    assert found["matplotlib"] is None or found["matplotlib"][0].isdigit()


def test_the_thread_count_is_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        examine(["cpu"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_every_form_is_what_its_name_says(case: str) -> None:
    att = example(case, torch.float32, "cpu")
    dense = kernels.dense(att)
    total = dense.sum(dim=-1)
    upper = dense.triu(1).abs().sum()
    assert bool(upper == 0) == (case != "plain")
    blind = total[1, :, :5].sum() == 0
    assert bool(blind) == (case in ("padded", "float mask"))
    assert bool((total > 1e-3).all()) != bool(blind) and bool((total < 0.999).any()) == (case == "sinks" or bool(blind))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shift", [0.01, -0.01, 1.0])
def test_a_wrong_log_sum_exp_fails(case: str, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.attend_lse

    def wrong(att: Any) -> Any:
        out, lse = right(att)
        return out, lse + shift

    monkeypatch.setattr(kernels, "attend_lse", wrong)
    for dtype in TOLERANCE:
        assert not check("cpu", dtype, case).ok


def test_another_base_of_the_logarithm_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.attend_lse
    monkeypatch.setattr(kernels, "attend_lse", lambda att: (right(att)[0], right(att)[1] * 1.4427))
    assert not check("cpu", torch.float32, "plain").ok


def test_not_a_number_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.attend_lse

    def wrong(att: Any) -> Any:
        out, lse = right(att)
        lse[0, 0, 7] = float("nan")
        return out, lse

    monkeypatch.setattr(kernels, "attend_lse", wrong)
    found = check("cpu", torch.float32, "plain")
    assert not found.ok and found.error != found.error
    broken = doctor.Report({}, {}, {"cpu": ""}, (found,))
    assert not broken.ok and json.loads(json.dumps(broken.to_dict(), allow_nan=False))["checks"][0]["error"] is None


def test_a_kernel_that_raises_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(att: Any) -> Any:
        raise RuntimeError("no such kernel\nwith a long\ntraceback")

    monkeypatch.setattr(kernels, "attend_lse", wrong)
    found = check("cpu", torch.float32, "plain")
    assert not found.ok and found.problem == "RuntimeError: no such kernel"


def test_the_partition_covers_every_key_once() -> None:
    att = example("plain", torch.float32, "cpu")
    parts = doctor._partition(att)
    assert bool((sum(p.int() for p in parts) == 1).all()) and all(bool(p.any()) for p in parts)
    # One part is large enough for the path that runs the kernel again on a slice.
    assert max(int(p.sum()) for p in parts) >= kernels.groups.FUSED_SLICE
    assert partition_error(att) < 1e-5


def test_an_unknown_backend_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    att = example("plain", torch.float32, "cpu")
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert sdpa_backend(att) == ""


def test_ok_is_within_the_tolerance() -> None:
    make = lambda error, problem="": Check("cpu", "float32", "plain", "x", "", error, 1e-3, problem)  # noqa: E731
    assert make(1e-3).ok and not make(2e-3).ok and not make(float("nan")).ok and not make(0.0, "failed").ok


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernels_of_a_gpu_pass() -> None:
    report = examine(["cuda:0"])
    assert report.ok, [c for c in report.checks if not c.ok]
    assert {"cuda-flash", "cuda-efficient"} <= {c.source for c in report.checks}
