"""The shipped recipes: each loads, is checked, and says what it claims; they are found, shown, copied and tabled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnsteer import HeadSet, get_method, methods, zoo
from attnsteer.cli import app
from attnsteer.errors import RecipeError
from attnsteer.recipe import shipped, yaml
from attnsteer.recipe.checks import check
from attnsteer.recipe.loading import load_recipe
from attnsteer.recipe.resolved import resolve
from attnsteer.recipe.search_specs import calibration_key
from attnsteer.recipe.sweep import points
from attnsteer.results import readme_tables as results
from tests.run.common import changed

NAMES = shipped.names()
# Its recipes measure heads by searches of several papers, of embedded models; no paper is its own.
# Tools (maps and heads of another run, knock-outs), and methods whose evaluation is not written yet.
TOOLS = {"FreezeMaps", "InjectMap", "PatchHeads", "VisualKnockout"}
NOT_EVALUATED = {"BlockMask", "Scatterbrain", "StoryAdapter"}
FOLDER = shipped.folder()


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def test_every_method_with_an_evaluation_has_a_recipe_on_an_embedded_model_and_one_as_published() -> None:
    by_method: dict[str, list[Any]] = {}
    for recipe in shipped.shipped():
        for spec in recipe.interventions:
            by_method.setdefault(spec.method, []).append(recipe)
    # Other tests may register methods of their own.
    own = {n for n in methods() if get_method(n).__module__.startswith("attnsteer.methods.")}
    assert set(by_method) == own - TOOLS - NOT_EVALUATED
    for method, recipes in by_method.items():
        assert any(r.model.embedded for r in recipes), method
        assert any(r.model.hub for r in recipes), method


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_sound(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.summary and recipe.notes
    # What has to be downloaded first is named in the notes.
    assert check(recipe, files=recipe.model.embedded) == []
    missing = check(recipe)
    assert all("there is no f" in p or "attnsteer zoo fetch" in p for p in missing), missing
    assert recipe.controls.zero and all(s.zero for s in recipe.interventions)
    # Chosen by one rule, which is stated; else it is "partly".
    assert recipe.chosen != "calibration" or re.search(r"[Rr]ule( for [^:]*)?:", recipe.notes)
    for claim in recipe.claims:
        assert claim.setting and re.search(r"\d{4}\.\d{5}|FeijiangHan", claim.source), claim
    if recipe.model.hub:
        assert recipe.claims or "could not be read" in recipe.notes
    if recipe.data.file and not (recipe.folder / recipe.data.file).is_file():
        assert "line of the data" in recipe.notes or "The file is" in recipe.notes


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_resolves_and_round_trips(name: str, tmp_path: Path) -> None:
    for tiny in (False, True):
        resolved = resolve(load_recipe(name), tiny=tiny)
        path = tmp_path / f"{tiny}.yaml"
        path.write_text(resolved.canonical(), encoding="utf-8")
        again = load_recipe(path)
        assert again.dump() == resolved.dump() and again.digest() == resolved.digest()
        assert len(points(resolved)) == len(points(load_recipe(name)))
        assert check(resolved, files=False) == []
    assert resolved.data.limit <= 4 and resolved.model.device == "cpu"


def test_zero_strengths_agree_with_the_table() -> None:
    from attnsteer.recipe.parameters import ZERO

    for recipe in shipped.shipped():
        for spec in recipe.interventions:
            if spec.method == "HeadGate":
                # Gates of 1 for all the heads that it gates.
                zero = {"$pairs": [[head, 1.0] for head, _ in spec.params["gates"]["$pairs"]]}
                assert spec.zero == {"gates": zero}, recipe.name
            elif spec.method == "AttentionBuckets":
                # The model's own base alone.
                assert len(spec.zero["bases"]) == 1 and spec.zero["bases"][0] in spec.params["bases"], recipe.name
            else:
                assert spec.zero == ZERO[spec.method], recipe.name
            assert get_method(spec.method)


def test_names_and_files_are_both_taken(tmp_path: Path) -> None:
    path = FOLDER / "act" / "shapes-reading.yaml"
    for given in ("act/shapes-reading", "act/shapes-reading.yaml", path, str(path)):
        assert load_recipe(given).source == path
    with pytest.raises(RecipeError, match=r"no shipped recipe of that name .* Did you mean 'act/shapes-reading'\?"):
        load_recipe("act/shape-reading")
    with pytest.raises(RecipeError, match="there is no file"):
        load_recipe(tmp_path)


def test_a_copy_brings_its_files_and_replaces_nothing(tmp_path: Path) -> None:
    found = shipped.copy("attend-and-excite/sd14-animals", tmp_path / "new")
    assert [p.name for p in found] == ["sd14-animals.yaml", "prompts.jsonl"]
    assert check(load_recipe(found[0])) == []
    with pytest.raises(RecipeError, match="is there already"):
        shipped.copy("attend-and-excite/sd14-animals", tmp_path / "new")
    assert shipped.copy("act/shapes-reading", tmp_path / "mine.yaml") == [tmp_path / "mine.yaml"]
    assert shipped.copy("act/shapes-reading", tmp_path / "mine.yaml", force=True)
    # Nor write what is not beside the copy: in/../in is beside the recipe, and not beside the copy.
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows.jsonl").write_text("{}")
    around = tmp_path / "in" / "around.yaml"
    around.write_text(yaml.dump(changed({"data": {"file": "../in/rows.jsonl", "format": "choices"}})))
    found = shipped.copy(around, tmp_path / "deep" / "out")
    assert found == [tmp_path / "deep" / "out" / name for name in ("around.yaml", "rows.jsonl")]
    # A recipe cannot make `cp` read what is not beside it.
    (tmp_path / "secret.jsonl").write_text("{}")
    bad = tmp_path / "in" / "bad.yaml"
    bad.write_text(yaml.dump(changed({"data": {"file": "../secret.jsonl", "format": "choices"}})))
    assert shipped.copy(bad, tmp_path / "out") == [tmp_path / "out" / "bad.yaml"]


def test_commands_list_show_copy_and_describe(tmp_path: Path) -> None:
    table = run("recipes", "ls").output.splitlines()
    assert len(table) == len(NAMES) + 1 and table[0].split()[:2] == ["name", "methods"]
    listed = json.loads(run("recipes", "ls", "softpag", "--json").output)
    assert [r["name"] for r in listed] == [n for n in NAMES if "softpag" in n] and listed[0]["methods"] == ["SoftPAG"]
    text = (FOLDER / "act" / "shapes-reading.yaml").read_text(encoding="utf-8")
    assert run("recipes", "show", "act/shapes-reading").output == text
    resolved = run("recipes", "show", "act/shapes-reading", "--tiny").output
    assert yaml.parse(resolved).value["data"]["limit"] == 4
    assert "schema" in json.loads(run("recipes", "schema").output)["properties"]
    assert run("recipes", "cp", "act/shapes-reading", str(tmp_path)).output == f"{tmp_path / 'shapes-reading.yaml'}\n"
    for args in (("cp", "act/shapes-reading", str(tmp_path)), ("show", "nothing"), ("show", str(tmp_path))):
        done = run("recipes", *args)
        assert done.exit_code == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert done.stderr.startswith("attnsteer: ")
    (tmp_path / "bad.yaml").write_text("schema: 1\nname: *x\n")
    done = run("recipes", "show", str(tmp_path / "bad.yaml"))
    assert done.exit_code == 2 and "bad.yaml, line 2: the alias *x is not read" in done.stderr


def fake_run(folder: Path, name: str, method: float, state: str = "complete", tiny: bool = False) -> None:
    """The files of a run folder that a table is made from."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.dump(changed({"name": name})))
    (folder / "status.json").write_text(json.dumps({"state": state}))
    (folder / "identity.json").write_text(json.dumps({"tiny": tiny}))
    (folder / "samples.jsonl").write_text("{}\n" * 7)
    interval = lambda v: {"value": v, "low": v - 0.1, "high": v + 0.1}  # noqa: E731
    change = {"point": 0, "against": "baseline", "metric": "choice"}
    metrics = {
        "arms": {"baseline": {"choice": {"accuracy": interval(0.5)}}, "method@1": {"choice": {"accuracy": interval(method)}}},
        "differences": [
            {**change, "arm": "zero", "estimates": {"accuracy": interval(0.0)}},
            {**change, "arm": "method", "estimates": {"accuracy": interval(method - 0.5)}},
        ],
        "points": [{"point": 0, "values": {}, "arms": {"baseline": "baseline", "method": "method@1"}}],
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_tables_take_complete_runs_and_say_what_was_not_run(tmp_path: Path) -> None:
    recipes, runs = tmp_path / "act", tmp_path / "runs"
    recipes.mkdir()
    claim = {"metric": "choice.accuracy", "baseline": 57.1, "value": 60.2, "source": "Table 2"}
    for name in ("a", "b"):
        (recipes / f"{name}.yaml").write_text(yaml.dump(changed({"name": f"act/{name}", "claims": [claim]})))
    fake_run(runs / "x", "act/a", 0.625)
    fake_run(runs / "deep" / "y", "act/b", 0.7, state="interrupted")
    fake_run(runs / "deep" / "z", "act/b", 0.7, tiny=True)
    (runs / "broken").mkdir()
    (runs / "broken" / "metrics.json").write_text("{")
    table = results.results_table(recipes, runs).splitlines()
    paper = "57.1 → 60.2 (percent; Table 2)"
    assert table[2] == (
        f"| [act/a](a.yaml) | choice.accuracy | {paper} | 0.500 [0.400, 0.600] | 0.625 [0.525, 0.725] | "
        "+0.125 [+0.025, +0.225] | 7 |"
    )
    assert table[3] == f"| [act/b](b.yaml) | choice.accuracy | {paper} | not run | not run |  |  |" and len(table) == 4
    readme = recipes / "README.md"
    with pytest.raises(RecipeError, match=r"README\.md: cannot be read"):
        results.write_results(recipes, runs)
    readme.write_text("# ACT\n")
    with pytest.raises(RecipeError, match="has no place for results"):
        results.write_results(recipes, runs)
    readme.write_text(f"# ACT\n{results.BEGIN}\nold\n{results.END}\nend\n")
    assert results.write_results(recipes, runs) and not results.write_results(recipes, runs)
    text = readme.read_text()
    assert (
        "act/a" in text and "old" not in text and text.startswith("# ACT\n") and text.endswith(f"{results.END}\nend\n")
    )
    assert run("recipes", "table", str(recipes), "--runs", str(runs)).output.splitlines() == table


@pytest.mark.parametrize("folder", sorted({n.partition("/")[0] for n in NAMES}))
def test_every_folder_has_a_readme_whose_table_lists_its_recipes(folder: str) -> None:
    text = (FOLDER / folder / "README.md").read_text(encoding="utf-8")
    table = text.partition(results.BEGIN)[2].partition(results.END)[0]
    for name in NAMES:
        if name.startswith(f"{folder}/"):
            assert f"| [{name}]({name.partition('/')[2]}.yaml) |" in table
    assert (FOLDER / "README.md").read_text(encoding="utf-8").count(f"({folder}/README.md)") == 1


def test_the_guide_describes_every_field() -> None:
    from attnsteer.recipe import schema

    guide = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    sections = {
        "": schema.Recipe, "model.": schema.ModelSpec, "data.": schema.DataSpec, "interventions.": schema.InterventionSpec,
        "calibration.": schema.CalibrationSpec, "controls.": schema.ControlsSpec, "claims.": schema.ClaimSpec,
    }  # fmt: skip
    for prefix, section in sections.items():
        for name, field in section.model_fields.items():
            assert f"| `{prefix}{field.alias or name}` |" in guide, prefix + name


def test_calibrate_says_what_it_cannot_do(tmp_path: Path) -> None:
    done = run("calibrate", "act/shapes-reading", "--out", str(tmp_path / "h.safetensors"))
    assert done.exit_code == 2 and "act/shapes-reading has no calibration section" in done.stderr


def test_the_heads_of_the_zoo_are_what_the_recipe_uses() -> None:
    from attnsteer.recipe.arms import methods_of
    from attnsteer.run.build import plan

    made = plan(load_recipe("act/shapes-reading")).arms[2].make([])[0]
    assert made.heads == HeadSet.load(zoo.folder("shapes-lm") / "act" / "heads.safetensors")
    assert len(methods_of(load_recipe("softpag/shapes-prompts"))[0].heads) == 6
    assert len(calibration_key(load_recipe("softpag/shapes-search"))) == 64
