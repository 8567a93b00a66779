"""Prefix sharing in continuous batching: a block of keys is found again only by requests that are steered alike.

The library finds a block by the hash of its tokens and of the blocks before it. So it is enough that the tokens of a prompt's first
block are told apart by what the steering is, and those of the block in which generated tokens begin by where that is: the same text
as a prompt and as an answer is edited differently. Where a later token may have changed an earlier one, nothing is shared.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

from ...choices import Choice
from .packed import CARRIER, UNSTEERED

# What stands in place of a block's first tokens: two halves of its hash, as non-negative 32-bit integers.
WORDS = 2


def salt_prefixes(cache: Any, scheduler: Any) -> None:
    """Put the salt of each request into the hashes of its blocks."""
    search, mark = cache.search_prefix_match, cache.mark_complete_blocks
    size = min(allocator.tokens_per_page for allocator in cache.cache_allocators.values())

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        state = scheduler.waiting_requests.get(request_id) or scheduler.active_requests.get(request_id)
        if state is None or not _choice(state).row_local:
            return 0
        return search(request_id, salted(prompt_ids, state, size))

    def mark_complete_blocks(state: Any, complete_blocks: Any) -> None:
        if complete_blocks and _choice(state).row_local:
            mark(_Salted(state, size), complete_blocks)

    cache.search_prefix_match = search_prefix_match
    cache.mark_complete_blocks = mark_complete_blocks


def _choice(state: Any) -> Choice:
    return state.logit_processor_kwargs.get(CARRIER, UNSTEERED).choice


def salted(tokens: list[int], state: Any, size: int) -> list[int]:
    """The tokens of a request from its first on, with those of some blocks of `size` exchanged for their keyed hash."""
    key = _choice(state).identity
    if not key:
        return tokens
    prompt = state._true_initial_tokens or len(state.initial_tokens)
    border = prompt // size * size
    if border > 0:
        tokens = _exchanged(tokens, 0, size, key)
    if border < len(tokens):
        tokens = _exchanged(tokens, border, size, key + prompt.to_bytes(8, "little"))
    return tokens


def _exchanged(tokens: list[int], start: int, size: int, key: bytes) -> list[int]:
    block = tokens[start : start + size]
    digest = hashlib.blake2b(array("q", block).tobytes(), digest_size=4 * WORDS, key=key).digest()
    # An incomplete block is hashed by nobody.
    words = [w & 0x7FFFFFFF for w in array("I", digest)][: len(block)]
    return [*tokens[:start], *words, *[0] * (len(block) - len(words)), *tokens[start + len(block) :]]


class _Salted:
    """A request as the ledger of blocks is shown it: with its tokens salted."""

    def __init__(self, state: Any, size: int):
        self._state = state
        self.initial_tokens = salted(state.initial_tokens + state.generated_tokens, state, size)
        self.generated_tokens: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)
