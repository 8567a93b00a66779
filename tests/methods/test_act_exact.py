"""ACT on peaked maps, where nearly all mass lies on sinks, against the dense map in double precision.

Each attention call of a steered model is compared by itself, so that errors of earlier layers do not add up: its q, k, v and mask
give the map, `tests.reference.llm_methods.act` edits it, and the output must agree to 1e-12 (fp64) or 2e-5 (fp32) of its largest.
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from attnsteer import ACT, Intervention, steer
from attnsteer.account import plain
from attnsteer.call import AttentionMap, AttnCall
from attnsteer.kernels import Attention, attend_lse, leftover, mass
from attnsteer.site import Site
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.reference import llm_methods
from tests.reference.dense import dense_map, dense_out, dense_scores

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
BETA, TAU, NEW = 0.4, 0.12, 4


class Seen(Intervention):
    """Keeps what each call computed from, and its output."""

    kinds = ("self",)
    observes = True
    log: ClassVar[list[tuple[AttnCall, Tensor]]] = []

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        self.log.append((call, out.clone()))
        return out


@torch.no_grad()
def calls_of(name: str, times: float, dtype: torch.dtype, length: int) -> list[tuple[AttnCall, Tensor]]:
    """Calls of a prefill of three prompts with left padding and of some decoding steps."""
    model = tiny_transformers(name)
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("q_proj", "k_proj", "q_norm", "k_norm", "c_attn")):
            parameter.mul_(times)
    model = model.to(dtype)
    inputs = tiny_transformers_inputs(name, model, batch=3, length=length, padding="left", seed=5)
    Seen.log.clear()
    with steer(model, ACT(None, BETA, TAU), Seen()):
        model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return list(Seen.log)


@pytest.mark.parametrize("length", [24, 80])
@pytest.mark.parametrize("times", [2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_peaked_maps(name: str, dtype: torch.dtype, times: float, length: int) -> None:
    sinks: dict[str, Tensor] = {}
    least, phases = 1.0, set()
    for call, out in calls_of(name, times, dtype, length):
        att, site = call.map.att, call.site.name
        q, k, v = (t.double() for t in (att.q, att.k, att.v))
        A = dense_map(dense_scores(q, k, att.scale, mask=att.mask, causal=att.causal))
        batch, _, n, m = A.shape
        rows, keys = call.row_valid.expand(batch, n), call.key_valid.expand(batch, m)
        if call.phase == "prefill":
            expected, sinks[site], _ = llm_methods.act(A, BETA, TAU, row_valid=rows, key_valid=keys)
        else:
            expected, sinks[site], _ = llm_methods.act_decode(A, sinks[site], "frozen", BETA, row_valid=rows)
        outside = (A * ~sinks[site][:, :, None]).sum(dim=-1)
        least = min(least, float(outside[rows[:, None].expand_as(outside)].min()))
        wanted = dense_out(expected, v)
        wrong = (wanted - out.double()).abs() * rows[:, None, :, None]
        assert float(wrong.max()) <= TOLERANCE[dtype] * float(wanted.abs().max()), (site, call.phase)
        phases.add(call.phase)
    assert phases == {"prefill", "decode"} and any(bool(s.any()) for s in sinks.values())
    assert least < 1e-2, "the maps are not peaked; the test would be vacuous"


def rows_with(outside: list[float], dtype: torch.dtype = torch.float64, shift: float = 0.0) -> tuple[Attention, Tensor]:
    """Query rows over 8 keys, the same six in each batch entry, of which 5 are sinks, with these masses outside of them."""
    B, n, m = len(outside), 6, 8
    generator = torch.Generator().manual_seed(0)
    keys = torch.zeros(1, 1, m, dtype=torch.bool)
    keys[..., 1:6] = True
    scores = torch.zeros(B, n, m, dtype=torch.float64)
    for b, r in enumerate(outside):
        scores[b, :, keys[0, 0]] = torch.tensor((1 - r) / 5).double().log()
        scores[b, :, ~keys[0, 0]] = torch.tensor(r / 3, dtype=torch.float64).log().clamp_min(-200.0)
    k = torch.eye(m, dtype=torch.float64).expand(B, 1, m, m)
    v = torch.randn(B, 1, m, m, generator=generator, dtype=torch.float64)
    return Attention((scores + shift)[:, None].to(dtype), k.to(dtype), v.to(dtype), scale=1.0), keys


@pytest.mark.parametrize("shift", [0.0, 60.0, -60.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_the_mass_outside_keeps_its_digits(dtype: torch.dtype, shift: float) -> None:
    """From half of the row down to what fp32 can hold; large scores make every other mass wrong in its last digits."""
    wanted = [0.5, 0.29, 0.2, 0.06, 0.04, 1e-3, 1e-6, 1e-12, 1e-30]
    att, keys = rows_with(wanted, dtype, shift)
    _, lse = attend_lse(att)
    found = leftover(att, lse, keys, mass(att, lse, keys)).double()[:, 0, 0]
    A = dense_map(dense_scores(att.q.double(), att.k.double(), 1.0))
    exact = (A * ~keys[:, :, None]).sum(dim=-1)[:, 0, 0]
    limit = 1e-12 if dtype == torch.float64 else 2e-5
    assert float(((found - exact) / exact).abs().max()) <= limit


@pytest.mark.parametrize("r", [1e-5, 1e-7, 1e-12, 1e-30, 1e-36])
@pytest.mark.parametrize("n", [2, 6], ids=["rows", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_there_is_no_cut_off(dtype: torch.dtype, n: int, r: float) -> None:
    """The other keys get the freed mass however little they had."""
    edited, plain, beta = edited_row(dtype, n, r)
    assert float((edited - plain).abs().max() / plain.abs().max()) > 1e-2
    att, keys = rows_with([r], dtype)
    A = dense_map(dense_scores(att.q.double(), att.k.double(), 1.0))[:, :, :n]
    row = llm_methods._redistribute(A[0, 0, 0], keys[0, 0], beta)
    wanted = dense_out(row.expand(1, 1, n, -1), att.v.double())
    limit = 1e-12 if dtype == torch.float64 else 2e-5
    assert float((edited.double() - wanted).abs().max() / wanted.abs().max()) <= limit


@pytest.mark.parametrize("n", [2, 6], ids=["rows", "kernel"])
@pytest.mark.parametrize("r", [0.0, 1e-41])
def test_a_row_with_nothing_else_stays_as_it_is(n: int, r: float) -> None:
    """NaN in the official code; a subnormal mass has no reciprocal, so it counts as none."""
    edited, plain, _ = edited_row(torch.float32, n, r)
    assert torch.equal(edited, plain)


def edited_row(dtype: torch.dtype, n: int, r: float) -> tuple[Tensor, Tensor, float]:
    att, keys = rows_with([r], dtype)
    att = att.replace(q=att.q[:, :, :n])
    call = AttnCall(
        Site("a", 0, "self", 1, 1, causal=False),
        plain(n, att.q.device),
        plain(att.shape[3], att.q.device),
        phase="decode",
        heads=(0,),
        past=att.shape[3] - n,
        state={"sinks": keys},
        view=AttentionMap(att),
    )
    method = ACT(None, BETA, TAU)
    return call.map.reweight(method.weights(call)), call.map.out, BETA
