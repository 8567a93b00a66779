"""The demonstration as text, part by part while it runs, and the page in the end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from . import zoo
from .demo import run_demo
from .demo_page import write
from .showcase import REAL, WITHOUT_GAIN, Cost, Example, Part, Row, Sheet, cost, showcase

WIDTH = 24


def show(verdict: str, out: Path, names: Sequence[str] | None = None) -> bool:
    """Run all of it and print it; whether everything did what it should.

    Args:
        verdict: of the kernels. out: folder of the page and its pictures. names: see `showcase`.
    """
    out.mkdir(parents=True, exist_ok=True)
    print(
        "Published methods edit the attention of a model while it runs. Here: small models, samples that no setting was"
    )
    print("chosen on, 95 % intervals of the paired change. [[...]] is what a method is told to attend to.", flush=True)
    parts: list[Part] = []
    sheets: list[Path] = []
    for part in showcase(names):
        parts.append(part)
        if isinstance(part, Sheet):
            sheets.append(_save(part, out / f"{part.model}-{len(sheets) + 1}.png"))
        else:
            print("\n" + (_row(part) if isinstance(part, Row) else _example(part)), flush=True)
    exact, spent = run_demo(), None if names else cost()
    print(f"\n{verdict}. The same edit over the full attention map differs by {exact.exact:.0e} in a logit at most;")
    print(f"taken off again, the model is what it was, bit for bit: {'yes' if exact.restored else 'NO'}.")
    if spent is not None:
        print(_cost(spent))
    print(f"\n{WITHOUT_GAIN}")
    if REAL not in zoo.present():
        print(f"A real language model beside these: attnsteer zoo fetch {REAL} (93 MB, once).")
    print(f"\nThe same with pictures: {write(out / 'index.html', verdict, exact, parts, spent, sheets).resolve()}")
    return exact.ok and all(part.fired for part in parts if isinstance(part, Row))


def _save(sheet: Sheet, path: Path) -> Path:
    from .viz import contact_sheet

    labels, images = zip(*sheet.rows, strict=True)
    contact_sheet(images, rows=labels, columns=sheet.prompts, path=path)
    return path


def _bar(share: float) -> str:
    full = round(WIDTH * share)
    return "#" * full + "." * (WIDTH - full)


def _row(row: Row) -> str:
    change = "{:+.0f} points [{:+.0f}, {:+.0f}]".format(*(100 * v for v in row.change))
    lines = [f">>> {row.code}", f"{row.figure}: {change}"]
    shares = [("as it is", row.before), ("with the method", row.after)]
    if row.control is not None:
        shares.append(row.control)
    return "\n".join([*lines, *(f"  {name:<20}{_bar(share)} {share:4.0%}" for name, share in shares)])


def _example(example: Example) -> str:
    before, marked, behind = example.text
    lines = textwrap.wrap(f"{example.model}: {before}[[{marked}]]{behind} ...", 110)
    lines.append(f"  {'answer':<20}before  after    ({example.note})")
    for i, choice in enumerate(example.choices):
        name = f"{choice}{' (right)' if i == example.answer else ''}"
        lines.append(f"  {name:<20}{example.before[i]:6.1%} {example.after[i]:6.1%}")
    return "\n".join(lines)


def _cost(cost: Cost) -> str:
    plain = cost.seconds["plain"]
    each = [
        f"{name} {seconds / plain:.2f}x, {cost.memory[name] / 1e6:.0f} MB" for name, seconds in cost.seconds.items()
    ]
    return (
        f"{cost.method}, a prefill of {cost.tokens:,} tokens, time and memory added: {'; '.join(each)} (which any edit of "
        "written-out maps costs at least)."
    )
