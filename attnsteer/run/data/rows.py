"""Rows of a file or data set as samples, by format: what each column must hold, and prompts from templates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import RecipeError, did_you_mean, listing
from ...recipe.schema import template_fields
from .sample import Sample

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LEVELS = ("easy", "medium", "hard")
# Prompts where a recipe gives none.
CHOICES, LETTERED = "Question: {question}\nAnswer:", "{question}\n{choices}\nAnswer:"
DESCRIBE = "Please help me describe the image in detail."


@dataclass(frozen=True)
class Row:
    """One row. place: file and line, for messages. values: by column. columns: field -> column, where they differ."""

    place: str
    number: int
    values: Mapping[str, Any]
    columns: Mapping[str, str]

    def has(self, field: str) -> bool:
        """Whether there is such a column with a value in it."""
        try:
            return self.get(field) not in (None, "")
        except RecipeError:
            return False

    def get(self, field: str) -> Any:
        """The value of a field.

        Raises:
            RecipeError: the row has no such column.
        """
        column = self.columns.get(field, field)
        if column not in self.values:
            outer, dot, inner = column.partition(".")
            nested = self.values.get(outer) if dot else None
            if isinstance(nested, Mapping) and inner in nested:
                return nested[inner]
            mapped = "" if column in self.columns.values() else f" Say which column it is: columns: {{{field}: NAME}}."
            raise RecipeError(
                f"{self.place}: the column {column!r} ({field}) is missing; there are {listing(self.values)}."
                f"{did_you_mean(column, self.values)}{mapped}"
            )
        return self.values[column]

    def text(self, *fields: str) -> str:
        """The first of these fields that is there, a text that is not empty."""
        field = next((f for f in fields if self.has(f)), next((f for f in fields if f in self.columns), fields[0]))
        value = self.get(field)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(field, value, "a text")
        return value

    def wrong(self, field: str, value: Any, wanted: str) -> RecipeError:
        """What to raise for a value that is not what is needed."""
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return RecipeError(
            f"{self.place}: the column {self.columns.get(field, field)!r} has {shown}; {wanted} is needed."
        )

    def listed(self, field: str) -> list[Any]:
        """A list; also one written as JSON, as CSV files have it."""
        value = self.get(field)
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise self.wrong(field, value, "a list in JSON") from None
        if not isinstance(value, (list, tuple)) or not value:
            raise self.wrong(field, value, "a list with something in it")
        return list(value)

    def name(self, *fields: str) -> str:
        """The id: of the first of these fields that is there, else the number of the row."""
        return next((str(self.get(f)) for f in ("id", *fields) if self.has(f)), str(self.number))

    def others(self, *used: str) -> Sample:
        """Columns of plain values that have no meaning here: methods can take parameters from them."""
        taken = {self.columns.get(f, f) for f in used}
        return {k: v for k, v in self.values.items() if isinstance(k, str) and k not in taken and _plain(v)}


def _plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def samples(
    rows: Sequence[Row], form: str, options: Mapping[str, Any], prompt: str | None, start: int, total: int
) -> list[Sample]:
    """The samples of rows.

    Args:
        form: the recipe's data.format. options: of the format. prompt: template; None: the format's own.
        start: number of the first row in its source. total: rows of the source.

    Raises:
        RecipeError: an unknown option or field of the template, a column that is missing or holds something else.
    """
    known, build = FORMATS[form]
    for name in options:
        if name not in known:
            raise RecipeError(
                f"data.options.{name}: the format {form} has no such option; there are: {', '.join(known) or 'none'}."
            )
    out = [{**build(row, options, prompt), **_group(row), "index": start + i} for i, row in enumerate(rows)]
    if options.get("levels"):
        # HRS-Bench's files: three equal thirds, from easy to hard.
        for sample in out:
            sample["level"] = LEVELS[min(2, 3 * sample["index"] // total)]
    return out


def _group(row: Row) -> Sample:
    """What a sample was drawn together with, where a column says so; else samples of one picture are a group."""
    return {"group": str(row.get("group"))} if row.has("group") else {}


def filled(template: str, row: Row, values: Mapping[str, Any]) -> str:
    """A template with the fields of a sample, or columns of its row, put in; texts only, and nothing else is evaluated.

    Raises:
        RecipeError: a field that is neither.
    """
    every = {**{k: v for k, v in row.values.items() if isinstance(k, str)}, **values}
    fields = template_fields(template)
    for name in fields:
        if name not in every:
            raise RecipeError(
                f"{row.place}: the prompt asks for {{{name}}}; there are {listing(every)}.{did_you_mean(name, every)}"
            )
    return template.format(**{name: _as_text(every[name]) for name in fields})


def _as_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def choices(row: Row, options: Mapping[str, Any], prompt: str | None) -> Sample:
    """question (or prompt), choices, answer; perhaps labels, of the choices.

    choices: the same for all rows. letters: whether the labels are scored, in place of the texts; unless it is given, they are
    where the prompt has the choices in it ({choices}: a line "A. text" for each).
    """
    whole = prompt is None and not row.has("question") and row.has("prompt")
    question = row.text("prompt" if whole else "question")
    texts, labels = _choices(row, options)
    answer = _answer(row, texts, labels)
    by_letter = options.get("letters", prompt is not None and "choices" in template_fields(prompt))
    if not isinstance(by_letter, bool):
        raise RecipeError(f"data.options.letters: {by_letter!r}; true or false.")
    listed = "\n".join(f"{a}. {t}" for a, t in zip(labels, texts, strict=True))
    template = prompt or ("{question}" if whole else LETTERED if by_letter else CHOICES)
    return {
        **row.others("question", "choices", "answer", "labels"),
        "id": row.name("question_id"),
        "prompt": filled(template, row, {"question": question, "choices": listed}),
        "question": question,
        "choices": labels if by_letter else texts,
        "texts": texts,
        "answer": answer,
    }


def _choices(row: Row, options: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Texts and labels: a list; {"text": [...], "label": [...]}; or columns A, B, C, ..."""
    labels = list(LETTERS)
    fixed = options.get("choices")
    if fixed is not None:
        if not isinstance(fixed, list) or len(fixed) < 2 or not all(isinstance(c, str) and c for c in fixed):
            raise RecipeError(f"data.options.choices: {fixed!r}; a list of at least two texts is needed.")
        return list(fixed), labels[: len(fixed)]
    if row.has("labels"):
        labels = [str(v) for v in row.listed("labels")]
    if row.columns.get("choices", "choices") not in row.values:
        found = []
        for letter in LETTERS:
            if not row.has(letter):
                break
            found.append(row.text(letter))
        if len(found) >= 2:
            return found, labels[: len(found)]
    value = row.get("choices")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _object(row, "choices", value)
    if isinstance(value, Mapping):
        if not isinstance(value.get("text"), (list, tuple)):
            raise row.wrong("choices", value, 'a list, or {"text": [...], "label": [...]}')
        texts, labels = list(value["text"]), [str(v) for v in value.get("label") or LETTERS]
    else:
        texts = row.listed("choices")
    if not 2 <= len(texts) <= len(LETTERS) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise row.wrong("choices", texts, f"a list of 2 to {len(LETTERS)} texts")
    if len(labels) < len(texts):
        raise row.wrong("choices", value, "as many labels as texts")
    return texts, labels[: len(texts)]


def _answer(row: Row, texts: list[str], labels: list[str]) -> int:
    """An index from 0, a label, or the text of the choice."""
    value = row.get("answer")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(texts):
        return value
    if isinstance(value, str):
        said = value.strip()
        for known in (labels, texts):
            if said in known:
                return known.index(said)
        if said.isdecimal() and int(said) < len(texts):
            return int(said)
    wanted = f"an index from 0 to {len(texts) - 1}, one of {', '.join(labels)}, or the text of a choice"
    raise row.wrong("answer", value, wanted)


def pope(row: Row, options: Mapping[str, Any], prompt: str | None) -> Sample:
    """image, text (or question), label: the files of AoiDragon/POPE."""
    question = row.text("text", "question")
    label = row.text("label").strip().lower()
    if label not in ("yes", "no"):
        raise row.wrong("label", row.get("label"), "yes or no")
    picture = _image(row)
    return {
        **row.others("text", "question", "label", "image"),
        "id": row.name("question_id"),
        "group": str(picture),
        "prompt": filled(prompt or "{question}", row, {"question": question}),
        "question": question,
        "image": picture,
        "label": label,
        "choices": ["yes", "no"],
        "answer": ["yes", "no"].index(label),
    }


def mme(row: Row, options: Mapping[str, Any], prompt: str | None) -> Sample:
    """image, question (or text), answer (or label), category: the two questions about a picture are a pair of its category."""
    field = "answer" if row.has("answer") or not row.has("label") else "label"
    label = row.text(field).strip().lower()
    if label not in ("yes", "no"):
        raise row.wrong(field, row.get(field), "yes or no")
    question, category, picture = row.text("question", "text"), row.text("category"), _image(row)
    return {
        **row.others("question", "text", "answer", "label", "category", "image", "file_name", "question_id", "id"),
        # The official files name the picture, which has two questions.
        "id": f"{category}/{row.number}",
        "group": f"{category}/{picture}",
        "pair": f"{category}/{picture}",
        "category": category,
        "prompt": filled(prompt or "{question}", row, {"question": question}),
        "question": question,
        "image": picture,
        "label": label,
        "choices": ["yes", "no"],
        "answer": ["yes", "no"].index(label),
    }


def captions(row: Row, options: Mapping[str, Any], prompt: str | None) -> Sample:
    """image (or file_name) and image_id (or id): rows, or the `images` of a COCO file."""
    picture = _image(row)
    image_id = next((row.get(f) for f in ("image_id", "id") if row.has(f)), picture)
    question = row.text("question") if row.has("question") else DESCRIBE
    return {
        **row.others("image", "file_name", "image_id", "id", "question"),
        "id": str(image_id),
        "prompt": filled(prompt or "{question}", row, {"question": question}),
        "image": picture,
        "image_id": image_id,
    }


def questions(row: Row, options: Mapping[str, Any], prompt: str | None) -> Sample:
    """question (or text, or prompt); image, answer or answers, where there are such."""
    question = row.text("question", "text", "prompt")
    out = {
        **row.others("question", "image"),
        "id": row.name("question_id"),
        "prompt": filled(prompt or "{question}", row, {"question": question}),
        "question": question,
    }
    if row.has("image") or row.has("file_name"):
        out |= {"image": _image(row), "group": str(_image(row))}
    if row.has("answer") and not row.has("answers"):
        out["answers"] = [row.text("answer")]
    return out


def prompts(row: Row, options: Mapping[str, Any], prompt: str | None) -> Sample:
    """prompt. category: of every row; levels: the row says of which third of the file it is."""
    text = row.text("prompt")
    out = {**row.others("prompt"), "id": row.name(), "prompt": filled(prompt or "{prompt}", row, {"prompt": text})}
    if "category" in options:
        out["category"] = options["category"]
    return out


def boxes(row: Row, options: Mapping[str, Any], prompt: str | None) -> Sample:
    """prompt, phrases (texts) and boxes, one (x0, y0, x1, y1) for each phrase; or regions: {phrase: box or boxes}.

    side: of the canvas that they are in, in pixels.
    """
    out = prompts(row, {k: v for k, v in options.items() if k != "side"}, prompt)
    side = options.get("side", 1)
    if isinstance(side, bool) or not isinstance(side, (int, float)) or not side > 0:
        raise RecipeError(f"data.options.side: {side!r}; a number above 0 is needed.")
    if row.has("regions"):
        given = row.get("regions")
        if isinstance(given, str):
            given = _object(row, "regions", given)
        if not isinstance(given, Mapping) or not given:
            raise row.wrong("regions", given, "{phrase: box}")
        every = [(t, b) for t, own in given.items() for b in (own if own and isinstance(own[0], list) else [own])]
        texts, found = [t for t, _ in every], [b for _, b in every]
    else:
        texts, found = row.listed("phrases"), row.listed("boxes")
    if len(texts) != len(found) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise row.wrong("phrases", texts, f"a list of texts, as many as there are boxes ({len(found)})")
    regions: dict[str, Any] = {}
    for text, box in zip(texts, found, strict=True):
        if text.lower() not in out["prompt"].lower():
            raise row.wrong("phrases", text, f"a part of the prompt {out['prompt']!r}")
        regions.setdefault(text, []).append(_box(row, box, side))
    # The columns are in pixels, or text.
    out = {k: v for k, v in out.items() if k not in ("boxes", "phrases")}
    # A phrase of one box has the box itself, as methods and figures take it.
    out["regions"] = {t: b[0] if len(b) == 1 else b for t, b in regions.items()}
    if all(len(b) == 1 for b in regions.values()):
        out["boxes"] = list(out["regions"].values())
    return {**out, "texts": list(regions), "words": [t.split()[-1] for t in regions], "phrases": _labels(regions)}


def _object(row: Row, field: str, text: str) -> Any:
    """What a cell of a CSV file holds as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise row.wrong(field, text, "an object in JSON") from None


def _labels(regions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Phrases as HRS-Bench's figures take them."""
    return [{"label": t, "count": len(b) if isinstance(b[0], list) else 1} for t, b in regions.items()]


def _box(row: Row, box: Any, side: float) -> list[float]:
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(_number(v) for v in box):
        raise row.wrong("boxes", box, "(x0, y0, x1, y1)")
    x0, y0, x1, y1 = (v / side for v in box)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        where = (
            f"in a canvas of {side:g}" if side != 1 else "in fractions of the image (or give options: {side: PIXELS})"
        )
        raise row.wrong("boxes", box, f"x0 < x1 and y0 < y1, {where},")
    return [x0, y0, x1, y1]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _image(row: Row) -> str | int:
    """The name of the picture, or its row in a data set."""
    field = "image" if row.has("image") or not row.has("file_name") else "file_name"
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise row.wrong(field, value, "the name of an image")
    return value


# Format -> its options, and what makes a sample of a row.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row, Mapping[str, Any], str | None], Sample]]] = {
    "choices": (("letters", "choices"), choices),
    "pope": ((), pope),
    "mme": ((), mme),
    "captions": ((), captions),
    "questions": ((), questions),
    "prompts": (("category", "levels"), prompts),
    "boxes": (("category", "side"), boxes),
}
