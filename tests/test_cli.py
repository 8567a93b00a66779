"""The command line: what it prints, as tables and as JSON, its exit codes, and errors in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import attnsteer
from attnsteer import __version__, cli, methods, sites
from attnsteer.testing import tiny_pipeline, tiny_transformers, tiny_transformers_inputs

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "methods",
    "sites",
    "doctor",
    "demo",
    "run",
    "calibrate",
    "profile",
    "bake",
    "compare",
    "report",
    "verify",
    "board",
    "push",
    "pull",
    "serve",
    "view",
    "play",
}
GROUPS = {"recipes", "zoo"}


def run(*args: str) -> Any:
    """One command in this process."""
    return CliRunner().invoke(cli.app, list(args))


def shell(*args: str, code: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own."""
    command = [sys.executable, *(("-c", code) if code else ("-m", "attnsteer")), *args]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "COLUMNS": "100", **env}
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    """Saved configs without weights: a language model, a pipeline, one of its models."""
    base = tmp_path_factory.mktemp("models")
    model = tiny_transformers("llama")
    model.config.save_pretrained(base / "llama")
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(base / "sd")
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    return {"llama": base / "llama", "sd": base / "sd", "unet": base / "sd" / "unet"}


# ------------------------------------------------------------------------------------------------ usage


def test_help_names_every_command_that_exists_and_no_other() -> None:
    done = run("--help")
    assert done.exit_code == 0
    assert {c.callback.__name__ for c in cli.app.registered_commands} == COMMANDS
    assert {g.name for g in cli.app.registered_groups} == GROUPS
    for name in sorted(COMMANDS | GROUPS):
        assert name in done.output
        page = run(name, "--help")
        assert page.exit_code == 0 and "--help" in page.output
    assert "attnsteer" in run().output


def test_a_wrong_command_or_option_exits_with_2() -> None:
    assert run("method").exit_code == run("methods", "--yaml").exit_code == run("sites").exit_code == 2


def test_the_version() -> None:
    assert run("--version").output.strip() == f"attnsteer {__version__}"


def test_help_and_wrong_usage_load_nothing_large() -> None:
    code = """
import sys
from attnsteer.cli import app
try: app(["sites", "--help"])
except SystemExit as end: assert not end.code
print(sorted({"torch", "transformers", "diffusers", "accelerate", "huggingface_hub"} & set(sys.modules)))
"""
    assert shell(code=code).stdout.splitlines()[-1] == "[]"


def test_python_m_is_the_command() -> None:
    done = shell("--version")
    assert (done.returncode, done.stdout) == (0, f"attnsteer {__version__}\n")


# ------------------------------------------------------------------------------------------------ methods


def test_methods_lists_every_method() -> None:
    lines = run("methods").output.splitlines()
    assert lines[0].split()[0] == "name" and [line.split()[0] for line in lines[1:]] == list(methods())
    act = next(line for line in lines if line.startswith("ACT "))
    assert "weights" in act and " yes " in act and "arXiv 2406.15765" in act and "transformers" in act


def test_methods_as_json_has_all_facts() -> None:
    found = {m["name"]: m for m in json.loads(run("methods", "--json").output)}
    assert list(found) == list(methods())
    assert found["ACT"] | {"summary": "", "paper": ""} == {
        "name": "ACT", "summary": "", "paper": "", "kinds": ["self"], "doors": ["weights"], "hosts": ["transformers"],
        "looks_ahead": True,
        "parameters": [
            "heads: HeadSet or {layer: [head, ...]} or None, default None",
            "beta: number from 0 to 1, or one per sample, default 0.4",
            "threshold: finite number of at least 0 or None, or one per sample, default None",
            "alpha: finite number of at least 0 or None, or one per sample, default None",
            "decode: one of 'frozen', 'running', 'prefill_only', default 'frozen'",
            "min_rows: integer of at least 1, default 1",
            "exclude: one of 'first_token', 'first_hit', default 'first_token'",
        ],
    }  # fmt: skip
    assert found["PAG"]["doors"] == ["output", "around"] and found["PAG"]["hosts"] == ["diffusers"]
    assert set(found["HeadGate"]["hosts"]) == {"transformers", "diffusers", "generic"}
    assert all(
        m["summary"].endswith(".") and "\n" not in m["summary"]
        for m in found.values()
        if m["name"] in attnsteer.__all__
    )


@pytest.mark.parametrize("name", methods())
def test_one_method_is_told_whole(name: str) -> None:
    found = json.loads(run("methods", name, "--json").output)
    cls = attnsteer.get_method(name)
    assert [p["name"] for p in found["parameters"]] == [f.name for f in dataclasses.fields(cls) if f.init]
    for row in found["parameters"]:
        assert row["type"] and row["values"] and (row["default"] is None) == row["required"]
    # The example's method can be made as it is written.
    before, _, steered = found["example"].rpartition("\n\n")
    names: dict[str, Any] = {}
    if "capture(" in before:
        names["model"] = tiny_transformers("llama")
        names["inputs"] = tiny_transformers_inputs("llama", names["model"])
    exec(before, names)
    made = eval(steered.partition(", ")[2].partition(") as run:")[0], names)
    assert isinstance(made, cls)
    table = run("methods", name).output
    assert found["summary"] in table and found["paper"] in table and found["example"] in table
    assert all(row["name"] in table for row in found["parameters"])


def test_declared_values_are_shown() -> None:
    from attnsteer.cli_methods import parameters

    class Declared:
        def describe(self) -> str:
            return "number from 0 to 1"

    @dataclasses.dataclass(frozen=True)
    class Base:
        share: float = dataclasses.field(default=0.5, metadata={"parameter": Declared()})

    @dataclasses.dataclass(frozen=True)
    class Other(Base):
        share: float = 0.2
        free: int = 1

    assert [(p["name"], p["values"], p["default"]) for p in parameters(Other)] == [
        ("share", "number from 0 to 1", "0.2"),
        ("free", "any", "1"),
    ]


def test_one_method_that_is_not_there() -> None:
    done = run("methods", "Act")
    assert done.exit_code == 2 and "Did you mean 'ACT'" in done.stderr


@pytest.mark.parametrize("name", ["shapes-lm", "shapes-sd"])
def test_sites_of_embedded_models_by_name(name: str) -> None:
    from attnsteer import zoo

    found = json.loads(run("sites", name, "--json").output)
    loaded = zoo.load(name)
    assert [s["path"] for s in found] == [s.path for s in sites(loaded.model if name == "shapes-lm" else loaded)]


def test_methods_works_without_the_host_libraries() -> None:
    code = """
import sys
sys.modules["transformers"] = sys.modules["diffusers"] = None
from attnsteer.cli import app
app(["methods"])
"""
    done = shell(code=code)
    assert done.returncode == 0 and "SoftPAG" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ sites


def test_sites_of_a_language_model_are_those_of_the_model(folders: Any) -> None:
    found = json.loads(run("sites", str(folders["llama"]), "--json").output)
    expected = sites(tiny_transformers("llama"))
    # The folder does not name a class, so it is the base model, without the head's prefix.
    assert [s["path"] for s in found] == [s.path.removeprefix("model.") for s in expected]
    assert [{**s, "name": ""} for s in found] == [
        {**s.to_dict(), "path": p["path"], "name": ""} for s, p in zip(expected, found, strict=True)
    ]
    table = run("sites", str(folders["llama"])).output.splitlines()
    assert len(table) == 4 and table[1].split() == ["0", "self", "4", "2", "text", "decoder", "layers.0.self_attn"]


def test_the_class_that_a_config_names_is_built(tmp_path: Path) -> None:
    model = tiny_transformers("llava")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    found = json.loads(run("sites", str(tmp_path), "--json").output)
    assert found == [{**s.to_dict(), "path": s.path} for s in sites(model)]
    assert {s["modality"] for s in found} == {"text", "vision"}


def test_sites_of_a_pipeline_and_of_its_parts(folders: Any) -> None:
    every = sites(tiny_pipeline("sd"))
    found = json.loads(run("sites", str(folders["sd"]), "--json").output)
    assert [s["path"] for s in found] == [s.path for s in every] and found[0]["component"] == "unet"
    alone = json.loads(run("sites", str(folders["unet"]), "--json").output)
    assert [s["path"] for s in alone] == [s.name for s in every]
    text = json.loads(run("sites", str(folders["sd"]), "--component", "text_encoder", "--json").output)
    assert text and all(s["path"].startswith("text_encoder.") and s["modality"] == "text" for s in text)


def test_no_weights_are_read_and_none_are_made(folders: Any) -> None:
    from attnsteer.skeleton import sites_of

    found = sites_of(folders["sd"])
    assert {p.device.type for site in found for p in site.module.parameters()} == {"meta"}


def config(folder: Path, **record: Any) -> str:
    (folder / "config.json").write_text(json.dumps(record))
    return str(folder)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"model_type": "starship"}, "model_type 'starship'"),
        ({"model_type": "starship", "auto_map": {"AutoConfig": "ship.Config"}}, "own code is not run here"),
        ({"model_type": "llama", "num_hidden_layers": "many"}, "does not make a model"),
        ({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}, "no attention that can be reached"),
        ({"_class_name": "Starship2DModel"}, "names the class 'Starship2DModel'"),
        ({"_class_name": "DDIMScheduler"}, "names the class 'DDIMScheduler'"),
        ({"_class_name": "os"}, "names the class 'os'"),
        ({"architectures": ["LlamaModel"]}, "neither a model_type nor a _class_name"),
    ],
)
def test_a_config_that_makes_no_model_is_one_line(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    (tmp_path / "ship.py").write_text("raise SystemExit('code of the repository was run')")
    done = run("sites", config(tmp_path, **record))
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("attnsteer: ") and done.stderr.count("\n") == 1 and words in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nobody/nothing"], "no hub repository of that name can be reached"),
        (["/nowhere"], "there is no folder '/nowhere'"),
        (["shapes-sdd"], "Did you mean 'shapes-sd'?"),
        (["{sd}", "--component", "texr_encoder"], "Did you mean 'text_encoder'?"),
        (["{sd}", "--component", "scheduler"], "has no config.json"),
        (["{sd}", "--component", "tokenizer"], "so it is no model"),
        (["{llama}", "--component", "unet"], "not a pipeline"),
        (["{sd}/vae/.."], ""),
        (["{sd}/scheduler"], "neither config.json nor model_index.json"),
    ],
)
def test_what_is_not_there_is_one_line(folders: Any, args: list[str], words: str) -> None:
    done = run("sites", *(a.format(**folders) for a in args))
    assert done.exit_code == (2 if words else 0)
    assert words in done.stderr and done.stderr.count("\n") == (1 if words else 0)


def test_a_broken_json_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in run("sites", str(tmp_path)).stderr
    (tmp_path / "config.json").write_text("[]")
    assert "is not an object" in run("sites", str(tmp_path)).stderr


def test_a_component_with_code_of_its_own_is_refused(folders: Any, tmp_path: Path) -> None:
    index = json.loads((folders["sd"] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["my_unet", "MyUNet"]}))
    assert "code of its own" in run("sites", str(tmp_path)).stderr


def test_the_shell_sees_one_line_and_no_traceback() -> None:
    done = shell("sites", "/nowhere")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("attnsteer: there is no folder '/nowhere'")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnsteer import catalogue

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(catalogue, "catalogue", broken)
    assert isinstance(run("methods").exception, ZeroDivisionError)


# ------------------------------------------------------------------------------------------------ doctor, demo


def test_doctor_prints_versions_checks_and_a_verdict() -> None:
    done = run("doctor")
    assert done.exit_code == 0
    assert "cpu-flash" in done.output and "blockwise" in done.output and "FAIL" not in done.output
    assert done.output.splitlines()[-1].startswith("cpu (") and "21/21 kernel checks pass" in done.output
    record = json.loads(run("doctor", "--json").output)
    assert record["ok"] is True and len(record["checks"]) == 21


def test_doctor_and_demo_fail_when_a_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnsteer import kernels

    right = kernels.attend_lse
    monkeypatch.setattr(kernels, "attend_lse", lambda att: (right(att)[0], right(att)[1] + 0.1))
    done = run("doctor")
    assert done.exit_code == 1 and "FAIL" in done.output and "0/21 kernel checks pass" in done.output
    assert json.loads(run("doctor", "--json").output)["ok"] is False
    assert run("demo").exit_code == 1


def test_demo_steers_says_what_changed_and_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnsteer import showcase

    monkeypatch.setattr(showcase, "READINGS", 16)
    monkeypatch.setattr(showcase, "LENGTH", 64)
    monkeypatch.setattr(showcase, "LEADING", ("shapes-lm",))
    done = run("demo", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "src=" not in page and "http" not in page
    for method in ("SpotLight", "PASTA"):
        assert f'>>> steer(model, zoo.preset("shapes-lm", "{method}", spans=marked))' in done.output
        assert f"steer(model, zoo.preset(&quot;shapes-lm&quot;, &quot;{method}&quot;, spans=marked))" in page
    for words in (
        "21/21 kernel checks",
        "with the method",
        "random words marked",
        "[[",
        "a prefill of 64 tokens",
        "Not everything helps",
    ):
        assert words in done.output
    assert (
        "bit for bit: yes" in done.output
        and page.count("<mark>") == 2
        and page.count('class="with"') == 2
        and page.count("with last") == 4
    )


def test_demo_shows_pictures_and_fails_where_nothing_acted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from attnsteer import demo_text, showcase
    from attnsteer.evals.significance import Interval

    def parts(fired: int) -> list[object]:
        row = showcase.Row("shapes-sd", "steer(pipe, m)", "boxes", 0.2, 0.8, Interval(0.6, 0.4, 0.8), None, fired, 1.0)
        pictures = [torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]
        return [
            row,
            showcase.Sheet("shapes-sd", [("as it is", pictures), ("steered", pictures)], ["a", "b"], "frames: <boxes>"),
        ]

    for fired, good in ((3, True), (0, False)):
        made = parts(fired)
        monkeypatch.setattr(demo_text, "showcase", lambda names, made=made: made)
        assert demo_text.show("21/21", tmp_path, ["shapes-sd"]) is good
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 1 and "frames: &lt;boxes&gt;" in page
    assert (tmp_path / "shapes-sd-1.png").is_file()


def test_the_demonstration_holds_what_it_shows() -> None:
    from attnsteer.demo import LAYERS, TARGET, run_demo

    result = run_demo()
    assert result.ok and result.restored and 0 < result.exact < 1e-5 and result.distance > 1e-2
    assert result.mass[0][0] == result.mass[0][1]
    for layer in LAYERS:
        before, after = result.mass[layer]
        assert before < after <= TARGET + 1e-6


# ------------------------------------------------------------------------------------------------ tables


def test_a_terminal_gets_a_table_that_fits_and_a_pipe_gets_plain_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("a", "[bold]x[/bold] " + "word " * 40), ("bb", 3)]
    cli._print_table(("name", "text"), rows)
    plain = capsys.readouterr().out.splitlines()
    assert plain[0] == "name  text" and plain[2] == "bb    3" and len(plain) == 3 and len(plain[1]) > 200
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    cli._print_table(("name", "text"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3 and "[bold]x[/bold]" in "".join(lines)
