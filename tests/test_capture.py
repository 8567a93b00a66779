"""`capture`: what it takes is the model's own, whatever the call; nothing moves; memory is that of the rows."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnsteer import AttentionBuckets, Captured, HeadGate, InjectMap, PatchHeads, Where, ZeroTuning, capture, steer
from attnsteer.errors import (
    CaptureTooLarge,
    NeverFired,
    SelectionError,
    SerializationError,
    UnsupportedHost,
)
from attnsteer.testing import tiny_call, tiny_pipeline, tiny_transformers, tiny_transformers_inputs
from tests.reference.dense import dense_map, dense_scores


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_transformers("llama")


@pytest.fixture(scope="module")
def inputs(llama: nn.Module) -> dict[str, Tensor]:
    return tiny_transformers_inputs("llama", llama, batch=3, length=12, padding="left", seed=1)


def eager_maps(model: nn.Module, inputs: dict[str, Tensor], grad: bool = False) -> list[Tensor]:
    model.set_attn_implementation("eager")
    try:
        with torch.set_grad_enabled(grad):
            return list(model(**inputs, output_attentions=True).attentions)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("rows", [None, "last", (2, 6), [3, 5], [[(0, 2)], [(4, 7), (9, 10)], [(1, 2)]]], ids=str)
@torch.no_grad()
def test_rows_of_maps_are_those_of_eager_attention(llama: nn.Module, inputs: dict[str, Tensor], rows: Any) -> None:
    plain, maps = llama(**inputs).logits, eager_maps(llama, inputs)
    with capture(llama, rows=rows) as seen:
        assert torch.equal(llama(**inputs).logits, plain)
    for layer, A in enumerate(maps):
        for b, valid in enumerate(inputs["attention_mask"].bool()):
            own, T = A[b][:, valid][:, :, valid], int(valid.sum())
            wanted = {
                "None": range(T),
                "last": [T - 1],
                "(2, 6)": range(2, 6),
                "[3, 5]": [3, 5],
            }.get(str(rows)) or [i for start, stop in rows[b] for i in range(start, stop)]
            assert seen.rows(layer, sample=b).tolist() == list(wanted)
            assert (seen.get(layer, sample=b) - own[:, list(wanted)]).abs().max() <= 1e-6


@torch.no_grad()
def test_queries_keys_values_and_outputs_make_the_map_and_its_output(
    llama: nn.Module, inputs: dict[str, Tensor]
) -> None:
    with capture(llama, Where(layers=[1]), what=("map", "output", "q", "k", "v")) as seen:
        llama(**inputs)
    (take,) = seen.takes
    assert take.heads == (0, 1, 2, 3) and take.kv_heads == (0, 1)
    for b in range(3):
        q, k, v, A, o = (seen.get(1, what, sample=b) for what in ("q", "k", "v", "map", "output"))
        T = q.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
        ours = dense_map(dense_scores(q[None], k[None], take.scale, mask=mask))[0]
        assert (ours - A).abs().max() <= 1e-6
        assert (A @ v.repeat_interleave(2, dim=0) - o).abs().max() <= 1e-5


@torch.no_grad()
def test_decoding_is_one_uncached_call(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    with capture(llama, what=("map", "output", "q", "k", "v")) as seen:
        made = llama.generate(**inputs, max_new_tokens=4, do_sample=False)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with capture(llama, what=seen.what) as whole:
        llama(input_ids=made[:, :-1], attention_mask=mask, position_ids=position, use_cache=False)
    assert len(seen.takes) == 4 * len(whole.takes) and whole.ids == seen.ids
    for layer in range(3):
        for b in range(3):
            for what in seen.what:
                ours, theirs = seen.get(layer, what, sample=b), whole.get(layer, what, sample=b)
                assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 2e-5, what
    last = seen.get(0, "map")
    assert last.shape == (3, 4, 15, 15) and not last[0, :, 0, 12:].any()


@pytest.mark.parametrize("keys", ["first", "self", "previous", "prompt", "generated", [[(1, 3)]] * 3], ids=str)
@torch.no_grad()
def test_masses_are_sums_of_the_map(llama: nn.Module, inputs: dict[str, Tensor], keys: Any) -> None:
    with capture(llama, Where(layers=[2]), what=("map", "mass"), keys=keys) as seen:
        llama.generate(**inputs, max_new_tokens=3, do_sample=False)
    for b in range(3):
        A, mass = seen.get(what="map", sample=b), seen.get(what="mass", sample=b)
        i, j = torch.meshgrid(torch.arange(A.shape[1]), torch.arange(A.shape[2]), indexing="ij")
        prompt = int(inputs["attention_mask"][b].sum())
        inside = {
            "first": j == 0,
            "self": i == j,
            "previous": i == j + 1,
            "prompt": j < prompt,
            "generated": j >= prompt,
        }.get(str(keys), (j >= 1) & (j < 3))
        assert ((A * inside).sum(-1) - mass).abs().max() <= 1e-6


def test_gradients_are_those_of_eager_attention(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    embeddings = llama.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"attention_mask": inputs["attention_mask"]}
    weight = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0)) * inputs["attention_mask"][:, None]

    def gradient(rows: Any) -> Tensor:
        leaf = embeddings.clone().requires_grad_()
        A = rows({"inputs_embeds": leaf, **given})
        (A * weight).sum().backward()
        return leaf.grad

    def ours(values: dict[str, Tensor]) -> Tensor:
        with capture(llama, Where(layers=[2]), rows="last", gradients=True) as seen:
            llama(**values)
        return seen.get()[:, :, 0]

    theirs = gradient(lambda values: eager_maps(llama, values, grad=True)[2][:, :, -1])
    assert theirs.abs().max() > 1e-3
    assert (gradient(ours) - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1.0)


@torch.no_grad()
def test_maps_are_in_full_precision_under_autocast(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    """As of the half-precision queries and keys that the kernel takes; its own map changes nothing there."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = llama(**inputs).logits
        with capture(llama, what=("map", "q", "k")) as seen:
            llama(**inputs)
        with steer(llama, InjectMap(seen), control=True):
            assert torch.equal(llama(**inputs).logits, base)
    for layer in range(3):
        for b in range(3):
            q, k, found = (seen.get(layer, what, sample=b) for what in ("q", "k", "map"))
            assert q.dtype == torch.bfloat16 and found.dtype == torch.float32
            own = torch.ones(q.shape[1], q.shape[1]).tril().log()
            wanted = dense_map(dense_scores(q[None].float(), k[None].float(), q.shape[-1] ** -0.5, mask=own))[0]
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@torch.no_grad()
def test_edits_of_other_methods_are_in_what_is_taken(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    # They divide the heads into groups, which come back as one.
    methods = [ZeroTuning({1: [0, 3]}, 4.0), HeadGate({(1, 2): 0.5})]
    with steer(llama, *methods):
        plain = llama(**inputs).logits
    with capture(llama, Where(layers=[0, 1])) as before:
        llama(**inputs)
    with capture(llama, Where(layers=[0, 1]), *methods, what=("map", "output", "k")) as seen:
        assert (llama(**inputs).logits - plain).abs().max() <= 1e-5
    old, A = before.get(1, sample=0), seen.get(1, "map", sample=0)
    new = old.clone()
    new[..., 0] *= 4
    new /= new.sum(-1, keepdim=True)
    old[[0, 3]] = new[[0, 3]]
    assert len(seen.of(1)) == 1 and seen.get(1, "k").shape[1] == 2
    assert (A - old).abs().max() <= 1e-6
    with capture(llama, Where(layers=[1]), methods[0], what="output") as ungated:
        llama(**inputs)
    assert (seen.get(1, "output")[:, 2] - 0.5 * ungated.get(1)[:, 2]).abs().max() <= 1e-6


def test_a_pipeline_is_captured_by_step_and_branch() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=2)
    plain = pipe(**call)[0]
    where = Where(kinds="cross", layers=[0, 1], branches="cond")
    with capture(pipe, where, what=("map", "mass"), keys="first") as seen:
        assert torch.equal(torch.as_tensor(pipe(**call)[0]), torch.as_tensor(plain))
    site = seen.sites[0]
    assert {t.step for t in seen.takes} == {0, 1}
    A = seen.get(site, "map", step=1)
    valid = seen.rows(site, step=1)[:, 0] >= 0
    assert 0 < int(valid.sum()) < len(valid)
    assert torch.allclose(A[valid].sum(-1), torch.ones(()), atol=1e-5) and not A[~valid].any()
    assert torch.allclose(A[..., 0], seen.get(site, "mass", step=1), atol=1e-6)
    with pytest.raises(SelectionError, match="give step= and branch="):
        seen.get(site, "map")


@torch.no_grad()
def test_files_are_what_was_in_memory(llama: nn.Module, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    def take(**options: Any) -> Captured:
        with capture(llama, rows="last", what=("map", "v"), **options) as seen:
            llama.generate(**inputs, max_new_tokens=3, do_sample=False)
        return seen

    kept, streamed = take(), take(to=tmp_path / "streamed")
    assert streamed.bytes < kept.bytes / 2 and not any(t.tensors for t in streamed.takes)
    kept.save(tmp_path / "saved")
    copies = copy.deepcopy(kept), pickle.loads(pickle.dumps(kept)), pickle.loads(pickle.dumps(streamed))
    for other in (streamed, Captured.load(tmp_path / "streamed"), Captured.load(tmp_path / "saved"), *copies):
        assert other.what == kept.what and other.ids == kept.ids and other.sites == kept.sites
        for layer in range(3):
            for what in kept.what:
                assert torch.equal(other.get(layer, what), kept.get(layer, what))
    with pytest.raises(SerializationError, match="not an empty folder"):
        take(to=tmp_path / "saved")
    (tmp_path / "saved" / "000002.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(SerializationError, match="000002"):
        Captured.load(tmp_path / "saved")
    (tmp_path / "streamed" / "capture.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(SerializationError, match="not one of this library's"):
        Captured.load(tmp_path / "streamed")


@torch.no_grad()
def test_calls_of_several_sequences_are_not_joined(llama: nn.Module, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    """Beams that moved, guidance, several prompts, batches of other sizes; steps without a cache or with drafts are one."""
    kept = {"max_new_tokens": 5, "do_sample": False}
    first = {k: v[:1] for k, v in inputs.items()}
    with capture(llama, what=("map", "output")) as beams:
        llama.generate(**inputs, **kept, num_beams=3)
    with capture(llama, what=("map", "output")) as guided:
        llama.generate(**inputs, **kept, guidance_scale=1.5)
    with capture(llama, what=("map", "output")) as prompts:
        llama(**first)
        llama(first["input_ids"].flip(1))
    with capture(llama, what=("map", "output")) as sizes:
        llama(**inputs)
        llama(**first)
    with capture(llama, None, AttentionBuckets((10000.0, 300.0)), what=("map", "output")) as bases:
        llama(**inputs)
    beams.save(tmp_path / "beams")
    for found in (beams, guided, prompts, sizes, bases, Captured.load(tmp_path / "beams")):
        for call in (
            lambda f=found: f.get(0, "map", sample=0),
            lambda f=found: f.get(0, "map"),
            lambda f=found: f.rows(0),
        ):
            with pytest.raises(SelectionError, match="not of one sequence"):
                call()
        with pytest.raises(SelectionError, match="not of one sequence"), steer(llama, PatchHeads(found)):
            llama(**inputs)
        assert len({t.tensor("map").shape[1] for t in found.takes}) == 1
    ways: list[tuple[dict[str, Any], Any]] = [
        ({"num_beams": 3}, "prompt"), ({}, None), ({"use_cache": False}, None), ({"prompt_lookup_num_tokens": 3}, None),
    ]  # fmt: skip
    for options, rows in ways:
        with capture(llama, rows=rows, what="map") as seen:
            llama.generate(**(first if "prompt_lookup_num_tokens" in options else inputs), **kept, **options)
        assert not seen.mixed and seen.get(0, sample=0).shape[1] >= 9


def test_layers_that_are_computed_again_are_taken_once(inputs: dict[str, Tensor]) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_transformers("llama").train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        with capture(model, Where(layers=[1]), gradients=True) as seen:
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
            seen.get(1)[:, :, -1, 0].sum().backward()
        assert len(seen.takes) == 1
        found.append(embeds.grad)
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


class Peak(TorchDispatchMode):
    """The bytes of the largest storage that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


@torch.no_grad()
def test_memory_is_that_of_the_rows_at_8k_tokens() -> None:
    model = tiny_transformers("llama", num_hidden_layers=1, max_position_embeddings=8192)
    ids = torch.randint(4, 90, (1, 8192), generator=torch.Generator().manual_seed(0))
    base, peak = Peak(), Peak()
    with base:
        model.model(input_ids=ids, use_cache=False)
    with capture(model.model, rows=(4000, 4064), what=("map", "mass", "output"), keys="first") as seen, peak:
        model.model(input_ids=ids, use_cache=False)
    A = seen.get(0, "map")
    assert A.shape == (1, 4, 64, 8192) and torch.allclose(A.sum(-1), torch.ones(()), atol=1e-5)
    kn = 4 * 4 * 64 * 8192
    assert peak.bytes <= max(base.bytes, kn)  # one map of one head alone is 256 MiB, these rows are 8 MiB
    assert seen.bytes <= 1.1 * kn


@torch.no_grad()
def test_a_capture_that_does_not_fit_says_how_much_it_needs(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    need = 3 * 4 * 12 * 12 * 4
    message = r"takes 6.8 KiB, and the 3 sites of it that are left 20.2 KiB"
    with pytest.raises(CaptureTooLarge, match=message), capture(llama, limit=3 * need - 1):
        llama(**inputs)
    with capture(llama, limit=4 * need) as seen:
        llama(**inputs)
        with pytest.raises(CaptureTooLarge, match="are held"):
            llama(**inputs)
    assert len(seen.takes) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "maps"}, "Did you mean 'map'"),
        ({"what": "mass"}, "of which keys the mass is taken"),
        ({"what": "mass", "keys": "frist"}, "Did you mean 'first'"),
        ({"rows": [-1]}, "give None"),
        ({"rows": (5, 2)}, "start, stop"),
        ({"where": Where(rows="last")}, "give the rows to capture itself"),
        ({"limit": -1}, "number of bytes"),
        ({"gradients": True, "to": "folder"}, "leave `to` out"),
    ],
    ids=str,
)
def test_a_selection_that_is_none(llama: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message), capture(llama, options.pop("where", None), **options):
        pass


def test_calls_that_cannot_be_captured(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    for mode, name in ((torch.no_grad(), "no_grad"), (torch.inference_mode(), "inference_mode")):
        message = f"torch.{name}, as all of `generate`"
        with mode, pytest.raises(UnsupportedHost, match=message), capture(llama, gradients=True):
            llama(**inputs)
    frozen = tiny_transformers("llama").requires_grad_(False)
    with pytest.raises(UnsupportedHost, match="requires a gradient"), capture(frozen, gradients=True):
        frozen(**inputs)
    with pytest.raises(NeverFired, match="never acted"), capture(llama):
        pass
    with torch.no_grad(), pytest.raises(SelectionError, match=r"'lest'.*mean 'last'"), capture(llama, rows="lest"):
        llama(**inputs)
    with torch.no_grad(), capture(llama, what=("q", "k")) as seen:
        llama(**inputs)
    with pytest.raises(SelectionError, match="several sites"):
        seen.get(what="q")
    with pytest.raises(SelectionError, match="say which"):
        seen.get(0)
    with pytest.raises(SelectionError, match="was not taken"):
        seen.get(0, "map")
    with pytest.raises(SelectionError, match="sample 3"):
        seen.get(0, "q", sample=3)


def test_rows_that_no_call_has_are_refused() -> None:
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model)
    for rows in ([99], (99, 120), "generated"):
        with pytest.raises(SelectionError, match="numbered from 0 to 11"), capture(model, rows=rows), torch.no_grad():
            model(**inputs)
    with pytest.raises(ZeroDivisionError), capture(model, rows=[99]), torch.no_grad():
        model(**inputs)
        raise ZeroDivisionError
    with capture(model, rows=[12]) as seen, torch.no_grad():
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert len(seen.takes)
