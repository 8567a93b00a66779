"""Samples from a data set of the hub, at a revision, through the library `datasets`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import MissingExtra, RecipeError
from .rows import Row, samples
from .sample import Data, Sample

if TYPE_CHECKING:
    from ...recipe.schema import DataSpec


def load(spec: DataSpec, task: str, prompt: str | None) -> Data:
    """The samples of a hub data set; its code, where it has any, is not run.

    Raises:
        MissingExtra: `datasets` is not installed. RecipeError: it cannot be had, or a column is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(
            f"data.hub: {spec.hub} needs the library datasets: pip install 'attnsteer[eval]'. Or save it as JSON Lines and "
            "give data.file; --tiny needs neither."
        ) from error
    # Versions from 4 on have no code to trust, and no such argument.
    takes = inspect.signature(datasets.load_dataset).parameters
    safe = {"trust_remote_code": False} if "trust_remote_code" in takes else {}
    try:
        table = datasets.load_dataset(spec.hub, spec.config, revision=spec.revision, split=spec.split, **safe)
    except Exception as error:  # the library raises errors of its own, of the hub's and of pyarrow's
        raise RecipeError(
            f"data.hub: {spec.hub} (config {spec.config}, split {spec.split}, revision {spec.revision}) cannot be had "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        ) from error
    pictures = [name for name, kind in table.features.items() if type(kind).__name__ == "Image"]
    texts = table.remove_columns(pictures) if pictures else table
    stop = len(table) if spec.limit is None else min(len(table), spec.start + spec.limit)
    rows = []
    for i in range(spec.start, stop):
        # A picture is named by its row, and opened when it is needed.
        values: dict[str, Any] = {**texts[i], **dict.fromkeys(pictures, i)}
        rows.append(Row(f"{spec.hub} ({spec.split}), row {i}", i, values, spec.columns))
    found = samples(rows, str(spec.format), spec.options, prompt, spec.start, len(table))
    column = spec.columns.get("image", pictures[0] if pictures else "image")

    def image(sample: Mapping[str, Any] | Sample) -> Any:
        return table[sample["image"]][column].convert("RGB")

    return Data(found, image)
