"""A view of a model's config that differs in the name of its attention implementation only.

Only attention modules see it, so model code, library checks and mask functions read what they always read; a later change of
the config is seen through it. Copies and pickles of it are the config itself.
"""

from __future__ import annotations

import copy
from typing import Any

# The name under which our attention function is registered.
NAME = "attnsteer"


def view(config: Any) -> Any:
    """A live view of `config` with our implementation's name."""
    kind = type(config)
    made = type(
        kind.__name__,
        (kind,),
        {
            "__module__": kind.__module__,
            "_attn_implementation": property(lambda self: NAME, lambda self, value: None),
            "__deepcopy__": lambda self, memo: copy.deepcopy(config, memo),
            # A builtin, so that a pickle can be read where this library is not installed.
            "__reduce_ex__": lambda self, protocol: (max, ([config],)),
        },
    )
    seen = object.__new__(made)
    object.__setattr__(seen, "__dict__", config.__dict__)
    return seen


def base_name(config: Any) -> str:
    """The implementation that the model runs now."""
    found = config.__dict__.get("_attn_implementation_internal")
    return "eager" if found is None else found
