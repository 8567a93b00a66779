"""`python -m attnsteer.testing.fuzz`: many random cases; failures as lines that run them again, and a summary."""

from __future__ import annotations

import argparse
import random
import shlex
import time
from collections import Counter

import torch

from .case import Case, draw
from .run import check


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a case is wrong."""
    parser = argparse.ArgumentParser(prog="python -m attnsteer.testing.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=Case.parse, help="run this one only, as a failure prints it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    source = random.Random(given.seed)
    cases = (
        [given.case] if given.case else (draw(lambda _, options: source.choice(options)) for _ in range(given.cases))
    )
    kinds, reasons, worst, start = Counter(), Counter(), 0.0, time.perf_counter()
    for case in cases:
        outcome = check(case)
        kinds[outcome.kind] += 1
        if outcome.kind == "refused":
            reasons[outcome.message.partition(":")[0] + ": " + outcome.message.partition(": ")[2][:100]] += 1
        elif outcome.kind == "exact":
            worst = max(worst, outcome.difference)
        else:
            print(
                f"wrong by {outcome.difference:.2g} ({outcome.message[:200]}): "
                f"python -m attnsteer.testing.fuzz --case {shlex.quote(str(case))}",
                flush=True,
            )
    print(
        f"{sum(kinds.values())} cases in {time.perf_counter() - start:.0f} s: {dict(kinds)}; largest difference {worst:.2g}"
    )
    for reason, count in reasons.most_common():
        print(f"  refused {count}: {reason}")
    return 1 if kinds["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
