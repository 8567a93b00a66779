"""What attention calls are, found by looking: the tables must say the same, and what no table says is looked up in the call."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from attnsteer import PAG, Where, sites, steer
from attnsteer.hosts.diffusers import streams
from attnsteer.hosts.diffusers.probe import probe
from attnsteer.testing import tiny_denoiser, tiny_denoiser_inputs
from tests.hosts.diffusers.common import relative
from tests.hosts.families import forward, known

ALL = known()
SAMPLE = [
    "sd",
    "sd35",
    "flux",
    "wan",
    "lumina2",
    "kandinsky3",
    "prx",
    "cascade",
    "stableaudio",
    "hunyuanvideo",
    "zimage",
]


@pytest.mark.parametrize("name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.long) for n in ALL])
def test_the_tables_say_what_the_probe_sees(name: str) -> None:
    model, inputs = ALL[name].build(), ALL[name].inputs()
    plain, state = forward(model, inputs), torch.get_rng_state()
    calls: list[int] = []
    counting = model.register_forward_pre_hook(lambda m, a: calls.append(1))
    found = probe(model, inputs)
    counting.remove()
    assert len(calls) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(forward(model, inputs), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    listed = {s.name: s for s in sites(model)}
    assert found
    for structure in found:
        site = listed.get(structure.site)
        if site is None or structure.kind == "?":
            # Mochi's pooler is no site.
            continue
        # Tokens that are all alike (OmniGen's prompt) look like constants.
        if name != "omnigen":
            assert site.kind == streams.listed_kind(structure.kind, structure.order), structure
        order = streams.order_of(site, model)
        if site.kind == "joint" and order:
            assert structure.order == order, structure
        assert structure.heads == site.heads or structure.kv_heads == site.kv_heads


def test_a_training_model_is_not_looked_at() -> None:
    from attnsteer.errors import UnsupportedHost

    model = tiny_denoiser("sd").train()
    with pytest.raises(UnsupportedHost, match="eval"):
        probe(model, tiny_denoiser_inputs("sd", model))


@pytest.mark.parametrize("name", ["flux", "hunyuandit"])
def test_inputs_changed_at_once_show_what_they_show_one_by_one(name: str) -> None:
    model, inputs = ALL[name].build(), ALL[name].inputs()
    found = probe(model, inputs)
    base = _queries(model, inputs)
    for source in ("hidden_states", "encoder_hidden_states"):
        moved = _queries(model, {**inputs, source: _in_another_order(inputs[source])})
        for structure, (a, b) in zip(found, zip(base, moved, strict=True), strict=True):
            rows = ((a - b).abs().amax((1, 3)) > 1e-4 * b.abs().amax((1, 3))).any(0)
            told = [source in names for names, size in structure.queries for _ in range(size)]
            assert rows.tolist() == told, (source, structure)


def _in_another_order(tokens: Tensor) -> Tensor:
    return tokens.roll(1, -2) if tokens.ndim == 3 else tokens.roll(1, -1).roll(1, -2)


def _queries(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Those of each attention call, where attention gives its values back."""
    found: list[Tensor] = []

    class Cut(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not torch.nn.functional.scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            q, _, v = [*args, *((kwargs or {}).get(n) for n in ("query", "key", "value")[len(args) :])][:3]
            found.append(q.clone())
            return v.clone() if q.shape[2] == v.shape[2] else torch.zeros_like(q)

    with Cut():
        forward(model, inputs)
    return found


class _OwnValues(TorchFunctionMode):
    """Each row keeps the value of its own key, which is among further keys."""

    def __init__(self, place: str):
        super().__init__()
        self.place = place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, _, v = [*args, *((kwargs or {}).get(n) for n in ("query", "key", "value")[len(args) :])][:3]
            rows = q.shape[2]
            return v[:, :, :rows] if self.place == "first" else v[:, :, -rows:]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "place"), [("prx", "last"), ("cascade", "first")])
def test_identity_among_further_keys_is_the_rows_own(name: str, place: str) -> None:
    model, inputs = ALL[name].build(), ALL[name].inputs()
    plain = forward(model, inputs)
    where = Where(kinds="self")
    with steer(model, PAG(2.0, where=where)) as run, run.branches("cond"):
        ours = forward(model, inputs)
    with _OwnValues(place):
        weak = forward(model, inputs)
    expected = plain + 2.0 * (plain - weak)
    assert relative(ours, expected) < 5e-6
    assert relative(plain, expected) > 1e-2


def without_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_structures", dict)
    for name in ("IMAGE_FIRST", "TEXT_FIRST"):
        monkeypatch.setattr(streams, name, streams.re.compile(r"(?!)"))


def test_an_order_that_no_table_has_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def guided(model: nn.Module) -> Tensor:
        method = PAG(2.0, joint="ii_identity", where=Where(layers=[1], kinds="joint"))
        with steer(model, method) as run, run.branches("cond"):
            return forward(model, inputs)

    model, inputs = ALL["flux"].build(), ALL["flux"].inputs()
    expected = guided(model)
    without_tables(monkeypatch)
    site = next(s for s in sites(model) if s.kind == "joint")
    assert streams.order_of(site, model) == ()
    assert torch.equal(guided(model), expected)
    assert not any(m._forward_hooks for m in model.modules())


class Restless(nn.Module):
    """A layer whose output depends on how often it ran, and on everything that is random."""

    def __init__(self, inner: nn.Module, fails: bool = False):
        super().__init__()
        self.inner, self.fails = inner, fails
        self.register_buffer("count", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(1)
        self.ran, self.log, self.kept, self.mean = 0, [], {}, torch.zeros(())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fails and _get_current_function_mode() is not None:
            raise IndexError("half-way")
        self.count += 1
        self.ran += 1
        self.log.append(self.ran)
        self.kept[self.ran] = x
        self.mean.mul_(0.5).add_(x.mean())
        self.first = getattr(self, "first", self.ran)
        noise = torch.randn(()) + torch.randn((), generator=self.generator) + random.random() + float(np.random.rand())
        return self.inner(x + noise * 0.1 + self.count * 0.01 + self.mean * 0.01 + len(self.kept), *args, **kwargs)


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_look_counts_and_draws_is_not_seen_afterwards(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    def run(steered: bool) -> tuple[Any, ...]:
        model, inputs = ALL["flux"].build(), ALL["flux"].inputs()
        layer = model.transformer_blocks[0].norm1 = Restless(model.transformer_blocks[0].norm1, fails).eval()
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        if not steered:
            out = forward(model, inputs)
        else:
            with (
                steer(model, PAG(0.0, joint="ii_identity", where=Where(layers=[1], kinds="joint")), control=True) as on,
                on.branches("cond"),
            ):
                out = forward(model, inputs)
        drawn = (random.random(), float(np.random.rand()), float(torch.rand(())), layer.generator.get_state().tolist())
        return out, float(layer.count), layer.ran, layer.log, len(layer.kept), float(layer.mean), layer.first, drawn

    without_tables(monkeypatch)
    plain, ours = run(False), run(True)
    assert torch.equal(ours[0], plain[0])
    assert ours[1:] == plain[1:]


@pytest.mark.parametrize(
    ("ready", "why"), [("training", "training mode"), ("compiled", "compiled"), ("fails", "half-way")]
)
def test_a_model_that_cannot_be_looked_at_says_why(monkeypatch: pytest.MonkeyPatch, ready: str, why: str) -> None:
    from attnsteer.errors import UnsupportedHost

    without_tables(monkeypatch)
    model, inputs = ALL["flux"].build(), ALL["flux"].inputs()
    if ready == "training":
        model.train()
    elif ready == "compiled":
        model.transformer_blocks[1].compile(backend="eager")
    else:
        model.transformer_blocks[0].norm1 = Restless(model.transformer_blocks[0].norm1, fails=True).eval()
    method = PAG(2.0, joint="ii_identity", where=Where(layers=[1], kinds="joint"))
    with steer(model, method, control=True) as run, run.branches("cond"), pytest.raises(UnsupportedHost) as raised:
        forward(model, inputs)
    assert any(why in note for note in raised.value.__notes__)
