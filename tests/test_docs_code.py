"""The Python of README.md, CONTRIBUTING.md and docs/ runs as it is printed, on the embedded models."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import attnsteer
from attnsteer import registry, zoo
from attnsteer.call import AttnCall, KeyBias
from attnsteer.parameters import number
from attnsteer.search import Choice
from attnsteer.zoo.shapes.reading import reading

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))]
# Pages whose code needs what a user brings: tests/evals/test_lm_eval.py runs the same lines on a task of its own, and
# tests/test_serving.py those of a client, tests/hosts/vllm/ those of an engine of vLLM, tests/test_walkthrough.py a page whose
# blocks follow each other.
ELSEWHERE = {"docs/lm_eval.md", "docs/serving.md", "docs/vllm.md", "docs/walkthrough.md"}
PASSAGE = "a small red star . a large blue ring . question what colour is the star ? answer"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


# What takes its time: searches, laws on several hosts, pictures of many steps.
HEAVY = re.compile(
    r"calibrate_act|headhunter|run_laws|check_laws|phrase_maps|find_sink_dims|shapley|screen_heads|head_profile|num_inference_steps|generate_batch|continuous_batching"
)


def heavy(page: str, index: int) -> bool:
    code = blocks(page)[index]
    return bool(HEAVY.search(code))


CASES = [
    pytest.param(page, i, marks=pytest.mark.long) if heavy(page, i) else (page, i)
    for page in PAGES
    if page not in ELSEWHERE
    for i in range(len(blocks(page)))
]
PAGES_WITH_CODE = {page for page in PAGES if page not in ELSEWHERE and blocks(page)}


@functools.cache
def loaded(name: str) -> Any:
    """An embedded model, once for all blocks: what steers it takes itself off."""
    return zoo.load(name)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(registry._METHODS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)


def language() -> dict[str, Any]:
    """What the blocks about texts take for granted."""
    model, tokenizer = loaded("shapes-lm")
    inputs = tokenizer(PASSAGE, return_tensors="pt", return_token_type_ids=False)
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    continuation = torch.tensor([ids("red .")])
    total = inputs.input_ids.shape[1] + continuation.shape[1]
    readings = [reading("calibration", i, "one-shot") for i in range(60)]
    questions = [(tokenizer(r.prompt).input_ids, [ids(c) for c in r.choices], r.answer) for r in readings]
    return {
        "model": model,
        "tokenizer": tokenizer,
        "inputs": dict(inputs),
        "prompt": dict(inputs),
        "continuation": continuation,
        "mask": torch.ones(1, total, dtype=torch.long),
        "heads": attnsteer.HeadSet.load(zoo.folder("shapes-lm") / "act" / "heads.safetensors"),
        "questions": questions[:-5],
        "test_samples": [Choice(*q) for q in questions[-5:]],
    }


def vision() -> dict[str, Any]:
    """And those about pictures."""
    model, processor = loaded("shapes-lvlm")
    image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    inputs = dict(processor(images=image, text="<image> caption", return_tensors="pt"))
    return {
        "model": model,
        "processor": processor,
        "tokenizer": processor.tokenizer,
        "inputs": inputs,
        "batches": [inputs],
        "image": image.float() / 255,
        "method": attnsteer.VHR(alpha=1.3),
    }


def drawing() -> dict[str, Any]:
    """And those about pipelines."""
    pipe = loaded("shapes-sd")
    return {
        "pipe": pipe,
        "captions": ["a red circle", "a blue star"],
        "score": lambda images, prompts: [0.5] * len(images),
    }


def names(code: str) -> dict[str, Any]:
    """The names that a block takes for granted, by what it speaks of."""
    found: dict[str, Any] = {}
    if "pipe" in code:
        found |= drawing()
    if re.search(r"VAR|VHR|word_maps", code):
        found |= vision()
    elif re.search(r"\bmodel\b", code):
        found |= language()
    if "calibrate_act" in code or "head_grid" in code:
        extra = language()
        found |= {k: v for k, v in extra.items() if k not in found}
        found["ACT"], found["SoftPAG"], found["Where"] = attnsteer.ACT, attnsteer.SoftPAG, attnsteer.Where
    return found | {"ACT": attnsteer.ACT, "steer": attnsteer.steer}


def my_method() -> types.ModuleType:
    """The module of a reader's own method that the blocks about laws import."""

    @dataclass(frozen=True)
    class MyMethod(attnsteer.Intervention):
        """Adds to the first key's scores."""

        strength: float = number(0.5)

        kinds = ("self",)

        def bias(self, call: AttnCall) -> KeyBias | None:
            return KeyBias(self.strength * call.first_key().float()) if self.strength else None

    module = types.ModuleType("my_method")
    module.MyMethod = MyMethod
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("page", "index"), CASES)
def test_the_code_runs(page: str, index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(zoo.folder("shapes-lm") / "act" / "heads.safetensors", tmp_path)
    code = blocks(page)[index]
    given = names(code)
    monkeypatch.setitem(sys.modules, "my_method", my_method())
    if "check_laws" in code:
        # The block before it on the page makes the case.
        exec(blocks(page)[index - 1], given)
    if "LatentLoss" in code:
        from attnsteer.maps.words_to_image import Maps

        given |= {"dataclass": dataclass, "LatentLoss": attnsteer.LatentLoss, "Tensor": torch.Tensor, "Maps": Maps}
    # A dataclass looks for the module of its class.
    module = types.ModuleType(f"printed_{index}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(given)
    compiled = compile(code, f"{page}, block {index + 1}", "exec")
    if "find_sink_dims" in code:
        # The embedded model has no massive activations, as its card says, and the search says so in place of a result.
        with pytest.raises(attnsteer.errors.SelectionError, match="VAR"):
            exec(compiled, vars(module))
        assert not vars(module)["sinks"].dims and vars(module)["sinks"].reason
    else:
        exec(compiled, vars(module))
    if "bake(" in code:
        # It folds gates into weights.
        loaded.cache_clear()
    # A gap for the reader to fill is no code that runs.
    assert not re.search(r"^\s*\.\.\.$|, \.\.\.\]", code, re.M)


def test_pages_with_code_are_found() -> None:
    assert len(blocks("README.md")) >= 8
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "docs/metrics.md",
        "docs/index.md",
        "docs/mark_a_span.md",
    } <= PAGES_WITH_CODE
    assert all(blocks(page) for page in ELSEWHERE)


def shell_lines(page: str) -> list[list[str]]:
    """The words behind `attnsteer` of each command in a page's shell blocks."""
    found = []
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|", line):
                words = shlex.split(part, comments=True)
                names = [i for i, w in enumerate(words) if w == "attnsteer"]
                if names and (names[0] == 0 or words[names[0] - 1] in ("-m", "-I{}")):
                    found.append(words[names[0] + 1 :])
    return found


@pytest.mark.parametrize("page", [p for p in [*PAGES, "docs/board/README.md"] if shell_lines(p)])
def test_shell_lines_are_ones_that_the_command_line_takes(page: str) -> None:
    """They are read, not run: names of commands, options, and how many arguments there are."""
    from typer.main import get_command

    from attnsteer import cli

    for words in shell_lines(page):
        command, rest = get_command(cli.app), list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, (page, words)
            command = command.commands[rest.pop(0)]
        try:
            command.make_context("attnsteer", rest)
        except SystemExit:
            raise AssertionError((page, words)) from None
        except Exception as error:
            # --version and --help print and leave.
            if type(error).__name__ != "Exit":
                raise AssertionError((page, words, str(error))) from error
