"""Attention before and after, as attention.json has it: weights over words, or maps over an image.

    {"schema": 1, "note": "mean over the steered heads",
     "samples": [{"id": "r3", "seed": 0,
                  "arms": {"baseline": {"labels": ["a", "red"], "weights": [0.1, 0.2]},            # shares of words, or
                           "method": {"labels": ["circle"], "maps": [[[0.1, ...], ...]],           # [label][h][w], with
                                      "image": "images/method/0/l3.png"}}}]}                       # what they lie on

`attnsteer.results.attention_maps` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import RunError
from .album import Album, heat


def overlays(found: Mapping[str, Any] | None, album: Album, samples: Mapping[str, Any]) -> dict[str, Any] | None:
    """For the template: {"note", "samples": [{"id", "prompt", "arms": [{"arm", "words" or "maps", "image"}]}]}.

    Words are (text, weight, share of the largest one); maps are (label, data URI, sum or None). One scale holds for all arms of a
    sample, and for each word of a picture's prompt by itself, since words differ in mass.

    Raises:
        RunError: labels without a weight or map, or maps that are no rectangles of numbers.
    """
    if found is None:
        return None
    out = []
    for entry in found.get("samples", ()):
        arms, top, tops = entry.get("arms") or {}, _top(entry), _tops(entry)
        shown = []
        for arm, part in arms.items():
            labels = [str(x) for x in part.get("labels", ())]
            values = part.get("weights", part.get("maps")) or []
            if len(labels) != len(values):
                raise RunError(
                    f"attention.json: sample {entry.get('id')}, arm {arm} has {len(labels)} labels and {len(values)} weights "
                    "or maps; delete the file and write it again."
                )
            pairs = zip(labels, values, strict=True)
            if "weights" in part:
                shown.append({"arm": arm, "words": [(t, w, w / top if top else 0.0) for t, w in pairs]})
                continue
            scene = (samples.get(str(entry.get("id"))) or {}).get("image")
            image = album.add(part["image"], own=True) if part.get("image") else album.add(scene)
            # The sum over a generated picture is a sum of shares of different queries, which says nothing.
            total = (lambda m: None) if part.get("image") else (lambda m: sum(map(sum, m)))
            maps = [(t, heat(m, tops.get(t, top)), total(m)) for t, m in pairs]
            shown.append({"arm": arm, "maps": maps, "image": None if image is None else album.uris[image]})
        # Words show the prompt themselves.
        maps = any("maps" in a for a in shown)
        prompt = str((samples.get(str(entry.get("id"))) or {}).get("prompt", "")) if maps else ""
        out.append({"id": entry.get("id"), "prompt": prompt, "arms": shown})
    return {"note": str(found.get("note", "")), "samples": out}


def _top(entry: Mapping[str, Any]) -> float:
    """The largest value of all arms of a sample."""
    try:
        values = [0.0]
        for part in (entry.get("arms") or {}).values():
            values += [float(w) for w in part.get("weights", ())]
            values += [_largest(m) for m in part.get("maps", ())]
        return max(values)
    except (TypeError, ValueError) as error:
        raise RunError(
            f"attention.json: sample {entry.get('id')} has weights that are no numbers ({error})."
        ) from error


def _tops(entry: Mapping[str, Any]) -> dict[str, float]:
    """Label -> the largest value of all arms, of maps over generated pictures."""
    found: dict[str, float] = {}
    for part in (entry.get("arms") or {}).values():
        for label, grid in zip(part.get("labels", ()), part.get("maps", ()) if part.get("image") else (), strict=False):
            found[str(label)] = max(found.get(str(label), 0.0), _largest(grid))
    return found


def _largest(grid: Any) -> float:
    if not grid or any(len(row) != len(grid[0]) or not row for row in grid):
        raise ValueError("a map is a rectangle [h][w]")
    return max(float(v) for row in grid for v in row)
