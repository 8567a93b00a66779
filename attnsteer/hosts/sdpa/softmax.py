"""Whether a module takes the softmax of its attention itself, by its own code."""

from __future__ import annotations

import functools
import inspect

from torch import nn

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "attention_heads", "heads", "nhead")


def writes_attention(module: nn.Module) -> bool:
    """Whether the module's own code, or a function beside it that this calls, takes a softmax, and it has heads.

    `nn.MultiheadAttention` does, in a function of torch.
    """
    return heads_of(module) is not None and (isinstance(module, nn.MultiheadAttention) or _takes_softmax(type(module)))


def heads_of(module: nn.Module) -> int | None:
    """The number of heads that the module has, or its config where it projects queries, keys and values: a router does not."""
    owners = [vars(module)]
    if sum(isinstance(child, nn.Linear) for child in module.children()) > 2:
        config = getattr(module, "config", None)
        owners.append({name: getattr(config, name, None) for name in HEADS})
    found = (owner.get(name) for owner in owners for name in HEADS)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


@functools.lru_cache(maxsize=4096)
def _takes_softmax(cls: type) -> bool:
    waiting, seen = [cls.forward], set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        if {"softmax", "Softmax", "multi_head_attention_forward"} & set(code.co_names):
            return True
        for name in code.co_names:
            found = function.__globals__.get(name)
            found = getattr(cls, name, None) if found is None else found
            if inspect.isfunction(found) and found.__module__ == cls.__module__:
                waiting.append(found)
    return False
