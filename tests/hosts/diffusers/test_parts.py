"""Processors that compute several attentions: their parts are listed, and edits of maps act in the part that is meant, exactly.

The reference exchanges the library's attention primitive for softmax(Q K^T) written out, edited in chosen calls of chosen modules.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import PAG, HeadGate, Intervention, Where, sites, steer
from attnsteer.call import AttnCall, Reweight
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.parameters import number
from attnsteer.site import Site
from attnsteer.testing.sweep import diffusers as sweep

FACTOR = 0.25


@dataclass(frozen=True)
class FirstKey(Intervention):
    """A'_ij = w A_ij for the first key, the rest renormalised."""

    weight: float = number(FACTOR, low=0)

    def weights(self, call: AttnCall) -> Reweight:
        return Reweight((((torch.arange(call.k.shape[2]) < 1)[None, None], self.weight),))


# Name -> record of the sweep, other numbers in its config, further arguments, module, calls of it that are edited, of how many.
CASES: dict[str, Any] = {
    # The processors of Wan count 512 tokens of text.
    "wan": ("WanTransformer3DModel (wan)", {"image_dim": 16, "added_kv_proj_dim": 48},
            {"encoder_hidden_states_image": (2, 5, 16), "encoder_hidden_states": (2, 512, 32)},
            "blocks.1.attn2", {"text": [2], "image prompt": [1]}, 2),
    "cosmos": ("CosmosControlNetModel", {}, {}, "control_blocks.1.attn2", {"text": [1], "image prompt": [2]}, 2),
    "cosmos 3": ("Cosmos3OmniTransformer", {}, {}, "layers.0.self_attn", {"image": [2], "text": [1]}, 2),
    "wan animate": ("WanAnimateTransformer3DModel", {"added_kv_proj_dim": 24}, {"encoder_hidden_states": (1, 512, 16)},
                    "blocks.1.attn2",
                    {"text": [2], "image prompt": [1]}, 2),
    "differential": ("StableAudio3DiTModel", {"use_differential_attention": True}, {}, "transformer_blocks.1.self_attn",
                     {"first map": [1], "second map": [2]}, 2),
    "differential, cross": ("StableAudio3DiTModel", {"use_differential_attention": True}, {}, "transformer_blocks.1.cross_attn",
                            {"first map": [1], "second map": [2]}, 2),
    "blocks": ("QwenImage21Transformer2DModel", {}, {}, "transformer_blocks.1.attn", {"image": [-1]}, None),
}  # fmt: skip
MAIN = {"image": ["image"], "text": ["text"], "first map": ["first map", "second map"]}


def built(name: str) -> tuple[nn.Module, dict[str, Any], Site]:
    record, config, further, path, _, _ = CASES[name]
    records = sweep.records()
    changed = {**records[record], "config": {**records[record]["config"], **config}}
    before = records[record]
    try:
        records[record] = changed
        model, inputs = sweep.build(record)
    finally:
        records[record] = before
    generator = torch.Generator().manual_seed(1)
    inputs |= {key: torch.randn(*shape, generator=generator) for key, shape in further.items()}
    return model, inputs, next(s for s in sites(model) if s.name == path)


@contextlib.contextmanager
def by_hand(site: Site, edited: list[int], weight: float, gate: float = 1.0) -> Iterator[list[int]]:
    """The primitive of the processor's module written out; in the `edited` calls the first key counts `weight` times."""
    home = sys.modules[type(site.module.processor).__module__]
    real = home.dispatch_attention_fn
    calls: list[int] = []
    inside: list[bool] = []
    total: list[int] = []

    def primitive(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if not inside:
            return real(query, key, value, attn_mask=attn_mask, **options)
        calls.append(len(calls) + 1)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        z = q @ k.mT * q.shape[-1] ** -0.5
        if options.get("is_causal"):
            z = z.masked_fill(~torch.ones(z.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        if attn_mask is not None:
            z = z.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else z + attn_mask
        A = z.softmax(dim=-1)
        if calls[-1] in edited or (-1 in edited and calls[-1] == total[0]):
            A = torch.cat([A[..., :1] * weight, A[..., 1:]], dim=-1)
            A = A / A.sum(dim=-1, keepdim=True)
            v = v * gate
        return (A @ v).transpose(1, 2)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.clear()
        total[:] = [1 + len(kwargs.get("segments") or ())]
        inside.append(True)

    hooks = [
        site.module.register_forward_pre_hook(enter, with_kwargs=True),
        site.module.register_forward_hook(lambda *_: inside.clear(), always_call=True),
    ]
    home.dispatch_attention_fn = primitive
    try:
        yield calls
    finally:
        home.dispatch_attention_fn = real
        for hook in hooks:
            hook.remove()


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=3e-6 * float(y.abs().max()), rtol=2e-5) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_an_edit_of_the_map_acts_in_the_part_that_is_meant(name: str) -> None:
    model, inputs, site = built(name)
    *_, parts, count = CASES[name]
    assert set(parts) <= set(site.parts), site.parts
    plain = sweep.forward(model, inputs)
    here = Where(modules=site.path)

    def wanted(numbers: list[int], gate: float = 1.0, weight: float = FACTOR) -> list[Tensor]:
        with by_hand(site, numbers, weight, gate) as calls:
            out = sweep.forward(model, inputs)
            assert count is None or len(calls) == count
        return out

    def got(method: Intervention) -> list[Tensor]:
        with steer(model, method):
            return sweep.forward(model, inputs)

    main = next(m for first, m in MAIN.items() if first in parts)
    expected = wanted([n for part in main for n in parts[part]])
    assert close(got(FirstKey(where=here)), expected) and not close(expected, plain)
    for part, numbers in parts.items():
        one = Where(modules=site.path, parts=part)
        assert close(got(FirstKey(where=one)), wanted(numbers)), part
        gates = {(site.layer, h): 0.5 for h in range(site.heads)}
        assert close(got(HeadGate(gates, where=one)), wanted(numbers, 0.5, 1.0)), part
    # And a gate without parts covers the head in all of them.
    every = list(range(1, 30))
    assert close(got(HeadGate(gates, where=here)), wanted(every, 0.5, 1.0))
    after = sweep.forward(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(after, plain, strict=True))


@torch.no_grad()
def test_what_is_not_defined_on_a_difference_is_refused_before_it_runs() -> None:
    model, _, site = built("differential")
    with pytest.raises(UnsupportedHost, match=r"subtracts one attention map from another.*PAG"):
        steer(model, PAG(1.0, where=Where(modules=site.path)))


def test_a_method_about_one_part_does_not_act_in_another() -> None:
    from attnsteer import NAG
    from attnsteer.bound import Bound
    from attnsteer.hosts.diffusers.plans import check_plan, plan_of

    _, _, site = built("wan")
    method = NAG({"encoder_hidden_states": torch.ones(1, 4, 8)})
    for parts, refused in (("text", False), ("image prompt", True)):
        bound = Bound(0, method, Where(parts=parts), frozenset({"output"}))
        with pytest.raises(UnsupportedHost, match=r"NAG is about text.*Leave parts out") if refused else nullcontext():
            check_plan(site, plan_of(site.module, site.module.processor), bound)


def test_parts_are_named_and_listed() -> None:
    model, _, site = built("wan")
    assert "parts: image prompt, text" in str(sites(model)) and site.to_dict()["parts"] == ("image prompt", "text")
    with pytest.raises(SelectionError, match=r"parts.*image prompt.*text"):
        steer(model, FirstKey(where=Where(parts="picture")))
    chosen = Where(parts="text").resolve(sites(model), ("image",))
    assert {s.name for s, _ in chosen} == {"blocks.0.attn2", "blocks.1.attn2", "blocks.2.attn2"}
    for wrong in ((), 3, [""], {"a": 1}):
        with pytest.raises(SelectionError, match="parts"):
            Where(parts=wrong)
