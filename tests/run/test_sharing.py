"""Arms in shared batches: the records, audits and interrupts of arms by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnsteer import ZeroTuning
from attnsteer.errors import RunError
from attnsteer.run import run, sharing
from tests.run.running import EXISTENCE, load, recipe, records, tiny
from tests.run.test_run_resume import stopped

ANSWER = {"task": "answer", "decoding": {"max_new_tokens": 6}, "metrics": ["letter"], "primary": "letter.accuracy"}
TUNED = {"method": "ZeroTuning", "params": {"gamma": 6.0}}
CASES: dict[str, dict[str, Any]] = {
    "choice": {"controls": {"zero": True, "random_heads": 2}},
    "sweep": {
        "interventions": [TUNED],
        "controls": {"zero": True},
        "sweep": {"interventions.0.params.gamma": [0.3, 6.0]},
    },
    "answer": {**ANSWER, "controls": {"zero": True, "random_heads": 1}},
}


@pytest.fixture(autouse=True)
def _whatever_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """All arms that can share do."""
    monkeypatch.setattr(sharing, "MOST_TOKENS", 10**6)


def both(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Run folders of arms in shared batches, and of arms by themselves."""
    found = [run(recipe(folder, **changes, share=s), folder / s, progress=False) for s in ("auto", "off")]
    return found[0], found[1]


def timings(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "timings.jsonl").read_text(encoding="utf-8").splitlines()]


def same_records(shared: Path, apart: Path) -> None:
    """The same answers in the same order; log-likelihoods to 1e-5."""
    one, two = records(shared), records(apart)
    assert len(one) == len(two) > 0
    for left, right in zip(one, two, strict=True):
        assert left.pop("scores", []) == pytest.approx(right.pop("scores", []), abs=1e-5)
        assert left == right


def counts(folder: Path, *names: str) -> dict[str, Any]:
    """Of the audit: arm -> site -> what it says."""
    arms = load(folder / "audit.json")["arms"]
    return {
        arm: [{path: [s[n] for n in names] for path, s in entry["sites"].items()} for entry in entries]
        for arm, entries in arms.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_arms_in_one_batch_answer_as_by_themselves(tmp_path: Path, name: str) -> None:
    shared, apart = both(tmp_path, **CASES[name])
    same_records(shared, apart)
    assert (shared / "arms.json").read_bytes() == (apart / "arms.json").read_bytes()
    one, two = (load(f / "metrics.json") for f in (shared, apart))
    assert one["zero_equals_baseline"] is True and one["unchanged"] == two["unchanged"] == []
    arms = len(load(shared / "arms.json")["arms"])
    assert all(t["shared"] == arms for t in timings(shared)) and not any("shared" in t for t in timings(apart))
    unit = "samples" if CASES[name].get("task", "choice") == "choice" else "tokens"
    assert [t[unit] for t in timings(shared)] == [t[unit] for t in timings(apart)]
    # What an arm changed is counted for it alone. Arms that end early wait for the others, and are seen in more calls.
    wanted = ("heads",) if name == "answer" else ("calls", "changed", "heads")
    assert counts(shared, *wanted) == counts(apart, *wanted)
    assert {arm: calls == 0 for arm, calls in one["changed_calls"].items()} == {
        arm: arm == "zero" for arm in one["changed_calls"]
    }


@pytest.mark.parametrize("task", ["choice", "answer"])
def test_values_of_samples_on_a_transformers_model(tmp_path: Path, task: str) -> None:
    """Choices of several tokens, spans and strengths of each sample, one of which is left alone."""
    changes = {**tiny(tmp_path), **({} if task == "choice" else ANSWER), "controls": {"random_heads": 1}}
    shared, apart = both(tmp_path, **changes)
    same_records(shared, apart)
    assert all(t["shared"] == 4 for t in timings(shared))
    for folder in (shared, apart):
        answers = {(r["arm"], r["id"]): {k: v for k, v in r.items() if k != "arm"} for r in records(folder)}
        same = [answers["method", f"r{i}"] == answers["baseline", f"r{i}"] for i in range(4)]
        # 0.1 and 4.0 act; None and 1.0 leave the sample as it is.
        assert same[1] and same[3]
        if task == "choice":
            assert not same[0] and not same[2]


# ------------------------------------------------------------------------------------------------ stops and failures


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stopped_run_goes_on_and_ends_as_an_uninterrupted_one(tmp_path: Path, after: int) -> None:
    base = recipe(tmp_path, share="auto")
    whole = run(base, tmp_path / "whole", progress=False)
    stopped(base, tmp_path / "run", after=after)
    status = load(tmp_path / "run" / "status.json")
    assert status["state"] == "interrupted" and status["done"] == 16 * after
    out = run(base, tmp_path / "run", progress=False)
    for name in ("records.jsonl", "audit.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert [(t["arm"], t["batch"], t["shared"]) for t in timings(out)] == [
        (t["arm"], t["batch"], t["shared"]) for t in timings(whole)
    ]


def test_what_is_missing_of_a_shared_batch_is_computed_with_the_others(tmp_path: Path) -> None:
    base = recipe(tmp_path, share="auto")
    whole = run(base, tmp_path / "whole", progress=False)
    stopped(base, tmp_path / "run", after=2)
    part = tmp_path / "run" / "records-0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(line for i, line in enumerate(lines) if i not in (5, 20, 21)))
    out = run(base, tmp_path / "run", progress=False)
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_an_arm_that_fails_fails_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ZeroTuning.weights

    def weights(self: ZeroTuning, call: Any) -> Any:
        if 6.0 in getattr(self.gamma, "values", [self.gamma]):
            raise RuntimeError("a strength of six")
        return real(self, call)

    monkeypatch.setattr(ZeroTuning, "weights", weights)
    base = recipe(tmp_path, interventions=[TUNED], controls={"zero": True}, share="auto")
    with pytest.raises(RuntimeError, match="a strength of six"):
        run(base, tmp_path / "run", progress=False)
    status = load(tmp_path / "run" / "status.json")
    assert status["state"] == "failed" and "a strength of six" in status["message"] and status["done"] == 8
    kept = [json.loads(s)["arm"] for s in (tmp_path / "run" / "records-0.jsonl").read_text().splitlines()]
    assert kept == ["baseline"] * 4 + ["zero"] * 4
    monkeypatch.setattr(ZeroTuning, "weights", real)
    run(base, tmp_path / "run", progress=False)
    same_records(
        tmp_path / "run",
        run(recipe(tmp_path, interventions=[TUNED], controls={"zero": True}), tmp_path / "off", progress=False),
    )


def test_a_batch_that_fails_together_alone_is_done_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that does not fit into memory."""
    from attnsteer.run.tasks import choice

    real = choice.answer

    def answer(loaded: Any, request: Any) -> Any:
        if len(request.samples) > 4:
            raise RuntimeError("out of memory")
        return real(loaded, request)

    monkeypatch.setattr(choice, "answer", answer)
    with pytest.warns(UserWarning, match=r"baseline, zero, method.* did not answer in one batch .*out of memory"):
        out = run(recipe(tmp_path, share="auto"), tmp_path / "run", progress=False)
    assert not any("shared" in t for t in timings(out))
    monkeypatch.setattr(choice, "answer", real)
    apart = run(recipe(tmp_path), tmp_path / "off", progress=False)
    assert (out / "records.jsonl").read_bytes() == (apart / "records.jsonl").read_bytes()


def test_an_arm_that_was_never_asked_is_an_error_in_a_shared_batch_too(tmp_path: Path) -> None:
    from attnsteer.errors import NeverFired

    late = {**TUNED, "where": {"phases": "decode"}}
    for share in ("auto", "off"):
        with pytest.raises(NeverFired, match="never acted"):
            run(recipe(tmp_path, interventions=[late], controls={}, share=share), tmp_path / share, progress=False)


def test_an_arm_whose_heads_were_never_asked_is_an_error() -> None:
    """The sites of another arm ran; its own did not."""
    from attnsteer import HeadSet, Where
    from attnsteer.audit import Audit
    from attnsteer.errors import NeverFired
    from attnsteer.recipe.arms import Arm
    from attnsteer.recipe.parameters import Method
    from attnsteer.site import Site

    site = lambda layer: Site(name=f"l{layer}", layer=layer, kind="self", heads=4, kv_heads=4, modality="text")  # noqa: E731
    heads = {"method": HeadSet({0: [1, 2]}), "zero": HeadSet({3: [0]}), "random": HeadSet({3: [0]})}
    methods = {k: (Method("ZeroTuning", ZeroTuning, {}, h, Where(), "interventions.0"),) for k, h in heads.items()}
    audit = Audit(["ZeroTuning()"])
    audit.divide(2)
    audit.record(0, site(0).path).see(3, "prefill")
    audit.record(0, site(3).path)
    steering: Any = SimpleNamespace(audit=audit, sites=[site(0), site(3)])
    pair = lambda kind: [Arm(k, k, methods[k], {}) for k in ("method", kind)]  # noqa: E731
    (method,), (zero,) = sharing.audits(pair("zero"), steering)
    # Of sites that never ran an audit tells nothing.
    assert {p: s["heads"] for p, s in method["sites"].items()} == {site(0).path: 2} and not zero["sites"]
    with pytest.raises(NeverFired, match="ZeroTuning of the arm random never acted"):
        sharing.audits(pair("random"), steering)


# ------------------------------------------------------------------------------------------------ what is shared


def test_arms_that_cannot_share_run_apart(tmp_path: Path) -> None:
    sweep = {"interventions.0.params.decode": ["frozen", "running"]}
    shared, apart = both(tmp_path, controls={"zero": False}, sweep=sweep)
    same_records(shared, apart)
    assert [(t["arm"], t.get("shared")) for t in timings(shared)][:3] == [
        ("baseline", 2), ("method@1", 2), ("method@2", None),
    ]  # fmt: skip


def test_half_precision_is_not_shared(tmp_path: Path) -> None:
    model = {"zoo": "shapes-lm", "kind": "lm", "device": "cpu", "dtype": "bfloat16"}
    out = run(recipe(tmp_path, model=model, share="auto", controls={}), tmp_path / "run", progress=False)
    assert not any("shared" in t for t in timings(out))


def test_questions_about_images_are_not_shared(tmp_path: Path) -> None:
    """Their prompts are long, and each arm would see the images anew."""
    out = run(recipe(tmp_path, **EXISTENCE, share="auto"), tmp_path / "run", progress=False)
    assert not any("shared" in t for t in timings(out))


@pytest.mark.parametrize(("batch", "new", "wanted"), [(1, 0, [5]), (2, 0, [4, 1]), (5, 0, [1] * 5), (5, 16, [5])])
def test_as_many_arms_share_as_make_it_faster(
    monkeypatch: pytest.MonkeyPatch, batch: int, new: int, wanted: list[int]
) -> None:
    """Prompts of 120 tokens: 1000 tokens are those of eight; with 16 tokens to write, a forward has 8.4 of each on average."""
    monkeypatch.setattr(sharing, "MOST_TOKENS", 1000)
    tokenizer = lambda text: SimpleNamespace(input_ids=[0] * len(text.split()))  # noqa: E731
    samples = [{"prompt": "word " * 120}, *[{"prompt": "word"}] * (batch - 1)]
    arms: list[Any] = [SimpleNamespace(id=i, decoding={}) for i in range(5)]
    found = sharing.of_batch(
        [arms], samples, SimpleNamespace(tokenizer=tokenizer, stream=False), {"max_new_tokens": new} if new else {}
    )
    assert [len(g) for g in found] == wanted and [arm for g in found for arm in g] == arms


def test_the_cost_of_a_shared_batch_is_said_to_be_a_share(tmp_path: Path) -> None:
    shared, apart = both(tmp_path)
    cost, warned = (load(shared / "metrics.json")[k] for k in ("cost", "warnings"))
    assert all(own["relative"] is None and own["shared"] for own in cost.values())
    assert len({own["seconds_per_sample"] for own in cost.values()}) == 1
    assert any("baseline, zero, method, random-1 answered in shared batches" in w for w in warned)
    other = load(apart / "metrics.json")
    assert other["cost"]["baseline"]["relative"] == 1.0 and "shared" not in other["cost"]["baseline"]
    assert not any("shared" in w for w in other["warnings"])


def test_a_run_does_not_go_on_with_the_other_choice(tmp_path: Path) -> None:
    """Batches of another size round differently."""
    stopped(recipe(tmp_path, share="auto"), tmp_path / "run", after=1)
    with pytest.raises(RunError, match="a run with other recipe"):
        run(recipe(tmp_path), tmp_path / "run", progress=False)
