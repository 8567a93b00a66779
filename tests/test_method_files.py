"""Methods from a file that the user names: run once, known by name, and refused where it is not what it should be."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnsteer import get_method, method_files, methods, registry
from attnsteer.errors import RegistrationError, UnknownName
from attnsteer.method_files import import_methods, imported, require

ROOT = Path(__file__).parents[1]
SOURCE = '''"""Hush: multiplies the output of every head by a factor.

Nobody, "No Paper" (2026).
"""

from __future__ import annotations

from dataclasses import dataclass

from attnsteer import Intervention, register_method


@register_method
@dataclass(frozen=True)
class Hush(Intervention):
    """out' = factor * out."""

    factor: float = 0.5

    def output(self, call, out):
        return None if self.factor == 1.0 else out * self.factor
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has a registry and a list of imports of its own."""
    monkeypatch.setattr(method_files, "_IMPORTED", {})
    before = dict(registry._METHODS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)


@pytest.fixture
def hush(tmp_path: Path) -> Path:
    path = tmp_path / "hush.py"
    path.write_text(SOURCE)
    return path


def shell(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnsteer", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ})


def test_a_file_is_run_once_and_its_method_known(hush: Path) -> None:
    found = import_methods(hush)
    assert found.methods == ("Hush",) and found.hosts == () and imported() == (found,)
    assert found.path == hush.resolve() and found.sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert "Hush" in methods() and get_method("Hush")(factor=0.2).factor == 0.2
    assert import_methods(str(hush)) is found
    require([hush])


def test_a_file_that_changed_meanwhile_is_refused(hush: Path) -> None:
    import_methods(hush)
    hush.write_text(SOURCE + "# more")
    with pytest.raises(RegistrationError, match="has changed since this process imported it"):
        import_methods(hush)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("x = 1", "registers neither a method nor a host"),
        ("x = 1\ny = x / 0", r"line 2: ZeroDivisionError"),
        ("x = (", r"line 1: SyntaxError"),
        ("import sys\nsys.exit(0)", r"line 2: SystemExit: 0"),
        (SOURCE.replace("class Hush", "class ACT"), "the name 'ACT' is taken"),
    ],
)
def test_a_file_that_is_no_method(tmp_path: Path, source: str, error: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(RegistrationError, match=error):
        import_methods(path)
    assert not imported() and not [name for name in sys.modules if name.startswith("attnsteer_method_file_bad")]


@pytest.mark.parametrize("failing", ["raise ValueError", "raise KeyboardInterrupt"])
def test_a_file_that_fails_behind_its_class_leaves_nothing_and_can_be_mended(hush: Path, failing: str) -> None:
    hush.write_text(f"{SOURCE}\n{failing}\n")
    known, loaded = methods(), set(sys.modules)
    with pytest.raises((RegistrationError, KeyboardInterrupt)):
        import_methods(hush)
    assert methods() == known and not [name for name in set(sys.modules) - loaded if "hush" in name]
    hush.write_text(SOURCE)
    assert import_methods(hush).methods == ("Hush",)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="cannot be read"):
        import_methods(tmp_path / "none.py")
    (tmp_path / "text.txt").write_text("x = 1")
    with pytest.raises(RegistrationError, match=r"must end in \.py"):
        import_methods(tmp_path / "text.txt")


def test_nothing_is_imported_without_a_word(hush: Path) -> None:
    with pytest.raises(RegistrationError, match=r"--import .*hush\.py, or with --allow-imports"):
        require([hush])
    assert not imported() and "Hush" not in methods()


@pytest.mark.long
def test_the_commands_import(hush: Path) -> None:
    done = shell("methods", "Hush", "--import", hush, "--json")
    found = json.loads(done.stdout)
    assert found["summary"] == "multiplies the output of every head by a factor."
    assert [p["name"] for p in found["parameters"]] == ["where", "factor"]
    assert "get_method('Hush')()" in found["example"]
    assert "Hush" in shell("methods", "--import", hush).stdout
    done = shell("sites", "shapes-lm", "--import", hush.with_name("none.py"))
    assert done.returncode == 2 and "cannot be read" in done.stderr and done.stderr.count("\n") == 1
    assert shell("sites", "shapes-lm", "--import", hush).returncode == 0
