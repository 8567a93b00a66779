"""Puts interventions into a clone of a ComfyUI model; a second node adds to the first one's, as if both were given to one `steer`.

    clone, report = install(model, SoftPAG(3.0, 0.5))
    clone, report = install(clone, NAG({"context": negative}))

The given model stays as it is: bypassing a node, or removing it, leaves nothing behind. What acts lives in keyed wrappers and
callbacks of the clone, which that program copies with it and calls in turn with those of other nodes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...audit import Audit
from ...bound import Bound
from ...branches import BranchInputs, Prediction
from ...errors import CompositionError, UnsupportedHost
from ...intervention import Intervention
from ...maps.phrases import Prompt
from ...maps.words_to_image import MapsComplete
from ...steering import Steering
from .host import ComfyHost
from .latent import LatentMoves
from .passes import MARK, Pass, step_of
from .preview import WordMaps
from .report import Report

LOG = logging.getLogger("attnsteer")
WRAPPERS = {"calc_cond_batch": "batch", "predict_noise": "predict", "outer_sample": "sample"}
CALLBACKS = {"on_pre_run": "begin", "on_cleanup": "end"}
POST_CFG = "sampler_post_cfg_function"


def install(
    model: Any,
    *methods: Intervention,
    publish: Callable[[str], None] | None = None,
    prompt: Prompt | None = None,
) -> tuple[Any, Report]:
    """A clone of a model in which the methods act, and what will be reported of them.

    Args:
        model: a `ModelPatcher` of ComfyUI. methods: added behind those that an earlier call has put in.
        publish: called with the report's text at the end of each sampling run.
        prompt: where the words of the positive prompt are, for methods that read it (see `words.py`).

    Raises:
        SelectionError: a selection matches nothing. UnsupportedHost: this model cannot be steered so.
        CompositionError: the same method is on a site already.
    """
    before = installed(model)
    clone = model.clone()
    own = () if before is None else before.run.interventions
    host = ComfyHost(clone)
    run = Steering(clone, (*own, *methods), host=host)
    _refuse_twice(run, len(own))
    report = Report([type(m).__name__ for m in run.interventions], publish)
    known = prompt if prompt is not None or before is None else before.prompt
    sampling = Sampling(run, report, known)
    if before is not None:
        # Nodes of the earlier ones go on telling.
        sampling.told = (*before.told, before.report)
        report.images.update(before.report.images)
    for kind, name in WRAPPERS.items():
        clone.remove_wrappers_with_key(kind, MARK)
        clone.add_wrapper_with_key(kind, MARK, getattr(sampling, name))
    for kind, name in CALLBACKS.items():
        clone.remove_callbacks_with_key(kind, MARK)
        clone.add_callback_with_key(kind, MARK, getattr(sampling, name))
    others = [
        f for f in clone.model_options.get(POST_CFG, ()) if not isinstance(getattr(f, "__self__", None), Sampling)
    ]
    # In front: functions behind it (rescaling and the like) then see the guided prediction.
    clone.model_options[POST_CFG] = [sampling.guide, *others] if sampling.guides else others
    return clone, report


def installed(model: Any) -> Sampling | None:
    """What an earlier call has put into a model, or None."""
    found = model.wrappers.get("calc_cond_batch", {}).get(MARK, ())
    return next((f.__self__ for f in found if isinstance(getattr(f, "__self__", None), Sampling)), None)


def _refuse_twice(run: Steering, own: int) -> None:
    for path, runtime in run.runtimes.items():
        names = [b.name for b, _ in runtime.entries if b.index < own]
        for bound, _ in runtime.entries:
            if bound.index >= own and bound.name in names:
                raise CompositionError(
                    f"{bound.name} is at {path} already, by another node. Select other layers in one of them, or keep one node."
                )


class Sampling:
    """What the passes of one steered clone share, and its hooks.

    Attributes:
        run: the steering. report: of the last run. compared: sites whose kernel was looked at in this run.
        capture: where the maps of the running pass go, or None. told: reports of earlier nodes in the same chain.
    """

    def __init__(self, run: Steering, report: Report, prompt: Prompt | None):
        self.run, self.report, self.prompt = run, report, prompt
        self.told: tuple[Report, ...] = ()
        self.compared: set[str] = set()
        self.capture: Any = None
        self.memory: dict[Any, Any] = {}
        moves = [b for b in run.bounds if "latent" in b.method.needs]
        self.moves = LatentMoves(self, moves) if moves else None
        self.guides = [b for b in run.bounds if b.guides and b not in moves]

    def __deepcopy__(self, memo: Any) -> Sampling:
        # The program's older versions copy a model's options deeply: what acts and what reports must stay the same thing.
        return self

    # Callbacks of a model: a run begins and ends, also by an exception.

    def begin(self, patcher: Any, *_: Any) -> None:
        self.run.audit = Audit(self.run.audit.names)
        self.compared, self.memory, self.capture = set(), {}, None
        for report in (self.report, *self.told):
            report.begin()
        for method in self.run.interventions:
            if isinstance(method, WordMaps):
                method.maps.clear()

    def end(self, patcher: Any, *_: Any) -> None:
        text = self.report.finish(self.run)
        for report in self.told:
            report.text = text
            if report.publish is not None:
                report.publish(text)
        LOG.log(logging.WARNING if "did nothing" in text else logging.INFO, text)
        self.memory, self.capture = {}, None

    # Wrappers.

    def batch(
        self, executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, options: Any, *more: Any
    ) -> Any:
        """Around `calc_cond_batch`: the options that go on carry the hooks of this pass."""
        this = Pass(self, model, timestep, options)
        if this.step is not None:
            self.report.steps.add(this.step)
        return executor(model, conds, x, timestep, this.options(options), *more)

    def predict(self, executor: Any, x: Tensor, timestep: Tensor, *more: Any, **named: Any) -> Any:
        """Around the prediction of one call of the sampler: methods that move the latent come first."""
        if self.moves is not None:
            self.moves.act(executor.class_obj, x, timestep, *more, **named)
        return executor(x, timestep, *more, **named)

    def sample(
        self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *more: Any, **named: Any
    ) -> Any:
        """Around a sampling run."""
        if self.moves is not None:
            mask = named.get("denoise_mask", more[0] if more else None)
            self.moves.check(sampler, mask)
        return executor(noise, latent, sampler, sigmas, *more, **named)

    # Guidance by a weak branch: one more pass on the positive conditioning, behind the guidance of the program.

    def guide(self, args: dict[str, Any]) -> Tensor:
        """A post-CFG function: adds s (x0_cond - x0_weak) to the guided prediction, whatever its scale."""
        x, sigma = args["input"], args["sigma"]
        options = args["model_options"]
        sigmas = options.get("transformer_options", {}).get("sample_sigmas")
        step, steps = step_of(float(sigma.flatten()[0]), sigmas)
        guided = args["denoised"]
        for bound in self.guides:
            if bound.timed and not bound.where.active(None, step, steps):
                continue
            before = guided
            inputs = BranchInputs(
                {}, ("cond",), len(x), self._timestep(args["model"], sigma), self.memory, step=step, steps=steps
            )
            strong = Prediction(args["cond_denoised"]).with_sample(guided)

            def forward(_: Any, strong: Prediction = strong) -> Prediction:
                if not self.run.opened:
                    return strong
                calc = sys.modules["comfy.samplers"].calc_cond_batch
                before = self._edits()
                (weak,) = calc(args["model"], [args["cond"]], x, sigma, options)
                # A pass of its own rounds otherwise than the same rows in a larger batch: nothing edited is nothing added.
                return Prediction(weak if self._edits() != before else args["cond_denoised"])

            guided = bound.method.around(forward, inputs, self.run).sample
            if guided is not before:
                self.run.audit.moved(bound.index, (guided != before).any())
                self.report.guided(bound.index, guided, before)
        return guided

    def _edits(self) -> int:
        """How many edits the weak branches have returned in this run."""
        return sum(r.edits for (i, _), r in self.run.audit.records.items() if any(b.index == i for b in self.guides))

    @staticmethod
    def _timestep(model: Any, sigma: Tensor) -> float | None:
        """As a scheduler of diffusers counts, 1000 to 0; flow models count in sigmas."""
        found = float(model.model_sampling.timestep(sigma).flatten()[0])
        return found * 1000.0 if type(model).__name__ == "Flux" else found

    # Negative prompts inside attention.

    def contrasting(self, this: Pass) -> list[Bound]:
        """The methods that compare with a negative prompt in this pass."""
        found = [b for b in self.run.bounds if "contrast" in b.method.needs and b.method.on]
        found = [b for b in found if not b.timed or b.where.active(None, this.step, this.steps)]
        if len(found) > 1:
            raise CompositionError(
                f"{found[1].name} is there {len(found)} times; one negative prompt is followed. Leave one node."
            )
        if found and this.family != "unet":
            own = {p for p, r in self.run.runtimes.items() if any(b is found[0] for b, _ in r.entries)}
            left = sorted({s.path for s in self.run.host.sites() if s.kind == "joint"} - own)
            if left:
                raise UnsupportedHost(
                    f"{found[0].name} leaves {left[0]} out: in Flux and SD3 the two streams would part there. Select all layers."
                )
        return found

    def negative(self, like: Tensor) -> dict[str, Tensor]:
        """The negative prompt: argument of the model -> tensor."""
        method = next(b.method for b in self.run.bounds if "contrast" in b.method.needs)
        if not isinstance(method.negative, dict) or "context" not in method.negative:
            raise UnsupportedHost(
                'NAG: give its negative prompt as {"context": tensor [1 or b, n, c]}, for Flux and SD3 {"context": ..., "y": ...}.'
            )
        return {name: t.to(like.device) for name, t in method.negative.items()}

    # Passes that are run for their maps.

    def capture_complete(self) -> bool:
        """Whether the running pass was made for maps that are all there."""
        return self.capture is not None and self.capture.complete

    def stop_pass(self) -> None:
        """Ends a pass that was run for its maps."""
        raise MapsComplete


__all__ = ["Report", "Sampling", "install", "installed"]
