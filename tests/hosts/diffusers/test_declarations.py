"""What a run declares of a denoiser, worked out when it is attached."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from attnsteer import PAG, AttendAndExcite, HeadGate, Where, sites, steer
from attnsteer.hosts.diffusers.declarations import Declarations
from attnsteer.intervention import Intervention
from attnsteer.steering import Steering
from attnsteer.testing import tiny_pipeline

GATE = {(0, 0): 0.5}
OFF = {"around": (), "latent": (), "steps": False, "branches": False, "latent_moves": False, "compiled": False}


def declared(run: Steering, pipe: Any, owner: Any) -> Declarations:
    return Declarations.of(run, run.runtimes.values(), owner, pipe.unet)


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ((HeadGate(GATE),), {"watched": False, **OFF}),
        ((HeadGate(GATE, where=Where(steps=1)),), {"watched": True, **OFF}),
        ((HeadGate(GATE, where=Where(branches="cond")),), {"watched": True, **OFF, "branches": True}),
        ((HeadGate(GATE, where=Where(rows=(0, 4))),), {"watched": True, **OFF}),
        ((HeadGate(GATE), PAG(3.0)), {"watched": True, **OFF, "around": (1,)}),
        (
            (PAG(3.0), AttendAndExcite(["red"], where=Where(kinds="cross"))),
            {"watched": True, **OFF, "around": (0, 1), "latent": (1,), "latent_moves": True},
        ),
    ],
    ids=["gate", "steps", "branches", "rows", "guidance", "latent"],
)
def test_what_methods_ask(methods: tuple[Intervention, ...], expected: dict[str, Any]) -> None:
    pipe = tiny_pipeline("sd")
    with steer(pipe, *methods, control=True) as run:
        found = declared(run, pipe, pipe.unet)
        # A denoiser whose arguments nobody needs keeps its own forward.
        assert ("forward" in vars(pipe.unet)) == found.watched
    shown = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name in expected}
    assert {k: tuple(b.index for b in v) if isinstance(v, tuple) else v for k, v in shown.items()} == expected
    assert found.edits.keys() == set(range(len(methods)))
    assert set(found.edits[0]) <= {s.name for s in sites(pipe)}


def test_whether_it_is_compiled() -> None:
    pipe = tiny_pipeline("sd")
    with steer(pipe, HeadGate(GATE), control=True) as run:
        assert declared(run, pipe, torch.compile(pipe.unet, backend="eager")).whole
        pipe.unet.mid_block.compile(backend="eager")
        parts = declared(run, pipe, pipe.unet)
        assert parts.compiled and not parts.whole
        pipe.unet.compile(backend="eager")
        assert declared(run, pipe, pipe.unet).whole


def test_a_method_without_sites_here_is_not_around_this_denoiser() -> None:
    pipe = tiny_pipeline("sd")
    with steer(pipe, PAG(3.0), control=True) as run:
        found = Declarations.of(run, (), pipe.unet, pipe.unet)
        assert not found.around and not found.edits
