"""Whether the interventions of an arm changed anything, read from their audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Events of an audit that belong to no site and change what the model computes.
EVENTS = ("latent updates",)


def changed_calls(interventions: Sequence[Mapping[str, Any]]) -> int | None:
    """How often an arm's interventions changed something: attention calls, updates of the latent, or predictions alone.

    Args:
        interventions: as `Audit.to_dict` lists them. Sites that do not count changes are read by their edits.

    Returns:
        the number, or None where the audit cannot tell: compiled sites, methods that act around the model alone, and
        engines of their own.
    """
    total, unknown = 0, not interventions
    for entry in interventions:
        sites = entry.get("sites", {}).values()
        # A weak pass may leave blocks out and edit no attention: then the predictions count.
        total += sum(site.get("changed", site.get("edits", 0)) for site in sites) or entry.get("changed", 0)
        total += sum(entry.get(event, 0) for event in EVENTS)
        around = bool(entry.get("guided calls")) and not entry.get("inside passes")
        unknown = unknown or around or bool(entry.get("elsewhere")) or any(site.get("compiled") for site in sites)
    return total or (None if unknown else 0)
