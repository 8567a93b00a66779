"""How many files of the package a guided denoising step passes through, and how the files of this host depend on each other."""

from __future__ import annotations

import ast
from pathlib import Path

import attnsteer.hosts.diffusers as package
from attnsteer import SoftPAG, Where, steer
from attnsteer.testing import tiny_call, tiny_pipeline
from tests.stops import stops

# The life of one guidance step (docs/architecture.md) names each of them.
MOST = 19


def test_a_guided_run_passes_through_few_files() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=2)
    with steer(pipe, SoftPAG(3.0, 0.5, where=Where(layers=[1, 3], kinds="self"))) as run:
        # What is worked out once is not part of a step.
        pipe(**call)
        files, functions = stops(lambda: pipe(**call))
    assert run.audit.to_dict()["interventions"][0]["inside passes"] == 4
    assert {"methods/softpag.py", "engine.py", "hosts/diffusers/processors.py"} <= files
    assert len(files) <= MOST, sorted(files)
    assert "engine.py:SiteRuntime.__call__" in functions


def test_a_removed_steering_is_not_passed_through() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=1)
    with steer(pipe, SoftPAG(3.0, 0.5, where=Where(layers=[1]))):
        pipe(**call)
    assert stops(lambda: pipe(**call)) == (set(), set())


def uses(path: Path) -> set[str]:
    """Files of the same folder that a file imports, inside functions too; what is there for type checkers only does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1]
    return {n.module for n in froms if n.module} | {a.name for n in froms if not n.module for a in n.names}


def test_no_two_files_import_each_other() -> None:
    files = {path.stem: uses(path) for path in Path(package.__file__).parent.glob("*.py")}
    assert files["guided_forward"] >= {"clock", "prefix"}
    # A file that imports nothing of the rest may go; with a circle, some never can.
    while free := {name for name, used in files.items() if not used & set(files)}:
        files = {name: used for name, used in files.items() if name not in free}
    assert not files, f"a circle among {sorted(files)}"
