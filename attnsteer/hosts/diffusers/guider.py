"""`AttnSteerGuider`: our guidance where a user of diffusers chooses theirs, as the guider of a modular pipeline."""

from __future__ import annotations

from typing import Any

from diffusers.guiders.guider_utils import BaseGuidance
from torch import nn

from ...intervention import Intervention
from .guiders import Batches


class AttnSteerGuider(BaseGuidance):
    """Another guider, beside which interventions act on the denoiser.

    `pipe.update_components(guider=AttnSteerGuider(base, PAG(3.0)))`. Batches, state and formula are those of `base`. The term of a
    weak branch is added to what `base` combines, so that it counts exactly once for every formula; with a scale of zero the output
    is that of `base`, bit for bit. The denoiser is steered from the first
    batch of a run to the last one.

    Args:
        base: any guider of diffusers. interventions: as for `attnsteer.steer`.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012  the name and form that diffusers asks for

    def __init__(self, base: BaseGuidance, *interventions: Intervention):
        self.base, self.interventions = base, interventions
        self._run: Any = None
        self._batches: Batches | None = None
        self._told: tuple[int, int, float] | None = None
        self._waiting: list[Any] = []

    # What a guider is asked, answered by the other one.

    @property
    def config(self) -> Any:
        """The settings of `base`."""
        return self.base.config

    @property
    def is_conditional(self) -> bool:
        """Of the running batch."""
        return self.base.is_conditional

    @property
    def num_conditions(self) -> int:
        """Batches of a step."""
        return self.base.num_conditions

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "interventions"):
            raise AttributeError(name)
        return getattr(self.base, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r}, {', '.join(map(repr, self.interventions))})"

    def new(self, **kwargs: Any) -> AttnSteerGuider:
        """A copy with a new `base`."""
        return AttnSteerGuider(self.base.new(**kwargs), *self.interventions)

    def enable(self) -> None:
        """Switch `base` on."""
        self.base.enable()

    def disable(self) -> None:
        """Switch `base` off."""
        self.base.disable()

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """A step begins."""
        number = float(timestep.flatten()[0]) if hasattr(timestep, "flatten") else float(timestep)
        self._told = (int(step), int(num_inference_steps), number)
        self.base.set_state(step=step, num_inference_steps=num_inference_steps, timestep=timestep)

    def get_state(self) -> dict[str, Any]:
        """The state of `base`."""
        return self.base.get_state()

    def prepare_inputs(self, data: Any) -> list[Any]:
        """The batches of a step."""
        return self._begin(self.base.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """The batches of a step."""
        return self._begin(self.base.prepare_inputs_from_block_state(data, input_fields))

    def _begin(self, batches: list[Any]) -> list[Any]:
        self._waiting = batches
        if self._batches is not None:
            self._batches.begin(batches)
        return batches

    def prepare_models(self, denoiser: nn.Module) -> None:
        """The denoiser is about to be asked."""
        if self._run is None or self._run.target is not denoiser:
            self._attach(denoiser)
        self._run.host.sampling.told = self._told
        self._batches.ready()
        self.base.prepare_models(denoiser)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """The denoiser has answered."""
        self.base.cleanup_models(denoiser)
        self._batches.done()

    def _attach(self, denoiser: nn.Module) -> None:
        from ...steering import steer

        self.remove()
        # What never changed anything is said by the audit here: the denoiser may be asked for one batch only.
        self._run = steer(denoiser, *self.interventions, control=True)
        self._batches = Batches(self._run.host.sampling, self.base._identifier_key)
        self._run.host.sampling.formula.outside = True
        self._batches.begin(self._waiting)

    def __call__(self, data: list[Any]) -> Any:
        """What `base` combines, and the term."""
        output = self.base(data)
        if self._batches is None:
            return output
        key = self.base._identifier_key
        cond = next((b.noise_pred for b in data if getattr(b, key, None) == "pred_cond"), None)
        output = self._batches.combined(output, cond)
        if self._told is not None and self._told[0] == self._told[1] - 1:
            self.remove()
        return output

    @property
    def audit(self) -> Any:
        """That of the running, or of the last, steering; None before the first."""
        return self._audit if self._run is None else self._run.audit

    _audit: Any = None

    def remove(self) -> None:
        """Take the interventions off the denoiser; a run that was broken off leaves them on until then."""
        if self._run is not None:
            self._audit = self._run.audit
            self._run.remove()
            self._run, self._batches = None, None
