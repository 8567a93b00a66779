"""A loaded model, and what is known of one before it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from ..recipe.schema import ModelSpec


@dataclass(frozen=True)
class Loaded:
    """A model that is ready.

    Attributes:
        kind: lm, vlm or image. target: what is steered: the model or the pipeline. tokenizer, processor: or None.
        files: file -> SHA-256 of what it was loaded from. detector: reads objects from its pictures, where there is one.
        device: of its inputs. dtype: of its weights. revision: the resolved commit of a model from the hub.
        stream: whether it is asked by requests, each with its steering (`attnsteer.run.served`).
    """

    kind: str
    target: Any
    tokenizer: Any = None
    processor: Any = None
    files: dict[str, str] = field(default_factory=dict)
    detector: Any = None
    device: Any = "cpu"
    dtype: Any = None
    revision: str | None = None
    stream: bool = False

    def sites(self) -> Any:
        """Its attention sites; None where they are not known."""
        if self.stream:
            return self.target.sites()
        from ..steering import sites

        return sites(self.target)


def architecture(spec: ModelSpec, known: dict[str, Any]) -> str:
    """The name of the tiny model of a recipe.

    Raises:
        RecipeError: it has none, or one that is not known.
    """
    if spec.architecture is None:
        raise RecipeError(f"model.architecture: --tiny needs it here; for {spec.kind} there are {', '.join(known)}.")
    if spec.architecture not in known:
        raise RecipeError(
            f"model.architecture: there is no tiny {spec.architecture!r} of kind {spec.kind}; there are {', '.join(known)}."
            f"{did_you_mean(spec.architecture, known)}"
        )
    return spec.architecture
