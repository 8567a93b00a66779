"""ComfyUI: the host of a `ModelPatcher`; what acts is put into a clone of it (`install.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...bound import Bound
from ...errors import UnsupportedHost
from ...site import Site
from ..base import Host
from .sites import layout_of

if TYPE_CHECKING:
    from ...steering import Steering
    from ...undo import Journal


class ComfyHost(Host):
    """A model of ComfyUI: UNets, Flux and SD3."""

    provides = frozenset({"segments", "grid", "steps", "branches", "around", "latent", "contrast"})

    def __init__(self, target: Any):
        """
        Args:
            target: a `ModelPatcher`; `target.model.diffusion_model` is looked at and left as it is.
        """
        super().__init__(target)
        self.main = ("image",)
        self.layout = layout_of(target.model.diffusion_model)

    def sites(self) -> list[Site]:
        return self.layout.sites

    def check(self, site: Site, bound: Bound) -> None:
        if "around" in bound.doors and not bound.method.needs:
            raise UnsupportedHost(f"{bound.name} runs the whole model in a way that is not known here.")

    def attach(self, run: Steering, journal: Journal) -> None:
        """Nothing of the model is changed: its clone holds what acts."""
