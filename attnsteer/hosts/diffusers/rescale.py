"""`guidance_rescale` beside a guidance term: the rescaling is taken over from the pipeline, so that both are exact.

The pipelines pull the spread of the combined prediction towards that of the conditional one, which a term on every row
would change. While a term is held, the pipeline's own rescale is zero; the scheduler's step adds the term and rescales.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...branches import BranchInputs, Prediction
from ...errors import UnsupportedHost

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Rescale:
    """The guidance rescale of one pipeline, between a denoiser call and the scheduler's step.

    Attributes:
        in_attribute: whether the pipeline has `guidance_rescale` as an attribute, rather than as an argument of its call.
        held: (term, conditional prediction) between the two; None: nothing.
    """

    def __init__(self, pipeline: DiffusionPipeline | None):
        self.pipeline = pipeline
        self.in_attribute = hasattr(type(pipeline), "guidance_rescale")
        self.held: tuple[Tensor, Tensor] | None = None
        self._factor = 0.0

    def argument(self) -> float:
        """`guidance_rescale` of the running call of a pipeline that keeps it as an argument only."""
        frame = sys._getframe()
        while frame is not None:
            if "guidance_rescale" in frame.f_code.co_varnames and frame.f_locals.get("self") is self.pipeline:
                return float(frame.f_locals.get("guidance_rescale", 0.0))
            frame = frame.f_back
        return 0.0

    def _given(self) -> float:
        return float(self.pipeline.guidance_rescale) if self.in_attribute else self.argument()

    def hold(self, prediction: Prediction, inputs: BranchInputs) -> Prediction:
        """Keep the term until the next `apply`, and return the prediction without it.

        Raises:
            UnsupportedHost: the pipeline reads its rescale where it cannot be taken over, or made no step meanwhile.
        """
        pipe = self.pipeline
        names = inspect.unwrap(type(pipe).__call__).__code__.co_names
        if self.held is not None:
            raise UnsupportedHost(
                "a guidance term was never used: the scheduler's step did not run, or the scheduler was exchanged while "
                "steered. Attach again, or set guidance_rescale=0."
            )
        if "guidance_rescale" not in names or not hasattr(pipe, "_guidance_rescale"):
            raise UnsupportedHost(
                f"{type(pipe).__name__} with guidance_rescale={self._given()}: it rescales by the conditional row's "
                "spread, which guidance on every row changes, and this cannot be taken over here. Set guidance_rescale=0."
            )
        self._factor, pipe._guidance_rescale = pipe._guidance_rescale, 0.0
        self.held = prediction.shift, prediction.raw[inputs.part("cond")]
        return prediction.with_sample(prediction.raw)

    def apply(self, output: Any) -> Any:
        """The model output of a scheduler's step, with the held term and rescaled; unchanged where none is held."""
        if self.held is None:
            return output
        term, cond = self.held
        self.release()
        if not isinstance(output, Tensor) or output.shape != term.shape:
            raise UnsupportedHost(
                f"{type(self.pipeline).__name__} changes the prediction's shape before the scheduler's step; with guidance "
                "set guidance_rescale=0."
            )
        output, cond = output + term.to(output.dtype), cond.to(output.dtype)
        dims = list(range(1, output.ndim))
        rescaled = output * (cond.std(dim=dims, keepdim=True) / output.std(dim=dims, keepdim=True))
        return self._factor * rescaled + (1 - self._factor) * output

    def release(self) -> None:
        """Give the pipeline its rescale back."""
        if self.held is not None:
            self.held = None
            self.pipeline._guidance_rescale = self._factor
