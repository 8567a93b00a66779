"""MME: yes/no questions in pairs about one picture, one to be affirmed and one to be denied (Fu et al. 2023, arXiv 2306.13394).

score = 100 accuracy + 100 accuracy+ of each category, and their sum; accuracy is over questions, accuracy+ over the pairs whose
questions are both right. A model that always says yes has an accuracy of 50 % and an accuracy+ of 0.

Parsers, for what is compared with published figures:

- "official" (the authors' eval_tool/calculation.py, read in zjunlp/Deco, commit a3ccc15): in small letters, the whole answer if
  it is yes or no; else "yes", then "no", anywhere in its first four characters (so "know" is a no); else nothing, which is wrong.
- "own": that of POPE here.

Own rule for what the official script refuses: a pair with one answer alone counts in accuracy, and not in accuracy+.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import RecordError, did_you_mean
from ..significance import Interval, McNemar
from .base import Metric, Ratio, Sample, Totals
from .pope import own

PAIR = "pair"


def official(text: str, label: str = "") -> str | None:
    """See the module; `label` is not looked at."""
    said = text.lower()
    if said in ("yes", "no"):
        return said
    return next((word for word in ("yes", "no") if word in said[:4]), None)


PARSERS = {"official": official, "own": own}


@dataclass(frozen=True)
class PairMetric(Metric):
    """A metric of pairs. A sample is the numbers of one question, `pair` among them; the next two with the same one are a pair,
    which is resampled as one."""

    def aggregate(
        self, samples: Sequence[Sample], *, groups: Sequence[Any] | None = None, draws: int = 10_000, seed: int = 0
    ) -> dict[str, Interval | float]:
        """See `Metric.aggregate`; groups: one label per question, the first one of a pair counts."""
        (rows,), groups = joined([samples], groups)
        return super().aggregate(rows, groups=groups, draws=draws, seed=seed)

    def compare(
        self,
        before: Sequence[Sample],
        after: Sequence[Sample],
        *,
        groups: Sequence[Any] | None = None,
        draws: int = 10_000,
        seed: int = 0,
    ) -> dict[str, Interval | float]:
        """See `Metric.compare`."""
        self._as_many(before, after)
        (first, second), groups = joined([before, after], groups)
        return super().compare(first, second, groups=groups, draws=draws, seed=seed)

    def p_value(
        self,
        estimate: str,
        before: Sequence[Sample],
        after: Sequence[Sample],
        *,
        groups: Sequence[Any] | None = None,
        draws: int = 10_000,
        seed: int = 0,
    ) -> float | None:
        """See `Metric.p_value`."""
        self._as_many(before, after)
        (first, second), groups = joined([before, after], groups)
        return super().p_value(estimate, first, second, groups=groups, draws=draws, seed=seed)

    def mcnemar(
        self, before: Sequence[Sample], after: Sequence[Sample], *, groups: Sequence[Any] | None = None
    ) -> McNemar | None:
        """None: questions of a pair are no independent trials."""
        return None

    def _as_many(self, before: Sequence[Sample], after: Sequence[Sample]) -> None:
        if len(before) != len(after):
            raise RecordError(
                f"{self.name}: {len(before)} samples before and {len(after)} after; a paired difference needs the same ones."
            )


def joined(
    arms: Sequence[Sequence[Mapping[str, Any]]], groups: Sequence[Any] | None
) -> tuple[list[list[dict[str, float]]], list[Any] | None]:
    """The questions of each arm as pairs: sums of their numbers, `pairs` and `both` (and those of each category)."""
    if groups is not None and len(groups) != len(arms[0]):
        raise RecordError(f"mme: {len(arms[0])} samples and {len(groups)} groups; give one group per sample.")
    open_: dict[Any, int] = {}
    members: list[list[int]] = []
    for i, sample in enumerate(arms[0]):
        name = sample[PAIR]
        if name in open_:
            members[open_.pop(name)].append(i)
        else:
            open_[name] = len(members)
            members.append([i])
    rows = [[_row([arm[i] for i in own]) for own in members] for arm in arms]
    return rows, None if groups is None else [groups[own[0]] for own in members]


def _number(name: str) -> int:
    """A name as a number that fp64 holds exactly."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def _row(questions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of a pair."""
    out: dict[str, float] = {}
    for question in questions:
        for key, value in question.items():
            if key != PAIR:
                out[key] = out.get(key, 0.0) + value
    whole = len(questions) == 2
    kinds = [k.removeprefix("is_") for k in out if k.startswith("is_")]
    for end in ("", *(f"_{k}" for k in kinds)):
        out[f"pairs{end}"] = float(whole)
        out[f"both{end}"] = float(whole and out["right"] == 2)
    return out


def metric(parser: str = "official", by: list[str] | None = None) -> Metric:
    """Estimates: `accuracy`, `accuracy_plus`, `score`, `yes_ratio`, `unparsed`; with `by` the first three of each category too, as
    `score_NAME`, and `score` is the sum of theirs (MME's perception has ten, at most 2,000; its cognition four, 800).

    The record has `label` ("yes" or "no"), `generated`, `pair` (what its two questions have in common) and, for `by`, `category`.

    Args:
        parser: of `PARSERS`. by: names of categories.
    """
    if parser not in PARSERS:
        raise RecordError(f"mme: no parser {parser!r}; there are {', '.join(PARSERS)}.{did_you_mean(parser, PARSERS)}")
    kinds = list(by or ())
    if not all(isinstance(k, str) and k for k in kinds) or len(set(kinds)) != len(kinds):
        raise RecordError(f"mme: by={by!r}; give different names of categories.")

    def read(record: Mapping[str, Any]) -> dict[str, float]:
        label, text, pair = record["label"], record["generated"], record[PAIR]
        if label not in ("yes", "no"):
            raise RecordError(f"mme: the label is {label!r}; 'yes' and 'no' are known.")
        if not isinstance(text, str) or not isinstance(pair, str):
            raise RecordError(f"mme: the answer is {text!r} and the pair {pair!r}; texts are needed.")
        said = PARSERS[parser](text, label)
        right = int(said == label)
        found: dict[str, float] = {
            PAIR: _number(pair),
            "questions": 1,
            "right": right,
            "said_yes": int(said == "yes"),
            "unparsed": int(said is None),
        }
        if kinds:
            kind = record["category"]
            if kind not in kinds:
                raise RecordError(
                    f"mme: the category {kind!r} is none of {', '.join(kinds)}.{did_you_mean(str(kind), kinds)}"
                )
            found |= {f"is_{kind}": 1, f"right_{kind}": right}
        return found

    statistics: dict[str, Any] = {
        "accuracy": Ratio(("right",), ("questions",)),
        "accuracy_plus": Ratio(("both",), ("pairs",)),
        "score": _Score(tuple(kinds)),
        "yes_ratio": Ratio(("said_yes",), ("questions",)),
        "unparsed": Ratio(("unparsed",), ("questions",)),
    }
    when = {}
    for kind in kinds:
        parts = {
            f"accuracy_{kind}": Ratio((f"right_{kind}",), (f"is_{kind}",)),
            f"accuracy_plus_{kind}": Ratio((f"both_{kind}",), (f"pairs_{kind}",)),
            f"score_{kind}": _Score((kind,)),
        }
        statistics |= parts
        when |= dict.fromkeys(parts, f"is_{kind}")
    good = [k for k in statistics if k not in ("yes_ratio", "unparsed")]
    return PairMetric(
        "mme",
        ("label", "generated", PAIR, *(("category",) if kinds else ())),
        read,
        statistics,
        when=when,
        note=f"parser: {parser}",
        better={**dict.fromkeys(good, 1), "unparsed": -1},
    )


@dataclass(frozen=True)
class _Score:
    """100 accuracy + 100 accuracy+, summed over categories; of all questions where none are given."""

    kinds: tuple[str, ...]

    def __call__(self, totals: Totals) -> Tensor:
        if not self.kinds:
            return 100 * (totals["right"] / totals["questions"] + totals["both"] / totals["pairs"])
        # A category of which no question was asked adds nothing.
        found = [
            (totals[f"right_{k}"] / totals[f"is_{k}"]).nan_to_num(0.0)
            + (totals[f"both_{k}"] / totals[f"pairs_{k}"]).nan_to_num(0.0)
            for k in self.kinds
        ]
        return 100 * sum(found)
