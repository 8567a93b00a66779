"""The parameter of methods that speak of the patches of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SelectionError
from ..parameters import Parsed, declared_field, plain, whole


def _numbers(given: Any) -> tuple[tuple[int, ...], ...]:
    given = plain(given)
    listed = isinstance(given, (list, tuple)) and len(given) > 0
    found = []
    for own in given if listed else ():
        own = plain(own)
        numbers = [whole(i) for i in own] if isinstance(own, (list, tuple)) else [None]
        if any(i is None or i < 0 for i in numbers):
            listed = False
            break
        found.append(tuple(dict.fromkeys(numbers)))
    if not listed:
        raise SelectionError(
            "give one list of patch numbers per sample, e.g. [[0, 5, 17]]; select_patches(...) finds them."
        )
    return tuple(found)


@dataclass(frozen=True)
class _Patches(Parsed):
    """Patch numbers, a list for each sample."""

    def count(self, value: Any) -> int | None:
        return len(value)

    def of_sample(self, value: Any, i: int) -> Any:
        return (value[i],)

    def of_request(self, given: Any) -> Any:
        return [given] if given and all(whole(plain(i)) is not None for i in given) else given

    def shared(self, value: Any) -> Any:
        return "one for each"

    def resting(self, value: Any) -> Any:
        return ((),)

    def joined(self, values: Sequence[Any]) -> Any:
        return tuple(own for (own,) in values)


def patch_numbers() -> Any:
    """The field of patch numbers by sample."""
    return declared_field(_Patches(parse=_numbers, text="one list of patch numbers per sample"))
