"""Models on flash-attention: what its arguments mean, by a stand-in with its signature; the check of each site decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.modeling_utils import AttentionInterface

from attnsteer import ACT, SpotLight, steer
from attnsteer.errors import UnsupportedHost
from attnsteer.testing.transformers_models import TRANSFORMERS

METHODS = (ACT({0: [0, 3]}, beta=0.4, threshold=0.02), SpotLight([[(2, 6)], [(1, 4)]], 0.5))


def stand_in(error: float = 0.0) -> Any:
    def flash(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float = 1.0, sliding_window: Any = None,
        is_causal: Any = None, **rest: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        n, m = q.shape[2], k.shape[2]
        behind = torch.arange(m - n, m)[:, None] - torch.arange(m)
        seen = (behind >= 0) if n > 1 else torch.ones(1, m, dtype=torch.bool)
        seen = seen & (behind < sliding_window) if sliding_window else seen
        seen = seen[None, None] if attention_mask is None else seen & attention_mask[:, None, None].bool()
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=True)
        return (out + error).transpose(1, 2), None

    return flash


def on_flash(model: nn.Module) -> nn.Module:
    """As after `set_attn_implementation`, which asks for the package."""
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


@torch.no_grad()
def logits(model: nn.Module, padded: bool) -> Tensor:
    """Of a prompt, of three tokens more in one call, and of one."""
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : 4 if padded else 0] = 0
    more = {"attention_mask": mask} if padded else {}
    found = model(ids, **more)
    out, cache = [found.logits * mask[..., None]], found.past_key_values
    for count in (3, 1):
        step = torch.full((2, count), 7)
        if padded:
            more["attention_mask"] = nn.functional.pad(more["attention_mask"], (0, count), value=1)
        out.append(model(step, past_key_values=cache, **more).logits)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_as_on_sdpa(kind: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", stand_in())
    model = TRANSFORMERS[kind].build(num_hidden_layers=1)
    with steer(model, *METHODS):
        expected = logits(model, padded)
    on_flash(model)
    plain = logits(model, padded)
    with steer(model, *METHODS):
        torch.testing.assert_close(logits(model, padded), expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-2


def test_a_kernel_that_does_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", stand_in(0.1))
    model = on_flash(TRANSFORMERS["llama"].build(num_hidden_layers=1))
    with steer(model, METHODS[0], control=True), pytest.raises(UnsupportedHost, match="does something else"):
        model(torch.randint(5, 60, (1, 12)))


@pytest.mark.parametrize("kind", ["packed", "static cache"])
def test_what_hides_its_mask_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", stand_in())
    model = on_flash(TRANSFORMERS["llama"].build(num_hidden_layers=1))
    mask, lengths = torch.ones(1, 12, dtype=torch.long), torch.tensor([0, 5, 12], dtype=torch.int32)
    mask[:, :4] = 0
    more: dict[str, Any] = {
        "packed": {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7},
        "static cache": {"attention_mask": mask, "past_key_values": StaticCache(model.config, max_cache_len=20)},
    }[kind]
    with steer(model, METHODS[0], control=True), pytest.raises(UnsupportedHost, match="on padded batches"):
        model(torch.randint(5, 60, (1, 12)), **more)


@torch.no_grad()
def test_compiled_code_is_left_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", stand_in())
    model, ids = on_flash(TRANSFORMERS["llama"].build(num_hidden_layers=1)), torch.randint(5, 60, (2, 12))
    plain = model(ids).logits
    torch._dynamo.reset()
    with steer(model, *METHODS):
        expected = model(ids).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, expected)
    torch._dynamo.reset()
    with steer(model, *METHODS, control=True), pytest.raises(Exception, match="not steered inside compiled code"):
        torch.compile(model, backend="eager", fullgraph=True)(ids)
    assert (expected - plain).abs().max() > 1e-2
