"""VAR and VHR on a compiled language model: the hooks they need break the graph and act; they are never ignored."""

from __future__ import annotations

import pytest
import torch

from attnsteer import VAR, VHR, Intervention, Where, steer
from tests.hosts.transformers.vision_families import VOCAB, build

BOTH = Where(layers=[0, 1])


@pytest.mark.parametrize("method", [VAR((3, 17), 1.6, 0.2, 0.1, where=BOTH), VHR(1.7, where=BOTH)], ids=["VAR", "VHR"])
@torch.no_grad()
def test_compiled(method: Intervention) -> None:
    model = build("llava").model.language_model
    ids, spans = (
        torch.randint(8, VOCAB, (2, 14), generator=torch.Generator().manual_seed(0)),
        [[(2, 8)], [(1, 6), (7, 9)]],
    )
    plain = model(input_ids=ids).last_hidden_state
    with steer(model, method) as run, run.images(spans):
        expected = model(input_ids=ids).last_hidden_state
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    try:
        with steer(compiled, method) as run, run.images(spans):
            out = compiled(input_ids=ids).last_hidden_state
        assert torch.allclose(out, expected, atol=1e-5) and not torch.allclose(out, plain, atol=1e-3)
        assert torch.allclose(compiled(input_ids=ids).last_hidden_state, plain, atol=1e-5)
    finally:
        torch._dynamo.reset()
