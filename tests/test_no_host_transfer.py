"""What a GPU would run, by tensors that have a device and no values: nothing is read back, nothing meets a tensor of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnsteer import ACT, PASTA, HeadGate, SpotLight, ZeroTuning, kernels, steer
from attnsteer.kernels import Attention
from attnsteer.testing.transformers_models import TRANSFORMERS

SPANS = [[(3, 9)], [(2, 5)]]
METHODS: dict[str, Callable[[], Any]] = {
    "HeadGate": lambda: HeadGate({(0, 0): 0.5}),
    "ZeroTuning": lambda: ZeroTuning({0: [1, 2]}, gamma=3.0),
    "ZeroTuning per sample": lambda: ZeroTuning(gamma=[3.0, 0.5]),
    "SpotLight": lambda: SpotLight(SPANS, 0.5),
    "PASTA": lambda: PASTA(SPANS, alpha=0.1),
    "ACT": lambda: ACT({0: [0, 3]}, beta=0.4, threshold=0.02),
    "ACT on all heads": lambda: ACT(beta=0.4, threshold=0.02),
}


class Watched(TorchDispatchMode):
    """Raises where a tensor of the device becomes one of the CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        before = [t for t in args if isinstance(t, Tensor)]
        moved = isinstance(out, Tensor) and out.device.type == "cpu" and any(t.device.type == "cuda" for t in before)
        assert not moved, f"{function} brings a tensor to the host"
        return out


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As in compiled code, where the reads of a first act are left out."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_methods(name: str, dtype: torch.dtype, device: torch.device) -> None:
    model = TRANSFORMERS["llama"].build(num_hidden_layers=1).to(device, dtype)
    ids = torch.ones(2, 12, dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    with steer(model, METHODS[name](), control=True) as run:
        with Watched():
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
            longer = torch.ones(2, 13, dtype=torch.long, device=device)
            out = model(ids[:, :1], attention_mask=longer, past_key_values=cache).logits
        assert out.device.type == "cuda" and out.shape[:2] == (2, 1)
        # Whatever it counted has no values.
        for record in run.audit.records.values():
            record._placed = None


@pytest.mark.parametrize("quirk", ["causal", "mask", "soft cap", "sinks", "few rows"])
def test_kernels(quirk: str, device: torch.device) -> None:
    q, k, v = (torch.empty(2, heads, 32, 16, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2))
    att = Attention(q, k, v, 0.25, causal=True)
    if quirk == "mask":
        att = att.replace(mask=torch.ones(2, 1, 32, 32, dtype=torch.bool, device=device), causal=False)
    elif quirk == "soft cap":
        att = att.replace(softcap=5.0)
    elif quirk == "sinks":
        att = att.replace(sinks=torch.empty(4, device=device))
    elif quirk == "few rows":
        att = att.replace(q=q[:, :, :1], causal=False)
    keys = torch.ones(2, 1, 32, dtype=torch.bool, device=device)
    with Watched():
        out, lse = kernels.attend_lse(att)
        mass, part = kernels.partial(att, lse, keys)
        found = [out, lse, mass, part, kernels.leftover(att, lse, keys, mass), kernels.attend(att)]
        found += [kernels.column_mass(att, lse), kernels.entropy(att, lse), kernels.keys_seen(att), kernels.dense(att)]
        found.append(kernels.reweight(att, out, lse, [(keys, 0.5, mass, part)], 1.0, True))
    assert all(t.device.type == "cuda" for t in found)
