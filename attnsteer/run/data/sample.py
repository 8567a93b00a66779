"""One sample of an evaluation, and a set of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


Sample = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Samples, and the images that they name.

    Attributes:
        samples: in order; `index` counts them from the start of the source, whatever part of it is used.
        image: the picture of a sample, as a PIL image. folder: that the samples' pictures are files of, where they are.
    """

    samples: list[Sample]
    image: Callable[[Mapping[str, Any]], Any]
    folder: Path | None = None

    def digest(self) -> str:
        """SHA-256, in hex, of all samples, and of the files of their pictures."""
        from ...recipe.schema import digest
        from .. import store

        names = [] if self.folder is None else sorted({str(s["image"]) for s in self.samples if "image" in s})
        if not names:
            return digest(self.samples)
        return digest([self.samples, {name: store.file_hash(self.folder / name) for name in names}])
