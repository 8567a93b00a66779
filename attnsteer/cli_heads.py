"""The commands about heads: profile them, and fold gates into the weights."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import SelectionError, listing
from .output import print_table

MODEL = Annotated[str, typer.Argument(metavar="MODEL", help="An embedded model, a folder, or a hub id.")]


class DType(StrEnum):
    """Of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DTYPE = Annotated[DType, typer.Option(help="Of the weights.")]


def _language_model(name: str, dtype: DType) -> Any:
    """A language model with its tokenizer, loaded as a recipe's."""
    from .recipe.schema import ZOO_KINDS, ModelSpec
    from .run.models import load

    if name in ZOO_KINDS:
        if ZOO_KINDS[name] != "lm":
            known = listing([n for n, kind in ZOO_KINDS.items() if kind == "lm"])
            raise SelectionError(f"{name} is no language model; of the embedded ones there are {known}.")
        source = {"zoo": name}
    else:
        source = {"path": str(Path(name).resolve())} if Path(name).is_dir() else {"hub": name}
    return load(ModelSpec(kind="lm", dtype=dtype.value, **source))


def profile(
    model: MODEL,
    texts: Annotated[
        Path, typer.Argument(metavar="TEXTS", help="A text file: each line that is not empty is one input.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write the table as .csv or .json; without it, a summary is printed.")
    ] = None,
    reading: Annotated[
        str | None, typer.Option(help="A reading to select heads by, e.g. induction, or to plot.")
    ] = None,
    heads: Annotated[Path | None, typer.Option(help="Write the best heads of the reading as a HeadSet.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="So many of them; all without it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the reading as a grid of layers and heads.")] = None,
    words: Annotated[int, typer.Option(min=0, help="Top words that each head writes.")] = 0,
    dtype: DTYPE = DType.float32,
) -> None:
    """Profile the heads of a language model over texts: what they look at, how widely, and what their weights do."""
    from .analysis import head_profile
    from .errors import did_you_mean

    if reading is None and (heads is not None or plot is not None):
        raise SelectionError("--heads and --plot are of one reading: give --reading, e.g. --reading induction.")
    if out is not None and out.suffix not in (".csv", ".json"):
        raise SelectionError(f"--out {out}: give a path that ends in .csv or .json.")
    if not texts.is_file():
        raise SelectionError(f"there is no file {texts}; give a text file with one input in each line.")
    lines = [line.strip() for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise SelectionError(f"{texts} has no line with text.")
    loaded = _language_model(model, dtype)
    encode = lambda text: loaded.tokenizer(text, return_tensors="pt", return_token_type_ids=False)  # noqa: E731
    inputs = [{k: v.to(loaded.target.device) for k, v in encode(line).items()} for line in lines]
    found = head_profile(loaded.target, inputs, words=words, tokenizer=loaded.tokenizer)
    if reading is not None and reading not in found.columns:
        known = ", ".join(sorted(found.columns))
        raise SelectionError(f"--reading {reading}: there are {known}.{did_you_mean(reading, found.columns)}")
    if out is not None:
        print(f"{len(found.heads)} heads, {len(found.columns)} readings: {found.save(out)}")
    if heads is not None:
        print(f"heads: {found.to_heads(reading, top).save(heads)}")
    if plot is not None:
        found.plot(reading, plot, selected=None if top is None else found.to_heads(reading, top))
        print(f"plot: {plot}")
    if reading is not None:
        best = found.to_heads(reading, top or min(10, len(found.heads)))
        between = found.intervals(reading)
        rows = [
            (
                layer,
                head,
                f"{i.value:.3f}",
                f"[{i.low:.3f}, {i.high:.3f}]",
                " ".join(found.words.get((layer, head), ())),
            )
            for (layer, head), i in ((p, between[p]) for p in sorted(best, key=best.scores.get, reverse=True))
        ]
        print_table(("layer", "head", reading, "95 %", "words" if words else ""), rows)
    elif out is None:
        print(found)


def bake(
    model: MODEL,
    method: Annotated[Path, typer.Argument(metavar="DIR", help="A HeadGate, saved by save_pretrained.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new checkpoint; must be empty or new.")],
    dtype: DTYPE = DType.float32,
) -> None:
    """Fold the gates of heads into a language model's weights: a checkpoint that runs anywhere, without this library."""
    from .baking import bake as fold
    from .intervention import Intervention
    from .zoo.quiet import quiet

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SelectionError(
            f"{out} is there already and not an empty folder; give another, so that nothing is replaced."
        )
    gates = Intervention.from_pretrained(method)
    loaded = _language_model(model, dtype)
    with quiet(pictures=False, remarks=False):
        fold(loaded.target, gates, inplace=True, save_to=out)
    loaded.tokenizer.save_pretrained(out)
    print(f"{model} with the gates of {method} in its weights: {out}")
