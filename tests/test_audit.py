"""The audit: what is counted, per intervention and site, and that a silent intervention is an error."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import ACT, HeadGate, HeadSet, Intervention, SpotLight, Where, ZeroTuning, steer
from attnsteer.audit import MANY, Audit, Flags
from attnsteer.call import AttnCall, KeyBias, Reweight
from attnsteer.errors import NeverFired, NothingChanged, SelectionError
from attnsteer.parameters import number
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs


@dataclass(frozen=True)
class Neutral(Intervention):
    """Returns an edit at one door; at strength 1 it is the identity."""

    door: str = "weights"
    strength: float = 1.0

    def doors(self) -> set[str]:
        return {self.door}

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor]:
        return call.q * self.strength, call.k, call.v

    def bias(self, call: AttnCall) -> KeyBias:
        return KeyBias(call.keys.slot[None, None] * math.log(self.strength))

    def weights(self, call: AttnCall) -> Reweight:
        return Reweight(((call.first_key(), self.strength),))

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        return out * self.strength


@dataclass(frozen=True)
class Reader(Intervention):
    """Only looks."""

    observes = True

    def weights(self, call: AttnCall) -> None:
        call.map.mass(call.first_key())


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
    assert (record.calls, record.edits, record.changed) == (2, 2, 2)
    assert (record.rows, record.heads, record.path) == (2 * 2 * 7, 2, "output")
    assert set(run.audit.records) == {(0, site(0)), (0, site(2))}
    assert run.audit.record(0, site(2)).heads == 1


@torch.no_grad()
def test_a_call_that_changes_nothing_is_seen_but_not_an_edit(model: Any, inputs: Any) -> None:
    with steer(model, ZeroTuning(gamma=1.0), control=True) as run:
        model(**inputs)
    assert all((r.calls, r.edits, r.changed, r.rows) == (1, 0, 0, 0) for r in run.audit.records.values())
    assert run.audit.saw(0) and not run.audit.fired(0)


@torch.no_grad()
@pytest.mark.parametrize("door", ["inputs", "bias", "weights", "output"])
def test_an_edit_that_moves_nothing_is_counted_but_changes_nothing(model: Any, inputs: Any, door: str) -> None:
    """What is returned and what is changed are counted apart, at every door."""
    with steer(model, Neutral(door), control=True) as run:
        model(**inputs)
    assert all((r.calls, r.edits, r.changed) == (1, 1, 0) for r in run.audit.records.values())
    with pytest.raises(NeverFired, match=r"Neutral.*changed nothing.*control=True"), steer(model, Neutral(door)):
        model(**inputs)
    with steer(model, Neutral(door, strength=0.5)) as run:
        model(**inputs)
    assert all((r.calls, r.edits, r.changed) == (1, 1, 1) for r in run.audit.records.values())


@torch.no_grad()
def test_head_groups_of_one_call_are_one_call(model: Any, inputs: Any) -> None:
    tuned, gated = ZeroTuning(gamma=2.0, where=Where(layers=0)), HeadGate({(0, 1): 0.5})
    with steer(model, tuned, gated) as run:
        model(**inputs)
    record = run.audit.record(0, site(0))
    assert (record.calls, record.edits, record.rows, record.heads, record.path) == (1, 1, 2 * 7, 4, "bias")
    assert run.audit.record(1, site(0)).heads == 1


@torch.no_grad()
def test_the_path_of_an_edit_is_said(model: Any, inputs: Any) -> None:
    """Weights without a row are a bias of the keys; two reweightings of a short prompt are worked out from its rows."""
    lifted = SpotLight([[(0, 2)]] * len(inputs["input_ids"]), 0.9, where=Where(layers=0))
    first, second = ZeroTuning(gamma=2.0, where=Where(layers=0)), ZeroTuning(HeadSet({0: [3]}), 3.0)
    with steer(model, first, second, lifted) as run:
        model(**inputs)
    assert [run.audit.record(i, site(0)).path for i in (0, 1, 2)] == ["bias", "bias", "fused"]
    with steer(model, lifted, first, second) as run:
        model(**inputs)
    assert [run.audit.record(i, site(0)).path for i in (0, 1, 2)] == ["fused", "rows", "rows"]
    with steer(model, first, second, reference=True) as run:
        model(**inputs)
    assert [run.audit.record(i, site(0)).path for i in (0, 1)] == ["dense", "dense"]
    with steer(model, lifted, first) as run:
        model(inputs["input_ids"][:, :3])
    assert run.audit.record(0, site(0)).path == "rows"
    with steer(model, lifted) as run:
        cache = model(**inputs, use_cache=True).past_key_values
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    assert run.audit.record(0, site(0)).path == "shares"
    with steer(model, Neutral("bias", 0.5), Neutral("inputs", 0.5)) as run:
        model(**inputs)
    assert [run.audit.record(i, site(0)).path for i in (0, 1)] == ["bias", "inputs"]


@torch.no_grad()
def test_decoding_is_counted_call_by_call(model: Any, inputs: Any) -> None:
    with steer(model, ACT(threshold=0.0), ZeroTuning(gamma=2.0, where=Where(phases="decode"))) as run:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert run.audit.record(0, site(0)).calls == 4
    assert run.audit.record(1, site(0)).calls == 3 and run.audit.record(1, site(0)).rows == 3 * 2
    first, second = (run.audit.record(i, site(0)).to_dict()["phases"] for i in (0, 1))
    assert first["prefill"]["calls"] == 1 and first["decode"]["calls"] == 3
    assert second == {"decode": {"calls": 3, "edits": 3, "changed": 3}}


@torch.no_grad()
def test_the_distance_is_measured_on_request(model: Any, inputs: Any) -> None:
    method = SpotLight([[(1, 3)]] * 2, 0.9, where=Where(layers=1))
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
    assert lines[0] == "calls seen / edits returned / calls in which something changed"
    assert lines[1] == "HeadGate(where=Where(), gates={(0, 1): 0.5}): 1 / 1 / 1 at 1 sites"
    assert lines[2] == f"  {site(0)}: prefill 1 / 1 / 1; 14 rows x 1 heads, output"
    assert len(lines) == 1 + 2 + 1 + 3
    record = json.loads(json.dumps(run.audit.to_dict(), allow_nan=False))
    assert record["interventions"][0]["sites"][site(0)] == {
        "calls": 1, "edits": 1, "changed": 1, "phases": {"prefill": {"calls": 1, "edits": 1, "changed": 1}},
        "rows": 14, "heads": 1, "path": "output", "distance": None,
    }  # fmt: skip
    assert len(record["interventions"][1]["sites"]) == 3


def test_events_without_a_site_are_counted() -> None:
    audit = Audit(["PAG()"])
    audit.count(0, "inside passes")
    audit.count(0, "inside passes", 2)
    assert str(audit).splitlines()[1] == "PAG(): 0 / 0 / 0 at 0 sites, 3 inside passes"
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


def test_a_handle_warns_once_and_can_be_checked_by_hand(model: Any) -> None:
    run = steer(model, ZeroTuning(gamma=2.0))
    with pytest.warns(NothingChanged, match=r"ZeroTuning.*never acted"):
        run.remove()
    run.remove()
    with pytest.raises(NeverFired):
        run.check_fired()
    steer(model, ZeroTuning(gamma=2.0), control=True).remove()


@torch.no_grad()
def test_what_only_reads_need_not_change_anything(model: Any, inputs: Any) -> None:
    """But it has to have been asked."""
    with steer(model, Reader()) as run:
        model(**inputs)
    assert run.audit.record(0, site(0)).calls == 1 and not run.audit.fired(0)
    with pytest.raises(NeverFired, match=r"Reader.*never acted"), steer(model, Reader()):
        pass


@torch.no_grad()
def test_many_calls_are_counted_in_full(model: Any) -> None:
    """Flags are summed on the device once there are many; the counts stay exact."""
    flags = Flags()
    for i in range(2 * MANY + 3):
        flags.add(torch.tensor(i % 3 == 0))
    assert flags.count() == sum(i % 3 == 0 for i in range(2 * MANY + 3)) == flags.count()


def no_key(call: AttnCall) -> Tensor:
    """[1, 1, m]: empty."""
    return torch.zeros(1, 1, call.keys.size, dtype=torch.bool)


# Reweightings that leave each row as it is, since each sees keys of one weight only.
ONE_WEIGHT: dict[str, Any] = {
    "no group": lambda call: Reweight((), rest=3.0),
    "no group, by row": lambda call: Reweight((), rest=torch.rand(call.rows.size) + 0.1),
    "no group, none left": lambda call: Reweight((), rest=0.0),
    "no key": lambda call: Reweight(((no_key(call), 3.0),)),
    "no key beside others": lambda call: Reweight(((no_key(call), 7.0), (no_key(call), 5.0)), rest=49.0),
    "no key, by row": lambda call: Reweight(((no_key(call), 7.0),), rest=torch.rand(call.rows.size) + 0.1),
    "the same for two": lambda call: Reweight(((call.first_key(), 7.0),), rest=7.0),
    "padding": lambda call: Reweight(((call.padding_keys(), 7.0),), rest=0.3),
}


@dataclass(frozen=True)
class OneWeight(Intervention):
    """One of `ONE_WEIGHT`."""

    name: str

    def weights(self, call: AttnCall) -> Reweight:
        return ONE_WEIGHT[self.name](call)


@pytest.mark.parametrize("heads", [None, [0, 3]], ids=["all heads", "two heads"])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", ONE_WEIGHT)
@torch.no_grad()
def test_one_weight_for_all_keys_changes_nothing(
    model: Any, inputs: Any, name: str, reference: bool, heads: Any
) -> None:
    """Renormalising takes it out again: bit for bit, in a prompt and in steps, in the fast form and in the explicit one."""
    plain = model.generate(**inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    method = OneWeight(name, where=Where(heads=heads))
    with steer(model, method, reference=reference, control=True) as run:
        out = model.generate(**inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))
    assert all((r.calls, r.edits, r.changed) == (4, 4, 0) for r in run.audit.records.values())


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_a_learned_sink_keeps_its_weight(reference: bool) -> None:
    """So that one weight for all keys moves their shares."""
    model = tiny_transformers("gpt_oss")
    inputs = tiny_transformers_inputs("gpt_oss", model, batch=2, length=7)
    with steer(model, OneWeight("no group"), reference=reference) as run:
        model(**inputs)
    assert all(r.changed == 1 for r in run.audit.records.values())


# ------------------------------------------------------------------------------------------------ parts of a batch


def parts(model: Any, ids: Tensor, count: int, method: Intervention) -> list[dict[str, Any]]:
    """The counts of each part at the first layer, of one forward."""
    with steer(model, method, control=True) as run:
        run.audit.divide(count)
        model(ids)
    found = [run.audit.to_dict(part)["interventions"][0]["sites"] for part in range(count)]
    return [own[site(0)] for own in found]


@torch.no_grad()
@pytest.mark.parametrize("door", ["inputs", "bias", "weights", "output"])
def test_what_changes_is_counted_for_each_part_of_the_batch(model: Any, inputs: Any, door: str) -> None:
    """As if each were a batch by itself: the second part is left alone, the third has a neutral strength."""

    @dataclass(frozen=True)
    class Some(Neutral):
        strength: float = number(1.0, per_sample=True)

        def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor]:
            return call.q * call.each(self.strength)[..., None], call.k, call.v

        def bias(self, call: AttnCall) -> KeyBias:
            return KeyBias(call.keys.slot[None, None] * call.each(self.strength).log())

        def output(self, call: AttnCall, out: Tensor) -> Tensor:
            return out * call.each(self.strength)[..., None]

        def weights(self, call: AttnCall) -> Reweight:
            return Reweight(((call.first_key(), call.each(self.strength)),))

    ids = inputs["input_ids"].repeat(4, 1)
    found = parts(model, ids, 4, Some(door, [0.5, 1.0, None, None, 1.0, 1.0, 1.0, 2.0]))
    assert [part["changed"] for part in found] == [1, 0, 0, 1]
    assert all((part["calls"], part["edits"], part["rows"]) == (1, 1, 2 * 7) for part in found)
    assert [part["phases"]["prefill"]["changed"] for part in found] == [1, 0, 0, 1]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [3, 7], ids=["rows", "fused"])
def test_parts_of_reweightings_are_counted_by_their_heads(model: Any, inputs: Any, tokens: int) -> None:
    heads = [HeadSet({0: [1]}), HeadSet({1: [0]}), None]
    ids = inputs["input_ids"][:1, :tokens].repeat(3, 1)
    found = parts(model, ids, 3, ZeroTuning(heads, 3.0))
    assert [part["changed"] for part in found] == [1, 0, 0]


@torch.no_grad()
def test_repeated_and_reordered_rows_count_for_their_part(model: Any, inputs: Any) -> None:
    ids = inputs["input_ids"][:1].repeat(2, 1)
    with steer(model, ZeroTuning(gamma=[None, 3.0], where=Where(phases="decode"))) as run:
        run.audit.divide(2)
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1, 0, 0]))
        with run.freeze():
            model(ids[:1, :1].repeat(3, 1), past_key_values=cache)
    sites = [run.audit.to_dict(part)["interventions"][0]["sites"][site(0)] for part in range(2)]
    assert [s["changed"] for s in sites] == [0, 1] and [s["calls"] for s in sites] == [1, 1]


def test_a_batch_that_has_no_such_parts_is_refused(model: Any, inputs: Any) -> None:
    with pytest.raises(SelectionError, match="batch of 2 samples cannot be divided into 3 equal parts"):
        parts(model, inputs["input_ids"], 3, ZeroTuning(gamma=2.0))
