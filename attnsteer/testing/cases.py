"""What the laws are run on: a method with the way to build it, and a tiny model with the way to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..heads import HeadSet
from ..intervention import Intervention
from ..site import Site
from ..where import Where


class NotApplicable(Exception):
    """The law does not speak about this method on this host; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What the functions of a `MethodCase` may need to know to build the method.

    Attributes:
        host: the name of the host. sites: those that the method may be put on, one or more. batch: samples per call.
    """

    host: str
    sites: tuple[Site, ...]
    batch: int

    @property
    def heads(self) -> HeadSet:
        """Half of the heads of the middle layer."""
        layers = sorted({s.layer for s in self.sites})
        layer = layers[len(layers) // 2]
        heads = min(s.heads for s in self.sites if s.layer == layer)
        return HeadSet({layer: list(range(0, heads, 2)) or [0]})

    @property
    def where(self) -> Where:
        """The sites, and no others of the model; all of their heads."""
        patterns = [s.path.replace(".", r"\.") for s in self.sites]
        return Where(modules=patterns, kinds=tuple({s.kind for s in self.sites}))


Build = Callable[[Setting], Intervention]


@dataclass(frozen=True)
class MethodCase:
    """A method and how to build it. A method without any selection is put on `Setting.heads`, so that some are left out.

    Attributes:
        method: the class.
        acting: builds it so that it changes the output visibly; None: the laws that need this do not apply.
        zero: builds it at the strength that changes nothing; None where there is none.
        prompt_bound: by its definition it treats generated tokens otherwise than those of the prompt, so a run without a
            cache, where all tokens are prompt, gives something else.
        whole_model: it runs the model several times and takes no selection.
    """

    method: type[Intervention]
    acting: Build | None = None
    zero: Build | None = None
    prompt_bound: bool = False
    whole_model: bool = False

    @property
    def name(self) -> str:
        """The name of the class, shown in test ids."""
        return self.method.__name__


@dataclass(frozen=True)
class HostCase:
    """A tiny model and how to call it.

    Attributes:
        name: shown in test ids. family: "transformers", "denoiser" or "pipeline".
        build: a fresh target, always with the same weights.
        inputs: (target, batch, padding, seed) -> arguments; padding is None (no mask is given), "full" (a mask of ones),
            "left" or "right".
        run: (target, inputs) -> the tensor that the laws compare, batch first.
        decoder: has a causal KV cache. padded: the sides on which padding is defined.
        masked: takes an attention mask. images: its prompts have images.
    """

    name: str
    family: str
    build: Callable[[], Any]
    inputs: Callable[[Any, int, str | None, int], dict[str, Any]] = field(repr=False)
    run: Callable[[Any, dict[str, Any]], Tensor] = field(repr=False)
    decoder: bool = False
    padded: tuple[str, ...] = ()
    masked: bool = False
    images: bool = False

    def module(self, target: Any) -> nn.Module:
        """The (first) model of the target."""
        if isinstance(target, nn.Module):
            return target
        return getattr(target, "transformer", None) or target.unet
