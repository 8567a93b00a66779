"""The heads of a run as grids of layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...heads import HeadSet
from ...run.folder import RunFolder
from ...zoo import MODELS, NAMES
from .plots import head_grid

Pairs = list[tuple[int, int]]


def heads_of(entry: Mapping[str, Any]) -> list[Pairs]:
    """(layer, head) of each intervention of an arm of arms.json that selects heads, by itself or by its `where`."""
    found = []
    for item in entry.get("interventions") or ():
        table = item.get("heads") or (item.get("where") or {}).get("heads")
        # Of several towers there is no one grid.
        if isinstance(table, Mapping) and table and not any(isinstance(row, Mapping) for row in table.values()):
            found.append([(int(layer), int(h)) for layer, row in table.items() for h in row])
    return found


def grids(run: RunFolder, rows: Sequence[tuple[str, Pairs, bool]]) -> list[dict[str, Any]]:
    """For the template: {"label", "text", "svg"}.

    Args:
        rows: (label, heads, whether they were chosen by their scores, which then are shown).
    """
    sets = _sets(run)
    found = []
    for label, used, scored in rows:
        known = next((s for s in sets if set(used) <= set(s)), None)
        scores = {h: v for h, v in known.scores.items() if h in used} if known is not None and scored else {}
        shape = next((s.shape for s in sets if s.shape is not None), None)
        if shape is None or any(la >= shape[0] or h >= shape[1] for la, h in used):
            # Of an unknown model: as far as its heads are named.
            shape = (max(la for la, _ in used) + 1, max(h for _, h in used) + 1)
        text = f"{len(used)} of {shape[0] * shape[1]} heads" + (", darker: larger score" if scores else "")
        found.append({"label": label, "text": text, "svg": head_grid(used, scores, shape)})
    return found


def _sets(run: RunFolder) -> list[HeadSet]:
    """The head sets that the run's heads may come from: of its own search, and of the embedded model."""
    files = [f for f in sorted(run.path.glob("calibration/*.safetensors")) if not f.stem.endswith(".state")]
    name = (run.recipe.get("model") or {}).get("zoo")
    if name in NAMES:
        files += sorted((MODELS / name).glob("*/heads.safetensors"))
    return [HeadSet.load(f) for f in files]
