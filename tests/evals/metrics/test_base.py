"""What all metrics share: the table, totals, intervals, paired differences, and the errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnsteer.errors import RecordError, UnknownName
from attnsteer.evals.metrics import METRICS, Metric, get_metric, metrics
from attnsteer.evals.metrics.base import Mean, Ratio, UndefinedMetric, f1
from attnsteer.evals.significance import Interval, McNemar, paired_bootstrap, ratio_bootstrap, wilson

ROOT = Path(__file__).parents[3]


def of(statistics, **options) -> Metric:
    return Metric("toy", ("x",), lambda record: {"x": record["x"]}, statistics, **options)


def test_importing_the_table_loads_no_torch() -> None:
    code = "import sys, attnsteer.evals.metrics as m; m.metrics(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_is_documented_and_builds(name: str) -> None:
    guide = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in guide
    sets = name in ("fid", "precision_recall")
    found = get_metric(name, **({"reference": torch.eye(5)} if sets else {}))
    assert found.name == name and found.needs and found.better
    assert sets or name == "label_bias" or (set(found.better) | set(found.when)) <= set(found.statistics)


def test_names_and_options_that_do_not_exist() -> None:
    assert metrics() == tuple(sorted(METRICS))
    with pytest.raises(UnknownName, match=r"no metric 'choise'.*Did you mean 'choice'"):
        get_metric("choise")
    with pytest.raises(UnknownName, match=r"letter has no option 'parsr'; there are: parser. Did you mean 'parser'"):
        get_metric("letter", parsr="own")
    with pytest.raises(RecordError, match="fid needs the option 'reference'"):
        get_metric("fid", features="x")
    with pytest.raises(RecordError, match="does not take the options"):
        get_metric("chair", synonyms=3)


def test_estimates_are_those_of_the_statistics_module() -> None:
    metric = of({"mean": Mean("x"), "share": Ratio(("x",), ("x", "y"))})
    samples = [{"x": 1, "y": 1}, {"x": 0, "y": 1}, {"x": 2, "y": 3}]
    found = metric.aggregate(samples, draws=1000)
    assert found["share"] == ratio_bootstrap([1, 0, 2], [2, 1, 5], draws=1000)
    assert found["mean"] == ratio_bootstrap([1, 0, 2], [1, 1, 1], draws=1000)
    # One trial per sample: Wilson's interval, also where the trials are fewer than the samples.
    binary = [{"x": 1, "y": 0}] * 3 + [{"x": 0, "y": 1}] + [{}]
    found = metric.aggregate(binary, draws=10)
    assert found == {"mean": wilson(3, 5), "share": wilson(3, 4)}


def test_paired_difference_is_that_of_the_same_resamples() -> None:
    metric = of({"mean": Mean("x"), "f1": f1("tp", "fp", "fn")})
    before, after = [0.0, 1.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.5]
    pairs = [[{"x": v, "tp": 1} for v in arm] for arm in (before, after)]
    found = metric.compare(*pairs, draws=2000, seed=4)
    assert found["mean"] == pytest.approx(paired_bootstrap(before, after, draws=2000, seed=4))
    assert found["f1"] == Interval(0.0, 0.0, 0.0)
    assert metric.compare(pairs[0], pairs[0])["mean"] == Interval(0.0, 0.0, 0.0)
    # One of four turns from miss to hit: F1 2/3 -> 6/7, and a resample without it differs by nothing.
    before = [{"tp": 1}, {"tp": 1}, {"fn": 1}, {"fn": 1}]
    after = [{"tp": 1}, {"tp": 1}, {"tp": 1}, {"fn": 1}]
    found = metric.compare(before, after, draws=2000)["f1"]
    assert found.value == pytest.approx(6 / 7 - 2 / 3) and found.low == 0.0 and found.high > found.value


def test_groups_are_resampled_together() -> None:
    metric = of({"mean": Mean("x")})
    samples = [{"x": v} for v in (1, 1, 1, 0, 0, 0) for _ in range(4)]
    groups = [g for g in range(6) for _ in range(4)]
    assert metric.aggregate(samples)["mean"] == wilson(12, 24)
    # Six values, not 24. A binomial of six is 0 in 1.6 % and at most 1 in 10.9 %, so its 2.5 % point is 1.
    found = metric.aggregate(samples, groups=groups)["mean"]
    assert tuple(found) == pytest.approx((0.5, 1 / 6, 5 / 6))
    with pytest.raises(RecordError, match="24 samples and 2 groups"):
        metric.aggregate(samples, groups=[0, 1])


def test_stored_samples_give_the_same_figures_whole_or_in_shards() -> None:
    metric = get_metric("pope")
    rows = [("yes", "Yes."), ("no", "No."), ("yes", "no"), ("no", "Yes"), ("yes", "?")]
    samples = [metric.sample({"label": y, "generated": a}) for y, a in rows]
    stored = [json.loads(json.dumps(s)) for s in samples]
    whole = metric.aggregate(samples, draws=200)
    assert metric.aggregate(stored[:2] + stored[2:], draws=200) == whole
    # Zero columns may be left out, and the order of the columns does not matter.
    short = [{k: v for k, v in reversed(s.items()) if v} for s in samples]
    assert metric.aggregate(short, draws=200) == whole


def test_the_example_of_the_guide() -> None:
    guide = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    code = guide.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    pope, baseline, steered = (names[k] for k in ("pope", "baseline", "steered"))
    assert tuple(pope.aggregate(steered)["accuracy"]) == pytest.approx((1.0, 0.34, 1.0), abs=0.005)
    assert pope.compare(baseline, steered)["accuracy"].value == 0.5 and pope.mcnemar(baseline, steered).gained == 1


def test_zero_over_zero_is_reported() -> None:
    metric = of({"share": Ratio(("x",), ("y",)), "other": Mean("z")}, when={"other": "z"})
    with pytest.warns(UndefinedMetric, match="share is 0 / 0"):
        assert metric.aggregate([{"x": 0}]) == {"share": Interval(0.0, 0.0, 0.0)}


def test_mcnemar() -> None:
    metric = of({}, correct="x")
    assert metric.mcnemar([{"x": 1}, {}], [{"x": 1}, {"x": 1}]) == McNemar(1, 0, 1.0)
    assert metric.mcnemar([{}, {}], [{"x": 1}, {"x": 1}], groups=["a", "a"]) == McNemar(1, 0, 1.0)
    assert of({}).mcnemar([{"x": 1}], [{"x": 1}]) is None


def test_the_p_value_of_a_figure() -> None:
    """McNemar's where it is about the figure; else the bootstrap's, which agrees with the interval."""
    metric = of(
        {"share": Mean("x"), "ratio": Ratio(("x",), ("y",)), "rare": Mean("z")}, correct="x", when={"rare": "z"}
    )
    before, after = [{"x": i % 2, "y": 1} for i in range(40)], [{"x": int(i % 8 != 0), "y": 1} for i in range(40)]
    assert metric.p_value("share", before, after) == metric.mcnemar(before, after).p == 2 / 2**15
    groups = [i // 4 for i in range(40)]
    assert metric.p_value("share", before, after, groups=groups) == metric.mcnemar(before, after, groups=groups).p
    assert metric.p_value("ratio", before, after) < 0.01 and metric.p_value("ratio", before, before) == 1.0
    assert metric.p_value("ratio", after, before) == metric.p_value("ratio", before, after)
    assert metric.p_value("rare", before, after) is None
    with pytest.raises(RecordError, match="40 samples before and 39 after"):
        metric.p_value("ratio", before, after[1:])


def test_bad_records() -> None:
    metric = of({"mean": Mean("x")})
    with pytest.raises(RecordError, match=r"toy needs x in a record; 'x' is missing, there are y, z"):
        metric.sample({"y": 1, "z": 2})
    with pytest.raises(RecordError, match="x = nan"):
        metric.sample({"x": float("nan")})
    with pytest.raises(RecordError, match=r"cannot read this record \(TypeError"):
        metric.sample({"x": "two"})
    with pytest.raises(RecordError, match="no samples"):
        metric.aggregate([])
    with pytest.raises(RecordError, match="1 samples before and 2 after"):
        metric.compare([{"x": 1}], [{"x": 1}] * 2)
