"""Builds wheel and sdist, and tries the wheel in a clean environment: `make release`. Not collected by pytest.

Checked: what is in both archives, that the sdist builds the same wheel, that the installed package is the wheel's alone (no
checkout on the path), says its version, finds its recipes and models, passes `attnsteer doctor`, and steers an embedded model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a user needs of the wheel, and what is none of it.
NEEDED = (
    "attnsteer/py.typed", "attnsteer/recipes/act/shapes-reading.yaml", "attnsteer/zoo/models/shapes-lm/", "attnsteer/comfyui.py",
    ".dist-info/licenses/LICENSE",
)  # fmt: skip
FOREIGN = ("tests/", "docs/", "benchmarks/", "integrations/", "recipes/")
SOURCES = (
    "tests/conftest.py",
    "docs/index.md",
    "docs/build.py",
    "mkdocs.yml",
    "SECURITY.md",
    "CITATION.cff",
    "integrations/comfyui/LICENSE",
)
TRY = """
import pathlib, sys, attnsteer
from attnsteer import InstABoost, steer, zoo
place = pathlib.Path(attnsteer.__file__)
assert place.is_relative_to(sys.prefix), place
model, tokenizer = zoo.load("shapes-lm")
inputs = tokenizer("a small red star .", return_tensors="pt", return_token_type_ids=False)
with steer(model, InstABoost(spans=[[(0, 3)]], factor=3.0)) as run:
    model(**inputs)
print(attnsteer.__version__, run.audit.fired(0))
"""


def run(*command: str | Path, **more: object) -> str:
    """What a command printed; the run ends where it fails."""
    done = subprocess.run([str(c) for c in command], text=True, capture_output=True, check=False, **more)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    """0 where everything holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--archives-only", action="store_true", help="do not install the wheel (its requirements are large)"
    )
    given = parser.parse_args()
    dist = ROOT / "dist"
    for old in dist.glob("attnsteer-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    names = zipfile.ZipFile(wheel).namelist()
    missing = [n for n in NEEDED if not any(n in name for name in names)]
    extra = [n for n in names if n.startswith(FOREIGN)]
    with tarfile.open(sdist) as archive:
        inner = [n.partition("/")[2] for n in archive.getnames()]
    missing += [n for n in SOURCES if n not in inner]
    assert version in sdist.name, (wheel.name, sdist.name)
    if missing or extra:
        sys.exit(f"missing: {missing}; not part of the wheel: {extra[:5]}")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size >> 20} MiB; {sdist.name}: {len(inner)} files")
    if given.archives_only:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv.create(place / "venv", with_pip=True)
        python = place / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        print(run(python, "-c", TRY, cwd=place, env=environment).strip())
        run(python, "-m", "attnsteer", "doctor", cwd=place, env=environment)
        assert "act/shapes-reading" in run(python, "-m", "attnsteer", "recipes", "ls", cwd=place, env=environment)
    print("the wheel works in a clean environment")
    return 0


if __name__ == "__main__":
    sys.exit(main())
