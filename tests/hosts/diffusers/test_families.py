"""Every denoiser family that can be built small: sites, idle steering, edits, undo, and the order of joint streams."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import PAG, SEG, HeadGate, SoftPAG, Where, sites, steer
from attnsteer.errors import UnsupportedHost
from attnsteer.intervention import Intervention
from tests.hosts.families import Family, forward, known

ALL = known()
JOINT = [name for name, family in ALL.items() if family.order]
# Joint sequences whose order differs per sample (padding between the streams), or whose rows are one stream only.
UNTOLD = ["lumina2", "zimage", "omnigen", "hidream"]


@functools.cache
def built(name: str) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """Model, inputs and plain prediction, shared: steering must leave the model as it was."""
    family = ALL[name]
    model, inputs = family.build(), family.inputs()
    return model, inputs, forward(model, inputs)


def gates(model: nn.Module, value: float) -> dict[tuple[int, int], float]:
    return {(s.layer, h): value for s in sites(model) if s.modality == "image" for h in range(s.heads)}


@pytest.mark.parametrize("name", ALL)
def test_idle_steering_is_bit_identical(name: str) -> None:
    model, inputs, plain = built(name)
    processors = [getattr(s.module, "processor", None) for s in sites(model)]
    with steer(model, HeadGate(gates(model, 1.0)), control=True) as run:
        assert torch.equal(forward(model, inputs), plain)
    # every site was reached
    assert len(run.audit.records) == len(run.sites)
    handle = steer(model, HeadGate(gates(model, 0.0), where=Where(steps=[5])), control=True)
    assert torch.equal(forward(model, inputs), plain)
    handle.remove()
    assert all(getattr(s.module, "processor", None) is p for s, p in zip(sites(model), processors, strict=True))
    assert "forward" not in vars(model)
    assert torch.equal(forward(model, inputs), plain)


@pytest.mark.parametrize("name", ALL)
def test_a_gate_at_any_site_moves_the_prediction(name: str) -> None:
    model, inputs, plain = built(name)
    chosen = [s for s in sites(model) if s.modality == "image"]
    for site in (chosen[0], chosen[-1]):
        gate = HeadGate({(site.layer, 0): -1.0}, where=Where(kinds=site.kind, layers=[site.layer]))
        with steer(model, gate):
            assert not torch.allclose(forward(model, inputs), plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(forward(model, inputs), plain)


@dataclass(frozen=True)
class Spy(Intervention):
    """Keeps the queries and the row roles of every call."""

    seen: list[Any] = field(default_factory=list, compare=False, kw_only=True)

    needs = ("segments",)

    observes = True

    def output(self, call: Any, out: Tensor) -> None:
        self.seen.append((call.site.name, call.q.clone(), dict(call.segments)))


def first_joint(family: Family, **overrides: Any) -> tuple[list[int], dict[str, slice], int]:
    """Rows of the first joint site that hear the image input, the roles that the host gives, and the number of rows."""
    model, inputs = family.build(**overrides), family.inputs()
    name = next(n for n in ("sample", "hidden_states", "x") if n in inputs)
    spy = Spy(where=Where(kinds="joint"))
    moved = {**inputs, name: [t + 1 for t in inputs[name]] if isinstance(inputs[name], list) else inputs[name] + 1}
    with steer(model, spy):
        forward(model, inputs)
        calls = len(spy.seen)
        forward(model, moved)
    (_, before, roles), (_, after, _) = spy.seen[0], spy.seen[calls]
    changed = (before - after).abs().amax(dim=(0, 1, 3)) > 1e-6
    return changed.nonzero().flatten().tolist(), roles, before.shape[2]


# The first joint block as it is, and the first of the single-stream blocks, where there are some.
JOINT_RUNS = [(n, False) for n in JOINT] + [(n, True) for n in JOINT if ALL[n].only_joint]


@pytest.mark.parametrize(("name", "single"), JOINT_RUNS)
def test_the_order_of_a_joint_sequence(name: str, single: bool) -> None:
    family = ALL[name]
    image, roles, rows = first_joint(family, **(family.only_joint if single else {}))
    assert set(roles) == {"image", "text"}
    assert image == list(range(rows))[roles["image"]]
    assert sorted([*image, *range(rows)[roles["text"]]]) == list(range(rows))
    assert (image[0] == 0) == (family.order == "image text")


@pytest.mark.parametrize("name", UNTOLD)
def test_an_order_that_is_not_told_is_refused_where_it_matters(name: str) -> None:
    model, inputs, plain = built(name)
    layer = next(s.layer for s in sites(model) if s.kind == "joint")
    where = Where(layers=[layer], kinds="joint")
    for method in (PAG(3.0, joint="ii_identity", where=where), SEG(3.0, where=where)):
        run = steer(model, method, control=True)
        with pytest.raises(UnsupportedHost, match=r"not known|not defined"), run.branches("cond"):
            forward(model, inputs)
        run.remove()
    with (
        pytest.raises(Exception, match="row roles"),
        steer(model, HeadGate({(layer, 0): 0.0}, where=Where(rows="text"))),
    ):
        forward(model, inputs)
    with steer(model, SoftPAG(3.0, 0.5, joint="joint_identity", where=where)) as run, run.branches("cond"):
        assert not torch.equal(forward(model, inputs), plain)
    assert torch.equal(forward(model, inputs), plain)


def test_the_prompts_own_layers_count_apart() -> None:
    for name in ("hunyuanvideo", "kandinsky5", "lumina2", "zimage"):
        found = sites(built(name)[0])
        assert {s.modality for s in found} == {"image", "text"}
        for modality in ("image", "text"):
            assert min(s.layer for s in found if s.modality == modality) == 0
    model = built("kandinsky5")[0]
    with steer(model, HeadGate({(0, 0): 0.0}, where=Where(modalities="text"))) as run:
        assert [s.name for s in run.sites] == ["text_transformer_blocks.0.self_attention"]
        forward(model, built("kandinsky5")[1])


KINDS = {
    "sd": {"self", "cross"}, "cogvideox": {"joint"}, "cogview4": {"joint"}, "sd35": {"self", "joint"}, "prx": {"self"},
    "lumina2": {"self", "joint"}, "zimage": {"self", "joint"}, "hidream": {"joint"}, "ltx": {"self", "cross"},
    "kandinsky5": {"self", "cross"}, "joyimage": {"joint"}, "easyanimate": {"joint"}, "mochi": {"joint", "cross"},
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name: str) -> None:
    assert {s.kind for s in sites(built(name)[0])} == KINDS[name]
