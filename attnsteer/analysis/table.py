"""`HeadTable`: readings of heads, each with a value for every sample and head, its interval and its chance level."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SelectionError, did_you_mean
from ..evals.significance import Interval, percentiles, resampled_totals
from ..heads import HeadSet

# (layer, head), or (tower, layer, head).
Pair = tuple[Any, ...]


@dataclass
class Column:
    """One reading: sum of `top` over sum of `bottom`, over samples, [N, heads]; a mean of samples where `bottom` is one.

    Attributes:
        about: what it is, in words. chance: what a head would have that looks at all visible keys alike, [heads], or None.
        least: with a smaller sum of `bottom` there is no value (NaN), as too few pairs were counted.
    """

    top: Tensor
    bottom: Tensor
    about: str = ""
    chance: Tensor | None = None
    least: float = 0.0

    def values(self) -> Tensor:
        """[heads]; NaN where there is none."""
        return self._ratio(self.top.sum(dim=0), self.bottom.sum(dim=0))

    def _ratio(self, top: Tensor, bottom: Tensor) -> Tensor:
        bad = (bottom <= 0) | (bottom < self.least)
        return torch.where(bad, math.nan, top / bottom.masked_fill(bad, 1.0))


@dataclass
class HeadTable:
    """Readings by head.

    Attributes:
        heads: the (layer, head) of each column entry, of several towers (tower, layer, head). shape: (layers, heads per layer),
            of each tower where there are several. columns: name -> `Column`.
        facts: JSON-able facts about model and inputs. words: (layer, head) -> top tokens of what it writes, where asked for.
    """

    heads: tuple[Pair, ...]
    shape: Any
    columns: dict[str, Column]
    facts: dict[str, Any] = field(default_factory=dict)
    words: dict[Pair, list[Any]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> dict[Pair, float]:
        """The values of a reading by head."""
        return dict(zip(self.heads, self.column(name).values().tolist(), strict=True))

    def column(self, name: str) -> Column:
        """A reading by name.

        Raises:
            SelectionError: there is none of this name.
        """
        if name not in self.columns:
            raise SelectionError(
                f"there is no reading {name!r}; this table has {', '.join(sorted(self.columns))}.{did_you_mean(name, self.columns)}"
            )
        return self.columns[name]

    def intervals(self, name: str, draws: int = 2000, seed: int = 0) -> dict[Pair, Interval]:
        """Values with 95 % percentile intervals of resampled inputs; of one input, and of weights, there is no spread."""
        column, n = self.column(name), len(self.heads)
        totals = resampled_totals(torch.cat([column.top, column.bottom], dim=1), draws, seed)
        ratios = totals[:, :n] / totals[:, n:]
        values = column.values().tolist()
        return {p: Interval(values[i], *percentiles(ratios[:, i])) for i, p in enumerate(self.heads)}

    def to_heads(self, name: str, top: int | None = None, lowest: bool = False) -> HeadSet:
        """The heads with a value, scored by it; `top`: the best of them only; `lowest`: least is best (scores are negated)."""
        sign = -1.0 if lowest else 1.0
        scores = {p: sign * v for p, v in self[name].items() if not math.isnan(v)}
        if not scores:
            raise SelectionError(f"no head has a value of {name!r}: {self.column(name).about}")
        provenance = {**self.facts, "reading": name, "about": self.column(name).about, "lowest": lowest}
        found = HeadSet(list(scores), scores=scores, shape=self.shape, provenance=provenance)
        return found if top is None else found.top(top)

    def plot(self, name: str, path: str | Path | None = None, selected: HeadSet | None = None) -> Any:
        """The reading as a matplotlib figure, a grid of layers and heads (extra `viz`)."""
        from ..viz import head_grid

        values = {p: v for p, v in self[name].items() if math.isfinite(v)}
        if not values:
            raise SelectionError(f"no head has a value of {name!r}: {self.column(name).about}")
        if any(len(p) == 3 for p in values):
            raise SelectionError(
                "a grid is of one stack of layers, and this table of several towers; profile them one by one."
            )
        return head_grid(
            values, path, selected=selected, shape=self.shape, title=name, label=self.column(name).about or name
        )

    def rows(self, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """One JSON-able row a head: values, with chance levels and words where there are any; None where there is no value."""
        names = list(self.columns if names is None else names)
        values = {n: self.column(n).values().tolist() for n in names}
        out = []
        for i, pair in enumerate(self.heads):
            row: dict[str, Any] = dict(zip(("tower", "layer", "head")[-len(pair) :], pair, strict=True))
            for n in names:
                row[n] = values[n][i] if math.isfinite(values[n][i]) else None
                chance = self.columns[n].chance
                if chance is not None:
                    row[f"{n} (chance)"] = float(chance[i])
            if pair in self.words:
                row["words"] = self.words[pair]
            out.append(row)
        return out

    def save(self, path: str | Path) -> Path:
        """Write the rows as .csv or .json (with facts and what the readings are)."""
        path = Path(path)
        rows = self.rows()
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".json":
            about = {n: c.about for n, c in self.columns.items()}
            path.write_text(
                json.dumps({"facts": self.facts, "readings": about, "heads": rows}, indent=1), encoding="utf-8"
            )
        else:
            raise SelectionError(f"HeadTable.save({str(path)!r}): give a path that ends in .csv or .json.")
        return path

    def __str__(self) -> str:
        lines = [f"{len(self.heads)} heads, {len(self.columns)} readings, {self.facts.get('samples', 0)} inputs"]
        for name in self.columns:
            known = {p: v for p, v in self[name].items() if math.isfinite(v)}
            if known:
                best = max(known, key=lambda p: known[p])
                place = "".join(f"{tower}, " for tower in best[:-2]) + f"layer {best[-2]}, head {best[-1]}"
                lines.append(f"  {name:<22} largest {known[best]:.3f} at {place}")
        return "\n".join(lines)

    def joined(self, other: HeadTable) -> HeadTable:
        """Both tables' readings of the same heads."""
        if other.heads != self.heads:
            raise SelectionError("two tables are joined only where they are of the same heads of one model.")
        return HeadTable(
            self.heads,
            self.shape,
            {**self.columns, **other.columns},
            {**other.facts, **self.facts},
            {**other.words, **self.words},
        )


def of_scores(scores: HeadSet | Mapping[Pair, float], heads: tuple[Pair, ...], about: str) -> Column:
    """A reading that is no mean over inputs, such as a search's scores or one of weights; heads without one have no value."""
    known = scores.scores if isinstance(scores, HeadSet) else scores
    top = torch.tensor([[known.get(p, math.nan) for p in heads]], dtype=torch.float64)
    return Column(top.nan_to_num(0.0), (~top.isnan()).double(), about)
