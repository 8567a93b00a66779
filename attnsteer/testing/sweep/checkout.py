"""`python -m attnsteer.testing.sweep.checkout CLONE FOLDER`: the tests of diffusers that pipelines are built from.

CLONE is a clone of diffusers with its history. FOLDER gets its `tests`, and beside them those of before pipelines that
the library still ships lost theirs, each under a name of its own: `tests_<commit>`. DIFFUSERS_CHECKOUT names FOLDER afterwards.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import tarfile
from importlib.util import find_spec
from pathlib import Path

# The commits that took tests of pipelines away which are still there.
REMOVED = ("bc55b631fd", "dc85b578c2", "a0c54828a1", "9c357bda3f")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m attnsteer.testing.sweep.checkout", description=__doc__)
    parser.add_argument("clone", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    _lay_out(given.clone, "HEAD", given.folder, "tests")
    for commit in REMOVED:
        _lay_out(given.clone, f"{commit}^", given.folder, f"tests_{commit}")


def moved(text: str, kept: frozenset[str]) -> str:
    """A test with the imports of today.

    Args:
        kept: packages of pipelines that the library has put away as deprecated.
    """
    text = re.sub(r"\bsrc\.diffusers\b", "diffusers", text)
    text = re.sub(r"\bdiffusers\.models\.unet_2d_blocks\b", "diffusers.models.unets.unet_2d_blocks", text)
    return re.sub(
        r"\bdiffusers\.pipelines\.(\w+)",
        lambda m: f"diffusers.pipelines.deprecated.{m[1]}" if m[1] in kept else m[0],
        text,
    )


def deprecated() -> frozenset[str]:
    """The packages of pipelines that the installed diffusers has put away."""
    folder = Path(find_spec("diffusers").origin).parent / "pipelines" / "deprecated"
    return frozenset(path.parent.name for path in folder.glob("*/__init__.py"))


def _lay_out(clone: Path, commit: str, folder: Path, name: str) -> None:
    git = clone / ".git" if (clone / ".git").is_dir() else clone
    packed = subprocess.run(
        ["git", f"--git-dir={git}", "archive", "--format=tar", commit, "tests"], check=True, capture_output=True
    ).stdout
    kept = deprecated()
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive.getmembers():
            if member.isfile() and member.name.endswith(".py"):
                path = folder / name / Path(*Path(member.name).parts[1:])
                path.parent.mkdir(parents=True, exist_ok=True)
                text = archive.extractfile(member).read().decode()
                path.write_text(text if name == "tests" else moved(text, kept), encoding="utf-8")


if __name__ == "__main__":
    main()
