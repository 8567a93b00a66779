"""Imports point one way: each module may import what its layer allows, at the top or inside functions."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attnsteer"
HOST_LIBRARIES = {"vllm", "transformers", "diffusers", "accelerate", "timm", "peft"}
# Ends of the program: they may use everything, and nothing of the library uses them.
COMMANDS = {
    "cli",
    "cli_heads",
    "cli_hub",
    "cli_methods",
    "cli_options",
    "cli_recipes",
    "cli_runs",
    "cli_serve",
    "cli_view",
    "cli_zoo",
    "output",
    "__main__",
}
ENDS = COMMANDS | {
    "catalogue",
    "comfyui",
    "demo",
    "demo_page",
    "demo_text",
    "doctor",
    "play",
    "serving",
    "showcase",
    "skeleton",
}
# What a module of the core may import from outside. `typing_extensions` and the standard library are free.
CORE = {"torch", "safetensors", "huggingface_hub"}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@functools.cache
def imported(name: str, types: bool = True) -> tuple[set[str], set[str]]:
    """(outside top-level packages, modules of this package) that a module's code names, wherever it does.

    Args:
        types: also those that are for annotations alone, under `if TYPE_CHECKING`.
    """
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    outside, inside = set(), set()
    nodes = ast.walk if types else statements
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = [p for p in package if p][: len([p for p in package if p]) - node.level + 1]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                full = ".".join([*base, alias.name])
                inside.add(full if full in MODULES else ".".join(base))
    return outside - set(sys.stdlib_module_names), inside - {"", name}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a file but those below `if TYPE_CHECKING`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from statements(ast.Module(node.orelse, []))
        else:
            yield node
            yield from statements(node)


def circles(edges: Mapping[str, Set[str]]) -> list[set[str]]:
    """Groups of modules that import each other, directly or not."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = edges.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in edges}
    found: list[set[str]] = []
    for name in sorted(edges):
        if name in reach[name] and not any(name in circle for circle in found):
            found.append({other for other in edges if other in reach[name] and name in reach[other]})
    return found


def under(*packages: str) -> list[str]:
    return sorted(n for n in MODULES if any(n == p or n.startswith(f"{p}.") for p in packages))


# Tensor maths and selection.
MATHS = under(
    "methods", "kernels", "maps", "where", "heads", "parameters", "patterns", "account", "attention_map", "edits", "call",
    "bound", "branches", "engine", "tokens", "audit", "site",
)  # fmt: skip


@pytest.mark.parametrize("name", MATHS)
def test_tensor_maths_and_selection_know_no_model(name: str) -> None:
    outside, inside = imported(name)
    assert outside <= {"torch", "safetensors"}
    assert not {m for m in inside if m.split(".")[0] in ENDS | {"hosts", "testing"}}


@pytest.mark.parametrize("name", under("kernels"))
def test_kernels_know_nothing_of_the_package(name: str) -> None:
    assert all(m.split(".")[0] in ("kernels", "errors") for m in imported(name)[1])


def closure(name: str) -> set[str]:
    """A module of the hosts and all modules of the hosts that it uses, directly or not."""
    found, waiting = set(), [name]
    while waiting:
        found.add(waiting.pop())
        waiting += [m for n in found for m in imported(n)[1] if m.startswith("hosts.") and m not in found]
    return found


@pytest.mark.parametrize("name", under("hosts"))
def test_a_host_imports_its_own_library_only(name: str) -> None:
    outside, inside = imported(name)
    # numba and NumPy come with vLLM.
    assert outside <= {
        "torch",
        *({"vllm", "numba", "numpy"} if name.startswith("hosts.vllm") else {"transformers", "diffusers"}),
    }
    assert not {m for m in inside if m.split(".")[0] in ENDS | {"testing", "methods"}}
    libraries = {lib for module in closure(name) for lib in imported(module)[0]} & HOST_LIBRARIES
    assert libraries <= {"transformers"} or libraries <= {"diffusers"} or libraries <= {"vllm"}


def test_hosts_are_where_their_library_is() -> None:
    assert imported("hosts.sdpa.host")[0] == imported("hosts.base")[0] | {"torch"} == {"torch"}
    assert "transformers" in imported("hosts.transformers.host")[0]


@pytest.mark.parametrize(
    "name",
    sorted(
        set(MODULES) - set(under("testing", "hosts", "evals", "recipe", "run", "results", "zoo", "viz", "play")) - ENDS
    ),
)
def test_the_core_knows_no_host_library(name: str) -> None:
    outside, inside = imported(name)
    # Searches are long: they show a bar. Frames of a story are pictures.
    assert outside <= CORE | ({"tqdm"} if name.startswith("search") else {"PIL"} if name == "stories" else set())
    assert not {m for m in inside if m.split(".")[0] in ENDS | {"testing"}}


def test_no_modules_import_each_other() -> None:
    assert not circles({name: imported(name, types=False)[1] for name in MODULES})


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e.inner"}, "e.inner": {"a", "e"}}
    assert circles(edges) == [{"b", "c"}, {"e", "e.inner"}]
    assert "registry" in imported("hosts.base", types=False)[1]
    assert "steering" in imported("hosts.base")[1] - imported("hosts.base", types=False)[1]


# What is asked, doing it, what came out: each may import those on its left.
EVALUATION = ("recipe", "run", "results")


@pytest.mark.parametrize("name", under(*EVALUATION))
def test_recipes_know_no_runs_and_runs_know_no_results(name: str) -> None:
    later = EVALUATION[EVALUATION.index(name.split(".")[0]) + 1 :]
    assert not {m for m in imported(name)[1] if m.split(".")[0] in later}


def test_nothing_imports_the_command_line() -> None:
    assert [n for n in MODULES if "cli" in {m.split(".")[0] for m in imported(n)[1]}] == ["__main__"]


def test_transformers_is_steered_where_diffusers_is_missing() -> None:
    code = """
import sys
sys.modules["diffusers"] = None
import torch, attnsteer
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
model = tiny_transformers("llama")
with torch.no_grad(), attnsteer.steer(model, attnsteer.HeadGate({(0, 0): 0.5})) as run:
    model(**tiny_transformers_inputs("llama", model))
assert run.audit.fired(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_walk_sees_imports() -> None:
    """The helper finds imports at the top, inside functions, and relative ones."""
    assert {"transformers", "torch"} <= imported("hosts.transformers.host")[0]
    assert {"bound", "hosts.base", "hosts.transformers.attention_function"} <= imported("hosts.transformers.host")[1]
    assert "kernels" in imported("hosts.transformers.attention_function")[1]
    assert "cli" in imported("__main__")[1]
