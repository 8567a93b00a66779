"""Whether a tensor was changed where it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer.audit import mark_of as mark
from attnsteer.audit import unchanged as same


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf"), -float("inf")])
def test_a_change_is_noticed_and_nothing_else_is(value: float, mode: Any) -> None:
    with mode():
        tensor = torch.tensor([0.5, value])
        marked = mark(tensor, values=True)
        assert same(tensor, marked) and same(tensor * 1.0, mark(tensor * 1.0, values=True))
        tensor[1:].fill_(2.0)
        assert not same(tensor, marked)


def test_without_copies_inference_tensors_do_not_tell() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(2)
        marked = mark(tensor, values=False)
        tensor.add_(1.0)
        assert marked is None and same(tensor, marked)
    plain = torch.zeros(2)
    marked = mark(plain, values=False)
    plain.add_(1.0)
    assert not same(plain, marked)
