"""Look around in the attention of a finished run: one sample, every head, before and after the method."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from ..errors import AttnSteerError, RunError, did_you_mean, listing
from ..run import store
from ..run.data.sample import Sample
from ..run.folder import RunFolder, read_run
from ..run.loaded import Loaded
from ..run.ranks import Ranks
from ..run.runs import Job, plan_arms
from ..where import Where
from .drawings import most_changed, reopened
from .reports.headline import headline

# Samples that readings of heads are taken over; steps of a sampler that are looked at.
PROFILED, STEPS = 8, 4
PAGE = "attention.html"


def page_of(folder: Path) -> Path:
    """The page of a folder.

    Raises:
        RunError: a link has its name, which may lead to any file of whoever opens a folder of somebody else.
    """
    page = folder / PAGE
    if page.is_symlink():
        raise RunError(f"{page} is a link, and what it leads to would be written over; delete it, or give --out.")
    return page


def view_run(folder: str | Path, out: str | Path | None = None, sample: str | None = None) -> Path:
    """Load the model of a finished run again, and write a page of one sample's attention without and with the method.

    Args:
        out: the page; by default attention.html in the folder. sample: its id; by default the one that changed the most plainly.

    Raises:
        RunError: no such sample, no finished run, its model is not what it was then, or a file of it lies elsewhere.
        RecipeError: the recipe's model or data are no longer there.
    """
    import torch

    from ..capturing import capture
    from ..viz import view

    run = read_run(folder)
    job, loaded = reopened(run)
    head, seed = headline(run, set()), run.seeds[0]
    chosen = _sample(run, job, seed, sample)
    arms = {a.id: a for a in plan_arms(job, loaded, Ranks(), progress=False).arms}
    inputs = None if loaded.kind == "image" else _inputs(loaded, job, chosen)
    taken = []
    for name in (head.base, head.arm):
        arm = arms[name]
        methods = arm.make([chosen], loaded)
        where = (
            Where(kinds="self") if inputs is not None else Where(branches="cond", steps=_steps(loaded, arm.decoding))
        )
        what = ("map", "q", "k") if inputs is not None else "map"
        with capture(loaded.target, where, *methods, what=what) as seen:
            if inputs is not None:
                with torch.no_grad():
                    loaded.target(**inputs)
            else:
                _draw(loaded, chosen, seed, arm.decoding)
        taken.append(seen)
    given: dict[str, Any] = {"tokenizer": loaded.tokenizer}
    if loaded.kind == "image":
        given["tokens"] = [loaded.tokenizer.decode([i]) for i in loaded.tokenizer(chosen["prompt"]).input_ids]
        given["image"] = [
            store.own_file(run.path, run.records[a][seed, chosen["id"]].get("image")) for a in (head.base, head.arm)
        ]
    elif loaded.kind == "vlm":
        given |= {"image": job.data.image(chosen), "image_tokens": _image_tokens(loaded, inputs)}
    facts = {
        "sample": chosen["id"],
        "method": _named(run, head.arm),
        "model": job.recipe.model.name,
    }
    return view(
        taken[0],
        page_of(run.path) if out is None else out,
        after=taken[1],
        labels=(head.base, head.arm),
        profile=None if inputs is None else _profile(loaded, job, chosen),
        title=run.name,
        facts=facts,
        **given,
    )


def _sample(run: RunFolder, job: Job, seed: int, wanted: str | None) -> Sample:
    known = {s["id"]: s for s in job.data.samples}
    if wanted is None:
        return most_changed(run, job.data.samples, seed, 1)[0]
    if wanted not in known:
        raise RunError(
            f"{run.path} has no sample {wanted!r}; there are {listing(known, 6)}.{did_you_mean(wanted, known)}"
        )
    return known[wanted]


def _inputs(loaded: Loaded, job: Job, sample: Sample) -> Any:
    from ..run.tasks import Request
    from ..run.tasks.prompts import encode

    return encode(loaded, Request([sample], job.data, {}, 0))


def _steps(loaded: Loaded, decoding: dict[str, Any]) -> list[int]:
    parameters = inspect.signature(type(loaded.target).__call__).parameters
    default = parameters["num_inference_steps"].default if "num_inference_steps" in parameters else 50
    count = int(decoding.get("num_inference_steps", default))
    return sorted({round(i * (count - 1) / (STEPS - 1)) for i in range(STEPS)})


def _draw(loaded: Loaded, sample: Sample, seed: int, decoding: dict[str, Any]) -> None:
    import torch

    from ..run.tasks.image import seed_of

    generator = torch.Generator().manual_seed(seed_of(seed, sample["index"]))
    loaded.target(prompt=sample["prompt"], generator=generator, output_type="latent", **decoding)


def _image_tokens(loaded: Loaded, inputs: Any) -> tuple[int, int] | None:
    """(start, stop) of the image among the valid tokens; None where the config does not mark it, or it is not one range."""
    ids = inputs["input_ids"][0][inputs["attention_mask"][0].bool()]
    at = (ids == getattr(loaded.target.config, "image_token_id", -1)).nonzero()[:, 0].tolist()
    whole = bool(at) and at[-1] - at[0] + 1 == len(at)
    return (at[0], at[-1] + 1) if whole else None


def _profile(loaded: Loaded, job: Job, sample: Sample) -> Any:
    """Readings over some samples, this one first; None where the model has none."""
    from ..analysis import head_profile

    others = [s for s in job.data.samples if s["id"] != sample["id"]][: PROFILED - 1]
    batches = [dict(_inputs(loaded, job, s)) for s in (sample, *others)]
    try:
        return head_profile(loaded.target, batches, weights=False)
    except AttnSteerError:
        # The page does without: maps say enough.
        return None


def _named(run: RunFolder, arm: str) -> str:
    steps = run.arms[arm].get("interventions", ())
    shown = [f"{s.get('method')}({', '.join(f'{k}={v}' for k, v in (s.get('params') or {}).items())})" for s in steps]
    return " + ".join(shown)[:300] or arm
