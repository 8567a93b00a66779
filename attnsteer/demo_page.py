"""The page of the demonstration: one file with its pictures inside, which loads nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from .demo import DemoResult
from .showcase import WITHOUT_GAIN, Cost, Example, Part, Row, Sheet

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin: 0 }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-top: 1px solid #d5dae0; padding-top: 1rem }
p { margin: .5rem 0 }
code, pre { font: 14px/1.5 ui-monospace, monospace; background: #f2f4f7; border-radius: 4px }
pre { padding: .5rem .75rem; overflow-x: auto; margin: .75rem 0 .5rem }
code { padding: .1rem .3rem }
mark { background: #ffe08a; padding: .1rem .15rem; border-radius: 3px }
blockquote { margin: .75rem 0; padding: .5rem 1rem; background: #f8f9fb; border-left: 4px solid #c5ccd6 }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .3rem .75rem; align-items: center;
  margin: .5rem 0 }
.track { background: #eef1f4; height: 1.1rem; position: relative; border-radius: 3px }
.track i { display: block; height: 100%; border-radius: 3px; background: #aab4c0 }
.track i.with { background: #1f6feb }
.track:has(.last) { margin-bottom: .5rem }
.track i.control { background: #d9b48f }
.track b { position: absolute; top: .5rem; height: 2px; background: #0b2a5b }
.num { font-variant-numeric: tabular-nums; text-align: right }
.right { font-weight: 600 }
.note { color: #57606a; font-size: .9rem }
figure { margin: 1rem 0 }
figure img { width: 100%; image-rendering: pixelated }
table { border-collapse: collapse }
td, th { padding: .2rem .8rem .2rem 0; text-align: left }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums }
"""


def write(
    path: Path, verdict: str, exact: DemoResult, parts: Sequence[Part], cost: Cost | None, sheets: Sequence[Path]
) -> Path:
    """Write the page.

    Args:
        verdict: of the kernels. sheets: the pictures, in the order of the `Sheet`s among `parts`.
    """
    pictures = iter(sheets)
    body = [
        "<h1>attnsteer</h1>",
        "<p>Published methods edit the attention of a trained model while it runs, and make it better at something. Here "
        "they act on small models, before and after, on samples that no setting was chosen on. The line on grey is all there "
        "is to write.</p>",
        '<p class="note">Bars: <b>grey</b> the model as it is, <b>blue</b> with the method, <b>brown</b> a control; the dark '
        "line is the 95 % interval of the difference. <mark>Marked</mark> words are those the method is told to attend to.</p>",
    ]
    model = None
    for part in parts:
        if part.model != model:
            model = part.model
            body.append(f"<h2>{html.escape(model)}</h2>")
        if isinstance(part, Row):
            body.append(_row(part))
        elif isinstance(part, Example):
            body.append(_example(part))
        elif isinstance(part, Sheet):
            body.append(_sheet(part, next(pictures)))
    body += ["<h2>Exact, and as fast as the model</h2>", _exact(verdict, exact)]
    if cost is not None:
        body.append(_cost(cost))
    body += ["<h2>What did not help</h2>", f"<p>{html.escape(WITHOUT_GAIN)}</p>"]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>attnsteer: a demonstration</title><style>{STYLE}</style>'
    path.write_text(page + "\n".join(body) + "</html>\n", encoding="utf-8")
    return path


def _bar(
    label: str, share: float, kind: str, low: float | None = None, high: float | None = None, right: bool = False
) -> str:
    line = ""
    if low is not None and high is not None:
        low, high = max(0.0, low), min(1.0, high)
        line = f'<b style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></b>'
    name = f'<span class="right">{html.escape(label)}</span>' if right else f"<span>{html.escape(label)}</span>"
    return (
        f'{name}<div class="track"><i class="{kind}" style="width:{100 * share:.1f}%"></i>{line}</div>'
        f'<span class="num">{100 * share:.0f} %</span>'
    )


def _row(row: Row) -> str:
    low, high = (row.before + v for v in (row.change.low, row.change.high))
    bars = [_bar("as it is", row.before, ""), _bar("with the method", row.after, "with", low, high)]
    if row.control is not None:
        bars.append(_bar(row.control[0], row.control[1], "control"))
    change = "{:+.0f} points [{:+.0f}, {:+.0f}]".format(*(100 * v for v in row.change))
    return (
        f"<pre>{html.escape(row.code)}</pre><p>{html.escape(row.figure)}: <b>{change}</b></p>"
        f'<div class="bars">{"".join(bars)}</div>'
    )


def _example(example: Example) -> str:
    before, marked, behind = (html.escape(t).replace("\n", "<br>") for t in example.text)
    bars = []
    for i, choice in enumerate(example.choices):
        right = i == example.answer
        bars.append(_bar(f"{choice}{' (right)' if right else ''}", example.before[i], "", right=right))
        bars.append(_bar("", example.after[i], "with last"))
    return (
        f"<pre>{html.escape(example.code)}</pre><blockquote>{before}<mark>{marked}</mark>{behind} <b>...</b></blockquote>"
        f'<p>How likely each answer is, before and after ({html.escape(example.note)}):</p><div class="bars">{"".join(bars)}</div>'
    )


def _sheet(sheet: Sheet, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="pictures before and after" src="data:image/png;base64,{data}">'
        f'<figcaption class="note">{html.escape(sheet.legend)}</figcaption></figure>'
    )


def _exact(verdict: str, exact: DemoResult) -> str:
    gone = "the model's own, bit for bit" if exact.restored else "NOT the model's own"
    return (
        f"<p>{html.escape(verdict)}. The same edit over the full attention map differs by at most {exact.exact:.0e} in a logit; "
        f"after the method is taken off, the answers are {gone}.</p>"
    )


def _cost(cost: Cost) -> str:
    plain = cost.seconds["plain"]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{1000 * s:.0f} ms</td><td>{s / plain:.2f}x</td>"
        f"<td>{cost.memory[name] / 1e6:.0f} MB</td></tr>"
        for name, s in cost.seconds.items()
    )
    return (
        f"<p>{html.escape(cost.method)}, one prefill of {cost.tokens:,} tokens. An edit of maps that are written out costs at "
        "least the last row, which is the model without any edit.</p>"
        f"<table><tr><th></th><th>time</th><th></th><th>memory added</th></tr>{rows}</table>"
    )
