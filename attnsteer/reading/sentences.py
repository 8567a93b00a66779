"""Maps in words: a plain sentence about where a row looks; and the ledger of a score as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.circuits import Ledger
from ..capturing import capture
from ..errors import SelectionError, brief
from ..parameters import whole
from ..where import Where
from ._vision import image_grid

# Parts of less than this are left out, as "the rest".
LEAST = 0.1
MOST = 3
# A map whose strongest ninth has less than this is said to have no place; a ninth of a uniform one is 1/9.
CLEAR = 0.25
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
BAR = 24


def place_of(found: Tensor) -> tuple[str, float]:
    """(name of the ninth of the image with the largest share of a map [h, w], that share); cells count by the overlap of areas.

    Raises:
        SelectionError: the map is negative, zero or not finite.
    """
    if (
        found.ndim != 2
        or not bool(torch.isfinite(found).all())
        or bool((found < 0).any())
        or not float(found.sum()) > 0
    ):
        raise SelectionError(
            f"a map of the shape {list(found.shape)} that is zero, negative or not finite has no place."
        )
    down, across = (_thirds(n).to(found) for n in found.shape)
    shares = down @ found @ across.T / found.sum()
    y, x = divmod(int(shares.argmax()), 3)
    return PLACES[y][x], float(shares[y, x])


def _thirds(n: int) -> Tensor:
    """[3, n]: the share of each of n cells that is in each third of their axis."""
    start, stop = torch.arange(n) * 3 / n, (torch.arange(n) + 1) * 3 / n
    third = torch.arange(3)[:, None]
    return (torch.minimum(stop, third + 1.0) - torch.maximum(start, third + 0.0)).clamp_min(0) * n / 3


def sentence(
    row: Tensor,
    labels: Sequence[str],
    image: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    subject: str = "the row",
) -> str:
    """A sentence about where a row of a map looks: up to three parts of a tenth or more, largest first.

    Args:
        row: [m], not negative. labels: one for each key. image: bool [m], which keys are the image's; together one part, with the
            ninth of the image that has the most of it. grid: (height, width) of these. subject: what the row is.

    Raises:
        SelectionError: lengths that do not fit, or a row that is zero or not finite.
    """
    row = torch.as_tensor(row, dtype=None if isinstance(row, Tensor) else torch.float32)
    if row.ndim != 1 or len(labels) != len(row) or not float(row.sum()) > 0 or not bool(torch.isfinite(row).all()):
        raise SelectionError(f"a row of the shape {list(row.shape)} and {len(labels)} labels; give one for each key.")
    row = row.detach().double().cpu() / float(row.detach().sum())
    parts: list[tuple[float, str]] = []
    inside = torch.zeros(len(row), dtype=torch.bool) if image is None else image.cpu()
    if bool(inside.any()):
        parts.append((float(row[inside].sum()), _of_image(row[inside], grid)))
    # A word that stands several times is one part for each place.
    parts += [(float(row[j]), repr(labels[j].strip())) for j in range(len(row)) if not bool(inside[j])]
    parts.sort(key=lambda part: -part[0])
    shown = [part for part in parts if part[0] >= LEAST][:MOST]
    if not shown:
        most = f"{100 * parts[0][0]:.0f} % at most, on {parts[0][1]}"
        return f"{subject} looks at nothing in particular ({most})."
    text = ", ".join(f"{100 * share:.0f} % on {what}" for share, what in shown)
    rest = 1 - sum(share for share, _ in shown)
    return f"{subject} looks {text}" + (f", and {100 * rest:.0f} % on the rest." if rest >= 0.005 else ".")


def _of_image(row: Tensor, grid: tuple[int, int] | None) -> str:
    if grid is None or not float(row.sum()) > 0:
        return "the image"
    place, share = place_of(row.view(grid))
    return f"the image, mostly at its {place}" if share >= CLEAR else "the image, nowhere in particular"


@torch.no_grad()
def in_words(
    model: nn.Module,
    inputs: Mapping[str, Any],
    tokenizer: Any,
    layer: int,
    head: int | None = None,
    row: int | str = "last",
    *,
    grid: Any = None,
) -> str:
    """A sentence about where a row of one text looks, in one head or in the mean of a layer's.

    Args:
        inputs: of the model's forward, one sample. row: a token's number, or "last". grid: (height, width) in image tokens where
            the model does not tell.

    Raises:
        SelectionError: no such layer, head or row; several samples.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or len(ids) != 1:
        raise SelectionError("in_words: give the input_ids of one text.")
    number = ids.shape[1] - 1 if row == "last" else whole(row)
    if number is None or not 0 <= number < ids.shape[1]:
        raise SelectionError(f"in_words(row={brief(row)}): the text has {ids.shape[1]} tokens, counted from 0.")
    where = Where(layers=[layer], kinds="self", heads=None if head is None else [head])
    with capture(model, where, rows=[number]) as seen:
        model(**inputs)
    found = seen.get(sample=0)[:, 0].mean(dim=0)
    labels = [tokenizer.decode([i]) for i in ids[0].tolist()]
    marks = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")]
    image = torch.isin(ids[0].cpu(), torch.tensor([m for m in marks if isinstance(m, int)], dtype=ids.dtype))
    cells = image_grid(model, inputs, int(image.sum()), grid) if bool(image.any()) else None
    who = f"{labels[number].strip()!r} (token {number}) in layer {layer}" + ("" if head is None else f", head {head},")
    return sentence(found, labels, image, cells, who)


def signals(ledger: Ledger, share: float = 1.0) -> Tensor:
    """int64: the singular directions that make a score, largest term first: the smallest prefix whose sum exceeds `share` of the
    whole (Franco, Crovella 2024, section 3.2 of arXiv 2410.00340 as their code has it: with 1, the positive terms that pass it).

    Raises:
        SelectionError: the score is not positive, of which the rule does not speak.
    """
    terms = ledger.directions
    total = float(terms.sum())
    if not 0 < share <= 1 or total <= 0:
        raise SelectionError(
            f"signals(share={brief(share)}) of a score of {total:.3g}: a share of 0 to 1 of a positive score."
        )
    order = terms.argsort(descending=True)
    passed = terms[order].cumsum(dim=0) >= share * total - 1e-9 * abs(total)
    return order[: int(passed.int().argmax()) + 1]


def trace_view(ledger: Ledger, count: int = 8) -> str:
    """A `Ledger` as a table in plain text: the largest parts that wrote the score, and the singular directions that carry it.

    Args:
        count: of parts and of directions that are shown; the others are one line.
    """
    if whole(count) is None or count < 1:
        raise SelectionError(f"trace_view(count={brief(count)}): give a number of lines.")
    shown = ledger.top(count)
    lines = [f"score {ledger.score:+.3f}", "", "written by"]
    rest = sum(ledger.parts.values()) - sum(v for _, v in shown)
    lines += _bars(
        [(_part(name), v) for name, v in shown] + ([("others", rest)] if len(ledger.parts) > len(shown) else [])
    )
    terms = ledger.directions.tolist()
    order = sorted(range(len(terms)), key=lambda k: -abs(terms[k]))[:count]
    rest = sum(terms) - sum(terms[k] for k in order)
    lines += ["", f"carried by singular directions (of {len(terms)})"]
    lines += _bars(
        [(f"direction {k}", terms[k]) for k in order] + ([("others", rest)] if len(terms) > len(order) else [])
    )
    return "\n".join(lines) + "\n"


def _part(name: tuple[Any, ...]) -> str:
    return {"head": "head {}.{}", "block": "rest of block {}"}.get(name[0], name[0]).format(*name[1:])


def _bars(values: Sequence[tuple[str, float]]) -> list[str]:
    most = max((abs(v) for _, v in values), default=1.0) or 1.0
    wide = max(len(name) for name, _ in values)
    return [f"  {name:<{wide}}  {v:+9.3f}  {'#' * round(BAR * abs(v) / most)}" for name, v in values]
