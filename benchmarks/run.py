"""Run the benchmark cases: correctness first, then ratios within one run.

    python benchmarks/run.py --case act-20 --case decode    # real shapes
    python benchmarks/run.py --quick                        # every case, small shapes, under a minute
    python benchmarks/run.py --json                         # also write benchmarks/results/<machine>.json

The status is 1 when a correctness gate fails, and 0 otherwise: a bar that is missed is printed, it is not an error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    # Run as a script: the folder on the path is this one, not the checkout.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks.cases import CASES, Case, Check  # noqa: E402
from benchmarks.measure import machine, machine_name  # noqa: E402

DEFAULT = ROOT / "benchmarks" / "results" / f"{machine_name()}.json"


def main(words: list[str] | None = None) -> int:
    """Parse, run, print; the exit status."""
    options = _parser().parse_args(words)
    if options.list:
        for case in CASES.values():
            print(f"{case.name:12} at most {case.bar:g}x  {case.what}")
        return 0
    names = options.case or list(CASES)
    mode = next((m for m in ("smoke", "quick") if getattr(options, m)), "full")
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    results = []
    for name in names:
        print(f"{name}: {CASES[name].what} ...", file=sys.stderr, flush=True)
        results.append(run(CASES[name], mode, options.threads))
        if options.json:
            # After each case, so that a later one cannot lose it.
            _write(Path(options.json), results)
    print(table(results))
    return 0 if all(r["gate"]["passed"] for r in results) else 1


def run(case: Case, mode: str, threads: int) -> dict[str, Any]:
    """One case as a JSON-able record; without timings when its gate fails."""
    size, begin = case.sizes[mode], time.perf_counter()
    about = machine(threads)
    gate = case.gate(size)
    record: dict[str, Any] = {
        "case": case.name,
        "what": case.what,
        "value": None,
        "bar": case.bar,
        "passed": False,
        "mode": mode,
        "gate": {
            "passed": gate.passed,
            "error": gate.error,
            "tolerance": gate.tolerance,
            "moved": gate.moved,
            "against": gate.against,
        },
        "shape": size.shape.to_dict(),
        "tokens": size.tokens,
        "dtype": "float32",
        **about,
    }
    if gate.passed:
        found = case.measure(size, threads)
        record |= {
            "value": found.value,
            "passed": found.value <= case.bar,
            "checks": [_check(c) for c in found.checks],
            "quiet": all(times.quiet for times in found.times.values()),
            "times": {name: times.to_dict() for name, times in found.times.items()},
            "more": found.more,
        }
    record["load_after"] = round(os.getloadavg()[0], 2)
    record["seconds"] = round(time.perf_counter() - begin, 1)
    return record


def table(results: list[dict[str, Any]]) -> str:
    """The verdicts as text."""
    rows = [("case", "value", "bar", "verdict", "gate", "seconds")]
    for r in results:
        gate = f"{r['gate']['error']:.1e}"
        if r["value"] is None:
            rows.append((r["case"], "-", f"<= {r['bar']:g}", "not timed", f"FAILED, {gate}", f"{r['seconds']:.0f}"))
            continue
        noise = "" if r["quiet"] else ", disturbed"
        verdict = ("met" if r["passed"] else "MISSED") + noise
        rows.append((r["case"], f"{r['value']:.3f}", f"<= {r['bar']:g}", verdict, gate, f"{r['seconds']:.0f}"))
        for c in r["checks"]:
            sign = ">=" if c["at_least"] else "<="
            verdict = ("met" if c["passed"] else "MISSED") + noise
            rows.append((f"  {c['what']}", f"{c['value']:.3f}", f"{sign} {c['bar']:g}", verdict, "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    first = results[0]
    dirty = " (changed)" if first["dirty"] else ""
    if not all(r.get("quiet", True) for r in results):
        lines += ["", "disturbed: other processes used the machine during most rounds; those figures say little."]
    lines += [
        "",
        f"{first['cpu']}, {first['threads']} threads of {first['cores']} cores, torch {first['torch']}, float32, "
        f"commit {first['commit']}{dirty}, {first['mode']} shapes; load {first['load']} before, {results[-1]['load_after']} after",
    ]
    return "\n".join(lines)


def _check(check: Check) -> dict[str, Any]:
    return {
        "what": check.what,
        "value": check.value,
        "bar": check.bar,
        "at_least": check.at_least,
        "passed": check.passed,
    }


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", action="append", choices=list(CASES), help="a case; repeat for several (default: all)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small shapes")
    size.add_argument("--smoke", action="store_true", help="tiny shapes, for tests of the benchmark itself")
    parser.add_argument(
        "--json", nargs="?", const=str(DEFAULT), metavar="PATH", help=f"write the results (default: {DEFAULT.name})"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
