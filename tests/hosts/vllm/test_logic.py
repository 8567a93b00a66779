"""What the plug-in for vLLM decides without vLLM: what a request may ask, which blocks it may share, whose rows are whose."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace as Space
from typing import Any

import numpy as np
import pytest
import torch

from attnsteer import ACT, PASTA, HeadGate, HeadSet, InstABoost, SpotLight, Where, ZeroTuning
from attnsteer.attention_map import AttentionMap
from attnsteer.edits import Reweight, Share
from attnsteer.errors import AttnSteerError, CompositionError, SelectionError, UnsupportedHost
from attnsteer.hosts.vllm import admission, limits, paged, seam, split, wire
from attnsteer.hosts.vllm.menu import Engine, Menu, settings_of
from attnsteer.hosts.vllm.rows import Armed, Ledger, put
from attnsteer.kernels import Attention

FACTS = Engine("tiny", layers=4, heads=4, kv_heads=2)
PROMPT = list(range(1, 41))
METHODS = [
    ZeroTuning(gamma=0.3, heads=HeadSet({1: [0, 3], 2: [1]})),
    SpotLight(spans=[[(2, 5), (7, 9)]], target=0.4),
    PASTA(spans=[[(2, 5)]], heads={0: [1]}, alpha=0.05, where=Where(phases="decode")),
    InstABoost(spans=[[(0, 4)]], factor=2.5, where=Where(layers=[-1])),
    HeadGate({(0, 1): 0.0, (3, 2): -1.5}),
    ACT(heads={2: [1]}, beta=0.1, alpha=2.0, decode="running"),
]


def menu(**settings: Any) -> Menu:
    facts = settings.pop("facts", FACTS)
    return Menu({"chunked_statistics": True, **settings}, facts)


def request(value: Any = None, ids: Any = PROMPT, salt: str | None = None, **other: Any) -> Space:
    """What an `EngineCoreRequest` has of use here."""
    params = Space(extra_args=None if value is None else {"attnsteer": value}, skip_reading_prefix_cache=False)
    own = dict(prompt_token_ids=ids, prompt_embeds=None, resumable=False, request_id="r-1")
    return Space(sampling_params=params, cache_salt=salt, **{**own, **other})


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_method_travels_as_json(method: Any) -> None:
    choice = menu().asked(wire.request_args(method)["attnsteer"], PROMPT)
    sent = json.loads(json.dumps(wire.resolved(choice)))
    (part,) = menu().received(sent).parts
    assert part.bound.method == choice.parts[0].bound.method
    assert part.sites == choice.parts[0].sites
    assert menu().received(sent).identity == choice.identity
    assert part.bound.method.to_dict() == method.to_dict()


def test_a_name_takes_values_and_json_text_is_read(tmp_path: Any) -> None:
    METHODS[0].save_pretrained(tmp_path / "calm")
    own = menu(steerings={"calm": str(tmp_path / "calm"), "loud": [{"method": "pasta", "spans": [[1, 3]]}]})
    assert own.names == ("calm", "loud")
    (plain,) = own.asked("calm", PROMPT).parts
    (changed,) = own.asked('{"name": "calm", "gamma": 0.7}', PROMPT).parts
    assert plain.bound.method == METHODS[0] and changed.bound.method == METHODS[0].new(gamma=0.7)
    assert own.asked({"name": "loud", "spans": [[4, 9]]}, PROMPT).parts[0].bound.method.spans == (((4, 9),),)
    for nothing in ("none", None, '"none"', {"method": "ZeroTuning", "gamma": [None]}):
        assert not own.asked(nothing, PROMPT).parts
    values = wire.request_args("calm", gamma=0.7)["attnsteer"]
    assert own.asked(values, PROMPT).identity == own.asked('{"name":"calm","gamma":0.7}', PROMPT).identity


def test_text_is_found_in_the_prompt() -> None:
    words = "the red circle is left of the blue square".split()
    tokenizer = Space(
        decode=lambda ids, **_: " ".join(words[i] for i in ids),
        convert_ids_to_tokens=lambda ids: [words[i] for i in ids],
        all_special_ids=[],
        is_fast=False,
    )
    with pytest.raises(SelectionError, match="okenizer"):
        menu().asked({"method": "SpotLight", "spans": ["red circle"]}, list(range(9)))
    choice = menu().asked({"method": "SpotLight", "spans": ["red circle"]}, list(range(9)), tokenizer)
    assert choice.parts[0].bound.method.spans == (((1, 3),),)
    assert choice.parts[0].bound.method.tokenizer is None


REFUSED = [
    ("calmer", "no steering is named 'calmer'.*calm"),
    ({"name": "calm", "gama": 1.0}, "no parameter 'gama'.*gamma"),
    ({"name": "calm", "gamma": "high"}, "gamma='high'"),
    ({"name": "calm", "gamma": -1}, "above 0"),
    ({"method": "ZeroTunning"}, "ZeroTuning"),
    ({"method": 5}, "name of a method"),
    ({"method": "ZeroTuning", "name": "calm"}, "one of the two"),
    ({}, "one of the two"),
    ({"method": "ZeroTuning", "heads": {"9": [0]}}, "layers \\[9\\]"),
    ({"method": "ZeroTuning", "heads": {"1": [4]}}, "4 heads|has 4"),
    ({"method": "ZeroTuning", "heads": {"x": [0]}}, "heads"),
    ({"method": "ZeroTuning", "where": {"layers": [7]}}, "layers"),
    ({"method": "ZeroTuning", "where": [1]}, "object of selections"),
    ({"method": "ZeroTuning", "gamma": [0.1, 0.2]}, "2 samples"),
    ({"method": "SpotLight", "spans": [[3, 41]], "target": 0.3}, "after its 40 tokens"),
    ({"method": "SpotLight", "spans": [[5, 3]]}, "spans"),
    ({"method": "SpotLight", "spans": [[-1, 3]]}, "spans|range"),
    ({"method": "SpotLight"}, "needs spans|spans"),
    ({"method": "SpotLight", "spans": [[1, 3]], "tokenizer": "x"}, "no parameter 'tokenizer'"),
    ({"method": "HeadGate", "gates": {"0": 1}}, "layer, head, gate"),
    ({"method": "HeadGate", "gates": [[0, 9, 0.5]]}, "heads"),
    ({"method": "VAR", "sink_dims": [1]}, "image"),
    ({"method": "PAG"}, "denoisers"),
    ({"method": "ADHH", "heads": {"0": [0]}}, "residual|image"),
    ("{broken", "JSON"),
    (5, "give a name"),
    ([1], "give a name"),
    ({"method": "ZeroTuning", "where": {"modules": ".*"}}, "no names of modules"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_is_refused_and_says_what_exists(value: Any, message: str) -> None:
    own = menu(steerings={"calm": {"method": "ZeroTuning", "gamma": 0.5}})
    with pytest.raises(AttnSteerError, match=f"(?is){message}"):
        own.asked(value, PROMPT)


def test_statistics_of_a_prompt_want_it_whole() -> None:
    act = {"method": "ACT", "beta": 0.4}
    with pytest.raises(UnsupportedHost, match="no-enable-chunked-prefill"):
        Menu({}, FACTS).asked(act, PROMPT)
    with pytest.raises(UnsupportedHost, match="the steering 'a'"):
        Menu({"steerings": {"a": act}}, FACTS)
    whole = Engine("tiny", 4, 4, 2, whole_prompts=True)
    assert Menu({}, whole).asked(act, PROMPT).parts
    with pytest.raises(UnsupportedHost, match="tensor_parallel_size"):
        menu(facts=Engine("tiny", 4, 4, 2, shards=2)).asked(
            {"method": "SpotLight", "spans": [[1, 2]], "pooled": True}, PROMPT
        )


def test_the_settings() -> None:
    assert settings_of({}, {}) is None
    assert settings_of({"attnsteer": {}}, {}) == {}
    assert settings_of(None, {"ATTNSTEER_VLLM": '{"steerings": {}}'}) == {"steerings": {}}
    for wrong in ({"attnsteer": 5}, {"attnsteer": {"steering": {}}}):
        with pytest.raises(SelectionError):
            settings_of(wrong, {})
    with pytest.raises(SelectionError, match="not JSON"):
        settings_of({}, {"ATTNSTEER_VLLM": "{"})
    for wrong in ({"none": {"method": "ZeroTuning"}}, {"a": 5}, {"a": []}, [1]):
        with pytest.raises(SelectionError):
            menu(steerings=wrong)


def salt_of(value: Any, own: str | None = None, id: str = "r-1") -> Any:
    asked = request(value, salt=own, request_id=id)
    admission.admit(asked, menu())
    return admission.enter(asked, menu()).cache_salt


def test_blocks_are_shared_by_requests_that_are_steered_alike_only() -> None:
    gentle, strong = ({"method": "ZeroTuning", "gamma": g} for g in (0.5, 0.4))
    assert salt_of(gentle) == salt_of(copy.deepcopy(gentle)) == salt_of(json.dumps(gentle))
    salts = [
        salt_of(v)
        for v in (None, gentle, strong, {**gentle, "heads": {"1": [0]}}, {**gentle, "where": {"phases": "decode"}})
    ]
    assert len(set(salts)) == 5 and salts[0] is None
    assert salt_of(gentle, "mine") != salt_of(gentle, "yours") != salt_of(gentle)
    assert salt_of(None, "mine") == "mine"
    # The state of another request's rows is not there: nothing is shared, and not even its own blocks are read again.
    act = {"method": "ACT", "beta": 0.4}
    assert salt_of(act, id="a") != salt_of(act, id="b")
    asked = admission.admit(request(act), menu())
    children = [
        admission.enter(copy.deepcopy(Space(**{**vars(asked), "request_id": i})), menu()).cache_salt for i in "ab"
    ]
    assert asked.sampling_params.skip_reading_prefix_cache and children[0] != children[1]


def test_a_salt_cannot_be_forged() -> None:
    forged = salt_of({"method": "ZeroTuning", "gamma": 0.5})
    for value in (None, {"method": "ZeroTuning", "gamma": 0.1}):
        with pytest.raises(SelectionError, match="choose another"):
            admission.admit(request(value, salt=forged), menu())


def test_admission() -> None:
    steered = {"method": "ZeroTuning", "gamma": 0.5}
    with pytest.raises(SelectionError, match="started without steering"):
        admission.admit(request(steered), None)
    plain = request()
    assert admission.admit(plain, None) is plain and admission.enter(plain, menu()) is plain
    for wrong in (request(steered, ids=None), request(steered, resumable=True), request(steered, prompt_embeds=1)):
        with pytest.raises(UnsupportedHost):
            admission.admit(wrong, menu())
    # What a front end has resolved is data of its own; a client cannot say it, and a request that comes past it is resolved here.
    sent = admission.admit(request(steered), menu()).sampling_params.extra_args["attnsteer"]
    with pytest.raises(SelectionError):
        admission.admit(request(sent), menu())
    past = admission.enter(request(steered), menu())
    assert past.cache_salt == salt_of(steered)
    with pytest.raises(SelectionError, match="its salt is not"):
        admission.enter(request(sent), menu())
    shared = {"attnsteer": steered, "other": 1}
    asked = request()
    asked.sampling_params.extra_args = shared
    admission.admit(asked, menu())
    assert shared["attnsteer"] is steered and asked.sampling_params.extra_args["other"] == 1


def armed(*values: Any) -> tuple[Ledger, list[Any]]:
    """A worker's ledger, and what travels with requests that ask for these."""
    sent = [v and admission.admit(request(v), menu()).sampling_params.extra_args for v in values]
    return Ledger(Armed(menu()), torch.device("cpu")), sent


def test_a_worker_never_takes_a_request_that_nobody_checked() -> None:
    ledger, _ = armed()
    with pytest.raises(CompositionError, match="without having been checked"):
        ledger.enter("a", Space(extra_args={"attnsteer": "calm"}), 5, list)
    assert ledger.enter("b", Space(extra_args=None), 5, list) is None


def test_rows_are_told_apart_by_request() -> None:
    z = {"method": "ZeroTuning", "heads": {"1": [0]}}
    ledger, sent = armed({**z, "gamma": 0.2}, {**z, "gamma": 3.0}, None, {"method": "SpotLight", "spans": [[1, 3]]})
    for name, extra, prompt in zip("abcd", sent, (40, 40, 40, 40), strict=True):
        ledger.enter(name, Space(extra_args=extra), prompt, lambda: PROMPT + [7, 8, 9])
    # a and b decode at other lengths; c is not steered; d computes its prompt and two generated tokens again.
    steps = [("a", 0, 0, 1, 41), ("c", 1, 1, 1, 44), ("d", 2, 2, 42, 0), ("b", 3, 44, 1, 40)]
    plan = ledger.plan(steps)
    said = {tuple((p.request.id, p.row, p.new, p.past, p.index) for p in b.pieces): b for b in plan.batches}
    joint = said[("a", 0, 1, 41, 0), ("b", 44, 1, 40, 3)]
    assert len(said) == 3
    assert said[(("d", 2, 40, 0, 2),)].phase == "prefill" and said[(("d", 42, 2, 40, 2),)].phase == "decode"
    assert joint.account.keys(42).index.tolist()[1][:3] == [-1, 0, 1] and joint.pads.tolist() == [0, 1]
    runtime = joint.runtimes["model.layers.1.self_attn"]
    assert runtime.entries[0][0].method.gamma.values == (0.2, 3.0) and runtime.rows is None
    layers = {"one": Space(), "two": Space()}
    put(layers, plan)
    assert layers["one"].attnsteer is layers["two"].attnsteer is plan
    assert ledger.plan([("c", 0, 0, 1, 44)]) is None
    ledger.leave("a")
    assert set(ledger.requests) == {"b", "c", "d"} and ledger.finished == 1


def test_what_is_padding_in_a_batch_is_written_nowhere() -> None:
    z = {"method": "ZeroTuning", "gamma": 0.2}
    ledger, sent = armed(z, z)
    for name, extra, prompt in zip("ab", sent, (5, 3), strict=True):
        ledger.enter(name, Space(extra_args=extra), prompt, lambda: PROMPT)
    (batch,) = ledger.plan([("a", 0, 0, 5, 0), ("b", 1, 5, 3, 0)]).batches
    own, packed = batch.real
    assert own.tolist() == [0, 1, 2, 3, 4, 7, 8, 9] and packed.tolist() == list(range(8))
    mask, causal = batch.mask(0)
    assert not causal and mask[1, 0].long().tolist() == [
        [0] * 5, [0] * 5, [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1],
    ]  # fmt: skip
    assert batch.mask(2)[0][0, 0, 4].tolist() == [False, False, False, True, True]


def cached(
    lengths: list[int], kv: int, d: int, size: int, across: bool = True
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """(a paged cache as CPU kernels keep it, its table, the keys and values [kv, m, d] in it)."""
    blocks = max(-(-m // size) for m in lengths)
    table = (torch.randperm(len(lengths) * blocks) + 1).view(len(lengths), blocks).int()
    held = torch.full((len(lengths) * blocks + 1, kv, 2, size, d), torch.nan)
    pairs = []
    for row, m in zip(table.tolist(), lengths, strict=True):
        k, v = torch.randn(2, kv, m, d)
        for j, block in enumerate(row):
            n = min(size, max(0, m - j * size))
            held[block, :, 0, :n], held[block, :, 1, :n] = k[:, j * size : j * size + n], v[:, j * size : j * size + n]
        pairs.append((k, v))
    if across:
        held[:, :, 0] = held[:, :, 0].transpose(-1, -2).reshape(held[:, :, 0].shape).clone()
    return held.view(len(held), kv, size, 2 * d), table, pairs


@pytest.fixture
def interpreted(monkeypatch: Any) -> None:
    """The pass over the cache as Python runs it: this environment may have no numba."""
    monkeypatch.setattr(split, "compiled", lambda: split._split)
    np.seterr(invalid="ignore")


@pytest.mark.parametrize("across", [True, False])
def test_a_pass_over_the_cache_is_attention_over_its_keys(interpreted: None, across: bool) -> None:
    H, kv, d, size, lengths, window = 4, 2, 8, 4, [11, 3, 8], 7
    cache, table, pairs = cached(lengths, kv, d, size, across)
    layout = paged.Layout(True, paged.ACROSS if across else paged.ALONG)
    for b, (k, v) in enumerate(pairs):
        own = layout.read(cache, table[b].long())
        assert torch.equal(own[0][:, : lengths[b]], k) and torch.equal(own[1][:, : lengths[b]], v)
    q, longest = torch.randn(3, H, d), max(lengths)
    length = torch.tensor(lengths)
    rows = paged.Decoding(q, cache, layout, table, length, (length - window).clamp_min(0), longest - length, 0.3)
    keys = torch.rand(3, 2, 9) < 0.4
    out_in, lse_in, out, lse = rows.halves(keys, (1, 3))
    for b, (k, v) in enumerate(pairs):
        m = lengths[b]
        member = torch.nn.functional.pad(keys[b], (0, longest - 9))[:, longest - m :]
        for i, head in enumerate((1, 3)):
            z = k[head // 2] @ q[b, head] * 0.3
            for own, got, sums in ((member[i], out_in, lse_in), (~member[i], out, lse)):
                own = own & (torch.arange(m) >= m - window)
                assert torch.allclose(sums[b, i, 0], z[own].logsumexp(0), atol=1e-5)
                if own.any():
                    assert torch.allclose(got[b, i, 0], torch.softmax(z[own], 0) @ v[head // 2][own], atol=1e-5)


def test_edits_over_the_cache_are_those_of_the_map(interpreted: None) -> None:
    H, kv, d, size, m = 4, 2, 8, 4, 10
    cache, table, ((k, v),) = cached([m], kv, d, size)
    q = torch.randn(1, H, d)
    att = Attention(q[:, :, None], k[None], v[None], 0.5)
    whole = AttentionMap(att)
    rows = paged.Decoding(
        q, cache, paged.Layout(True, paged.ACROSS), table, torch.tensor([m]), torch.tensor([0]), torch.tensor([0]), 0.5
    )
    keys = torch.zeros(1, 1, m, dtype=torch.bool)
    keys[..., 2:5] = True
    biased, shared = Reweight(((keys, 0.2),), 1.5), Share(keys, lambda share: 0.3 * share)
    for edit in (biased, shared):
        forms = paged.PagedForms(rows, lambda: whole.out)
        moved = forms.add_bias(None, None, edit, None)[0] if edit is biased else forms.share(None, edit)
        assert moved is not None and torch.allclose(forms.out(), whole.reweight(edit), atol=1e-5)
    forms = paged.PagedForms(rows, lambda: whole.out)
    forms.share((1,), Share(keys, lambda share: 0.0 * share))
    assert torch.equal(forms.out()[:, [0, 2, 3]], whole.out[:, [0, 2, 3]])
    per_row = Reweight(((keys, torch.rand(1, H, 1)),), positive=False)
    assert forms.takes_bias(biased, None) and not forms.takes_bias(per_row, None)
    assert not forms.takes_bias(Reweight(((keys, 1.0),), normalise=False), None)


def test_edits_of_many_batches_are_done_in_one_pass(interpreted: None) -> None:
    H, kv, d, size, lengths = 4, 2, 8, 4, [11, 3, 8]
    cache, table, pairs = cached(lengths, kv, d, size)
    layout, query = paged.Layout(True, paged.ACROSS), torch.randn(5, H, d)
    together = paged.Together(query, cache, layout, 0.3, 0)
    wanted = {}
    for own, packed in (([0, 1], [4, 0]), ([2], [2])):
        length = torch.tensor([lengths[i] for i in own])
        base = torch.randn(len(own), H, 1, d)
        at = (table[own], length, torch.zeros_like(length), max(length) - length, 0.3)
        rows = paged.Decoding(query[packed], cache, layout, *at)
        keys = torch.zeros(1, 1, int(max(length)), dtype=torch.bool)
        keys[..., -2:] = True
        single = paged.PagedForms(rows, lambda base=base: base)
        requests = [Space(changed=False) for _ in own]
        joint = paged.TogetherForms(together, rows, torch.tensor(packed), lambda base=base: base, requests, 3)
        told = []
        for forms in (single, joint):
            told.append(forms.share((1, 2), Share(keys, lambda s: 0.4 * s)))
            told.append(forms.add_bias(None, (0,), Reweight(((keys, 0.2),), 1.5), None))
        # One group of heads more gave none that could be taken.
        assert joint.out() is base and not joint.whole and not told[3][0]
        # A head that no edit has.
        plain = [
            Attention(query[None, r, 3:4, None], *(t[None, 1:] for t in pairs[i]), 0.3)
            for r, i in zip(packed, own, strict=True)
        ]
        last = torch.stack([AttentionMap(a).out[0, 0, 0] for a in plain])
        wanted[tuple(packed)] = single.out()[:, :, 0], told, requests, last
    found = {heads: (rows.tolist(), new) for rows, heads, new in together.run()}
    assert set(found) == {(1, 2), (0,)}
    for packed, (out, told, requests, last) in wanted.items():
        assert all(r.changed for r in requests)
        for heads, (rows, new) in found.items():
            for i, row in enumerate(packed):
                assert torch.allclose(new[rows.index(row)], out[i, list(heads)], atol=1e-6)
        ((rows, heads, new),) = together.run(whole=True)
        assert rows.tolist() == [0, 2, 4] and heads == (0, 1, 2, 3)
        at = [rows.tolist().index(row) for row in packed]
        assert torch.allclose(new[at][:, :3], out[:, :3], atol=1e-6)
        assert torch.allclose(new[at][:, 3], last, atol=1e-5)
        assert torch.allclose(told[0][1], told[2][1]) and torch.equal(told[1][1], told[3][1]) and bool(told[3][0])


def test_keys_are_read_when_somebody_asks() -> None:
    reads = []
    k, v = torch.randn(2, 1, 2, 6, 8)

    def make() -> Any:
        reads.append(1)
        return k, v

    att = paged.PagedAttention(torch.randn(1, 4, 1, 8), 2, 6, make, 0.5)
    part = att.select((1, 2))
    assert (att.shape, att.groups, part.shape, part.groups, att.held) == ((1, 4, 1, 6), 2, (1, 2, 1, 6), 1, ("q",))
    assert not reads
    assert (
        torch.equal(part.k, k[:, [0, 1]]) and att.held == ("q", "k", "v") and type(att.replace(scale=1.0)) is Attention
    )
    assert len(reads) == 1


def test_a_layer_edits_the_rows_of_steered_requests_and_no_others(interpreted: None) -> None:
    """Four requests decode, one begins; two steerings of one method share a pass, a third keeps state, a fourth is a gate."""
    z, heads = {"method": "ZeroTuning", "heads": {"1": [0, 3]}}, {"1": [1, 2]}
    asked = [
        {**z, "gamma": 0.2},
        None,
        {**z, "gamma": 3.0},
        {"method": "SpotLight", "spans": [[1, 3]], "target": 0.6, "where": {"heads": heads}},
    ]
    asked += [{"method": "HeadGate", "gates": [[1, 2, 0.5]]}, {**z, "gamma": 0.5}]
    ledger, sent = armed(*asked)
    lengths, new = [11, 7, 9, 10, 6, 5], [1, 1, 1, 1, 1, 5]
    H, kv, d, size = 4, 2, 8, 4
    cache, table, pairs = cached(lengths, kv, d, size)
    query, row, steps, plain, wanted = torch.randn(sum(new), H, d), 0, [], [], []
    for i, (extra, m, n) in enumerate(zip(sent, lengths, new, strict=True)):
        ledger.enter(str(i), Space(extra_args=extra), m if n > 1 else 4, lambda: PROMPT)
        steps.append((str(i), i, row, n, m - n))
        k, v = (t[None] for t in pairs[i])
        seen = (torch.arange(m) <= torch.arange(m - n, m)[:, None])[None, None]
        view = AttentionMap(Attention(query[row : row + n].transpose(0, 1)[None], k, v, 0.3, mask=seen))
        first = torch.zeros(1, H, m, dtype=torch.bool)
        edited = view.out.clone()
        if asked[i] is not None and asked[i]["method"] == "ZeroTuning":
            first[:, [0, 3], 0] = True
            edited = view.reweight(Reweight(((first, asked[i]["gamma"]),)))
        elif i == 3:
            first[:, [1, 2], 1:3] = True
            edited = view.reweight(Share(first, lambda s: torch.where((s < 0.6) & (s > 0), 0.6 / (1.6 - s), s)))
        elif i == 4:
            edited[:, 2] *= 0.5
        plain.append(view.out[0].transpose(0, 1))
        wanted.append(edited[0].transpose(0, 1))
        row += n
    output = torch.cat(plain).clone()
    before = output.clone()
    layer = seam.Layer("layers.1", 1, ledger)
    layer.layout = paged.Layout(True, paged.ACROSS)
    impl = Space(num_heads=H, num_kv_heads=kv, scale=0.3, sliding_window=-1, logits_soft_cap=0, sinks=None)
    with torch.inference_mode():
        meta, ran = Space(block_table=table, num_actual_tokens=sum(new)), []
        layer.edit(impl, None, query, cache, meta, output, ledger.plan(steps), lambda: ran.append(1))
    assert ran == [1]
    assert torch.allclose(output, torch.cat(wanted), atol=1e-5)
    assert torch.equal(output[1], before[1]) and not torch.equal(output[0], before[0])
    assert [bool(ledger.requests[str(i)].changed) for i in (0, 2, 3, 4, 5)] == [True] * 5
    assert {ledger.requests[str(i)].edits for i in (0, 2, 3, 4, 5)} == {1}
    changes = [r.changed for r in ledger.run.audit.records.values()]
    assert changes and all(changes)
    # Where all rows are edited whole, the layer's own kernel does not run, and heads that are not edited come out all the same.
    alone = torch.full((2, H, d), torch.nan)
    with torch.inference_mode():
        plan = ledger.plan([(*steps[i][:2], j, *steps[i][3:]) for j, i in enumerate((2, 0))])
        meta = Space(block_table=table, num_actual_tokens=2)
        layer.edit(impl, None, query[[2, 0]], cache, meta, alone, plan, lambda: pytest.fail("the kernel ran"))
    assert torch.allclose(alone, torch.cat([wanted[2], wanted[0]]), atol=1e-5)


@pytest.mark.parametrize("method", ["ZeroTuning", "SpotLight", "ACT"])
def test_a_long_prompt_that_is_alone_takes_one_kernel(method: str) -> None:
    H, kv, d, size, n = 4, 2, 8, 16, 80
    heads = {"1": [0, 3]}
    values = {
        "ZeroTuning": {"gamma": 0.2, "heads": heads},
        "SpotLight": {"spans": [[1, 9]], "target": 0.6, "where": {"heads": heads}},
        "ACT": {"beta": 0.4, "threshold": 0.005, "heads": heads},
    }
    ids = list(range(n))
    asked = admission.admit(request({"method": method, **values[method]}, ids), menu()).sampling_params.extra_args
    query, (cache, table, ((k, v),)) = torch.randn(n, H, d) * 3, cached([n], kv, d, size)
    impl = Space(num_heads=H, num_kv_heads=kv, scale=0.3, sliding_window=-1, logits_soft_cap=0, sinks=None)
    whole = (
        AttentionMap(Attention(query.transpose(0, 1)[None], k[None], v[None], 0.3, causal=True)).out[0].transpose(0, 1)
    )
    found = []
    for tokens in (n + 1, n):
        # Beside another row that nobody steers the kernel runs, alone it does not.
        ledger = Ledger(Armed(menu()), torch.device("cpu"))
        ledger.enter("a", Space(extra_args=asked), n, lambda: ids)
        layer = seam.Layer("layers.1", 1, ledger)
        layer.layout, layer.exact = paged.Layout(True, paged.ACROSS), True
        output, ran = torch.full((n, H, d), torch.nan), []
        meta = Space(block_table=table, num_actual_tokens=tokens)

        def run(output: Any = output, ran: Any = ran) -> None:
            ran.append(1)
            output.copy_(whole)

        with torch.inference_mode():
            layer.edit(impl, None, query, cache, meta, output, ledger.plan([("a", 0, 0, n, 0)]), run)
        assert len(ran) == tokens - n and ledger.requests["a"].changed is not False
        found.append(output)
    assert torch.allclose(*found, atol=1e-5) and not torch.allclose(found[0], whole, atol=1e-3)
    assert torch.allclose(found[1][:, 1:3], whole[:, 1:3], atol=1e-5)


def test_a_block_behind_the_prompt_is_a_request_of_its_own() -> None:
    z = {"method": "ZeroTuning", "gamma": 0.5}
    made = [admission.admit(request(v), menu()) for v in (z, {**z, "prompt": 8}, None)]
    for own in made:
        own.num_prompt_tokens = 40
    whole, scored, plain = made
    # Blocks of 16: the third would end behind the prompt, which has 40 tokens, or in its last one where it has 8.
    assert [admission.own_key(whole, stop) is None for stop in (16, 32, 40, 48)] == [True, True, False, False]
    assert [admission.own_key(scored, stop) is None for stop in (4, 8, 16)] == [True, False, False]
    assert admission.own_key(plain, 48) is None
    keys = [admission.own_key(own, 48) for own in (whole, whole, scored)]
    assert keys[0] == keys[1] != keys[2]
    ledger = Ledger(Armed(menu()), torch.device("cpu"))
    entered = ledger.enter("a", scored.sampling_params, 40, lambda: PROMPT)
    assert entered.prompt == 8
    batches = ledger.plan([("a", 0, 0, 40, 0)]).batches
    assert sorted((b.phase, b.new) for b in batches) == [("decode", 32), ("prefill", 8)]
    for wrong in (0, 41, True, "8", None):
        with pytest.raises(SelectionError, match="1 to 40"):
            admission.admit(request({**z, "prompt": wrong}), menu())


def test_requests_whose_statistics_are_frozen_share_batches() -> None:
    act = {"method": "ACT", "beta": 0.4, "heads": {"1": [0]}}
    ledger, sent = armed(act, {**act, "beta": 0.2}, {**act, "decode": "running"}, {**act, "decode": "running"})
    for name, extra in zip("abcd", sent, strict=True):
        ledger.enter(name, Space(extra_args=extra), 40, lambda: PROMPT)
    steps = [(name, i, 40 * i, 40, 0) for i, name in enumerate("abcd")]
    assert [b.batch for b in ledger.plan(steps).batches] == [1] * 4
    decode = [(name, i, i, 1, 40 + i) for i, name in enumerate("abcd")]
    first, *others = ledger.plan(decode).batches
    assert first.batch == 2 and [b.batch for b in others] == [1, 1]
    index = ledger.requests["a"].choice.parts[0].bound.index
    place = (index, "model.layers.1.self_attn", (0,))
    sets = torch.zeros(2, 1, 1, 40, dtype=torch.bool)
    sets[0, ..., 3], sets[1, ..., 5] = True, True
    for name, own in zip("ab", sets, strict=True):
        ledger.requests[name].states[place] = {"sinks": own, "sum": torch.zeros(1, 1, 40)}
    stacked = first.states[place]["sinks"]
    # The first has a token less, so one slot of padding before it.
    assert stacked.shape[:2] == (2, 1) and stacked[:, 0].nonzero().tolist() == [[0, 4], [1, 5]]
    again = ledger.plan([(n, i, r, k, past + 1) for n, i, r, k, past in decode]).batches[0]
    assert again.states is first.states
    ledger.requests["b"].begin()
    assert not ledger.plan(decode).batches[0].states


def engine(**other: Any) -> Space:
    """A configuration that can be steered, with some entries changed."""
    own: dict[str, Any] = {
        "model_config": Space(
            model="tiny", runner_type="generate", use_mla=False, hf_text_config=Space(num_hidden_layers=2, num_attention_heads=4),
            get_layers_start_end_indices=lambda parallel: (0, 2),
        ),
        "parallel_config": Space(decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False),
        "cache_config": Space(cache_dtype="auto", kv_sharing_fast_prefill=False),
        "scheduler_config": Space(async_scheduling=False),
        "kv_transfer_config": None,
        "speculative_config": None,
        "compilation_config": Space(cudagraph_mode=None),
    }  # fmt: skip
    for path, value in other.items():
        owner, _, name = path.partition("__")
        if name:
            setattr(own[owner], name, value)
        else:
            own[owner] = value
    return Space(**own)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_config__use_mla": True}, "latent attention"),
        ({"model_config__runner_type": "pooling"}, "generate"),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context"),
        ({"parallel_config__enable_dbo": True}, "dbo"),
        ({"kv_transfer_config": Space()}, "kv_transfer"),
        ({"compilation_config__cudagraph_mode": Space(has_full_cudagraphs=lambda: True)}, "PIECEWISE"),
        ({"speculative_config": Space(), "scheduler_config__async_scheduling": True}, "async_scheduling"),
    ],
)
def test_engines_that_hide_something_are_refused(changed: Any, message: str) -> None:
    limits.check_engine(engine())
    with pytest.raises(UnsupportedHost, match=message):
        limits.check_engine(engine(**changed))


class Attention_(Space):
    """A layer of vLLM, as far as it is looked at."""


Attention_.__name__ = "Attention"


def layer(**other: Any) -> Any:
    impl = Space(alibi_slopes=other.pop("alibi_slopes", None))
    own = dict(impl=impl, attn_type="decoder", num_heads=4, head_size=8, head_size_v=8, kv_cache_dtype="auto")
    own["get_kv_cache_spec"] = None
    return Attention_(**{**own, **other})


def test_layers_of_other_kinds_are_refused() -> None:
    number = lambda name: int(name.split(".")[1])  # noqa: E731
    ask = lambda context, shards=1: limits.check_layers(engine(), context, number, shards)  # noqa: E731
    two = {"layers.0": layer(), "layers.1": layer()}
    assert list(ask({**two, "layers.1.experts": Space()})) == [0, 1]
    wrong = [
        ({"layers.0": layer()}, "hybrid"),
        ({**two, "layers.1": Space(impl=None, get_kv_cache_spec=None)}, "not steered"),
        ({**two, "layers.1": layer(alibi_slopes=1)}, "ALiBi"),
        ({**two, "layers.1": layer(attn_type="encoder_only")}, "encoder_only"),
        ({**two, "layers.1": layer(kv_cache_dtype="fp8")}, "quantised"),
        ({**two, "layers.1": layer(kv_sharing_target_layer_name="layers.0")}, "shares"),
        ({**two, "layers.1": layer(head_size_v=4)}, "another size"),
        ({**two, "layers.1": layer(num_heads=2)}, "4"),
        ({**two, "more.1": layer()}, "both layer 1"),
    ]
    for context, message in wrong:
        with pytest.raises(UnsupportedHost, match=message):
            ask(context)
    with pytest.raises(UnsupportedHost):
        ask(two, 2)


def test_versions_that_were_not_tested_are_refused() -> None:
    limits.check_version("0.32.0", False)
    limits.check_version("0.41.0", True)
    for other in ("0.31.2", "0.33.0", "1.0", "dev"):
        with pytest.raises(UnsupportedHost, match=r"0\.32"):
            limits.check_version(other, False)
