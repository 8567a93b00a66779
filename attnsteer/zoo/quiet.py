"""Loads models without the bars and remarks of the libraries, one at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

# The libraries load under settings of the whole process (the meta device, initialisers that do nothing, how much is said). Two
# threads at once leave them set, and every model that is loaded later without its weights.
_LOADING = threading.RLock()


@contextlib.contextmanager
def quiet(*, pictures: bool, remarks: bool = True) -> Iterator[None]:
    """Without the bars that the libraries show for each file; other threads wait.

    Args:
        pictures: diffusers is asked for silence too. remarks: also without what they log below an error, which is right where
            a model is known to be whole.
    """
    with _LOADING:
        yield from _quiet(pictures, remarks)


def _quiet(pictures: bool, remarks: bool) -> Iterator[None]:
    from transformers.utils import logging

    libraries = [logging]
    if pictures:
        from diffusers.utils import logging as diffusers_logging

        libraries.append(diffusers_logging)
    bars = [library for library in libraries if library.is_progress_bar_enabled()]
    levels = [(library, library.get_verbosity()) for library in libraries]
    for library in bars:
        library.disable_progress_bar()
    for library, level in levels if remarks else ():
        library.set_verbosity(max(level, library.ERROR))
    try:
        yield
    finally:
        for library in bars:
            library.enable_progress_bar()
        for library, level in levels if remarks else ():
            library.set_verbosity(level)
