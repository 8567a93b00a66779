"""The host protocol: which objects it takes, their sites, and how to attach a steering."""

from __future__ import annotations

import abc
import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UnsupportedHost
from ..registry import base_of
from ..site import Site

if TYPE_CHECKING:
    from ..bound import Bound
    from ..steering import Steering
    from ..undo import Journal


@base_of("hosts")
class Host(abc.ABC):
    """Base of all hosts; one that lacks `sites` or `attach` cannot be made.

    Attributes:
        target: the object that the user gave. main: the modalities that an empty `Where` selects.
        provides: names of `Intervention.needs` that its calls carry; of phases, steps and branches, those that it
            can tell; "around" where methods may call the model several times; "requests" where those of a batch may choose.
    """

    provides: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, target: Any):
        self.target = target
        self.main: tuple[str, ...] = ()

    @classmethod
    def takes(cls, target: Any) -> bool:
        """Whether this host can steer `target`; must not import its library for foreign objects."""
        return False

    @abc.abstractmethod
    def sites(self) -> list[Site]:
        """All attention sites of the target."""

    def absent(self) -> dict[str, str]:
        """Needs that the host provides, but this target has not: name -> why, and what to do."""
        return {}

    def check(self, site: Site, bound: Bound) -> None:  # noqa: B027 (most have nothing to check)
        """Raise if `bound` cannot act at `site` exactly; called before anything is patched."""

    @abc.abstractmethod
    def attach(self, run: Steering, journal: Journal) -> None:
        """Patch the sites in `run.runtimes`, with an undo step in `journal` for each change."""

    def pause(self, run: Steering) -> contextlib.AbstractContextManager[None]:
        """The calls of this thread or task in the block run as if nothing were attached, and nothing of them is noted."""
        raise UnsupportedHost(
            f"a {type(self.target).__name__} cannot be paused; language and vision-language models of transformers can. Remove the "
            "steering, and steer again."
        )


def imported(library: str, *names: str) -> tuple[type, ...]:
    """Classes of a library that is already imported; empty when it is not (then no object can be one)."""
    import sys

    found = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        loaded = sys.modules.get(f"{library}.{module}" if module else library)
        if loaded is not None and hasattr(loaded, attribute):
            found.append(getattr(loaded, attribute))
    return tuple(found)
