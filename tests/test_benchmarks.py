"""The benchmark runner: its list, the form of its results, its gate, and how it counts disturbed rounds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, guidance, measure, run
from benchmarks.models import llama, prompt, twin

ROOT = Path(__file__).resolve().parent.parent
NAMES = [
    "act-20",
    "act-all",
    "decode",
    "per-sample",
    "compose",
    "short",
    "idle",
    "prefill-32k",
    "var",
    "vhr",
    "vision-decode",
    "block-mask",
    "token-merge",
    "visual-tokens",
    "cfg-pag",
    "cfg-softpag",
    "cfg-slg",
    "nag",
    "latent-step",
]


@pytest.fixture(autouse=True)
def _gradients() -> Any:
    """The runner turns gradients off and sets threads for its process; here other tests follow."""
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_the_list_names_every_case_and_its_bar() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/run.py", "--list"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == NAMES == list(cases.CASES)
    assert "1.15x" in lines[0] and "1.38x" in lines[-5] and "0.75x" in lines[-1]


def test_an_unknown_case_is_refused_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--case", "act-21"])
    assert stop.value.code == 2
    assert "act-20" in capsys.readouterr().err


@pytest.mark.long
def test_results_have_the_documented_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "results.json"
    names = ["act-20", "decode", "idle"]
    words = list(itertools.chain.from_iterable(("--case", name) for name in names))
    assert run.main(["--smoke", "--threads", "1", "--json", str(path), *words]) == 0
    results = json.loads(path.read_text())
    assert [r["case"] for r in results] == names
    for r in results:
        assert isinstance(r["value"], float) and r["value"] > 0 and math.isfinite(r["value"])
        assert r["passed"] is (r["value"] <= r["bar"])
        assert r["gate"]["passed"] and r["gate"]["error"] <= r["gate"]["tolerance"]
        assert r["mode"] == "smoke" and r["dtype"] == "float32" and r["threads"] == 1
        assert r["shape"]["layers"] == 2 and r["tokens"] == 128
        assert {"machine", "cpu", "cores", "torch", "versions", "commit", "dirty", "load", "seconds"} <= set(r)
        for times in r["times"].values():
            assert set(times["medians_s"]) == set(times["samples_s"])
            assert all(len(s) == times["rounds"] == len(times["foreign_share"]) for s in times["samples_s"].values())
    first = results[0]
    assert [c["bar"] for c in first["checks"]] == [4.0, 4.0]
    assert first["more"]["heads_steered"] == 2 and first["more"]["mean_sinks_per_head"] >= 1
    table = capsys.readouterr().out
    assert all(name in table for name in names) and "threads" in table.splitlines()[-1]


def test_a_failed_gate_is_an_error_and_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def never(size: Any, threads: int) -> Any:
        raise AssertionError("timed although the gate failed")

    wrong = cases.Gate(error=1.0, tolerance=1e-5, moved=1.0, against="nothing")
    case = dataclasses.replace(cases.CASES["idle"], gate=lambda size: wrong, measure=never)
    monkeypatch.setitem(cases.CASES, "idle", case)
    path = tmp_path / "results.json"
    assert run.main(["--smoke", "--case", "idle", "--json", str(path)]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert json.loads(path.read_text())[0]["value"] is None


def test_a_missed_bar_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slow = cases.Outcome(9.0, [cases.Check("speed-up", 3.0, 4.0, at_least=True)])
    good = cases.Gate(error=0.0, tolerance=1e-5, moved=1.0, against="itself")
    case = dataclasses.replace(cases.CASES["idle"], gate=lambda size: good, measure=lambda size, threads: slow)
    monkeypatch.setitem(cases.CASES, "idle", case)
    assert run.main(["--smoke", "--case", "idle"]) == 0
    assert capsys.readouterr().out.count("MISSED") == 2


def test_a_gate_over_an_edit_that_does_nothing_fails() -> None:
    assert not cases.Gate(error=0.0, tolerance=1e-5, moved=1e-6, against="").passed
    assert cases.Gate(error=0.0, tolerance=0.0, moved=0.0, against="").passed


def test_the_gates_see_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    size = cases.CASES["act-20"].sizes["smoke"]
    monkeypatch.setattr(cases.dense.DenseACT, "_edit", lambda self, A: None)
    cases.gate_prefill.cache_clear()
    assert not cases.gate_prefill(size.shape, size.gate, 0.2).passed
    cases.gate_prefill.cache_clear()


def test_the_gates_of_methods_on_images() -> None:
    for name in ("var", "vhr"):
        case = cases.CASES[name]
        assert case.gate(case.sizes["smoke"]).passed


def test_disturbed_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, shares = iter([1.0, 2.0, 9.0, 9.0, 1.0, 2.0]), iter([0.0, 0.05, 0.0, 0.5, 0.0, 0.0])
    monkeypatch.setattr(measure, "timed", lambda call, calls: (next(seconds), next(shares)))
    monkeypatch.setattr(measure, "_wait_for_quiet", lambda until: None)
    times = measure.interleaved({"a": list, "b": list}, 2, warmup=0, patience=60.0)
    # Each round starts with another arm, so the second one is timed the other way round.
    assert times.rounds == {"a": [1.0, 9.0, 1.0], "b": [2.0, 9.0, 2.0]}
    assert times.foreign == [0.05, 0.5, 0.0] and times.quiet
    assert times.ratio("b", "a") == 2.0


def test_too_few_undisturbed_rounds_are_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "timed", lambda call, calls: (1.0, 0.9))
    times = measure.interleaved({"a": list}, 3, warmup=0)
    assert times.rounds == {"a": [1.0, 1.0, 1.0]} and not times.quiet
    assert times.to_dict()["rounds_kept"] == 3


@pytest.mark.parametrize(("threads", "share"), [(1, 0.0), (2, 0.375), (4, 0.375)])
def test_cores_that_our_threads_leave_free_are_no_disturbance(
    monkeypatch: pytest.MonkeyPatch, threads: int, share: float
) -> None:
    """Two cores, four seconds, five seconds of work on the machine, two of them ours: others took 0.75 cores on average."""
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    clocks = {"_busy": iter([100.0, 105.0]), "perf": iter([10.0, 14.0]), "own": iter([1.0, 3.0])}
    monkeypatch.setattr(measure, "_busy", lambda: next(clocks["_busy"]))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clocks["perf"]))
    monkeypatch.setattr(measure.time, "process_time", lambda: next(clocks["own"]))
    assert measure.timed(lambda: None) == (4.0, pytest.approx(share))


def test_a_twin_shares_weights_and_nothing_else() -> None:
    shape = cases.SMOKE
    model = llama(shape, 64)
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.config is not model.config
    ids = prompt(shape, 64, 4)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_heads_are_spread_over_the_layers() -> None:
    heads = cases.share_of_heads(cases.FULL, 0.2)
    assert len(heads) == 13 and sorted(len(heads[layer]) for layer in heads.layers) == [6, 7]


@pytest.mark.long
def test_the_latent_case_compares_with_the_built_in_pipeline() -> None:
    case = cases.CASES["latent-step"]
    size = case.sizes["smoke"]
    gate = case.gate(size)
    assert gate.passed and gate.error < 1e-8 < 1e-3 < gate.moved
    found = case.measure(size, 1)
    assert set(found.times["step"].rounds) == {"built-in", "steered", "without"} and found.value > 0


@pytest.mark.long
def test_peak_memory_is_that_of_the_arm() -> None:
    size = cases.CASES["prefill-32k"].sizes["smoke"]
    request = {"shape": size.shape.to_dict(), "tokens": 2048, "share": 0.2}
    # The parent's own peak must not show in the child's.
    ballast = torch.zeros(64 << 20)
    found = measure.peak_memory("unsteered", request, 1)
    del ballast
    assert found["finite"] and 0 < found["bytes"] < 128 << 20


@pytest.mark.parametrize("name", ["cfg-softpag", "cfg-slg", "nag"])
def test_the_guidance_cases_stand_beside_independent_arithmetic(name: str) -> None:
    case = cases.CASES[name]
    size = case.sizes["smoke"]
    gate = case.gate(size)
    assert gate.passed and gate.error < 1e-5 < 1e-3 < gate.moved
    if name != "nag":
        bound = {"cfg-softpag": guidance.softpag_bound, "cfg-slg": guidance.slg_bound}[name](size.shape, size.tokens)
        # More than CFG, less than a third row of the whole model.
        assert 1.1 < bound < 1.5
