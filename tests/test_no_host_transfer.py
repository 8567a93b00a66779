"""What compiled code would run, on tensors without values: nothing is read back, whatever the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer import kernels
from attnsteer.kernels import Attention


@pytest.mark.parametrize("quirk", ["causal", "mask", "soft cap", "sinks", "few rows"])
def test_kernels(quirk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of a value raises on the meta device; so does a tensor of the CPU that meets one of another device."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q, k, v = (torch.empty(2, heads, 32, 16, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2))
    changes: dict[str, dict[str, Any]] = {
        "mask": {"mask": torch.ones(2, 1, 32, 32, dtype=torch.bool, device="meta"), "causal": False},
        "soft cap": {"softcap": 5.0},
        "sinks": {"sinks": torch.empty(4, device="meta")},
        "few rows": {"q": q[:, :, :1], "causal": False},
    }
    att = Attention(q, k, v, 0.25, causal=True).replace(**changes.get(quirk, {}))
    keys = torch.ones(2, 1, 32, dtype=torch.bool, device="meta")
    out, lse = kernels.attend_lse(att)
    mass, part = kernels.partial(att, lse, keys)
    found = [out, lse, mass, part, kernels.leftover(att, lse, keys, mass), kernels.attend(att)]
    found += [kernels.column_mass(att, lse), kernels.entropy(att, lse), kernels.keys_seen(att), kernels.dense(att)]
    found.append(kernels.reweight(att, out, lse, [(keys, 0.5, mass, part)], 1.0, True))
    assert all(t.device.type == "meta" for t in found)
