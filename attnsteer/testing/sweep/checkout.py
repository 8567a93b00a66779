"""`python -m attnsteer.testing.sweep.checkout CLONE FOLDER`: the tests of diffusers that pipelines are built from.

CLONE is a clone of diffusers with its history. FOLDER gets its `tests`, and beside them those of before pipelines that
the library still ships lost theirs, each under a name of its own: `tests_<commit>`. DIFFUSERS_CHECKOUT names FOLDER afterwards.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import tarfile
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


def _lay_out(clone: Path, commit: str, folder: Path, name: str) -> None:
    git = clone / ".git" if (clone / ".git").is_dir() else clone
    packed = subprocess.run(
        ["git", f"--git-dir={git}", "archive", "--format=tar", commit, "tests"], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive.getmembers():
            if member.isfile() and member.name.endswith(".py"):
                path = folder / name / Path(*Path(member.name).parts[1:])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())


if __name__ == "__main__":
    main()
