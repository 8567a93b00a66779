"""The documentation site's pages: assembled here, links checked; `make docs` builds them strictly and checks what was built."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from attnsteer import _version
from attnsteer.registry import get_method, methods

ROOT = Path(__file__).parents[1]
TASKS = ("mark_a_span.md", "per_sample.md", "serving.md", "write_a_method.md", "read_a_report.md")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(build: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    build.assemble(folder)
    return folder


def test_every_link_between_pages_leads_to_one(pages: Path) -> None:
    wrong, count = [], 0
    for path in pages.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
            if not re.match(r"https?:|#", target):
                count += 1
                wrong += [(path.name, target)] if not (path.parent / target.partition("#")[0]).exists() else []
    assert not wrong and count > 150


def test_every_method_has_a_page_with_equation_source_and_numbers(pages: Path) -> None:
    own = [n for n in methods() if get_method(n).__module__.startswith("attnsteer.")]
    for name in own:
        text = (pages / "methods" / f"{name}.md").read_text(encoding="utf-8")
        assert all(
            f"## {part}" in text for part in ("Equation", "Source", "When it helps, when it harms", "Parameters", "Use")
        )
        assert f"({name}.md)" in (pages / "methods" / "index.md").read_text(encoding="utf-8")
    refocusing = (pages / "methods" / "AttentionRefocusing.md").read_text(encoding="utf-8")
    assert "Helped here" in refocusing and "+66.0 [59.5, 72.5]" in refocusing
    assert "Neither here" in (pages / "methods" / "VHR.md").read_text(encoding="utf-8")
    assert "Not measured" in (pages / "methods" / "AttentionBuckets.md").read_text(encoding="utf-8")


def test_tasks_are_one_click_from_the_start(pages: Path) -> None:
    start = (pages / "index.md").read_text(encoding="utf-8")
    assert all(f"({page})" in start for page in TASKS)


def test_the_guide_says_what_was_measured() -> None:
    effects = (ROOT / "docs" / "effects.md").read_text(encoding="utf-8")
    guide = (ROOT / "docs" / "which_method.md").read_text(encoding="utf-8")
    intervals = re.findall(r"[+-][\d.]+ \[-?[\d.]+, -?[\d.]+\]", guide)
    assert len(intervals) > 8 and not [i for i in intervals if i not in effects]


def test_docstrings_become_markdown(build: ModuleType) -> None:
    text = build.docstring(
        "One [h][w].\n\nArgs:\n    x, y: of a_b,\n        and on. z: more.\n    k: last.\n\nEnd, `[q]`."
    )
    assert r"One \[h\]\[w\]." in text and r"- `x, y`: of a\_b, and on. z: more." in text
    assert "- `k`: last." in text and "End, `[q]`." in text


def test_dead_links_and_foreign_addresses_are_found(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<article><a href="a.html#here">a</a><a href="b.html">b</a><a href="a.html#gone">c</a></article>'
        '<script src="https://elsewhere.example/x.js"></script><a href="https://arxiv.org/abs/1">p</a>'
    )
    (tmp_path / "a.html").write_text('<article><h1 id="here">A</h1><img src="//elsewhere.example/i.png"></article>')
    count, wrong = build.check(tmp_path)
    assert count == 3 and len(wrong) == 4
    assert build.clicks(tmp_path) == {"index.html": 0, "a.html": 1}
    shim = '<script src="https://unpkg.com/iframe-worker/shim" type="text/javascript"></script>'
    assert build.SHIM.sub("", f"<p>{shim}</p>") == "<p></p>"


def test_versions_agree_and_tools_are_pinned() -> None:
    given = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert given["version"] == _version.__version__ and given["license"] == project["project"]["license"]
    assert all("==" in tool for group in project["dependency-groups"].values() for tool in group)
    assert (ROOT / "attnsteer" / "py.typed").exists()
    pack = tomllib.loads((ROOT / "integrations" / "comfyui" / "pyproject.toml").read_text(encoding="utf-8"))
    assert "comfyui" not in pack["project"]["name"].lower() and pack["tool"]["comfy"]["PublisherId"]
