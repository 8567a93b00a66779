"""Loads models without the bars and remarks of the libraries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*, pictures: bool, remarks: bool = True) -> Iterator[None]:
    """Without the bars that the libraries show for each file.

    Args:
        pictures: diffusers is asked for silence too. remarks: also without what they log below an error, which is right where
            a model is known to be whole.
    """
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
