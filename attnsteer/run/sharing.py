"""Arms that answer a batch together: which do, with what methods, and what the audit says of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import NeverFired, listing
from ..recipe import sharing
from ..recipe.arms import Arm
from .data.sample import Sample
from .job import Job
from .loaded import Loaded

if TYPE_CHECKING:
    from ..intervention import Intervention
    from ..site import Site
    from ..steering import Steering

# Tokens in a forward up to which a shared batch was found faster: from there on the model computes as long for each arm as
# it does for one alone, and an edit more, which has the heads of all of them (docs/decisions.md).
MOST_TOKENS = 1000


def groups(job: Job, loaded: Loaded, arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms of a run, those together that can share batches.

    In half precision what a batch of another size rounds differently can be another answer. An engine of its own has its requests
    of all arms at once.
    """
    if loaded.stream:
        return [list(arms)]
    exact = loaded.kind == "lm" and job.recipe.model.dtype == "float32"
    if job.recipe.share == "off" or not exact or not job.data.samples:
        return [[arm] for arm in arms]
    return sharing.groups(arms, job.data.samples[0], loaded)


def of_batch(
    groups: Sequence[list[Arm]], samples: Sequence[Sample], loaded: Loaded, decoding: Mapping[str, Any]
) -> list[list[Arm]]:
    """The arms that answer these samples together: those of a group, as many as make the batch faster.

    Args:
        decoding: arguments of `generate` where the arms do not give them; without `max_new_tokens` nothing is written.
    """
    if loaded.stream or all(len(g) == 1 for g in groups):
        return list(groups)
    longest = max(len(loaded.tokenizer(s["prompt"]).input_ids) for s in samples)
    found = []
    for group in groups:
        # The prompts are one forward, each token after the first one more.
        new = max(1, {**decoding, **group[0].decoding}.get("max_new_tokens", 1))
        most = max(1, int(MOST_TOKENS * new / (len(samples) * (longest + new - 1))))
        found += [group[i : i + most] for i in range(0, len(group), most)]
    return found


def make(group: Sequence[Arm], samples: Sequence[Sample], loaded: Loaded) -> list[Intervention]:
    """The interventions of a batch that has the samples once for each arm; none where no arm has any."""
    return group[0].make(samples, loaded) if len(group) == 1 else sharing.make(group, samples, loaded)


def named(group: Sequence[Arm]) -> str:
    """The arms by name."""
    return listing([arm.id for arm in group])


def audits(group: Sequence[Arm], steering: Steering) -> list[list[dict[str, Any]]]:
    """The audit of each arm, at the sites and heads that it selects; calls and edits are those of the batch.

    Raises:
        NeverFired: an arm's interventions were never asked.
    """
    if len(group) == 1:
        return [steering.audit.to_dict()["interventions"]]
    chosen = {site.path: site for site in steering.sites}
    return [_audit(arm, steering.audit.to_dict(part)["interventions"], chosen) for part, arm in enumerate(group)]


def _audit(arm: Arm, entries: Sequence[dict[str, Any]], chosen: dict[str, Site]) -> list[dict[str, Any]]:
    out = []
    # A baseline has no interventions.
    for method, entry in zip(arm.interventions, entries, strict=False):
        sites = entry["sites"]
        if method.heads is not None:
            own = {path: len(method.heads.of(chosen[path])) for path in sites}
            sites = {p: {**s, "heads": min(s["heads"], own[p])} for p, s in sites.items() if own[p]}
        if arm.kind != "zero" and not any(s["calls"] or s.get("compiled") for s in sites.values()):
            raise NeverFired(f"{method.name} of the arm {arm.id} never acted: no site that it selects ran.")
        out.append({**entry, "sites": sites})
    return out
