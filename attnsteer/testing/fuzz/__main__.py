"""`python -m attnsteer.testing.fuzz`: many random cases; failures as lines that run them again, and a summary."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import time
from collections import Counter

import torch

from .case import Case, cases
from .run import check


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a case is wrong."""
    parser = argparse.ArgumentParser(prog="python -m attnsteer.testing.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=Case.parse, help="run this one only, as a failure prints it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    drawn = [given.case] if given.case else itertools.islice(cases(given.seed), given.cases)
    kinds, reasons, worst, start = Counter(), Counter(), 0.0, time.perf_counter()
    for case in drawn:
        outcome = check(case)
        kinds[outcome.kind] += 1
        worst = max(worst, outcome.difference if outcome.kind == "exact" else 0.0)
        if outcome.kind in ("refused", "impossible"):
            # Numbers and names of modules are those of the case.
            reasons[outcome.kind + " by " + re.sub(r"\S+\.\S+|\d+", "_", outcome.message)[:140]] += 1
        elif outcome.kind == "wrong":
            print(f"wrong by {outcome.difference:.2g} ({outcome.message[:200]}): {again(case)}", flush=True)
    print(
        f"{sum(kinds.values())} cases in {time.perf_counter() - start:.0f} s: {dict(kinds)}; largest difference {worst:.2g}"
    )
    for reason, count in reasons.most_common():
        print(f"  {count}: {reason}")
    return 1 if kinds["wrong"] else 0


def again(case: Case) -> str:
    """The command that runs a case again."""
    return f"python -m attnsteer.testing.fuzz --case {shlex.quote(str(case))}"


if __name__ == "__main__":
    raise SystemExit(main())
