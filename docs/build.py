"""Builds the documentation site: `make docs`, or `python docs/build.py --zensical PATH`. No network is used.

1. Assemble: the pages of `docs/`, the root's and the recipes', and pages made from the code: one for each method, the API, a page
   about writing a method out of CONTRIBUTING.md. Links between files of the repository become links between pages.
2. `zensical build --strict` with `mkdocs.yml`, whose navigation gets the generated pages.
3. Check what was built: every internal link and anchor leads somewhere, and no page loads anything from another address.
"""

from __future__ import annotations

import argparse
import functools
import html.parser
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

# Pages from elsewhere in the repository: file -> page.
ELSEWHERE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "recipes/README.md": "recipes/index.md",
}
# Modules whose public names are documented.
MODULES = (
    "attnsteer", "attnsteer.errors", "attnsteer.heads", "attnsteer.where", "attnsteer.tokens", "attnsteer.intervention",
    "attnsteer.call", "attnsteer.edits", "attnsteer.parameters", "attnsteer.branches", "attnsteer.captured", "attnsteer.audit",
    "attnsteer.search", "attnsteer.analysis", "attnsteer.viz", "attnsteer.maps.words_to_image", "attnsteer.maps.layout",
    "attnsteer.kernels", "attnsteer.testing", "attnsteer.zoo", "attnsteer.serving", "attnsteer.recipe", "attnsteer.run",
    "attnsteer.run.joining", "attnsteer.results.comparison", "attnsteer.results.verdict", "attnsteer.results.boards",
    "attnsteer.results.verification", "attnsteer.results.hub_runs", "attnsteer.results.lm_eval_runs", "attnsteer.evals.metrics",
    "attnsteer.evals.templates", "attnsteer.evals.lmms_eval", "attnsteer.comfyui", "attnsteer.hosts.comfyui.install",
)  # fmt: skip


# Pages made from the code.


def escaped(text: str) -> str:
    """Plain text as Markdown, code in backticks as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    keep = lambda t: re.sub(r"([\\\[\]*_|#])", r"\\\1", t).replace("<", "&lt;").replace(">", "&gt;")  # noqa: E731
    return "".join(p if i % 2 else keep(p) for i, p in enumerate(parts))


def docstring(text: str | None) -> str:
    """A docstring in the house's style as Markdown."""
    out: list[str] = []
    section, entry = "", ""

    def close() -> None:
        nonlocal entry
        if entry:
            name, colon, rest = entry.partition(": ")
            known = colon and re.fullmatch(r"[\w, *.`]+", name)
            out.append(f"- `{name.strip('`')}`: {escaped(rest)}" if known else f"- {escaped(entry)}")
            entry = ""

    lines = inspect.cleandoc(text or "").splitlines()
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            close()
            section = line[:-1]
            out += ["", f"**{section}**", ""]
        elif section and indent:
            if indent == 4 and entry:
                close()
            entry = f"{entry} {line.strip()}".strip()
        elif not line.strip():
            close()
            section = section if i + 1 < len(lines) and lines[i + 1].startswith(" ") else ""
            out.append("")
        elif indent >= 4:
            out.append(line)  # code, and drawings
        else:
            out.append(escaped(line))
    close()
    return "\n".join(out)


@functools.cache
def effects() -> dict[str, tuple[str, str]]:
    """Recipe -> (its row of docs/effects.md, "helps", "harms" or "neither"), by the interval of the paired difference."""
    found = {}
    for line in (DOCS / "effects.md").read_text(encoding="utf-8").splitlines():
        match = re.match(r"\| `([\w-]+/[\w-]+)` \|", line)
        if match is None:
            continue
        interval = re.search(r"\[(-?[\d.]+), (-?[\d.]+)\]", line)
        if interval is None:
            raise SystemExit(f"docs/effects.md: the row of {match[1]} has no interval [low, high] of its difference.")
        low, high = map(float, interval.groups())
        found[match[1]] = line, "helps" if low > 0 else "harms" if high < 0 else "neither"
    return found


@functools.cache
def recipes_of() -> dict[str, list[str]]:
    """Method -> names of the shipped recipes that have it."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        for step in recipe.get("interventions", ()):
            found.setdefault(step["method"], []).append(f"{path.parent.name}/{path.stem}")
    return found


# What the numbers of one small model or of a paper's setting do not tell; by method, from its docstring and the recipes' notes.
VERDICTS = {
    "helps": "Helped here: the interval of the difference lies above zero.",
    "harms": "Harmed here: the interval of the difference lies below zero.",
    "neither": "Neither here: the interval of the difference holds zero.",
}


def method_page(name: str) -> str:
    """All that is known of one method."""
    from attnsteer.catalogue import describe
    from attnsteer.cli_methods import example, parameters
    from attnsteer.registry import get_method

    cls = get_method(name)
    entry = describe(name, cls)
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    arxiv = re.search(r"arXiv (\d{4}\.\d{4,5})", module)
    paper = escaped(entry.paper or "see below")
    link = f" ([arXiv {arxiv[1]}](https://arxiv.org/abs/{arxiv[1]}))" if arxiv else ""
    first, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    known = effects()
    shipped = recipes_of().get(name, [])
    source = docstring(module.partition("\n\n")[2]) or paper
    lines = [
        f"# {name}", "", escaped(entry.summary[:1].upper() + entry.summary[1:]), "", "## Equation", "", "```text",
        *textwrap.wrap(" ".join(first.split()), 78), "```", "", "## Source", "", f"{source}{link}", "",
        "## When it helps, when it harms", "",
    ]  # fmt: skip
    measured = [(r, *known[r]) for r in shipped if r in known]
    if measured:
        head = (
            "| recipe | figure | without | with | difference in points | samples | beside it |\n| --- "
            + "| --- " * 6
            + "|"
        )
        for verdict, text in VERDICTS.items():
            rows = [row for _, row, found in measured if found == verdict]
            if rows:
                lines += [text, "", head, *rows, ""]
        lines += ["All rows and how they were measured: [measured effects](../effects.md).", ""]
    else:
        lines += [
            "Not measured on the embedded models. A recipe of your own says it for your model and task: "
            "[recipes](../recipes.md).", "",
        ]  # fmt: skip
    text = f"{module}\n\n{inspect.cleandoc(cls.__doc__ or '')}"
    harms = _sentences(text, r"\b(cost|break|breaks|harm|worse|refus|not defined)\w*")
    if harms:
        lines += ["What to mind:", "", *(f"- {escaped(s)}" for s in harms), ""]
    lines += ["## Parameters", "", "| name | values | default |", "| --- | --- | --- |"]
    for p in parameters(cls):
        default = "required" if p["required"] else f"`{p['default']}`"
        lines.append(f"| `{p['name']}` | {escaped(p['values'])} | {default.replace('|', chr(92) + '|')} |")
    lines += ["", docstring(rest), "", "## Use", "", "```python", example(name, cls, entry.hosts), "```", ""]
    facts = {"attention": ", ".join(entry.kinds), "edits": ", ".join(entry.doors), "hosts": ", ".join(entry.hosts)}
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [f"- looks ahead in the prompt: {'yes' if entry.looks_ahead else 'no'}"]
    if shipped:
        names = sorted({r.split("/")[0] for r in shipped})
        lines.append("- recipes: " + ", ".join(f"[{n}](../recipes/{n}.md)" for n in names))
    return "\n".join(lines) + "\n"


def _sentences(text: str, pattern: str) -> list[str]:
    """Sentences of a docstring that speak of costs and refusals."""
    flat = " ".join(re.sub(r"\b(Args|Raises|Attributes|Returns):", "", text).split())
    return [s.strip() for s in re.split(r"(?<=[.])\s+(?=[A-Z])", flat) if re.search(pattern, s) and len(s) < 300][:6]


def own_methods() -> list[str]:
    """Names of the methods of this package; others may be registered."""
    from attnsteer.registry import get_method, methods

    return [n for n in methods() if get_method(n).__module__.startswith("attnsteer.")]


def methods_index() -> str:
    """The list of methods."""
    from attnsteer.catalogue import catalogue

    known = {m.name: m for m in catalogue()}
    lines = ["# Methods", "", "Which of them for which problem: [which method](../which_method.md).", ""]
    lines += ["| method | what it edits | attention |", "| --- | --- | --- |"]
    lines += [
        f"| [{m.name}]({m.name}.md) | {escaped(m.summary)} | {', '.join(m.kinds)} |"
        for m in map(known.get, own_methods())
    ]
    return "\n".join(lines) + "\n"


def public_names(module: Any) -> list[str]:
    """The names that a module offers: its `__all__`, else what it defines without an underscore."""
    names = getattr(module, "__all__", None)
    if names is None:
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and callable(v)]
        names = [n for n in own if not n.startswith("_")]
    return [n for n in names if not n.startswith("__")]


def api_page(name: str) -> str:
    """The public names of one module: signature and docstring."""
    module = importlib.import_module(name)
    lines = [f"# {name}", "", docstring(module.__doc__), ""]
    for member in public_names(module):
        value = getattr(module, member)
        if inspect.ismodule(value) or not (inspect.isclass(value) or callable(value)):
            continue
        lines += [f"## {escaped(member)}", "", "```text", _signature(member, value), "```", ""]
        lines += [docstring(inspect.getdoc(value)), ""]
        if inspect.isclass(value):
            for inner, function in vars(value).items():
                function = getattr(function, "__func__", function)
                if inner.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
                    continue
                lines += [
                    f"### {escaped(member)}.{escaped(inner)}",
                    "",
                    "```text",
                    _signature(inner, function),
                    "```",
                    "",
                ]
                lines += [docstring(function.__doc__), ""]
    return "\n".join(lines) + "\n"


def _signature(name: str, value: Any) -> str:
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):
        signature = "(...)"
    # Addresses of objects differ from run to run.
    signature = re.sub(r" at 0x[0-9a-f]+", "", signature)
    if len(signature) > 100:
        signature = re.sub(r", (?=[*\w]+(: |=|,|\)))", ",\n    ", signature)
    return f"{name}{signature}"


def write_a_method() -> str:
    """The section of CONTRIBUTING.md between its marks."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    inner = text.partition("<!-- add-a-method: start -->")[2].partition("<!-- add-a-method: end -->")[0]
    return f"# Write a method\n\n{inner.strip()}\n"


# Assembling.


def sources() -> dict[str, Path]:
    """Page -> file of the repository."""
    found = {p.name: p for p in sorted(DOCS.glob("*.md"))}
    found |= {page: ROOT / name for name, page in ELSEWHERE.items() if (ROOT / name).exists()}
    found |= {f"recipes/{p.parent.name}.md": p for p in sorted((ROOT / "recipes").glob("*/README.md"))}
    return found


def generated() -> dict[str, str]:
    """Page -> text."""
    pages = {"methods/index.md": methods_index(), "write_a_method.md": write_a_method()}
    pages |= {f"methods/{name}.md": method_page(name) for name in own_methods()}
    listed = [f"- [`{name}`]({name}.md): {escaped(_first(name))}" for name in MODULES]
    pages["api/index.md"] = "\n".join(
        ["# API", "", "Public modules; anything else may change at any time.", "", *listed, ""]
    )
    pages |= {f"api/{name}.md": api_page(name) for name in MODULES}
    return pages


def _first(name: str) -> str:
    return (inspect.getdoc(importlib.import_module(name)) or "").split("\n\n")[0].replace("\n", " ")


LINK = re.compile(r"(?<!!)\[([^\]\[]*)\]\(([^)\s]+)\)")


def relinked(text: str, file: Path, page: str, pages: dict[Path, str], made: Collection[str]) -> str:
    """Links to files become links to pages; to a file that is no page, its name as code."""

    def change(match: re.Match[str]) -> str:
        label, target = match.groups()
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            return match[0]
        path, mark, anchor = target.partition("#")
        found = (file.parent / path).resolve()
        if found.is_dir():
            found = found / "README.md"
        if found in pages:
            return f"[{label}]({os.path.relpath(pages[found], Path(page).parent)}{mark}{anchor})"
        if os.path.normpath(Path(page).parent / path) in made:
            return match[0]
        if not found.exists():
            raise SystemExit(f"{file.relative_to(ROOT)}: the link to {target} leads nowhere.")
        return label if label.startswith("`") else f"`{label}`"

    out, code = [], False
    for line in text.splitlines():
        code ^= line.startswith("```")
        out.append(line if code else "`".join(p if i % 2 else LINK.sub(change, p) for i, p in enumerate(_apart(line))))
    return "\n".join(out) + "\n"


def _apart(line: str) -> list[str]:
    """Text and code of a line in turn; a link's label may hold code, and stays whole."""
    return [line] if LINK.search(line) and "`" in line else line.split("`")


def assemble(folder: Path) -> dict[str, Any]:
    """Write all pages into `folder`, and give the configuration for them.

    Raises:
        SystemExit: a link leads nowhere, or a page stands in no navigation.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if (DOCS / "images").exists():
        shutil.copytree(DOCS / "images", folder / "images")
    found = sources()
    pages = {path.resolve(): page for page, path in found.items()}
    made = generated()
    texts = {page: relinked(path.read_text(encoding="utf-8"), path, page, pages, made) for page, path in found.items()}
    page = "write_a_method.md"
    made[page] = relinked(made[page], ROOT / "CONTRIBUTING.md", page, pages, made)
    texts |= made
    for page, text in texts.items():
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(text, encoding="utf-8")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = lambda start: sorted(p for p in texts if p.startswith(start) and not p.endswith("index.md"))  # noqa: E731
    for section in config["nav"]:
        for title, inner in section.items():
            if isinstance(inner, list):
                for start in ("methods/", "api/", "recipes/"):
                    if f"{start}index.md" in [next(iter(e.values())) if isinstance(e, dict) else e for e in inner]:
                        inner += [{Path(p).stem: p} for p in listed(start)]
                section[title] = inner
    missing = set(texts) - set(_navigated(config["nav"]))
    if missing:
        raise SystemExit(f"mkdocs.yml has no place for {', '.join(sorted(missing))} in its navigation.")
    return config


def _navigated(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        yield from (p for inner in nav.values() for p in _navigated(inner))
    else:
        yield from (p for inner in nav for p in _navigated(inner))


# Checking what was built.


class Page(html.parser.HTMLParser):
    """Links, loaded addresses and anchors of one built page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        self.anchors |= {given[k] for k in ("id", "name") if given.get(k)}
        if "href" in given:
            loaded = tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate")
            (self.loads if loaded else self.links).append(given["href"])
        if "src" in given:
            self.loads.append(given["src"])


def check(site: Path) -> tuple[int, list[str]]:
    """(links looked at, what is wrong): dead links and anchors, and anything loaded from another address."""
    pages: dict[Path, Page] = {}
    for path in sorted(site.rglob("*.html")):
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        pages[path.resolve()] = page
    wrong, count = [], 0
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        wrong += [f"{name} loads {a}" for a in page.loads if re.match(r"(https?:)?//", a)]
        for address in [*page.links, *page.loads]:
            if re.match(r"(https?:)?//|mailto:|data:|javascript:", address):
                continue
            count += 1
            target, _, anchor = unquote(address).partition("#")
            # The page of errors has absolute addresses, as it may stand in for any other.
            if target.startswith("/") and path.name == "404.html":
                continue
            found = (path.parent / target).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            if not found.exists():
                wrong.append(f"{name} links to {address}, which is not there")
            elif anchor and found in pages and anchor not in pages[found].anchors and not anchor.startswith("__"):
                wrong.append(f"{name} links to {address}, whose anchor is not there")
    for path in site.rglob("*.css"):
        wrong += [
            f"{path.name} loads {a}"
            for a in re.findall(r"url\(['\"]?(https?:[^)'\"]+)", path.read_text(encoding="utf-8"))
        ]
    return count, wrong


# A polyfill of workers for pages that are opened as files, from another address; the search works without it there.
SHIM = re.compile(r'<script[^>]*src="https://unpkg\.com/iframe-worker/shim"[^>]*>\s*</script>')


def clicks(site: Path, start: str = "index.html") -> dict[str, int]:
    """Page -> how many clicks from the start page, counting links in a page's own text alone, not its navigation."""
    far = {start: 0}
    waiting = [start]
    while waiting:
        name = waiting.pop(0)
        text = (site / name).read_text(encoding="utf-8")
        page = Page()
        page.feed(text.partition("<article")[2].partition("</article>")[0])
        for address in page.links:
            target = unquote(address).partition("#")[0]
            if not target or re.match(r"[a-z]+:|//", target):
                continue
            found = (site / name).parent.joinpath(target).resolve()
            if found.exists() and found.suffix == ".html":
                other = found.relative_to(site.resolve()).as_posix()
                if other not in far:
                    far[other] = far[name] + 1
                    waiting.append(other)
    return far


def main() -> int:
    """Build and check; 0 where nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zensical", default="zensical", help="the program, in an environment of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="where to build")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    config = assemble(out / "pages")
    config |= {"docs_dir": "pages", "site_dir": "site"}
    (out / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    done = subprocess.run(
        # The build has another working folder.
        [
            str(Path(given.zensical).absolute()) if os.sep in given.zensical else given.zensical,
            "build",
            "--strict",
            "--clean",
            "-f",
            str(out / "mkdocs.yml"),
        ],
        check=False,
        cwd=out,
    )
    if done.returncode:
        return done.returncode
    site = out / "site"
    for path in site.rglob("*.html"):
        path.write_text(SHIM.sub("", path.read_text(encoding="utf-8")), encoding="utf-8")
    count, wrong = check(site)
    for line in wrong:
        print(line, file=sys.stderr)
    far = clicks(site)
    print(f"{len(list(site.rglob('*.html')))} pages, {count} links, {len(wrong)} wrong; {site / 'index.html'}")
    for page in ("mark_a_span", "per_sample", "serving", "write_a_method", "read_a_report"):
        if far.get(f"{page}.html", 9) > 2:
            print(f"{page} is more than two clicks from the start page", file=sys.stderr)
            wrong.append(page)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
