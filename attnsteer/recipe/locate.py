"""Where a recipe's file is: a path, or the name of one that comes with the package."""

from __future__ import annotations

from pathlib import Path

from ..errors import RecipeError, did_you_mean

ENDING = ".yaml"


def folder() -> Path:
    """Where they are: inside the package, or beside it in a checkout.

    Raises:
        RecipeError: this installation has none.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / "recipes", package.parent / "recipes"):
        if place.is_dir():
            return place
    raise RecipeError(f"this installation has no recipes beside {package}; install attnsteer again.")


def names() -> list[str]:
    """Names of all of them, such as act/shapes-reading, sorted."""
    root = folder()
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.glob(f"*/*{ENDING}"))


def locate(given: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a shipped one.

    Raises:
        RecipeError: neither a file nor a name.
    """
    path = Path(given)
    if path.is_file():
        return path
    name = str(given).removesuffix(ENDING)
    known = names()
    if name in known:
        return folder() / f"{name}{ENDING}"
    raise RecipeError(
        f"there is no file {str(given)!r}, and no shipped recipe of that name (attnsteer recipes ls).{did_you_mean(name, known)}"
    )
