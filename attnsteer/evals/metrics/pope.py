"""POPE: whether a model says that objects are there which are not (Li et al. 2023, arXiv 2305.10355, section 5).

"yes" is the positive class. Accuracy, precision, recall, F1 as usual; the yes-ratio is over the predictions. An answer
that is not parsed is wrong: it is neither a yes nor a no, and counts as a miss where the label is yes.

Parsers, for what is compared with published figures:

- "own": the first word, if it is yes or no; else the only one of the two kinds of word (yes; no, not, -n't) in the text;
  else nothing.
- "official" (AoiDragon/POPE, evaluate.py, commit f3ec604): text before the first ".", commas removed, split at single
  blanks; a word "No", "no" or "not" means no, and everything else means yes: also "NO", "No!", "no" after a line break,
  and the empty answer. Never unparsed.
- "vcd" (DAMO-NLP-SG/VCD): looks for "yes" in the answer where the label is yes, and for "no" where it is no. "I do not
  know" is a no; an answer with neither is wrong for both labels, so it counts as a yes where the label is no.
- "lmms_eval": the whole answer, stripped and in small letters, is "yes" or "no"; longer ones are wrong.
- "vlmevalkit": exactly one of the words yes and no, after punctuation is removed.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import RecordError, did_you_mean
from .base import Mean, Metric, Ratio, f1

Parser = Callable[[str, str], str | None]


def metric(parser: str = "own") -> Metric:
    """Columns: `right`, `tp`, `fp`, `fn`, `tn`, `said_yes`, `unparsed` (0 or 1 each).

    The record has `label` ("yes" or "no") and `generated`.

    Args:
        parser: of `PARSERS`.
    """
    if parser not in PARSERS:
        raise RecordError(f"pope: no parser {parser!r}; there are {', '.join(PARSERS)}.{did_you_mean(parser, PARSERS)}")

    def read(record: Mapping[str, Any]) -> dict[str, float]:
        label, text = record["label"], record["generated"]
        if label not in ("yes", "no"):
            raise RecordError(f"pope: the label is {label!r}; 'yes' and 'no' are known.")
        if not isinstance(text, str):
            raise RecordError(f"pope: the answer is {text!r}; a text is needed.")
        said = PARSERS[parser](text, label)
        return {
            "right": int(said == label),
            "tp": int(said == label == "yes"),
            "tn": int(said == label == "no"),
            "fp": int(said == "yes" and label == "no"),
            # A yes that was not said is missed, whatever was said instead.
            "fn": int(said != "yes" and label == "yes"),
            "said_yes": int(said == "yes"),
            "unparsed": int(said is None),
        }

    return Metric(
        "pope",
        ("label", "generated"),
        read,
        {
            "accuracy": Mean("right"),
            "precision": Ratio(("tp",), ("tp", "fp")),
            "recall": Ratio(("tp",), ("tp", "fn")),
            "f1": f1("tp", "fp", "fn"),
            "yes_ratio": Mean("said_yes"),
            "unparsed": Mean("unparsed"),
        },
        correct="right",
        note=f"parser: {parser}",
        better={"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "unparsed": -1},
    )


def own(text: str, label: str = "") -> str | None:
    """See the module; `label` is not looked at."""
    words = re.findall(r"[a-z]+(?:['’]t)?", text.lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    yes = "yes" in words
    no = any(w in ("no", "not") or w.endswith(("n't", "n’t")) for w in words)
    return None if yes == no else ("yes" if yes else "no")


def official(text: str, label: str = "") -> str:
    """See the module; `label` is not looked at."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def vcd(text: str, label: str) -> str:
    """See the module."""
    other = {"yes": "no", "no": "yes"}[label]
    return label if label in text.lower() else other


def lmms_eval(text: str, label: str = "") -> str | None:
    """See the module; `label` is not looked at."""
    said = text.lower().strip()
    return said if said in ("yes", "no") else None


def vlmevalkit(text: str, label: str = "") -> str | None:
    """See the module; `label` is not looked at."""
    words = text.lower().translate(str.maketrans(string.punctuation, " " * len(string.punctuation))).split()
    found = {"yes", "no"} & set(words)
    return found.pop() if len(found) == 1 else None


PARSERS: dict[str, Parser] = {
    "own": own,
    "official": official,
    "vcd": vcd,
    "lmms_eval": lmms_eval,
    "vlmevalkit": vlmevalkit,
}
