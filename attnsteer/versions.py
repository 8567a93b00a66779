"""Versions of the libraries that a result depends on, without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ._version import __version__

LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "safetensors")


def library_versions() -> dict[str, str]:
    """Installed versions by package name, attnsteer included; absent packages are left out."""
    found = {"attnsteer": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
