"""The pipeline's own guidance formula, measured: where a term must go so that it counts exactly once.

A term on every row counts once where the formula is a sum whose weights add up to one, as in classifier-free guidance. Where it
normalises what it combines (Qwen-Image, Lumina 2, Z-Image with `cfg_normalization`, projected guidance), a term inside would be
normalised too. There the rows stay as they are, and the term is added to what the scheduler's step is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...branches import BranchInputs, Prediction
from ...errors import UnsupportedHost

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# What the code of a pipeline that normalises its combination names.
NORMALISES = frozenset(
    {
        "cond_norm",
        "noise_norm",
        "pred_cond_norm",
        "normalized_guidance",
        "cfg_normalization",
        "_cfg_normalization",
        "ori_pos_norm",
    }
)
# Numbers of one sample's prediction that are compared, and how far from a sum in exact arithmetic they may be.
NUMBERS, EXACT = 1 << 14, 1e-3


class Formula:
    """How one pipeline combines the prediction rows of a step.

    Attributes:
        outside: whether a term is added to the combination, instead of to each row.
        held: the term that waits for the scheduler's step. given: the conditional prediction, as the model gave it.
    """

    def __init__(self, pipeline: DiffusionPipeline | None):
        self.pipeline = pipeline
        code = getattr(inspect.unwrap(type(pipeline).__call__), "__code__", None) if pipeline is not None else None
        self.outside = code is not None and bool(NORMALISES & {*code.co_names, *code.co_varnames})
        self.held: Tensor | None = None
        self.given: Tensor | None = None
        self._rows: list[Tensor] = []
        self._known = False
        # How far the combination was from a sum of the rows; unknown: as far as can be.
        self._rest = 1.0

    def restart(self) -> None:
        """A new run."""
        self.held, self.given, self._rows, self._known = None, None, [], False

    def see(self, prediction: Prediction, inputs: BranchInputs, turn: int) -> Prediction:
        """What the pipeline gets of a guided prediction.

        Args:
            turn: of this call among those since the last step of the scheduler, from 1.

        Raises:
            UnsupportedHost: an earlier term was never used.
        """
        if turn == 1 and self.held is not None:
            raise UnsupportedHost(
                f"a guidance term for {type(self.pipeline).__name__} was never used: the scheduler's step did not run, or another "
                "scheduler's did. Attach again; scale=0 in such calls."
            )
        if turn == 1:
            self._rows = []
        given = prediction.with_sample(prediction.raw) if self.outside else prediction
        if self.outside:
            self.held = prediction.shift
            if "cond" in inputs.layout:
                self.given = prediction.raw.detach()
        if not self._known:
            size = inputs.batch // len(inputs.layout)
            self._rows += [given.sample[i * size].detach() for i in range(len(inputs.layout))]
        return given

    def take(self, made: Tensor | None) -> Tensor | None:
        """The term that waits, in the form of what was made of the prediction; it waits no longer.

        Args:
            made: the numbers of the prediction in another shape, negated, or those of its last or first tokens.

        Raises:
            UnsupportedHost: they are not.
        """
        term, given, self.held, self.given = self.held, self.given, None, None
        if term is None or made is None:
            return None
        for part in _parts(given, made):
            own, more = part(given).reshape(made.shape), part(term).reshape(made.shape)
            for sign in (1.0, -1.0):
                if torch.equal((sign * own).to(made.dtype), made):
                    return sign * more
        raise UnsupportedHost(
            f"the guider combines {tuple(made.shape)}, and the denoiser predicts {tuple(given.shape)}: its numbers are changed "
            "before they are combined, so that a guidance term cannot be added behind it."
        )

    def step(self, output: Any) -> Any:
        """The model output of a scheduler's step, with the held term.

        Raises:
            UnsupportedHost: a term inside did not count once, by measure; or a held one does not fit the output.
        """
        term, self.held = self.held, None
        if not isinstance(output, Tensor):
            return output
        sign = self._measure(output[:1] if output.ndim else output)
        if term is None:
            return output
        flat = term.ndim < output.ndim
        term = _leading(term, output)
        # Numbers in a row, as of a list with a tensor for each sample, must lie as the output's do: the combination tells.
        if term is None or (flat and self._rest > 0.5):
            raise UnsupportedHost(
                f"{type(self.pipeline).__name__} normalises its combination and changes the prediction's form before the "
                "scheduler's step, so that a guidance term cannot be added behind it."
            )
        return output + sign * term.to(output.dtype)

    def _measure(self, output: Tensor) -> float:
        """The sign with which a prediction enters the combination; once a run, from the first sample's rows."""
        rows = [_leading(r[None], output) for r in self._rows]
        if self._known or not rows or any(r is None for r in rows):
            return getattr(self, "_sign", 1.0)
        self._known, self._rows = True, []
        stride = max(1, output.numel() // NUMBERS)
        y = output.detach().flatten()[::stride].double()
        A = torch.stack([r.flatten()[::stride].double() for r in rows], dim=1)
        if not bool(A.isfinite().all() & y.isfinite().all()):
            # The model overflows by itself; there is no formula to be seen.
            return 1.0
        # Equal rows (equal prompts) leave their weights open, not their sum.
        weights = torch.linalg.pinv(A) @ y
        total, rest = float(weights.sum()), float((A @ weights - y).norm() / y.norm().clamp_min(1e-30))
        self._sign, self._rest = -1.0 if total < 0 else 1.0, rest
        half = output.dtype in (torch.float16, torch.bfloat16)
        bound = 0.1 if half else EXACT
        if not self.outside and rest < bound and abs(abs(total) - 1.0) > max(bound, 2e-2):
            shown = [round(float(w), 3) for w in weights]
            raise UnsupportedHost(
                f"{type(self.pipeline).__name__} combines its predictions with weights {shown}, whose "
                f"sum is {total:.3f}: a guidance term on every row counts {total:.2f} times. Use the pipeline's plain guidance, "
                "and put hooks that change the denoiser's prediction on before it is steered."
            )
        return self._sign


def _parts(given: Tensor, made: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """The ways to take as many numbers of each row as `made` has: all, or the last or first along one axis."""
    if given.numel() == made.numel():
        return [lambda t: t]
    if given.ndim != made.ndim:
        return []
    axes = [i for i, (g, m) in enumerate(zip(given.shape, made.shape, strict=True)) if g != m]
    if len(axes) != 1 or not axes[0] or made.shape[axes[0]] > given.shape[axes[0]]:
        return []
    axis, size = axes[0], made.shape[axes[0]]
    return [lambda t: t.narrow(axis, t.shape[axis] - size, size), lambda t: t.narrow(axis, 0, size)]


def _leading(term: Tensor, output: Tensor) -> Tensor | None:
    """The leading part of `term` in the form of `output` (learned variances, or further tokens, follow); None where it has none."""
    if term.ndim == 2 < output.ndim and len(term) == len(output) and term.numel() == output.numel():
        return term.reshape(output.shape)
    if term.ndim != output.ndim or any(t < o for t, o in zip(term.shape, output.shape, strict=True)):
        return None
    return term[tuple(slice(0, o) for o in output.shape)]
