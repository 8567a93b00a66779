"""What an account says of rows and keys, from plain tensors."""

from __future__ import annotations

import torch

from attnsteer.account import Track

#         slot        0   1   2   3   4   5   6
#                    pad  A0  A1  A2  B0  B1  pad, where A2 is generated
SLOT = torch.arange(7)
VALID = torch.tensor([[False, True, True, True, True, True, False]])
GENERATED = SLOT[None] == 3


def at(found: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in found]


def test_the_last_tokens_of_packed_requests() -> None:
    index, request = torch.tensor([[-1, 0, 1, 2, 0, 1, 1]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    track = Track(SLOT, index, request, VALID, GENERATED, padded=True, packed=True)
    assert at(track.last) == [[3, 5]]
    assert at(track.last_prompt) == [[2, 5]]


def test_the_last_tokens_of_padded_rows() -> None:
    index = torch.tensor([[-1, 0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 5, 6]])
    valid = torch.cat([VALID, torch.ones_like(VALID)])
    generated = torch.cat([SLOT[None] == 5, torch.zeros_like(VALID)])
    track = Track(SLOT, index, torch.zeros_like(index), valid, generated, padded=True)
    assert at(track.last) == [[5], [6]]
    assert at(track.last_prompt) == [[4], [6]]
