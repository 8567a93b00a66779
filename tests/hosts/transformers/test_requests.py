"""Every row knows its request: what laws do not vary, one test for each way in which rows were once taken for others."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

from attnsteer import ACT, PASTA, HeadGate, Intervention, SpotLight, Where, ZeroTuning, detach, steer
from attnsteer.call import AttnCall, Reweight
from attnsteer.errors import CompositionError, SelectionError, UnsupportedHost
from attnsteer.hosts.transformers.masks import roles_of_mask, whole_mask
from attnsteer.testing import tiny_transformers
from attnsteer.testing.fingerprint import fingerprint

HEADS = {1: [0, 2]}
METHODS = {
    "zerotuning": ZeroTuning(HEADS, 4.0),
    "act": ACT(HEADS, 0.4, 0.1),
    "pasta": PASTA([[(1, 3)]], HEADS, 0.05),
    "spotlight": SpotLight([[(1, 3)]], 0.6, where=Where(heads=HEADS)),
}
OPTIONS = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_transformers("llama")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(8, 90, shape, generator=torch.Generator().manual_seed(seed))


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def controlled(model: nn.Module, *methods: Any) -> Any:
    return steer(model, *methods, control=True)


# Masks.


@pytest.mark.parametrize("host", ["llama", "mistral"])
@each_method
def test_padding_beyond_the_first_chunk_of_a_static_cache(host: str, method: Any) -> None:
    """`generate` makes 4-D masks for static caches; those of later chunks say nothing of padding in the rows themselves."""
    model, x = tiny_transformers(host), tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), x], dim=1)
    more: dict[str, Any] = {"cache_implementation": "static", "prefill_chunk_size": 5}
    if isinstance(method, ACT):
        # Each chunk uses the rows seen so far, by definition.
        more.pop("prefill_chunk_size")
    with controlled(model, method):
        alone = model.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=3, **OPTIONS)
        beside = model.generate(
            input_ids=padded, attention_mask=(padded != 0).long(), max_new_tokens=3, **OPTIONS, **more
        )
    assert max(far(a, b) for a, b in zip(alone.logits, beside.logits, strict=True)) <= 1e-5


def test_a_block_mask_of_flex_attention_says_what_is_padding() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    model, x = tiny_transformers("llama", attn_implementation="flex_attention"), tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), x], dim=1)
    valid = padded != 0
    mask = create_block_mask(lambda b, h, i, j: (j <= i) & valid[b, j], 1, None, 12, 12, device="cpu")
    position = (valid.long().cumsum(dim=1) - 1).clamp_min(0)
    with controlled(model, METHODS["zerotuning"]):
        beside = model(input_ids=padded, attention_mask=mask, position_ids=position).logits[:, 3:]
        assert far(beside, model(input_ids=x).logits) <= 1e-5


def test_a_padding_mask_of_one_row_serves_the_batch(llama: nn.Module) -> None:
    x = tokens(3, 7)
    with controlled(llama, PASTA([[(1, 3)]] * 3, HEADS, 0.05)):
        assert far(llama(input_ids=x, attention_mask=torch.ones(1, 7)).logits, llama(input_ids=x).logits) <= 1e-5


TRIANGLE = torch.ones(7, 7).tril().bool()[None, None]


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.where(TRIANGLE, 0.0, -1e9), "-1e.09.*bool mask"),
        (torch.where(TRIANGLE, 0.0, -1e4), "-1e.04.*bool mask"),
        (torch.cat([TRIANGLE, TRIANGLE, TRIANGLE, TRIANGLE & (torch.arange(7) > 2)], dim=1), "one mask for all heads"),
        (TRIANGLE[0], "has 3 axes"),
    ],
    ids=["-1e9", "-1e4", "heads", "3-D"],
)
def test_masks_that_do_not_say_what_is_seen_are_refused(llama: nn.Module, mask: Tensor, says: str) -> None:
    with controlled(llama, METHODS["zerotuning"]), pytest.raises(UnsupportedHost, match=says):
        llama(input_ids=tokens(1, 7), attention_mask=mask)


def test_padding_that_a_library_lets_see_everything_is_padding(llama: nn.Module) -> None:
    """In front of a sample, so that no row of its mask is empty: the sample is as it is alone."""
    ids, seen = tokens(1, 9), torch.ones(9, 9).tril().bool() & (torch.arange(9) >= 3)
    seen[:3] = True
    positions = torch.tensor([[0, 0, 0, *range(6)]])
    for method in (METHODS["zerotuning"], METHODS["pasta"], METHODS["act"]):
        with controlled(llama, method):
            found = llama(
                input_ids=ids, attention_mask=seen[None, None], position_ids=positions, use_cache=False
            ).logits
            assert far(found[:, 3:], llama(input_ids=ids[:, 3:], use_cache=False).logits) <= 1e-5


def packed_mask(request: list[int]) -> Tensor:
    r, slot = torch.tensor(request), torch.arange(len(request))
    return (r[:, None] == r) & (slot <= slot[:, None])


def test_interleaved_sequences_are_refused() -> None:
    with pytest.raises(UnsupportedHost, match="interleaves"):
        roles_of_mask(packed_mask([0, 1, 0, 1, 0, 1])[None])


def test_a_row_that_sees_two_sequences_is_refused() -> None:
    mask = packed_mask([0, 0, 0, 1, 1, 1])
    mask[5, 0] = True
    with pytest.raises(UnsupportedHost, match="see several"):
        roles_of_mask(mask[None])


def test_a_tree_is_one_sequence() -> None:
    mask = torch.eye(6, dtype=torch.bool)
    for child, parent in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 2)):
        mask[child] |= mask[parent]
    assert roles_of_mask(mask[None]) == (None, None)


def test_padding_that_sees_everything() -> None:
    mask = torch.ones(5, 5).tril().bool() & (torch.arange(5) >= 2)
    mask[:2] = True
    valid, request = roles_of_mask(mask[None])
    assert valid.tolist() == [[False, False, True, True, True]] and request is None


@pytest.mark.parametrize(
    "method",
    [
        SpotLight([[(8, 10)]], 0.6, where=Where(heads=HEADS)),
        PASTA([[(8, 10)]], HEADS, 0.05),
        HeadGate({(1, 0): 0.0}, where=Where(rows=(8, 10))),
    ],
)
def test_masks_of_a_window_cache_say_what_is_padding(method: Any) -> None:
    """They have fewer columns than there are slots; padding in a later chunk, and behind it, is known from them all the same."""
    model, valid = tiny_transformers("mistral"), torch.tensor([[True] * 7 + [False] * 2 + [True] * 4])
    ids, positions, slot = tokens(1, 13), (valid.cumsum(dim=-1) - 1), torch.arange(13)
    seen = (slot <= slot[:, None]) & (slot > slot[:, None] - 5) & valid[0] & valid[0][:, None]

    def logits(square: bool) -> Tensor:
        cache, out = None, []
        for start, stop in ((0, 6), (6, 9), (9, 13)):
            given = seen[None, None, start:stop, max(0, start - 4) : stop] if square else valid[:, :stop].long()
            made = model(
                input_ids=ids[:, start:stop], attention_mask=given, position_ids=positions[:, start:stop],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = made.past_key_values
            out.append(made.logits[valid[:, start:stop]])
        return torch.cat(out)

    with controlled(model, method) as run, run.chunked_prefill(tokens=13):
        assert far(logits(square=True), logits(square=False)) <= 1e-5


@each_method
def test_a_mask_of_keys_alone_is_one_for_all_rows(llama: nn.Module, method: Any) -> None:
    ids, valid = tokens(1, 10), torch.tensor([[False] * 3 + [True] * 7])
    keys = valid[:, None, None]
    with controlled(llama, method):
        if isinstance(method, ACT):
            with pytest.raises(UnsupportedHost, match="see later ones, and ACT is defined on causal attention"):
                llama(input_ids=ids, attention_mask=keys)
            return
        found = llama(input_ids=ids, attention_mask=keys).logits
        rows = llama(input_ids=ids, attention_mask=keys & valid[:, None, :, None]).logits
        alone = llama(input_ids=ids[:, 3:], attention_mask=torch.ones(1, 1, 7, 7, dtype=torch.bool)).logits
    assert far(found[:, 3:], rows[:, 3:]) <= 1e-5 and far(found[:, 3:], alone) <= 1e-5


def test_a_window_that_hides_what_a_token_belongs_to_is_refused() -> None:
    """Behind a hole as wide as the window, or as a branch of a tree, a token sees itself only: no beginning, by its position."""
    model, ids, slot = tiny_transformers("mistral"), tokens(1, 11), torch.arange(11)
    line = torch.tensor([0] * 7 + [1] * 4)
    seen = (slot <= slot[:, None]) & (slot > slot[:, None] - 5) & (line == line[:, None])
    branch, packed = torch.tensor([[*range(7), 1, 2, 3, 4]]), torch.tensor([[*range(7), *range(4)]])
    method = METHODS["zerotuning"]
    with controlled(model, method):
        with pytest.raises(UnsupportedHost, match="a window hides what it belongs to"):
            model(input_ids=ids, attention_mask=seen[None, None], position_ids=branch)
        found = model(input_ids=ids, attention_mask=seen[None, None], position_ids=packed, use_cache=False).logits
        alone = model(input_ids=ids[:, 7:]).logits
    assert far(found[:, 7:], alone) <= 1e-5
    # Padding that sees itself only, in front, has any position.
    padded = torch.eye(11, dtype=torch.bool) | ((slot <= slot[:, None]) & (slot > 2) & (slot[:, None] > 2))
    valid, request = roles_of_mask(padded[None], positions=torch.tensor([[1, 1, 1, *range(8)]]))
    assert valid is None and request.tolist() == [[0, 1, 2, *[3] * 8]]


def test_padding_at_the_end_that_sees_everything_is_refused_by_statistics(llama: nn.Module) -> None:
    """Two rows that see each other and all tokens are padding, or an image: a mean over rows has no one meaning."""
    ids, slot = tokens(1, 9), torch.arange(9)
    seen = ((slot <= slot[:, None]) & (slot < 7)) | (slot[:, None] >= 7)
    with controlled(llama, METHODS["act"]), pytest.raises(UnsupportedHost, match="ACT is defined on causal attention"):
        llama(input_ids=ids, attention_mask=seen[None, None])
    with controlled(llama, METHODS["zerotuning"]):
        found = llama(input_ids=ids, attention_mask=seen[None, None]).logits[:, :7]
        assert far(found, llama(input_ids=ids[:, :7]).logits) <= 1e-5


class Letters:
    """A tokenizer: one letter for each id."""

    is_fast = False

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(200 + i) for i in ids)


def test_a_string_in_packed_rows_is_found_in_the_one_text_or_refused(llama: nn.Module) -> None:
    """Ranges count in each packed sequence; padding that sees itself only has no text."""
    ids, slot = tokens(1, 12), torch.arange(12)
    method = SpotLight(Letters().decode(ids[0, 6:8].tolist()), 0.8, tokenizer=Letters(), where=Where(heads=HEADS))
    valid = slot > 2
    seen = ((slot <= slot[:, None]) & valid & valid[:, None]) | torch.eye(12, dtype=torch.bool)
    with controlled(llama, method):
        found = llama(input_ids=ids, attention_mask=seen[None, None]).logits[:, 3:]
        assert far(found, llama(input_ids=ids[:, 3:]).logits) <= 1e-5
        positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
        with pytest.raises(SelectionError, match="row 0 holds 2 packed sequences"):
            llama(input_ids=ids, position_ids=positions, use_cache=False)
    # A range that ends after each of them, though not after all of them together.
    with controlled(llama, SpotLight([[(7, 9)]], 0.8)), pytest.raises(SelectionError, match="after its 7 tokens"):
        llama(input_ids=ids, position_ids=positions, use_cache=False)


def test_of_several_masks_that_of_full_attention_counts() -> None:
    whole, window = TRIANGLE, TRIANGLE & (torch.arange(7) > 3)
    assert torch.equal(whole_mask({"sliding_attention": window, "full_attention": whole}), whole[:, 0])
    assert whole_mask({"sliding_attention": None, "full_attention": None}) is None


@each_method
def test_packed_sequences_go_on_over_their_cache(llama: nn.Module, method: Any) -> None:
    """The mask of the next call says which of the sequences it continues; where it cannot, that is refused."""
    a, b, more = tokens(1, 6), tokens(1, 7, seed=1), tokens(1, 3, seed=2)
    request = [0] * 6 + [1] * 7
    position = torch.cat([torch.arange(6), torch.arange(7)])[None]
    seen = torch.cat([(torch.tensor(request) == 1).expand(3, -1), torch.ones(3, 3).tril().bool()], dim=1)
    with controlled(llama, method):
        first = {
            "input_ids": torch.cat([a, b], dim=1),
            "attention_mask": packed_mask(request)[None, None],
            "position_ids": position,
        }
        cache = llama(**first, use_cache=True).past_key_values
        left = copy.deepcopy(cache)
        found = llama(
            input_ids=more,
            attention_mask=seen[None, None],
            position_ids=torch.arange(7, 10)[None],
            past_key_values=cache,
        )
        alone = llama(input_ids=b, use_cache=True).past_key_values
        assert far(found.logits, llama(input_ids=more, past_key_values=alone).logits) <= 1e-5
        with pytest.raises(UnsupportedHost, match="several sequences packed"):
            llama(input_ids=more, past_key_values=left)


# Caches.


def test_a_refused_cut_is_refused_again(llama: nn.Module) -> None:
    with controlled(llama, METHODS["act"]):
        cache = llama(input_ids=tokens(1, 8), use_cache=True).past_key_values
        cache.crop(-3)
        for _ in range(2):
            with pytest.raises(UnsupportedHost, match="cut back from 8 to 5 tokens"):
                llama(input_ids=tokens(1, 4), past_key_values=cache)


def test_many_turns_forget_states_but_not_where_prompts_ended(llama: nn.Module) -> None:
    """Beyond the turns whose states are kept, a cut is refused for methods with statistics; others know what was generated."""
    for method in METHODS.values():
        with controlled(llama, method):
            cache = llama(input_ids=tokens(1, 4), use_cache=True).past_key_values
            llama(input_ids=tokens(1, 1), past_key_values=cache)
            kept = copy.deepcopy(cache)
            for turn in range(10):
                llama(input_ids=tokens(1, 2, seed=turn), past_key_values=cache)
            cache.crop(-20)
            if method.looks_ahead:
                with pytest.raises(UnsupportedHost, match="cut back"):
                    llama(input_ids=tokens(1, 1), past_key_values=cache)
            else:
                found = llama(input_ids=tokens(1, 1), past_key_values=cache).logits
                assert far(found, llama(input_ids=tokens(1, 1), past_key_values=kept).logits) <= 1e-5


def test_a_cache_that_another_hand_wrote_to_is_refused(llama: nn.Module) -> None:
    with controlled(llama, METHODS["zerotuning"]):
        cache = llama(input_ids=tokens(1, 6), use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = (torch.cat([t, t[:, :, :2]], dim=2) for t in (layer.keys, layer.values))
        with pytest.raises(UnsupportedHost, match="holds 8 tokens, of which 6"):
            llama(input_ids=tokens(1, 2), past_key_values=cache)


@each_method
@pytest.mark.parametrize("count", [1, 3, 4], ids=["fewer", "as many", "more"])
def test_a_call_that_is_broken_off_behind_a_cut_leaves_no_whole_cache(
    llama: nn.Module, method: Any, count: int
) -> None:
    """However many tokens it leaves, also where they are as many as were cut off: they are others."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    prompt, first, second = tokens(1, 6), tokens(1, 3, seed=1), tokens(1, 4, seed=2)
    with controlled(llama, method):
        cache = llama(input_ids=prompt, use_cache=True).past_key_values
        expected = llama(input_ids=second, past_key_values=copy.deepcopy(cache)).logits
        llama(input_ids=first, past_key_values=cache)
        cache.crop(-3)
        hook = llama.model.norm.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            llama(input_ids=second[:, :count], past_key_values=cache)
        hook.remove()
        with pytest.raises(UnsupportedHost, match=f"holds {6 + count} tokens, of which 6"):
            llama(input_ids=tokens(1, 1), past_key_values=cache)
        cache.crop(-count)
        assert far(llama(input_ids=second, past_key_values=cache).logits, expected) <= 1e-5


@each_method
def test_a_step_without_a_mask_over_padding_is_refused(llama: nn.Module, method: Any) -> None:
    prompt, step = tokens(1, 7), tokens(1, 1, seed=1)
    mask, kept = torch.ones_like(prompt), torch.ones(1, 8, dtype=torch.long)
    with controlled(llama, method):
        for hidden in (0, 2):
            mask[:, :hidden], kept[:, :hidden] = 0, 0
            cache = llama(input_ids=prompt, attention_mask=mask, use_cache=True).past_key_values
            expected = llama(input_ids=step, attention_mask=kept, past_key_values=copy.deepcopy(cache)).logits
            if hidden:
                with pytest.raises(UnsupportedHost, match=r"cache of 7 tokens holds padding.*\[B, 8\]"):
                    llama(input_ids=step, past_key_values=cache)
            else:
                assert far(llama(input_ids=step, past_key_values=cache).logits, expected) <= 1e-5


def test_threads_attach_and_detach_what_is_theirs() -> None:
    """Each its own layer of one model, or a model of its own; of two that want the same layer one is refused."""
    shared, own = tiny_transformers("llama"), [tiny_transformers("llama", num_hidden_layers=1) for _ in range(3)]
    before = fingerprint(shared)
    wrong: list[Any] = []

    def work(number: int) -> None:
        for turn in range(30):
            try:
                layer = number if turn % 2 else 2
                handle = steer(shared, HeadGate({(layer, 0): 0.5}), control=True)
                mine = steer(own[number], HeadGate({(0, 0): 0.5}), control=True)
                mine.remove()
                handle.remove()
            except CompositionError:
                continue
            except BaseException as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert fingerprint(shared) == before


def test_a_copy_of_a_cache_says_nothing_to_a_later_steering(llama: nn.Module) -> None:
    """Also where the later steering happens to lie at the address of the one before."""
    with controlled(llama, METHODS["act"]):
        kept = copy.deepcopy(llama(input_ids=tokens(1, 8), use_cache=True).past_key_values)
    for _ in range(5):
        gc.collect()
        with controlled(llama, METHODS["act"]), pytest.raises(UnsupportedHost, match="filled before steering"):
            llama(input_ids=tokens(1, 1), past_key_values=copy.deepcopy(kept))


# Gradients.


@pytest.mark.parametrize(
    "reentrant", [None, False, True], ids=["without checkpoints", "checkpoints", "re-entrant ones"]
)
def test_a_backward_pass_behind_the_steering_is_that_of_its_forward_or_refused(reentrant: bool | None) -> None:
    model = tiny_transformers("llama").train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = []
    for inside in (True, False):
        model.zero_grad()
        with torch.enable_grad():
            with steer(model, ZeroTuning(HEADS, 4.0)):
                loss = model(input_ids=tokens(1, 6), use_cache=False).logits.square().mean()
                if inside:
                    loss.backward()
            if not inside and reentrant is not None:
                with pytest.raises(UnsupportedHost, match="removed between a forward and its backward"):
                    loss.backward()
                return
            if not inside:
                loss.backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.equal(*found)


@dataclass(frozen=True)
class Once(Intervention):
    """Scales the attention to the first token in the first call that a sequence has at a site."""

    kinds = ("self",)
    needs = ("tokens",)

    def weights(self, call: AttnCall) -> Reweight:
        factor = 1.0 if "seen" in call.state else 5.0
        call.state["seen"] = torch.ones(call.map.shape[0], 1)
        return Reweight(((call.first_key(), factor),))


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoints", "re-entrant ones"])
def test_layers_that_are_computed_again_find_the_state_that_they_found(reentrant: bool) -> None:
    found = []
    for checkpoints in (False, True):
        model = tiny_transformers("llama").train()
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        with torch.enable_grad(), steer(model, Once()):
            model(input_ids=tokens(1, 6), use_cache=False).logits.square().mean().backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


# Generation.


@each_method
def test_a_frozen_continuation_is_that_decoded_token_by_token(llama: nn.Module, method: Any) -> None:
    more = tokens(1, 3, seed=1)
    with steer(llama, method) as run:
        cache = llama(input_ids=tokens(1, 9), use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        steps = [llama(input_ids=more[:, [i]], past_key_values=cache).logits for i in range(3)]
        with run.freeze():
            whole = llama(input_ids=more, past_key_values=copied).logits
    assert far(whole, torch.cat(steps, dim=1)) <= 1e-5


@each_method
def test_a_prompt_that_begins_like_another_is_one_of_its_own(llama: nn.Module, method: Any) -> None:
    """A generation inside that goes on behind the outer one's prompt is no assistant of it."""
    x = tokens(1, 9)
    longer, found = torch.cat([x, tokens(1, 4, seed=1)], dim=1), []
    inner = {"input_ids": longer, "attention_mask": torch.ones_like(longer), "max_new_tokens": 4, **OPTIONS}

    class Beside(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            found.append(llama.generate(**inner))
            return torch.zeros(1, dtype=torch.bool)

    with controlled(llama, method):
        llama.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=1, stopping_criteria=[Beside()])
        alone = llama.generate(**inner)
    assert max(far(a, b) for a, b in zip(found[0].logits, alone.logits, strict=True)) <= 1e-5


@each_method
def test_an_assistant_with_a_steering_of_its_own(llama: nn.Module, method: Any) -> None:
    """Its prompt is that of the first round, whatever was taken since; statistics of a prompt are refused before it starts."""
    draft, x = tiny_transformers("llama", num_hidden_layers=2), tokens(1, 9)
    phases: list[tuple[int, str]] = []

    class Said(type(method)):
        def weights(self, call: Any) -> Any:
            phases.append((call.past + call.rows.size, call.phase))
            return super().weights(call)

    said = Said(**{f.name: getattr(method, f.name) for f in fields(method)})
    options = {"input_ids": x, "attention_mask": torch.ones_like(x), "max_new_tokens": 8, **OPTIONS}
    with controlled(llama, method):
        expected = llama.generate(**options)
        with controlled(draft, said):
            if method.looks_ahead:
                with pytest.raises(UnsupportedHost, match="attached to an assistant"):
                    llama.generate(**options, assistant_model=draft)
                return
            assisted = llama.generate(**options, assistant_model=draft)
    assert max(far(a, b) for a, b in zip(expected.logits, assisted.logits, strict=True)) <= 1e-5
    assert {phase for length, phase in phases if length > 10} == {"decode"}


@each_method
def test_a_bool_mask_that_eager_attention_adds_is_refused_also_behind_other_masks(method: Any) -> None:
    model = tiny_transformers("llama", attn_implementation="eager")
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with controlled(model, method):
        expected = model(input_ids=tokens(1, 6), use_cache=False).logits
        with pytest.raises(UnsupportedHost, match="attention_mask is bool"):
            model(input_ids=tokens(1, 6), attention_mask=mask, use_cache=False)
        least = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        assert far(model(input_ids=tokens(1, 6), attention_mask=least, use_cache=False).logits, expected) <= 1e-5


def test_a_generation_inside_another_has_its_own_prompt(llama: nn.Module) -> None:
    x, other, found = tokens(1, 9), tokens(1, 5, seed=1), []
    inner = {"input_ids": other, "attention_mask": torch.ones_like(other), "max_new_tokens": 6, **OPTIONS}

    class Beside(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            found.append(llama.generate(**inner))
            return torch.zeros(1, dtype=torch.bool)

    with controlled(llama, ZeroTuning(HEADS, 4.0, where=Where(phases="prefill"))):
        llama.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=2, stopping_criteria=[Beside()])
        alone = llama.generate(**inner)
    assert len(found) == 2
    for out in found:
        assert max(far(a, b) for a, b in zip(out.logits, alone.logits, strict=True)) <= 1e-5


@pytest.mark.parametrize("same", [False, True], ids=["another input", "the same input"])
def test_a_generation_of_the_same_shape_inside_another(same: bool) -> None:
    """Behind an encoder: what the decoder of each begins with is its own prompt."""
    model, found = tiny_transformers("bart"), []
    outer = {"input_ids": tokens(1, 9), "max_new_tokens": 4, **OPTIONS}
    begun = torch.cat([torch.full((1, 1), 2), tokens(1, 3, seed=2)], dim=1)
    inner = {**outer, "input_ids": tokens(1, 9, seed=0 if same else 1), "decoder_input_ids": begun}

    class Beside(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            found.append(model.generate(**inner))
            return torch.zeros(1, dtype=torch.bool)

    with controlled(model, HeadGate({(0, 1): 0.1, (1, 2): 3.0}, where=Where(phases="prefill", modules=r".*decoder.*"))):
        plain, alone = model.generate(**outer), model.generate(**inner)
        made = model.generate(**outer, stopping_criteria=[Beside()])
    assert len(found) == 4
    for out, wanted in ((made, plain), *((o, alone) for o in found)):
        assert max(far(a, b) for a, b in zip(out.logits, wanted.logits, strict=True)) <= 1e-5


@pytest.mark.parametrize("same", [False, True], ids=["another input", "the same input"])
@pytest.mark.parametrize("outer_too", [False, True], ids=["the inner one", "both"])
def test_a_guided_generation_of_the_same_shape_inside_another(llama: nn.Module, outer_too: bool, same: bool) -> None:
    """Its unconditional stream has its own prompt, also where no cache remembers it."""
    guided = lambda n, seed: {"guidance_scale": 1.7, "negative_prompt_ids": tokens(1, n, seed=seed), "use_cache": False}  # noqa: E731
    outer = {
        "input_ids": tokens(1, 9),
        "attention_mask": torch.ones(1, 9, dtype=torch.long),
        "max_new_tokens": 3,
        **OPTIONS,
    }
    inner = {**outer, "input_ids": tokens(1, 9, seed=0 if same else 1), **guided(7, 2)}
    outer, found = outer | guided(4, 3) if outer_too else outer, []

    class Beside(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            found.append(llama.generate(**inner, output_scores=True))
            return torch.zeros(1, dtype=torch.bool)

    with controlled(llama, ZeroTuning(HEADS, 4.0, where=Where(phases="prefill"))):
        plain, alone = (llama.generate(**given, output_scores=True) for given in (outer, inner))
        made = llama.generate(**outer, output_scores=True, stopping_criteria=[Beside()])
    assert len(found) == 3
    for out, wanted in ((made, plain), *((o, alone) for o in found)):
        assert max(far(a, b) for a, b in zip(out.scores, wanted.scores, strict=True)) <= 3e-5


@pytest.mark.parametrize("cached", [True, False])
def test_each_stream_of_a_guided_generation_has_its_own_prompt(llama: nn.Module, cached: bool) -> None:
    x, negative, s = tokens(1, 9), tokens(1, 6, seed=1), 1.7
    given = {"input_ids": x, "attention_mask": torch.ones_like(x), "negative_prompt_ids": negative, "guidance_scale": s}
    with controlled(llama, ZeroTuning(HEADS, 4.0, where=Where(phases="prefill"))):
        found = llama.generate(**given, **OPTIONS, output_scores=True, max_new_tokens=3, use_cache=cached)
        outs = [llama(input_ids=t, use_cache=True) for t in (x, negative)]
        for step in range(3):
            cond, uncond = (o.logits[:, -1].log_softmax(-1) for o in outs)
            assert far(found.scores[step], s * (cond - uncond) + uncond) <= 3e-5
            token = found.sequences[:, 9 + step, None]
            outs = [llama(input_ids=token, past_key_values=o.past_key_values, use_cache=True) for o in outs]


@pytest.mark.parametrize(
    "method",
    [PASTA([[(1, 3)]], HEADS, 0.05), ACT(HEADS, 0.4, 0.1), ZeroTuning(HEADS, 4.0, where=Where(phases="decode"))],
    ids=["pasta", "act", "decode only"],
)
def test_a_conversation_inside_a_generation_is_one_of_its_own(llama: nn.Module, method: Any) -> None:
    """A logits processor calls the model: a prompt, and a turn of several tokens over its cache."""
    x, found = tokens(1, 9), []

    def turns() -> Tensor:
        cache = llama(input_ids=tokens(1, 7, seed=1), use_cache=True).past_key_values
        return llama(input_ids=tokens(1, 3, seed=2), past_key_values=cache).logits

    class Aside(LogitsProcessor):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            found.append(turns())
            return scores

    given = {"input_ids": x, "attention_mask": torch.ones_like(x), "max_new_tokens": 2}
    with controlled(llama, method):
        alone, plain = turns(), llama.generate(**given, **OPTIONS)
        beside = llama.generate(**given, **OPTIONS, logits_processor=[Aside()])
    assert len(found) == 2
    assert max(far(out, alone) for out in found) <= 1e-5
    assert max(far(a, b) for a, b in zip(beside.logits, plain.logits, strict=True)) <= 1e-5


@pytest.mark.parametrize("start", [1, 4], ids=["start token", "a prompt of its own"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_ways_of_decoding_behind_an_encoder(phase: str, start: int) -> None:
    """The prompt of a decoder is what it begins with, whatever the calls are."""
    model = tiny_transformers("bart")
    given: dict[str, Any] = {"input_ids": tokens(1, 9), **OPTIONS, "max_new_tokens": 5}
    if start > 1:
        given["decoder_input_ids"] = torch.cat([torch.full((1, 1), 2), tokens(1, start - 1, seed=1)], dim=1)
    where = Where(phases=phase, modules=r".*decoder.*")
    with controlled(model, HeadGate({(0, 1): 0.1, (1, 2): 3.0}, where=where)):
        greedy = model.generate(**given)
        for way in (
            {"use_cache": False},
            {"prompt_lookup_num_tokens": 2},
            {"assistant_model": tiny_transformers("bart", seed=1)},
            {"assistant_model": model},
        ):
            other = model.generate(**given, **way)
            assert torch.equal(other.sequences, greedy.sequences)
            assert max(far(a, b) for a, b in zip(other.logits, greedy.logits, strict=True)) <= 1e-5, way


def test_a_layer_that_runs_twice_in_a_forward() -> None:
    """What a method learnt in one of its turns is not what it learnt in the other."""
    model = tiny_transformers("llama")
    model.model.layers[2] = model.model.layers[1]

    def steps() -> None:
        cache = model(input_ids=tokens(1, 7), use_cache=True).past_key_values
        model(input_ids=tokens(1, 1), past_key_values=cache)

    with controlled(model, ZeroTuning(HEADS, 4.0)):
        steps()
    with controlled(model, ACT(HEADS, 0.4, 0.1)), pytest.raises(UnsupportedHost, match="runs several times in one"):
        steps()


def test_early_exit_with_statistics_is_refused_before_it_starts(llama: nn.Module) -> None:
    x = tokens(1, 9)
    given = {"input_ids": x, "attention_mask": torch.ones_like(x), "max_new_tokens": 6, "assistant_early_exit": 1}
    for name, method in METHODS.items():
        with controlled(llama, method):
            if name == "act":
                with pytest.raises(UnsupportedHost, match="assistant_early_exit"):
                    llama.generate(**given, **OPTIONS)
                assert llama.config.num_hidden_layers == 3
                continue
            greedy = llama.generate(**{**given, "assistant_early_exit": None}, **OPTIONS)
            early = llama.generate(**given, assistant_model=llama, **OPTIONS)
        assert torch.equal(greedy.sequences, early.sequences)
        assert max(far(a, b) for a, b in zip(greedy.logits, early.logits, strict=True)) <= 1e-5


# The model around.


def test_a_steering_that_leaves_inside_a_forward_is_an_error(llama: nn.Module) -> None:
    run = controlled(llama, METHODS["zerotuning"])
    hook = llama.model.layers[0].register_forward_hook(lambda *_: run.remove())
    try:
        with pytest.raises(CompositionError, match="removed while a forward ran"):
            llama(input_ids=tokens(1, 6))
    finally:
        hook.remove()
        run.remove()


def test_export_and_trace_are_refused_by_name(llama: nn.Module) -> None:
    x = tokens(1, 6)
    with controlled(llama, METHODS["zerotuning"]):
        with pytest.raises(UnsupportedHost, match="neither exported nor traced"):
            torch.export.export(llama, (x,), strict=False)
        with pytest.raises(UnsupportedHost, match="neither exported nor traced"):
            torch.jit.trace(lambda ids: llama(ids, use_cache=False).logits, x)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_steered_model_are_plain_and_can_be_steered(how: str) -> None:
    model, x = tiny_transformers("llama"), tokens(1, 8)
    plain = model(input_ids=x).logits
    with controlled(model, METHODS["zerotuning"]):
        steered = model(input_ids=x).logits
        if how == "deepcopy":
            made = copy.deepcopy(model)
        elif how == "pickle":
            made = pickle.loads(pickle.dumps(model))
        else:
            held = io.BytesIO()
            torch.save(model, held)
            held.seek(0)
            made = torch.load(held, weights_only=False)
        assert torch.equal(made(input_ids=x).logits, plain)
        config = copy.deepcopy(model.model.layers[1].self_attn.config)
        assert type(config) is type(model.config) and config._attn_implementation == "sdpa"
    del model
    gc.collect()
    assert torch.equal(made(input_ids=x).logits, plain)
    made.set_attn_implementation("eager")
    mark = fingerprint(made)
    with controlled(made, METHODS["zerotuning"]):
        assert far(made(input_ids=x).logits, steered) <= 1e-5
    assert fingerprint(made) == mark


def test_another_attention_while_steered_is_followed_and_kept() -> None:
    model, x = tiny_transformers("llama"), tokens(1, 8)
    with controlled(model, METHODS["zerotuning"]):
        steered = model(input_ids=x).logits
        model.set_attn_implementation("eager")
        again = model(input_ids=x, output_attentions=True)
        assert far(again.logits, steered) <= 1e-5 and again.attentions[1] is not None
        model.config.output_attentions = True
        assert len(model(input_ids=x).attentions) == 3
        with pytest.raises((UnsupportedHost, ValueError, ImportError)):
            model.set_attn_implementation("flash_attention_2")
    assert model.config._attn_implementation == "eager"


def test_a_handle_that_is_gone_or_entered_already(llama: nn.Module) -> None:
    """What would run in the block is the plain model, and the audit of earlier calls would hide it."""
    x, method = tokens(1, 5), ZeroTuning(HEADS, 4.0)
    handle = steer(llama, method)
    steered = llama(input_ids=x).logits
    handle.remove()
    with pytest.raises(CompositionError, match="was removed"), handle:
        pass
    with pytest.raises(CompositionError, match="was removed"), handle.freeze():
        pass
    with steer(llama, method) as handle:
        with pytest.raises(CompositionError, match="entered already"), handle:
            pass
        assert torch.equal(llama(input_ids=x).logits, steered)


def test_a_lost_handle_is_found_by_its_model() -> None:
    model, x = tiny_transformers("llama"), tokens(1, 8)
    mark, plain = fingerprint(model), model(input_ids=x).logits
    steer(model, METHODS["zerotuning"], control=True)
    gc.collect()
    assert detach(model) in (0, 1)
    assert fingerprint(model) == mark and torch.equal(model(input_ids=x).logits, plain)


# Numbers.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_method
def test_half_precision_models_and_autocast(dtype: torch.dtype, method: Any) -> None:
    """The check of the kernel takes the dtype in which it runs; the edit is near that in float32."""
    model, x = tiny_transformers("llama"), tokens(1, 9)
    with controlled(model, method):
        exact = model(input_ids=x).logits
    size = float(exact.abs().max())
    with controlled(model, method), torch.autocast("cpu", dtype):
        cast = model(input_ids=x).logits.float()
    half = copy.deepcopy(model).to(dtype)
    with controlled(half, method):
        low = half(input_ids=x).logits.float()
    assert far(cast, exact) <= 0.15 * size and far(low, exact) <= 0.15 * size


@pytest.mark.parametrize("heads", [None, HEADS], ids=["all heads", "two heads"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_steps_under_autocast(name: str, dtype: torch.dtype, implementation: str, heads: Any) -> None:
    """Steps of one row, where the model's own kernel need not run, and steps of the whole sequence without a cache."""
    method, model = METHODS[name], tiny_transformers("llama")
    where = Where(heads=heads) if name == "spotlight" else None
    method = replace(method, where=where) if name == "spotlight" else replace(method, heads=heads)
    model.set_attn_implementation(implementation)
    options = {**OPTIONS, "max_new_tokens": 3, "min_new_tokens": 3}
    for short in (3, 9):
        x = tokens(1, short)
        found = []
        for cache in (True, False):
            with controlled(model, method), torch.autocast("cpu", dtype):
                out = model.generate(x, attention_mask=torch.ones_like(x), use_cache=cache, **options)
            found.append(out.logits[0].float())
        with controlled(model, method):
            first = model(input_ids=x).logits[:, -1]
        assert max(far(f, first) for f in found) <= 0.15 * float(first.abs().max())


def test_mixed_precision_training_has_gradients_near_those_of_float32() -> None:
    model, x = tiny_transformers("llama"), tokens(2, 9)
    weight, found = model.model.layers[1].self_attn.v_proj.weight, []
    with torch.enable_grad():
        # Strength one is what bf16 alone does to these gradients.
        for strength in (1.0, 4.0):
            for cast in (False, True):
                model.zero_grad()
                with (
                    controlled(model, ZeroTuning(HEADS, strength)),
                    torch.autocast("cpu", torch.bfloat16, enabled=cast),
                ):
                    model(input_ids=x, labels=x, use_cache=False).loss.backward()
                found.append(weight.grad.clone())
    error = [float((a - b).norm() / a.norm()) for a, b in (found[:2], found[2:])]
    assert error[1] <= max(2 * error[0], 0.05) and far(found[0], found[2]) > 0.05 * float(found[0].abs().max())


def test_overflow_and_meta_tensors_are_called_what_they_are() -> None:
    model, x = tiny_transformers("llama"), tokens(1, 6)
    model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with controlled(model, METHODS["zerotuning"]), pytest.raises(UnsupportedHost, match="NaN or infinite"):
        model(input_ids=x)
    model = tiny_transformers("llama").to("meta")
    with controlled(model, METHODS["zerotuning"]), pytest.raises(UnsupportedHost, match="meta device"):
        model(input_ids=x.to("meta"))
