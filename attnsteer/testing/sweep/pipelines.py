"""The part of the sweep for pipelines of diffusers: guidance and gates on conditional rows, against loops made by hand.

How each pipeline is built small: `pipeline_builds.py`. Which rows are conditional is found without the host: the prompt is changed,
and the rows that change with it are (`pipeline_loops.py`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ...errors import AttnSteerError
from .pipeline_builds import brief, built, cases, classes_in, offline, tests
from .pipeline_loops import Loop, UnseenError
from .pipeline_siblings import SIBLINGS
from .rows import Row

# PAG is the second at strength one: it is measured at each denoiser, in the other part of the sweep.
METHODS = ("SoftPAG", "HeadGate")


def versions() -> dict[str, str]:
    """Library -> version that is installed."""
    import diffusers

    return {"diffusers": diffusers.__version__}


def names() -> list[str]:
    """Every pipeline class with a call of its own."""
    import diffusers

    found = []
    for path in sorted((Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")):
        if "onnx" in path.name or "flax" in path.name:
            continue
        for name, _, body in classes_in(path):
            if "Pipeline" in name and "\n    def __call__(" in body:
                found.append(name)
    # Read here, so that a process forked later need not.
    tests()
    return sorted(set(found))


def prepare(name: str) -> None:
    """Import what builds `name`."""
    with offline(), contextlib.suppress(Exception):
        for module, _ in tests().get(SIBLINGS[name].of if name in SIBLINGS else name, []):
            cases(module)


def measure(name: str) -> Row:
    """Build `name` small, and measure it."""

    def loop() -> Loop | str:
        found, reason = built(name)
        return reason if found is None else Loop(found)

    return measured(Row(name, name), loop)


def measured(row: Row, make: Callable[[], Loop | str]) -> Row:
    """The row with what was found. `make`: builds what is compared, or says why it cannot; runs offline."""
    with offline(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            loop = make()
        except Exception as error:  # of the library's: nothing of ours is attached
            row.reason = brief(error)
            return row
        if isinstance(loop, str):
            row.reason = loop
            return row
        if loop.reason:
            row.verdict, row.reason = loop.verdict, loop.reason
            return row
        row.sites, row.heads = len(loop.sites), sorted({s.heads for s in loop.sites})
        outcomes: dict[str, str] = {}
        for what in METHODS:
            try:
                outcomes[what] = loop.compare(what)
            except UnseenError as error:
                row.reason = str(error)
                return row
            except AttnSteerError as error:
                outcomes[what] = f"refused: {brief(error)}"
            except Exception as error:  # a fault of ours, whatever it is
                outcomes[what] = f"wrong: {brief(error)}"
    row.measured = {"rows": loop.described(), **outcomes}
    bad = [f"{k}: {v}" for k, v in outcomes.items() if v.startswith("wrong")]
    refused = [f"{k}: {v.removeprefix('refused: ')}" for k, v in outcomes.items() if v.startswith("refused")]
    if bad:
        row.verdict, row.reason = "wrong", "; ".join(bad)[:240]
    elif len(refused) == len(outcomes):
        row.verdict, row.reason = "refused", refused[0][:240]
    elif refused:
        row.verdict, row.reason = "exact but", "; ".join(refused)[:240]
    elif "PAG" in row.name:
        row.verdict, row.reason = "exact but", "measured with pag_scale=0; beside its own perturbed rows it is refused"
    elif row.name in SIBLINGS and SIBLINGS[row.name].note:
        row.verdict, row.reason = "exact but", SIBLINGS[row.name].note
    else:
        row.verdict, row.reason = "exact", ""
    return row
