"""What methods say that act in decoding on what they found in the prompt."""

from __future__ import annotations

from ..call import AttnCall
from ..errors import UnsupportedHost
from ..intervention import Intervention


def prompt_unseen(method: Intervention, call: AttnCall, unknown: str, hint: str = "") -> UnsupportedHost:
    """The error where a method was not asked in the prefill: `unknown` is what it would have found there."""
    name, phases = type(method).__name__, method.where.phases
    if phases is not None and "prefill" not in phases:
        why, remedy = f"Where(phases={phases!r}) leaves the prompt out", "Select both phases."
    else:
        why = "the cache was filled before steering began"
        remedy = "Run the whole prefill inside the steering context."
    return UnsupportedHost(f"{name} at {call.site.path}: {why}, so {unknown}. {remedy}{hint and ' '}{hint}")
