"""Exact attention algebra: pure functions of q, k, v and a mask, in the model's own terms."""

from .blocks import RowBlocks
from .groups import KeyIndex, index_keys, leftover, mass, partial
from .lse import attend, attend_lse, causal_with_mask, lse_source
from .merge import held, lift, merge, reweight
from .problem import Attention, any_last, dense, dense_with_sink, key_heads, visible
from .sources import Source, add_source, flash_source, flex_source, remove_source
from .sparse import KeyBlocks, attend_blocks, hide_blocks
from .statistics import column_mass, entropy, keys_seen, rows, seen_by

__all__ = [
    "Attention",
    "KeyBlocks",
    "KeyIndex",
    "RowBlocks",
    "Source",
    "add_source",
    "any_last",
    "attend",
    "attend_blocks",
    "attend_lse",
    "causal_with_mask",
    "column_mass",
    "dense",
    "dense_with_sink",
    "entropy",
    "flash_source",
    "flex_source",
    "held",
    "hide_blocks",
    "index_keys",
    "key_heads",
    "keys_seen",
    "leftover",
    "lift",
    "lse_source",
    "mass",
    "merge",
    "partial",
    "remove_source",
    "reweight",
    "rows",
    "seen_by",
    "visible",
]
