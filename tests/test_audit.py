"""The audit: what is counted, per intervention and site, and that a silent intervention is an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from attnsteer import ACT, HeadGate, HeadSet, SpotLight, Where, ZeroTuning, steer
from attnsteer.audit import Audit
from attnsteer.errors import NeverFired
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_transformers("llama")


@pytest.fixture(scope="module")
def inputs(model: Any) -> Any:
    return tiny_transformers_inputs("llama", model, batch=2, length=7)


def site(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


@torch.no_grad()
def test_calls_edits_rows_and_heads_are_counted_per_site(model: Any, inputs: Any) -> None:
    with steer(model, HeadGate({(0, 1): 0.5, (0, 3): 1.0, (2, 0): 0.0})) as run:
        model(**inputs)
        model(**inputs)
    record = run.audit.record(0, site(0))
    assert (record.calls, record.edits, record.rows, record.heads, record.path) == (2, 2, 2 * 2 * 7, 2, "output")
    assert set(run.audit.records) == {(0, site(0)), (0, site(2))}
    assert run.audit.record(0, site(2)).heads == 1


@torch.no_grad()
def test_a_call_that_changes_nothing_is_seen_but_not_an_edit(model: Any, inputs: Any) -> None:
    with steer(model, ZeroTuning(gamma=1.0)) as run:
        model(**inputs)
    assert all((r.calls, r.edits, r.rows) == (1, 0, 0) for r in run.audit.records.values())
    assert run.audit.fired(0)


@torch.no_grad()
def test_head_groups_of_one_call_are_one_call(model: Any, inputs: Any) -> None:
    tuned, gated = ZeroTuning(gamma=2.0, where=Where(layers=0)), HeadGate({(0, 1): 0.5})
    with steer(model, tuned, gated) as run:
        model(**inputs)
    record = run.audit.record(0, site(0))
    assert (record.calls, record.edits, record.rows, record.heads, record.path) == (1, 1, 2 * 7, 4, "fused")
    assert run.audit.record(1, site(0)).heads == 1


@torch.no_grad()
def test_two_reweightings_say_where_they_took_the_dense_path(model: Any, inputs: Any) -> None:
    first, second = ZeroTuning(gamma=2.0, where=Where(layers=0)), ZeroTuning(HeadSet({0: [3]}), 3.0)
    with steer(model, first, second) as run:
        model(**inputs)
    assert set(run.audit.record(0, site(0)).path.split("+")) == {"dense", "fused"}
    assert run.audit.record(1, site(0)).path == "dense"


@torch.no_grad()
def test_decoding_is_counted_call_by_call(model: Any, inputs: Any) -> None:
    with steer(model, ACT(threshold=0.0), ZeroTuning(gamma=2.0, where=Where(phases="decode"))) as run:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert run.audit.record(0, site(0)).calls == 4
    assert run.audit.record(1, site(0)).calls == 3 and run.audit.record(1, site(0)).rows == 3 * 2


@torch.no_grad()
def test_the_distance_is_measured_on_request(model: Any, inputs: Any) -> None:
    method = SpotLight([[(1, 3)]], 0.9, where=Where(layers=1))
    with steer(model, method) as run:
        model(**inputs)
    assert run.audit.record(0, site(1)).distance is None and "moved" not in str(run.audit)
    with steer(model, method, measure=True) as run:
        model(**inputs)
    assert 0.0 < run.audit.record(0, site(1)).distance < 1.0 and "moved 0." in str(run.audit)


@torch.no_grad()
def test_it_prints_and_serialises(model: Any, inputs: Any) -> None:
    with steer(model, HeadGate({(0, 1): 0.5}), ZeroTuning(gamma=2.0)) as run:
        model(**inputs)
    lines = str(run.audit).splitlines()
    assert lines[0] == "HeadGate(where=Where(), gates={(0, 1): 0.5}): 1 calls at 1 sites, 1 edited"
    assert lines[1] == f"  {site(0)}: 1/1 calls, 14 rows x 1 heads, output"
    assert len(lines) == 2 + 1 + 3
    record = json.loads(json.dumps(run.audit.to_dict(), allow_nan=False))
    assert record["interventions"][0]["sites"][site(0)] == {
        "calls": 1, "edits": 1, "rows": 14, "heads": 1, "path": "output", "distance": None,
    }  # fmt: skip
    assert len(record["interventions"][1]["sites"]) == 3


def test_events_without_a_site_are_counted() -> None:
    audit = Audit(["PAG()"])
    audit.count(0, "inside passes")
    audit.count(0, "inside passes", 2)
    assert str(audit) == "PAG(): 0 calls at 0 sites, 0 edited, 3 inside passes"
    assert audit.to_dict()["interventions"][0]["inside passes"] == 3 and not audit.fired(0)


@torch.no_grad()
def test_leaving_without_a_call_raises_and_names_the_silent(model: Any, inputs: Any) -> None:
    words = r"ZeroTuning.*never acted.*3 sites.*model\.layers\.0"
    with pytest.raises(NeverFired, match=words), steer(model, ZeroTuning(gamma=2.0)):
        pass
    later = ZeroTuning(gamma=2.0, where=Where(phases="decode"))
    with pytest.raises(NeverFired) as caught, steer(model, HeadGate({(0, 0): 0.5}), later):
        model(**inputs)
    assert "ZeroTuning" in str(caught.value) and "HeadGate" not in str(caught.value)


def test_an_error_inside_is_not_hidden_by_never_fired(model: Any) -> None:
    with pytest.raises(ZeroDivisionError), steer(model, ZeroTuning(gamma=2.0)):
        raise ZeroDivisionError


def test_a_handle_can_be_checked_by_hand(model: Any) -> None:
    run = steer(model, ZeroTuning(gamma=2.0))
    run.remove()
    with pytest.raises(NeverFired):
        run.check_fired()
