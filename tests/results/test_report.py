"""Reports: what the page and the text say, that nothing of a run can act in the page, and what happens to odd runs."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnsteer import cli
from attnsteer.errors import RunError
from attnsteer.evals.significance import holm
from attnsteer.results.figures import Figure, p_text, per_sample, shares
from attnsteer.results.reports import report
from attnsteer.results.reports.content import content
from attnsteer.results.reports.headline import headline
from attnsteer.results.verdict import judged
from attnsteer.run.folder import read_run
from tests.results import folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    found = {
        "text": folders.text_run(base / "text"),
        "sweep": folders.text_run(base / "sweep", sweep=True),
        "existence": folders.existence_run(base / "existence"),
        "captions": folders.caption_run(base / "captions"),
        "images": folders.image_run(base / "images"),
    }
    for name, kind in (("text", "lm"), ("captions", "vlm"), ("images", "image")):
        folders.add_attention(found[name], kind)
    return found


def data_of(page: str) -> dict[str, Any]:
    """The JSON of the sample browser."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def text_of(page: str) -> str:
    """What a reader sees, without scripts and styles."""
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ------------------------------------------------------------------------------------------------ words and numbers


@pytest.mark.parametrize(
    ("interval", "better", "p", "said"),
    [
        ((0.1, 0.02, 0.2), 1, None, "better"),
        ((0.1, 0.02, 0.2), -1, None, "worse"),
        ((-0.1, -0.2, -0.02), -1, 0.05, "better"),
        ((0.1, 0.02, 0.2), 1, 0.051, "none"),
        ((0.1, 0.02, 0.2), 0, None, "changed"),
        ((0.1, 0.0, 0.2), 1, None, "none"),
        ((0.0, 0.0, 0.0), 1, None, "none"),
    ],
)
def test_the_verdict(interval: tuple[float, float, float], better: int, p: float | None, said: str) -> None:
    assert judged(Figure(*interval), better, p) == said


def test_a_difference_without_an_interval_is_no_verdict() -> None:
    assert judged(Figure(3.0), 1, None) == "none"


def test_how_figures_are_written() -> None:
    assert str(Figure(0.575, 0.4, 0.7, percent=True)) == "57.5 % [40.0 to 70.0]"
    assert str(Figure(0.031, -0.002, 0.064, percent=True, signed=True)) == "+3.1 points [−0.2 to +6.4]"
    assert str(Figure(1.34567)) == "1.346" and str(Figure(12.345)) == "12.3" and str(Figure(None)) == "–"
    assert str(Figure(-0.00001, signed=True)) == "0.000"
    assert [p_text(p) for p in (None, 0.00001, 0.0021, 0.5)] == ["", "p < 0.0001", "p = 0.0021", "p = 0.50"]


def test_only_shares_are_written_in_percent(runs: dict[str, Path]) -> None:
    found = shares(read_run(runs["captions"]))
    assert {"chair.chair_i", "chair.recall", "fluency.repetition"} <= found
    assert not {"chair.length", "chair.mentions", "fluency.length"} & found
    assert "choice.loss" not in shares(read_run(runs["text"]))


def test_the_figure_of_one_record_is_the_estimate_of_it_alone(runs: dict[str, Path]) -> None:
    run = read_run(runs["captions"])
    metric, rows = run.measures["chair"], run.records["baseline"]
    found = per_sample(metric, "chair_i", rows)
    for key, record in list(rows.items())[:5]:
        assert found[key] == pytest.approx(metric.aggregate([metric.sample(record)], draws=10)["chair_i"].value)


def test_the_headline(runs: dict[str, Path]) -> None:
    run = read_run(runs["text"])
    head = headline(run, shares(run))
    assert head.key == "better" and head.records == 40 and head.chosen == ""
    assert (head.baseline.value, head.method.value) == (0.55, 0.75)
    assert head.difference.value == pytest.approx(0.2)
    # A lower share of hallucinated mentions is better.
    run = read_run(runs["captions"])
    head = headline(run, shares(run))
    assert head.difference.value < 0 and head.key == "better"


def test_the_point_of_a_sweep(runs: dict[str, Path], tmp_path: Path) -> None:
    run = read_run(runs["sweep"])
    head = headline(run, set())
    assert (
        head.point["values"] == {"interventions.0.params.beta": 0.4} and head.chosen == "the recipe's own of 4 settings"
    )
    assert head.difference.low > 0 and head.p < head.p_holm < 0.05 and head.key == "better"
    other = copy(runs["sweep"], tmp_path / "other")
    # Better by its interval, but not once all settings are accounted for.
    metrics = json.loads((other / "metrics.json").read_text())
    for d in metrics["differences"]:
        d["p_holm"] = d["p_holm"] and 0.051
    (other / "metrics.json").write_text(json.dumps(metrics))
    found = content(read_run(other))
    assert found["head"].key == "none" and "not once all 4 settings are accounted for" in found["sentence"]
    plan = (other / "recipe.yaml").read_text().replace("beta: 0.4\n  zero", "beta: 0.5\n  zero")
    (other / "recipe.yaml").write_text(plan)
    head = headline(read_run(other), set())
    assert head.point["point"] == 1 and head.chosen.startswith("best of 4 settings")
    assert any(c.startswith("Tuned on the test: best of 4 settings") for c in content(read_run(other))["cautions"])


def test_a_baseline_that_moves_with_the_settings(runs: dict[str, Path], tmp_path: Path) -> None:
    """With settings of decoding, each point has a baseline of its own."""
    other = copy(runs["sweep"], tmp_path / "other")
    name = {"baseline": "baseline@1", "zero": "zero"}
    for file in ("arms.json", "metrics.json"):
        text = json.dumps(json.loads((other / file).read_text()))
        (other / file).write_text(re.sub(r'("id"|"baseline"): "baseline"', r'\1: "baseline@1"', text))
    metrics = json.loads((other / "metrics.json").read_text())
    for part in ("arms", "cost"):
        metrics[part] = {name.get(k, k): v for k, v in metrics[part].items()}
    (other / "metrics.json").write_text(json.dumps(metrics))
    records = (other / "records.jsonl").read_text().replace('"arm": "baseline"', '"arm": "baseline@1"')
    (other / "records.jsonl").write_text(records)
    found = content(read_run(other))
    assert found["head"].base == "baseline@1" and found["head"].records == 40
    assert all("baseline@1" in s["outs"] for s in found["data"]["samples"]) and found["counts"]["gained"] == 9


# ------------------------------------------------------------------------------------------------ the page


@pytest.mark.parametrize("name", ["text", "sweep", "existence", "captions", "images"])
def test_the_page_is_whole(runs: dict[str, Path], name: str) -> None:
    path = report(runs[name])
    page = path.read_text(encoding="utf-8")
    run = read_run(runs[name])
    seen = text_of(page)
    assert run.name in seen and run.recipe["summary"] in seen
    for part in ("Result", "Differences", "Samples", "Cost", "Recipe", "Environment", "peak memory", "54a324b"):
        assert part in seen
    # Nothing is asked for from anywhere: no address but data and places in the page itself.
    for address in re.findall(r"""(?:src|href|action|data|srcset|poster)\s*=\s*["']([^"']*)""", page):
        assert address.startswith(("data:", "#")), address
    assert "url(" not in page and "@import" not in page
    data = data_of(page)
    assert len(data["samples"]) == len(run.samples) == 40
    assert {s["outs"][data["arm"]]["state"] for s in data["samples"]} >= {"gained", "same"}


def test_what_the_method_changed(runs: dict[str, Path]) -> None:
    run = read_run(runs["text"])
    found = content(run)
    test = run.measures["choice"].mcnemar(
        *(
            [run.measures["choice"].sample(run.records[a][0, f"r{i}"]) for i in range(40)]
            for a in ("baseline", "method")
        )
    )
    assert found["counts"] == {"gained": test.gained, "lost": test.lost} and test.gained > 0
    for s in found["data"]["samples"]:
        one, two = (s["outs"][a] for a in ("baseline", "method"))
        record = run.records["method"][0, s["id"]]
        assert two["pick"] == record["scores"].index(max(record["scores"])) and sum(two["p"]) == pytest.approx(
            1, abs=1e-3
        )
        right = [o["pick"] == s["answer"] for o in (one, two)]
        assert two["state"] == {(0, 1): "gained", (1, 0): "lost"}.get(tuple(right), two["state"])


def test_controls_claims_and_heads_are_shown(runs: dict[str, Path]) -> None:
    report(runs["text"])
    page = (runs["text"] / "report.html").read_text()
    seen = text_of(page)
    assert "Zero strength equals the baseline, record for record" in seen
    assert "Random heads method minus random heads: +22.5 points [+7.5 to +37.5]" in seen
    assert "57.1 → 60.2 % (+3.1) Table 2, arXiv 2406.15765; Llama-2-7B-chat, 14 datasets" in seen
    assert "5 of 16 heads, darker: larger score" in seen and "layer 2, head 1: 0.27" in page
    assert "9 gained" in seen and "1 lost" in seen


def test_the_text_report(runs: dict[str, Path]) -> None:
    report(runs["text"])
    text = (runs["text"] / "report.md").read_text()
    for part in (
        "# act/reading",
        "**Better: 55.0 → 75.0 %.** Accuracy rises by 20.0 points (95 % interval +5.0 to +35.0).",
        "9 gained, 1 lost, p = 0.02",
        "| **choice.accuracy**",
        "57.1 % → 60.2 % (+3.1)",
        "```yaml",
        "- versions torch: 2.13.0",
    ):
        assert part in text


def test_a_run_that_says_nothing_is_marked(tmp_path: Path) -> None:
    run = folders.text_run(tmp_path / "run", tiny=True, state="interrupted")
    page = report(run).read_text()
    assert "Tiny stand-in model" in page and "Unfinished: interrupted" in page and "160 of 320 records" in page
    assert 'class="verdict better hollow"' in page
    assert "> **Tiny stand-in model.**" in (run / "report.md").read_text()


def test_what_makes_a_figure_suspicious_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    other = copy(runs["captions"], tmp_path / "other")
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["zero_equals_baseline"] = False
    metrics["warnings"] = ["chair: nothing was mentioned"]
    metrics["differences"][0]["guards"] = ["the mean length changed from 12.0 to 3.0 words"]
    (other / "metrics.json").write_text(json.dumps(metrics))
    found = content(read_run(other))
    assert len(found["cautions"]) == 2 and "The mean length changed from 12.0 to 3.0 words." in found["cautions"]
    assert found["checks"][0].state == "fail" and found["head"].words == "Invalid run"
    assert "Read with care" in report(other).read_text()


HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u2028<!-- {{ 7*7 }}"


def test_nothing_of_a_run_becomes_markup(tmp_path: Path) -> None:
    run = folders.text_run(tmp_path / "run", changes={"summary": HOSTILE.replace("\u2028", ""), "notes": "</style><b>"})
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    rows[0] |= {"prompt": HOSTILE, "choices": [HOSTILE, "b", "c", "d"]}
    folders.lines(run / "samples.jsonl", rows)
    edit(run / "status.json", state="failed", message=HOSTILE)
    shutil.copy(run / "records.jsonl", run / "records-0.jsonl")
    page = report(run).read_text()
    assert page.count("<script") == 2 and page.count("</script>") == 2 and page.count("</style>") == 1
    assert "<img src=x" not in page and "49" not in re.findall(r"<!-- (\S+)", page)
    first = data_of(page)["samples"][0]
    assert first["prompt"] == HOSTILE and first["choices"][0] == HOSTILE


def test_only_the_pages_own_script_may_run(runs: dict[str, Path]) -> None:
    import hashlib

    page = report(runs["text"]).read_text()
    script = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = html.unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1])
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert not re.search(r"\son[a-z]+\s*=", re.sub(r"<script.*?</script>", "", page, flags=re.S))


# ------------------------------------------------------------------------------------------------ odd runs, command line


def test_a_run_without_figures(runs: dict[str, Path], tmp_path: Path) -> None:
    run = folders.text_run(tmp_path / "run", state="running")
    (run / "metrics.json").unlink()
    with pytest.raises(
        RunError, match=r"has no metrics\.json yet \(running, 160 of 320 records\); start the run again"
    ):
        report(run)
    assert not (run / "report.html").exists()
    other = copy(runs["text"], tmp_path / "other")
    edit(other / "metrics.json", differences=[])
    with pytest.raises(RunError, match="no difference of method from the baseline"):
        report(other)
    edit(other / "metrics.json", primary="choice")
    with pytest.raises(RunError, match="primary figure 'choice'"):
        report(other)


def test_several_seeds(tmp_path: Path) -> None:
    run = folders.text_run(tmp_path / "run", changes={"seeds": [0, 1]})
    rows = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    folders.lines(run / "records.jsonl", [*rows, *({**r, "seed": 1} for r in rows)])
    row = {"mean": 0.55, "low": 0.5, "high": 0.6, "values": [0.54, 0.56]}
    edit(run / "metrics.json", seeds={"baseline": {"choice.accuracy": row}, "method": {"choice.accuracy": row}})
    page = report(run).read_text()
    data = data_of(page)
    assert len(data["samples"]) == 80 and data["seeds"] == 2
    assert "baseline 54.0, 56.0 (mean 55.0 % [50.0 to 60.0]); method 54.0" in text_of(page)


def test_a_sweep_over_words(runs: dict[str, Path], tmp_path: Path) -> None:
    """Settings that are no numbers are rows, not a curve."""
    other = copy(runs["sweep"], tmp_path / "other")
    for name in ("metrics.json", "arms.json"):
        found = json.loads((other / name).read_text())
        for k, point in enumerate(found["points"]):
            point["values"] = {"interventions.0.params.decode": ["frozen", "running", "a", "b"][k]}
        (other / name).write_text(json.dumps(found))
    found = content(read_run(other))["sweep"]
    assert found["svg"] is None and [r["label"] for r in found["rows"]][:2] == ["baseline", "decode frozen"]
    assert "decode running" in text_of(report(other).read_text())


def test_the_commands(runs: dict[str, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(runs["text"])])
    assert done.exit_code == 0 and done.output.strip() == str(runs["text"] / "report.html")
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "no recipe.yaml" in done.stderr and done.stderr.count("\n") == 1
    done = CliRunner().invoke(cli.app, ["compare", str(runs["text"]), str(runs["sweep"])])
    assert done.exit_code == 0 and "# text against sweep" in done.output
    done = CliRunner().invoke(cli.app, ["compare", str(runs["text"]), str(runs["sweep"]), "--json"])
    assert json.loads(done.output)["paired"] == 40
    done = CliRunner().invoke(cli.app, ["compare", str(runs["text"]), str(runs["images"])])
    assert done.exit_code == 2 and "--other-samples" in done.stderr


def test_a_report_is_the_same_each_time(runs: dict[str, Path]) -> None:
    first = report(runs["sweep"]).read_bytes()
    assert report(runs["sweep"]).read_bytes() == first
    assert not list(runs["sweep"].glob(".report*"))


def test_mcnemar_is_shown_for_what_it_is_about(runs: dict[str, Path], tmp_path: Path) -> None:
    """The test of `layout` is about whole pictures being right, not about single objects in their boxes."""
    run = read_run(runs["images"])
    assert headline(run, set()).gained is not None
    other = copy(runs["images"], tmp_path / "other")
    metrics = json.loads((other / "metrics.json").read_text())
    differences = [{**d, "p": d["p"] and 0.031, "p_holm": None} for d in metrics["differences"]]
    edit(other / "metrics.json", primary="layout.in_box", differences=differences)
    found = content(read_run(other))
    assert (found["head"].gained, found["head"].p, found["balance"]) == (None, 0.031, None)
    assert all(r["gained"] is None and r["p"] == ("p = 0.03" if r["main"] else "") for r in found["forest"]["rows"])
    assert (
        "Resampling p = 0.03" in text_of(report(other).read_text())
        and "Resampling p" in (other / "report.md").read_text()
    )
    assert found["counts"]["gained"] > 0 and "McNemar" not in text_of(report(other).read_text())


def test_the_best_of_several_settings_is_adjusted_whatever_the_figure(tmp_path: Path) -> None:
    """Confidence has no right and wrong, so that its test is the bootstrap's."""
    run = folders.text_run(tmp_path / "run", sweep=True, changes={"primary": "choice.confidence"})
    metrics = json.loads((run / "metrics.json").read_text())
    tests = [d for d in metrics["differences"] if d["p"] is not None]
    assert len(tests) == 4 and [d["p_holm"] for d in tests] == holm([d["p"] for d in tests])
    head = headline(read_run(run), set())
    assert head.test == "Resampling" and head.gained is None and head.p < head.p_holm
    assert head.difference.low > 0 and head.key == "better"
    for p, said in ((0.051, "not once all 4 settings are accounted for"), (None, "rises")):
        edit(run / "metrics.json", differences=[{**d, "p_holm": p} for d in metrics["differences"]])
        found = content(read_run(run))
        assert said in found["sentence"]
        assert [c for c in found["cautions"] if "4 settings" in c] == (
            [] if p else ["Nothing here is adjusted for the 4 settings that were tried."]
        )


def test_what_gained_and_lost_count_is_said(runs: dict[str, Path]) -> None:
    """Two questions about each picture are a group, and the test is of groups."""
    grouped, single = (text_of(report(runs[n]).read_text()) for n in ("existence", "text"))
    assert "Groups that changed" in grouped and "Groups of answers gained and lost are tested" in grouped
    assert "Answers that changed" in single and "Groups" not in single
    run = read_run(runs["existence"])
    head = headline(run, set())
    assert head.grouped and head.gained + head.lost <= len({s["group"] for s in run.samples.values()})
    assert "McNemar: groups of answers" in (runs["existence"] / "report.md").read_text()


def test_several_draws_of_random_heads_are_one_line(runs: dict[str, Path], tmp_path: Path) -> None:
    other = copy(runs["text"], tmp_path / "other")
    arms, metrics = (json.loads((other / n).read_text()) for n in ("arms.json", "metrics.json"))
    arms["arms"].append({**arms["arms"][-1], "id": "random-2"})
    metrics["arms"]["random-2"] = metrics["arms"]["random-1"]
    for point in metrics["points"]:
        point["arms"]["random-2"] = "random-2"
    same = next(d for d in metrics["differences"] if d["against"] == "random-1")
    near = {**same["estimates"], "accuracy": {"value": 0.01, "low": -0.02, "high": 0.04}}
    metrics["differences"].append({**same, "against": "random-2", "estimates": near})
    (other / "arms.json").write_text(json.dumps(arms))
    (other / "metrics.json").write_text(json.dumps(metrics))
    found = content(read_run(other))
    (block,) = found["figures"]
    assert block["others"] == ["zero strength", "random heads: mean, range of 2"]
    assert str(block["rows"][0]["others"][1]) == "52.5 % [52.5 to 52.5]"
    check = found["checks"][-1]
    assert check.state == "open" and found["head"].words == "No better than random"
    assert check.text == "method minus random heads, 2 draws: +22.5, +1.0 points; better than 1 of them"


def test_few_pairs_are_said(tmp_path: Path) -> None:
    run = folders.text_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    folders.lines(run / "records.jsonl", [r for r in rows if int(r["id"][1:]) < 5])
    assert content(read_run(run))["cautions"] == ["Only 5 pairs: so few say little, whatever their interval."]


def test_halves_of_characters(tmp_path: Path) -> None:
    run = folders.caption_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    rows[0]["generated"] = "a \ud800 star"
    folders.lines(run / "records.jsonl", rows)
    data = data_of(report(run).read_text(encoding="utf-8"))
    assert data["samples"][0]["outs"]["baseline"]["text"] == "a \ud800 star"
