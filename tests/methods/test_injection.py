"""InjectMap, FreezeMaps, PatchHeads: identities bit for bit, loops over dense maps, hand-made hooks, and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import (
    Captured,
    FreezeMaps,
    HeadGate,
    InjectMap,
    Intervention,
    PatchHeads,
    Where,
    ZeroTuning,
    capture,
    sites,
    steer,
)
from attnsteer.errors import CompositionError, SelectionError
from attnsteer.methods.patchheads import subspace
from attnsteer.testing import tiny_call, tiny_pipeline, tiny_transformers, tiny_transformers_inputs
from tests.laws.dense_model import Dense, Sequence, dense_model
from tests.laws.test_dense_reference import drive
from tests.reference import injection

HEADS = {1: [0, 3]}
GATES = HeadGate({(0, 0): -1.0, (0, 1): 3.0})


@functools.cache
def model_of(name: str) -> nn.Module:
    return tiny_transformers(name)


def prompts(seed: int, name: str = "llama") -> dict[str, Tensor]:
    """Three prompts of 12, 11 and 10 tokens, left padded; few different tokens, so that some come twice."""
    given = tiny_transformers_inputs(name, model_of(name), batch=3, length=12, padding="left", seed=1)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 10, given["input_ids"].shape, generator=draw)
    return given | {"input_ids": torch.where(given["attention_mask"].bool(), ids, given["input_ids"])}


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor], *methods: Intervention, control: bool = False) -> Tensor:
    """Logits of the valid rows."""
    with steer(model, *methods, control=control):
        return model(**inputs).logits[inputs["attention_mask"].bool()]


@torch.no_grad()
def taken(model: nn.Module, inputs: dict[str, Tensor], where: Where | None = None, **options: Any) -> Captured:
    with capture(model, where, **options) as seen:
        model(**inputs)
    return seen


def plain(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


# What a run has itself changes nothing.


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "gpt2"])
def test_what_a_run_has_itself_changes_nothing(name: str) -> None:
    model, inputs = model_of(name), prompts(3, name)
    seen = taken(model, inputs, what=("map", "output", "q", "k", "v"))
    base = plain(model, inputs)
    assert torch.equal(run(model, inputs, InjectMap(seen), control=True), base)
    for what in ("output", "q", "k", "v"):
        patch = PatchHeads(seen, what=what)
        assert torch.equal(run(model, inputs, patch, control=True), base), what
    pattern = taken(model, inputs, what=("q", "k"))
    assert torch.equal(run(model, inputs, FreezeMaps(pattern), control=True), base)
    assert (run(model, inputs, InjectMap(pattern), control=True) - base).abs().max() <= 1e-6 * base.abs().max()


def test_a_pipelines_own_patterns_change_nothing() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=2)
    where = Where(layers=[1])
    base = torch.as_tensor(pipe(**call)[0])
    with capture(pipe, where, what=("q", "k", "output")) as seen:
        pipe(**call)
    for method in (FreezeMaps(seen, where=where), PatchHeads(seen, where=where)):
        with steer(pipe, method, control=True):
            assert torch.equal(torch.as_tensor(pipe(**call)[0]), base)


ALL_ROWS = {
    "frozen": lambda donor: FreezeMaps(donor, same_tokens=False),
    "frozen heads": lambda donor: FreezeMaps(donor, HEADS, same_tokens=False),
    "output": lambda donor: PatchHeads(donor, HEADS),
    "q": lambda donor: PatchHeads(donor, HEADS, "q", strength=[0.5, 0.0, 1.0]),
    "k": lambda donor: PatchHeads(donor, HEADS, "k"),
    "v": lambda donor: PatchHeads(donor, HEADS, "v"),
    "one key": lambda donor: InjectMap("offset:2", HEADS, strength=0.5),
    "several keys": lambda donor: InjectMap("same_token", HEADS, strength=[0.5, 0.0, 1.0]),
    "several keys of some rows": lambda donor: InjectMap("block:3", HEADS, rows=[1, 4, 5]),
}


@pytest.mark.parametrize("name", ALL_ROWS)
@torch.no_grad()
def test_rows_in_order_are_those_of_padded_rows_of_chunks_and_of_the_dense_path(name: str) -> None:
    """Without padding, what is put back is taken as it stands; behind padding it is looked up."""
    model, draw = model_of("llama"), torch.Generator().manual_seed(4)
    ids, other = torch.randint(4, 10, (2, 3, 12), generator=draw)
    extra = torch.randint(4, 10, (3, 2), generator=draw)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    behind = {key: nn.functional.pad(value, (3, 0)) for key, value in given.items()}
    donor = taken(model, {**given, "input_ids": other}, what=("q", "k", "v", "output"))
    method = ALL_ROWS[name](donor)

    def logits(inputs: dict[str, Tensor], *chunks: tuple[int, int], reference: bool = False) -> Tensor:
        with steer(model, method, reference=reference) as run, run.chunked_prefill(tokens=inputs["input_ids"].shape[1]):
            return drive(model, inputs, list(chunks), extra, lambda *_: None)

    whole = logits(given, (0, 12))
    assert (whole - logits(behind, (0, 12))[:, 3:]).abs().max() <= 1e-5
    assert (whole - logits(given, (0, 5), (5, 12))).abs().max() <= 1e-5
    assert (whole - logits(given, (0, 12), reference=True)).abs().max() <= 1e-5
    assert (whole[:, :12].flatten(0, 1) - plain(model, given)).abs().max() > 1e-3


@pytest.mark.parametrize("second", ["first", "same_token", "tensor"])
@torch.no_grad()
def test_injections_into_one_head_follow_each_other(second: str) -> None:
    """(1 - s) of what the first left stays, whichever way the second is computed; what reads the model's own map is refused."""
    model, inputs = model_of("llama"), prompts(5)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    P = torch.softmax(torch.randn(12, 12).masked_fill(~torch.ones(12, 12).bool().tril(), -torch.inf), dim=-1)
    methods = (
        InjectMap("previous", HEADS, strength=0.7),
        InjectMap(P if second == "tensor" else second, HEADS, strength=0.5),
    )
    with steer(model, *methods, reference=True):
        slow = model(**inputs).logits.flatten(0, 1)
    assert (run(model, inputs, *methods) - slow).abs().max() <= 1e-5
    assert (run(model, inputs, methods[1]) - slow).abs().max() > 1e-3
    with pytest.raises(CompositionError, match="Put InjectMap first"):
        run(model, inputs, methods[0], InjectMap("same_token", HEADS, mode="mask"))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_frozen_maps_of_an_encoder_and_a_decoder_have_a_text_each(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    inputs = tiny_transformers_inputs(name, model, batch=2, length=10, padding="left", seed=2)
    own = taken(model, inputs, Where(kinds="self"), what=("q", "k"))
    with torch.no_grad():
        base = model(**inputs).logits
        for source in (own, Captured.load(own.save(tmp_path / name))):
            with steer(model, FreezeMaps(source, where=Where(kinds="self")), control=True):
                assert torch.equal(model(**inputs).logits, base)
        other = inputs | {"decoder_input_ids": inputs["decoder_input_ids"] + 1}
        with (
            pytest.raises(SelectionError, match="other tokens"),
            steer(model, FreezeMaps(own, where=Where(kinds="self"))),
        ):
            model(**other)


# Injected maps, against loops.


def edits_of(build: Any) -> dict[str, Any]:
    model = model_of("llama")
    names = {s.layer: s.name for s in sites(model)}
    return {names[layer]: (heads, build) for layer, heads in HEADS.items()}


PATTERNS = [
    "all", "previous", "self", "first", "offset:2", "block:3", "same_token", "other_same_token", "after_same_token",
    "sentence", "span",
]  # fmt: skip
SPANS = [(1, 4), (6, 8)]


@pytest.mark.parametrize(
    ("name", "mode"), [(p, "replace") for p in PATTERNS] + [("block:3", "mask"), ("same_token", "mask")]
)
@torch.no_grad()
def test_patterns_are_those_of_loops_in_prefill_and_decoding(name: str, mode: str) -> None:
    model, inputs = model_of("llama"), prompts(5)
    extra = torch.randint(4, 10, (3, 3), generator=torch.Generator().manual_seed(2))
    every = torch.cat([inputs["input_ids"], extra], dim=1)
    kind, _, number = name.partition(":")

    def edit(A: Tensor, seq: Sequence, memory: dict[str, Any]) -> Tensor:
        out = A.clone()
        for b in range(len(A)):
            first = int(seq.first()[b])
            P = injection.pattern(A[b], kind, int(number or 0), every[b, first:].tolist(), first, [5, 7], SPANS)
            changed = (A[b] != P).any(dim=-1, keepdim=True)
            out[b] = P if mode == "replace" else torch.where(changed, injection.masked(A[b], P), A[b])
        return out

    method = InjectMap(name, HEADS, mode, spans=[SPANS] * 3, sentence_ends=(5, 7))
    with steer(model, method):
        ours = drive(model, inputs, [(0, 12)], extra, lambda *_: None)
    dense = Dense(model, edits_of(edit), {})
    with dense_model(model, dense, list({id(s.module.config): s.module.config for s in sites(model)}.values())):

        def before(valid: Tensor, start: int, stop: int, decoding: bool) -> None:
            dense.sequence = Sequence(valid, start, min(stop, 12), decoding)

        theirs = drive(model, inputs, [(0, 12)], extra, before)
    valid = torch.cat([inputs["attention_mask"], torch.ones_like(extra)], dim=1).bool()
    assert (ours - theirs)[valid].abs().max() <= 1e-5
    assert (run(model, inputs, method) - plain(model, inputs)).abs().max() > 1e-3


def heads_out(method: InjectMap, inputs: dict[str, Tensor], b: int) -> Tensor:
    """Outputs [H, T, d] of the edited heads of one sample."""
    with torch.no_grad(), capture(model_of("llama"), Where(layers=[1], heads=[0, 3]), method, what="output") as seen:
        model_of("llama")(**inputs)
    return seen.get(sample=b)


GROUPS = ("all", "same_token", "other_same_token", "after_same_token", "block:5", "sentence", "span")


@pytest.mark.parametrize("pattern", GROUPS)
@torch.no_grad()
def test_running_sums_of_a_longer_prompt_are_the_dense_maps(pattern: str) -> None:
    """Without a mask; one of some samples; of a bidirectional stack; and what is marked, which has none."""
    ids = torch.randint(4, 10, (3, 90), generator=torch.Generator().manual_seed(2))
    spans = [[(2, 40), (50, 70)]] * 3
    for name in ("llama", "bert"):
        model = model_of(name)
        method = InjectMap(pattern, HEADS, strength=[1.0, 0.4, None], spans=spans, sentence_ends=(5,))
        found = []
        for reference in (False, True):
            with steer(model, method, reference=reference):
                out = model(input_ids=ids)
                found.append(out.logits if "logits" in out else out.last_hidden_state)
        assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()
        assert not torch.equal(found[0], model(input_ids=ids)[0])


@pytest.mark.parametrize("share", [None, 0.7])
def test_a_target_inside_a_set_of_keys(share: float | None) -> None:
    inputs = prompts(5)
    own = taken(model_of("llama"), inputs, Where(layers=[1], heads=[0, 3]), what=("map", "v"))
    target = torch.tensor([0.0, 3.0, 0.0, 1.0])
    P = torch.zeros(12, 12)
    P[:, 1:5] = target
    P = P.tril()
    method = InjectMap(P, HEADS, keys=[[(1, 5)]] * 3, share=share, rows=(4, 9))
    for b in range(3):
        A, v = own.get(what="map", sample=b), own.get(what="v", sample=b)
        wanted = A.clone()
        wanted[:, 4:9] = injection.inside(A[:, 4:9], target, [1, 2, 3, 4], share)
        assert (heads_out(method, inputs, b) - wanted @ v).abs().max() <= 1e-5


def test_tensors_scores_and_strengths() -> None:
    inputs = prompts(5)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    own = taken(model_of("llama"), inputs, Where(layers=[1], heads=[0, 3]), what=("map", "v"))
    draw = torch.Generator().manual_seed(0)
    S = torch.randn(2, 12, 12, generator=draw)
    lower = torch.ones(12, 12, dtype=torch.bool).tril()
    P = torch.softmax(S.masked_fill(~lower, -torch.inf), dim=-1)
    for b in range(3):
        A, v = own.get(what="map", sample=b), own.get(what="v", sample=b)
        for method, wanted in (
            (InjectMap(P, HEADS), P),
            (InjectMap({1: P}, HEADS, strength=[0.3, 0.0, 1.0]), A + (0.3, 0.0, 1.0)[b] * (P - A)),
            (InjectMap(S, HEADS, "scores"), P),
            (InjectMap(S, HEADS, "add"), torch.softmax((A.log() + S).masked_fill(~lower, -torch.inf), dim=-1)),
            (InjectMap(2 * P, HEADS, sums="renormalise"), P),
            (InjectMap(2 * P, HEADS, sums="keep"), 2 * P),
            (InjectMap.top_k(P, 2, heads=HEADS), injection.masked(A, top(P, 2))),
        ):
            assert (heads_out(method, inputs, b) - wanted @ v).abs().max() <= 1e-5, method


def top(P: Tensor, k: int) -> Tensor:
    return torch.zeros_like(P).scatter(-1, P.topk(k, dim=-1).indices, 1.0) * (P > 0)


def test_a_drawing_moves_what_the_image_gets() -> None:
    model = model_of("llava")
    inputs = tiny_transformers_inputs("llava", model, batch=2, length=12, padding=None, seed=1)
    drawn = torch.zeros(8, 8)
    drawn[:4, 4:] = 1.0
    method = InjectMap.drawing(drawn, (4, 4), heads={1: [0]}, rows="last")
    where = Where(layers=[1], heads=[0], modalities="text")
    own = taken(model, inputs, where, what=("map", "v"), rows=None)
    with torch.no_grad(), capture(model, where, method, what="output") as seen:
        model(**inputs)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    assert len(image) == 16
    target = torch.nn.functional.avg_pool2d(drawn[None], 2)[0].flatten()
    for b in range(2):
        A, v = own.get(what="map", sample=b), own.get(what="v", sample=b)
        wanted = A.clone()
        wanted[:, -1:] = injection.inside(A[:, -1:], target, image, None)
        assert (seen.get(sample=b) - wanted @ v).abs().max() <= 1e-5


@torch.no_grad()
def test_maps_of_another_model_as_rows_and_as_queries_and_keys() -> None:
    student, inputs = model_of("llama"), prompts(5)
    teacher = tiny_transformers("llama", num_attention_heads=8, hidden_size=96, num_key_value_heads=4, seed=3)
    head_map = {(layer, h): (2 - layer, 7 - h) for layer in range(3) for h in range(4)}
    found = []
    for what in (("map",), ("q", "k")):
        with capture(teacher, what=what) as seen:
            teacher(**inputs)
        found.append(run(student, inputs, InjectMap(seen, head_map=head_map)))
        if what == ("map",):
            with pytest.raises(SelectionError, match=r"head 3 of layer 0 is not in the source.*head_map"):
                run(student, inputs, InjectMap(taken(teacher, inputs, Where(heads=[0, 1, 2]))))
    assert (found[0] - found[1]).abs().max() <= 1e-5
    assert (found[0] - plain(student, inputs)).abs().max() > 1e-2


def test_a_capture_of_some_rows_or_one_sample_is_put_where_it_was_taken(tmp_path: Path) -> None:
    model, inputs, other = model_of("llama"), prompts(5), prompts(6)
    whole = taken(model, other)
    some = taken(model, other, rows=[3, 7])
    some.save(tmp_path / "maps")
    expected = run(model, inputs, InjectMap(whole, rows=[3, 7]))
    ours = run(model, inputs, InjectMap(some))
    assert (ours - expected).abs().max() <= 1e-5
    assert torch.equal(run(model, inputs, InjectMap(tmp_path / "maps")), ours)
    alone = {k: v[1:2, 1:] for k, v in inputs.items()}
    of_one = taken(model, {k: v[1:2, 1:] for k, v in other.items()})
    ours = run(model, alone, InjectMap(of_one))
    assert (ours - run(model, inputs, InjectMap(whole))[12:23]).abs().max() <= 1e-5


# Frozen patterns.


@torch.no_grad()
def test_frozen_patterns_are_the_stored_maps_with_live_values() -> None:
    model, inputs = model_of("llama"), prompts(5)
    clean = taken(model, inputs, what=("q", "k"))
    frozen = run(model, inputs, GATES, FreezeMaps(clean))
    assert (frozen - run(model, inputs, GATES, InjectMap(taken(model, inputs)))).abs().max() <= 1e-5
    assert (frozen - run(model, inputs, GATES)).abs().max() > 1e-2
    # A row of a padded batch is the row alone.
    alone = {k: v[1:2, 1:] for k, v in inputs.items()}
    ours = run(model, alone, GATES, FreezeMaps(taken(model, alone, what=("q", "k"))))
    assert (ours - frozen[12:23]).abs().max() <= 2e-5
    # Heads that are not frozen are live.
    some = run(model, inputs, GATES, FreezeMaps(clean, {1: [0]}))
    assert (some - frozen).abs().max() > 0 and (some - run(model, inputs, GATES)).abs().max() > 0


@torch.no_grad()
def test_frozen_patterns_are_the_same_with_and_without_a_cache() -> None:
    model, inputs = model_of("llama"), prompts(5)
    clean = taken(model, inputs, what=("q", "k"))
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for cached in (True, False):
        with steer(model, FreezeMaps(clean), GATES):
            made = model.generate(**inputs, use_cache=cached, **options)
        found.append(torch.stack(made.logits, dim=1))
    assert (found[0] - found[1]).abs().max() <= 1e-5
    message = "Put FreezeMaps before that method"
    with pytest.raises(CompositionError, match=message), steer(model, HeadGate({(0, 0): 2.0}), FreezeMaps(clean)):
        model.generate(**inputs, use_cache=False, **options)


# Patches.


def test_all_head_outputs_of_a_layer_are_a_hook_on_the_projection() -> None:
    model, inputs, other = model_of("llama"), prompts(5), prompts(6)
    o_proj, v_proj = model.model.layers[1].self_attn.o_proj, model.model.layers[1].self_attn.v_proj
    kept: dict[str, Tensor] = {}
    hooks = [
        o_proj.register_forward_pre_hook(lambda _, args: kept.update(o=args[0])),
        v_proj.register_forward_hook(lambda _, args, out: kept.update(v=out)),
    ]
    plain(model, other)
    for hook in hooks:
        hook.remove()
    donor = taken(model, other, what=("output", "v"))
    mask = inputs["attention_mask"][..., None]
    hook = o_proj.register_forward_pre_hook(lambda _, args: (torch.where(mask == 1, kept["o"], args[0]),))
    theirs = plain(model, inputs)
    hook.remove()
    assert torch.equal(run(model, inputs, PatchHeads(donor, where=Where(layers=[1]))), theirs)
    hook = v_proj.register_forward_hook(lambda _, args, out: torch.where(mask == 1, kept["v"], out))
    theirs = plain(model, inputs)
    hook.remove()
    assert (run(model, inputs, PatchHeads(donor, what="v", where=Where(layers=[1]))) - theirs).abs().max() <= 1e-6


def test_q_and_k_of_another_run_make_its_map() -> None:
    model, inputs, other = model_of("llama"), prompts(5), prompts(6)
    donor = taken(model, other, what=("q", "k"))
    where = Where(layers=[1])
    both = run(model, inputs, PatchHeads(donor, what="q", where=where), PatchHeads(donor, what="k", where=where))
    frozen = FreezeMaps(donor, where=where, same_tokens=False)
    assert (both - run(model, inputs, frozen)).abs().max() <= 1e-6
    # One head of two that share a key head: the other one keeps it.
    one = taken(model, inputs, where, what="map", rows="last")
    with torch.no_grad(), capture(model, where, PatchHeads(donor, {1: [2]}, what="k"), rows="last") as seen:
        model(**inputs)
    assert torch.equal(seen.get()[:, [0, 1, 3]], one.get()[:, [0, 1, 3]])
    assert not torch.allclose(seen.get()[:, 2], one.get()[:, 2], atol=1e-3)


@torch.no_grad()
def test_rows_are_paired_in_order_and_keys_stay_patched_in_decoding() -> None:
    model, inputs, other = model_of("llama"), prompts(5), prompts(6)
    ends = taken(model, other, rows="prompt_end", what="output")
    with capture(
        model,
        Where(layers=[1]),
        PatchHeads(ends, {1: [0, 1, 2, 3]}, rows=[[(2, 3)], [(5, 6)], [(4, 5)]]),
        what="output",
    ) as seen:
        model(**inputs)
    for b, row in enumerate((2, 5, 4)):
        assert torch.equal(seen.get(sample=b)[:, row], ends.get(1, sample=b)[:, 0])
    donor = taken(model, other, rows=(2, 5), what="k")
    patch = PatchHeads(donor, what="k", rows=(2, 5))
    with steer(model, patch):
        cached = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        whole = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            use_cache=False,
        )
    for ours, theirs in zip(cached.logits, whole.logits, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("rows", [(2, 6), [1, 4], "prompt", [[(2, 4)], [(0, 2)], [(5, 6)]]], ids=str)
@torch.no_grad()
def test_rows_by_number_are_paired_over_chunks_and_windows(name: str, rows: Any) -> None:
    """A chunk of a prompt has some of them, and a cache with a window keeps the last of the keys."""
    model, inputs, other = model_of(name), prompts(5, name), prompts(6, name)
    given = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    kept = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for what in ("output", "v") if rows != "prompt" else ("output",):
        donor = taken(model, other | given, rows=rows, what=what)
        with steer(model, PatchHeads(donor, HEADS, what, rows=rows)):
            whole = model.generate(**inputs, **kept, use_cache=False)
            for ways in ({}, {"prefill_chunk_size": 4}):
                found = model.generate(**inputs, **kept, **ways)
                for ours, theirs in zip(found.logits, whole.logits, strict=True):
                    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max())), (what, ways)


def test_subspaces() -> None:
    model, inputs, other = model_of("llama"), prompts(5), prompts(6)
    donor = taken(model, other, what=("output", "v"))
    full = subspace(donor, 16, what="output")
    where = Where(layers=[1])
    assert {len(mean) for mean, _ in full.values()} == {16} and len(full) == 12
    whole = run(model, inputs, PatchHeads(donor, where=where))
    assert (run(model, inputs, PatchHeads(donor, where=where, basis=full)) - whole).abs().max() <= 1e-4
    base = plain(model, inputs)
    assert (run(model, inputs, PatchHeads(None, where=where, basis=full), control=True) - base).abs().max() <= 1e-4
    low = subspace(donor, 2, what="output")
    with torch.no_grad(), capture(model, where, PatchHeads(None, where=where, basis=low), what="output") as seen:
        model(**inputs)
    mean, basis = low[1, 3]
    rows = seen.get(sample=0)[3] - mean
    assert torch.linalg.matrix_rank(rows, atol=1e-4) <= 2 and (rows - rows @ basis @ basis.T).abs().max() <= 1e-5
    # Between the means of two labels: one dimension, through both.
    labelled = subspace(taken(model, other, where, rows="prompt_end", what="output"), labels=["a", "b", "a"])
    ends = taken(model, other, where, rows="prompt_end", what="output").get()[:, 0, 0]
    line = (ends[[0, 2]].mean(0) - ends[1]) / (ends[[0, 2]].mean(0) - ends[1]).norm()
    basis = labelled[1, 0][1]
    assert basis.shape == (16, 1) and abs(float(basis[:, 0] @ line)) == pytest.approx(1.0, abs=1e-4)
    assert {h for _, h in subspace(donor, 2, what="v")} == {0, 1, 2, 3}


# What is refused.


def refusal(inputs: dict[str, Tensor], message: str, *methods: Intervention) -> None:
    with pytest.raises((SelectionError, CompositionError), match=message):
        run(model_of("llama"), inputs, *methods)


def test_maps_that_are_none() -> None:
    inputs = prompts(5)
    P = torch.ones(12, 12).tril()
    P = P / P.sum(-1, keepdim=True)
    refusal(inputs, r"12 rows, and sample 1 has 11 tokens", InjectMap(P))
    one = {k: v[:1] for k, v in inputs.items()}
    refusal(one, r"shape \[3, 12, 12\]", InjectMap(P.expand(3, 12, 12)))
    refusal(one, r"negative or not finite \(least -1\)", InjectMap(-P))
    refusal(one, "sums to 0.5", InjectMap(0.5 * P))
    refusal(one, "keys that it does not see", InjectMap(torch.full((12, 12), 1 / 12)))
    refusal(one, "layer or site", InjectMap({0: P}))
    refusal(one, "reweights them in the same heads", InjectMap(P, {1: [0]}), ZeroTuning({1: [0]}, 3.0))
    donor = taken(model_of("llama"), inputs, what=("q", "k", "output"))
    refusal({k: v[:2] for k, v in inputs.items()}, "the source has 3 samples", PatchHeads(donor))
    refusal(prompts(6), "other tokens than the clean run, from token 0 on", FreezeMaps(donor))
    refusal(inputs, "edited them", HeadShift(), FreezeMaps(donor))
    ends = taken(model_of("llama"), inputs, rows="prompt_end", what="output")
    refusal(inputs, "2 rows of sample 0 are chosen, and the donor has 1", PatchHeads(ends, rows=[3, 4]))
    wide = tiny_transformers("llama", head_dim=32)
    refusal(inputs, "width 32, those here 16", PatchHeads(taken(wide, inputs, what="output")))


class HeadShift(Intervention):
    """Moves queries."""

    def inputs(self, call: Any) -> Any:
        return call.q + 1.0, call.k, call.v


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: InjectMap("prevoius"), "Did you mean 'previous'"),
        (lambda: InjectMap("block:0"), "one of"),
        (lambda: InjectMap("span"), "needs spans"),
        (lambda: InjectMap("sentence"), "needs sentence_ends"),
        (lambda: InjectMap("self", mode="scores"), "a pattern has no scores"),
        (lambda: InjectMap("self", share=0.5), "give keys"),
        (lambda: InjectMap("self", keys="picture"), "looked for in the text"),
        (lambda: InjectMap(3), "give a Captured"),
        (lambda: InjectMap.drawing(torch.zeros(4, 4)), "not all zero"),
        (lambda: PatchHeads(), "needs a source, a basis"),
        (lambda: PatchHeads(basis={(0, 0): (torch.zeros(4), torch.ones(4, 2))}), "not orthonormal"),
        (lambda: FreezeMaps(torch.zeros(3, 3)), "of the clean run"),
    ],
)
def test_arguments_that_are_none(build: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        build()
