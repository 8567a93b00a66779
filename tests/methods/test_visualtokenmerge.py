"""VisualTokenMerge: dropping against masks in the whole model, clusters against loops, all decoding, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from attnsteer import HeadGate, VisualTokenMerge, steer
from attnsteer.errors import AttnSteerError, CompositionError, NeverFired, SelectionError, UnsupportedHost
from attnsteer.hosts.transformers.outer_calls import OUTER, Outer, entry
from attnsteer.methods import visualtokenmerge
from attnsteer.testing import HOSTS
from attnsteer.testing.fingerprint import fingerprint
from tests.reference import efficiency as slow

STEPS = 4


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return HOSTS["llava"].build().eval()


@pytest.fixture(scope="module")
def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two prompts, the second of them padded on the left by three tokens."""
    given = HOSTS["llava"].inputs(model, 2, None, 0)
    ids = torch.cat([torch.full((2, 3), 5), given["input_ids"]], dim=1)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": given["pixel_values"]}


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def decoded(model: nn.Module, inputs: dict[str, Tensor], steps: int = STEPS) -> tuple[list[Tensor], Tensor]:
    """Logits of the last row at the prefill and at each greedy step over the cache, and the tokens."""
    mask = inputs["attention_mask"]
    out = model(**inputs, position_ids=positions(mask), use_cache=True, logits_to_keep=1)
    logits, tokens = [out.logits[:, -1]], []
    for _ in range(steps):
        tokens.append(logits[-1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        out = model(
            input_ids=tokens[-1],
            attention_mask=mask,
            position_ids=positions(mask)[:, -1:],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
    return logits, torch.cat(tokens, dim=1) if tokens else mask[:, :0]


@torch.no_grad()
def masked(model: nn.Module, inputs: dict[str, Tensor], tokens: Tensor, index: list[list[int]], layer: int) -> Tensor:
    """Logits of the whole model over all tokens, without a cache, the keys of dropped tokens hidden from `layer` on."""
    n = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    hidden = torch.ones(len(ids), ids.shape[1], dtype=torch.bool)
    for b, kept in enumerate(index):
        hidden[b, kept] = False
    hidden[:, n:] = False
    full = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & mask.bool()[:, None, None]

    def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": full & ~hidden[:, None, None]}

    hooks = [
        block.register_forward_pre_hook(hide, with_kwargs=True) for block in model.model.language_model.layers[layer:]
    ]
    try:
        out = model(
            input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], position_ids=positions(mask)
        )
    finally:
        for hook in hooks:
            hook.remove()
    return out.logits[:, n - 1 :]


@torch.no_grad()
def eager_weights(model: nn.Module, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """The attention weights of a layer, as eager FastV reads them."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    out = eager(**inputs, position_ids=positions(inputs["attention_mask"]), output_attentions=True)
    return out.attentions[layer]


@pytest.mark.parametrize(("k", "r"), [(1, 0.5), (2, 0.75)])
def test_fastv_is_the_eager_choice_and_the_masked_model(
    model: nn.Module, inputs: dict[str, Tensor], k: int, r: float
) -> None:
    """Prefill and decoding over the shorter caches, of a padded batch, against the eager scores and masks without a cache."""
    image = inputs["input_ids"] == model.config.image_token_id
    n = image.shape[1]
    weights = eager_weights(model, inputs, k - 1)
    index = slow.fastv_index(weights, image, [n - 1, n - 1], round(16 * (1 - r)))
    with steer(model, VisualTokenMerge.fastv(k, r)):
        logits, tokens = decoded(model, inputs)
    want = masked(model, inputs, tokens[:, :-1], index, k)
    for step in range(STEPS):
        torch.testing.assert_close(logits[step], want[:, step], atol=1e-5, rtol=1e-5)


def test_lowest_keeps_what_attention_drops_first(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    image = inputs["input_ids"] == model.config.image_token_id
    weights = -eager_weights(model, inputs, 0)
    index = slow.fastv_index(weights, image, [image.shape[1] - 1] * 2, 4)
    with steer(model, VisualTokenMerge(keep=4, method="lowest", layer=1)):
        logits, tokens = decoded(model, inputs, 1)
    torch.testing.assert_close(logits[0], masked(model, inputs, tokens[:, :0], index, 1)[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def by_hand(model: nn.Module, inputs: dict[str, Tensor], b: int, make: Any, renumber: bool) -> Tensor:
    """Logits of the last token of one sample whose image tokens are replaced by [(slot, token)] in front of the language model."""
    ids, mask = inputs["input_ids"][b], inputs["attention_mask"][b]
    features = model.model.get_image_features(pixel_values=inputs["pixel_values"][b : b + 1]).pooler_output[0]
    words = model.get_input_embeddings()(ids)
    places = [j for j, t in enumerate(ids.tolist()) if t == model.config.image_token_id]
    rows = [(j, words[j]) for j in range(len(ids)) if j not in places and mask[j]] + make(features, places)
    rows.sort(key=lambda pair: pair[0])
    first = int(mask.argmax())
    at = torch.arange(len(rows)) if renumber else torch.tensor([j - first for j, _ in rows])
    out = model.model.language_model(
        inputs_embeds=torch.stack([t for _, t in rows])[None],
        attention_mask=torch.ones(1, len(rows), dtype=torch.long),
        position_ids=at[None],
    )
    return model.lm_head(out.last_hidden_state[:, -1])[0]


@pytest.mark.parametrize("places", ["keep", "renumber"])
def test_clusters_are_the_loop_in_front_of_the_model(model: nn.Module, inputs: dict[str, Tensor], places: str) -> None:
    with steer(model, VisualTokenMerge(keep=5, positions=places)):
        logits, _ = decoded(model, inputs, 0)
    for b in range(2):
        make = lambda x, at: slow.clusters(x, at, 5)  # noqa: E731
        want = by_hand(model, inputs, b, make, places == "renumber")
        torch.testing.assert_close(logits[0][b], want, atol=1e-5, rtol=1e-5)


def test_strided_tokens_are_those_of_the_model(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with steer(model, VisualTokenMerge(keep=4, method="spatial")):
        logits, _ = decoded(model, inputs, 0)
    make = lambda x, at: [(at[i], x[i]) for i in (0, 5, 10, 15)]  # noqa: E731
    torch.testing.assert_close(logits[0][1], by_hand(model, inputs, 1, make, False), atol=1e-5, rtol=1e-5)


def test_visionzip_is_its_arithmetic(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Scores and keys of the tower's last layer but one, from eager maps; sums of projected tokens."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        tower = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
        layer = eager.model.vision_tower.encoder.layers[-2]
        keys = layer.self_attn.k_proj(layer.layer_norm1(tower.hidden_states[-3]))
    heads = layer.self_attn.num_heads
    keys = keys.view(*keys.shape[:2], heads, -1).mean(2)[:, 1:]
    score = tower.attentions[-2][:, :, 0, 1:].sum(1)
    with steer(model, VisualTokenMerge.visionzip(5, 3)):
        logits, _ = decoded(model, inputs, 0)

    def make(b: int) -> Any:
        def tokens(x: Tensor, at: list[int]) -> list[tuple[int, Tensor]]:
            return [(at[i], t) for i, t in slow.visionzip_tokens(x, score[b], keys[b], 5, 3).items()]

        return tokens

    for b in range(2):
        torch.testing.assert_close(logits[0][b], by_hand(model, inputs, b, make(b), False), atol=1e-5, rtol=1e-5)


WAYS = [
    VisualTokenMerge.fastv(1, 0.5),
    VisualTokenMerge(keep=5),
    VisualTokenMerge(keep=5, positions="renumber"),
    VisualTokenMerge(keep=6, method="random", layer=2, seed=3),
]


@pytest.mark.parametrize("method", WAYS, ids=lambda m: f"{m.method}-{m.layer}-{m.positions}")
def test_ways_of_decoding_agree(model: nn.Module, inputs: dict[str, Tensor], method: VisualTokenMerge) -> None:
    """generate = the loop over a cache = without a cache = beams, which carry what they keep; a row of a batch = the row alone."""
    with steer(model, method):
        _, tokens = decoded(model, inputs)
        n = inputs["input_ids"].shape[1]
        plain = {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(model.generate(**inputs, **plain)[:, n:], tokens)
        assert torch.equal(model.generate(**inputs, **plain, use_cache=False)[:, n:], tokens)
        beams = model.generate(**inputs, **plain, num_beams=3)
        assert torch.equal(beams, model.generate(**inputs, **plain, num_beams=3, use_cache=False))
        one = {
            "input_ids": inputs["input_ids"][1:, 3:],
            "attention_mask": inputs["attention_mask"][1:, 3:],
            "pixel_values": inputs["pixel_values"][1:],
        }
        assert torch.equal(decoded(model, one)[1], tokens[1:])


def test_a_turn_of_text_goes_on_over_the_shorter_cache(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Several new tokens at once are what they are one by one; a copy of the cache goes on too."""
    turn = torch.tensor([[11, 12, 13], [14, 15, 16]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(turn)], dim=1)
    for method in (VisualTokenMerge.fastv(1, 0.5), VisualTokenMerge(keep=5)):
        with torch.no_grad(), steer(model, method):
            cache = model(**inputs, position_ids=positions(inputs["attention_mask"])).past_key_values
            other = copy.deepcopy(cache)
            whole = model(
                input_ids=turn, attention_mask=mask, position_ids=positions(mask)[:, -3:], past_key_values=cache
            ).logits
            for i in range(3):
                part = mask[:, : mask.shape[1] - 2 + i]
                step = model(
                    input_ids=turn[:, i : i + 1],
                    attention_mask=part,
                    position_ids=positions(part)[:, -1:],
                    past_key_values=other,
                ).logits
                torch.testing.assert_close(step[:, 0], whole[:, i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "method", [VisualTokenMerge(ratio=1.0), VisualTokenMerge(keep=16), VisualTokenMerge.fastv(1, 0.0)]
)
def test_all_tokens_are_the_plain_model(model: nn.Module, inputs: dict[str, Tensor], method: VisualTokenMerge) -> None:
    before = fingerprint(model)
    with torch.no_grad():
        want = model(**inputs).logits
        with steer(model, method, control=True):
            assert torch.equal(model(**inputs).logits, want)
        with pytest.raises(NeverFired), steer(model, method):
            model(**inputs)
        with pytest.raises(RuntimeError), steer(model, VisualTokenMerge.fastv(1, 0.5)):
            raise RuntimeError
        assert torch.equal(model(**inputs).logits, want)
    assert fingerprint(model) == before


def test_rows_that_were_dropped_are_nan_and_the_others_are_there(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    image = inputs["input_ids"] == model.config.image_token_id
    for method, gone in ((VisualTokenMerge.fastv(1, 0.5), 8), (VisualTokenMerge(keep=5), 16)):
        with torch.no_grad(), steer(model, method):
            lost = model(**inputs).logits.isnan().all(-1)
        assert (lost.sum(1) == gone).all() and not (lost & ~image).any()


def test_error_is_that_of_the_language_model_and_falls_with_the_budget(
    model: nn.Module, inputs: dict[str, Tensor]
) -> None:
    """On average over images; |y' - y| / |y| of what leaves the language model, on rows of text."""
    plain = {**inputs, "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    errors: dict[int, float] = {}
    for keep in (1, 4, 8, 12, 15):
        with torch.no_grad(), steer(model, VisualTokenMerge(keep=keep), measure=True) as run:
            model(**plain)
        record = next(r for r in run.audit.records.values() if r.error is not None)
        errors[keep] = record.error
        assert record.kept == pytest.approx(keep / 16)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    with torch.no_grad():
        want = model.model(**plain).last_hidden_state
        with steer(model, VisualTokenMerge(keep=4)):
            got = model.model(**plain).last_hidden_state
    rows = (inputs["input_ids"] != model.config.image_token_id) & inputs["attention_mask"].bool()
    assert errors[4] == pytest.approx(float((got - want)[rows].norm() / want[rows].norm()), rel=1e-4)


def test_identical_tokens_share_a_cluster_and_every_token_is_one_at_full_budget() -> None:
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    x[:, 4] = x[:, 1]
    slots = torch.arange(3, 9).expand(2, -1)
    tokens, place = visualtokenmerge.clustered(x, slots, 5)
    assert any(torch.allclose(t, x[0, 1]) for t in tokens[0])
    for b in range(2):
        want = slow.clusters(x[b], slots[b].tolist(), 5)
        assert place[b].tolist() == [at for at, _ in want]
        torch.testing.assert_close(tokens[b], torch.stack([t for _, t in want]))
    # So many tokens that the first step is not the last one.
    many, at = torch.randn(1, 60, 2, generator=torch.Generator().manual_seed(3)), torch.arange(60)[None]
    tokens, place = visualtokenmerge.clustered(many, at, 6)
    want = slow.clusters(many[0], at[0].tolist(), 6)
    assert place[0].tolist() == [where for where, _ in want]
    torch.testing.assert_close(tokens[0], torch.stack([t for _, t in want]))
    # Padding in front moves all places by as much, halves too.
    for count in range(1, 6):
        at = [visualtokenmerge.clustered(x, slots + by, count)[1] - by for by in (0, 1, 2, 5, 2**25)]
        assert all(torch.equal(t, at[0]) for t in at)
    alone = x[:, :4]
    tokens, place = visualtokenmerge.clustered(alone, slots[:, :4], 4)
    assert torch.equal(place, slots[:, :4]) and torch.allclose(tokens, alone)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VisualTokenMerge(ratio=0.0), "ratio"),
        (lambda: VisualTokenMerge(keep=0), "keep"),
        (lambda: VisualTokenMerge(keep=4, method="attention"), "layer=1 or more"),
        (lambda: VisualTokenMerge(keep=4, method="visionzip", contextual=4), "visionzip"),
        (lambda: VisualTokenMerge(keep=4, method="random", layer=1, positions="renumber"), "leave layer=0"),
    ],
)
def test_bad_parameters(make: Any, says: str) -> None:
    with pytest.raises(SelectionError, match=says):
        make()


def test_refusals_before_anything_runs(model: nn.Module) -> None:
    method = VisualTokenMerge.fastv(1, 0.5)
    before = fingerprint(model)
    with pytest.raises(CompositionError, match="Attach it alone"):
        steer(model, method, HeadGate({(0, 0): 0.5}))
    with pytest.raises(SelectionError, match="has the layers 0 to 2"):
        steer(model, VisualTokenMerge.fastv(9, 0.5))
    with pytest.raises(UnsupportedHost, match="images"):
        steer(HOSTS["llama"].build(), method)
    with pytest.raises(AttnSteerError, match="window"):
        windows = HOSTS["llava"].build()
        windows.model.language_model.config.sliding_window = 8
        steer(windows, method)
    assert fingerprint(model) == before


def test_refusals_in_a_call(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Static caches, unlike counts, caches that were cut, a second image over a cache, hidden states of several lengths."""
    with torch.no_grad(), steer(model, VisualTokenMerge.fastv(1, 0.5)):
        with pytest.raises(UnsupportedHost, match="one length for all layers"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
        with pytest.raises(UnsupportedHost, match="StaticCache"):
            model(**inputs, past_key_values=StaticCache(config=model.config.text_config, max_cache_len=40))
        with pytest.raises(UnsupportedHost, match="output_hidden_states"):
            model(**inputs, output_hidden_states=True)
        out = model(**inputs)
        cache = out.past_key_values
        with pytest.raises(UnsupportedHost, match="second image"):
            model(**inputs | {"attention_mask": inputs["attention_mask"].repeat(1, 2)}, past_key_values=cache)


def test_a_cache_that_is_cut_back_inside_the_answer_goes_on_and_inside_the_prompt_is_refused(
    model: nn.Module, inputs: dict[str, Tensor]
) -> None:
    token = torch.tensor([[7], [8]])
    for method in (VisualTokenMerge.fastv(1, 0.5), VisualTokenMerge(keep=5)):
        with torch.no_grad(), steer(model, method):
            cache, mask = model(**inputs).past_key_values, inputs["attention_mask"]
            logits = []
            for _ in range(4):
                mask = torch.cat([mask, torch.ones_like(token)], dim=1)
                logits.append(model(input_ids=token, attention_mask=mask, past_key_values=cache).logits)
            cache.crop(-2)
            again = model(input_ids=token, attention_mask=mask[:, :-1], past_key_values=cache).logits
            torch.testing.assert_close(again, logits[2], atol=1e-5, rtol=1e-5)
            cache.crop(-5)
            with pytest.raises(UnsupportedHost, match="cut back"):
                model(input_ids=token, attention_mask=mask[:, :-5], past_key_values=cache)


def test_samples_with_unlike_numbers_of_images_are_refused(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 2:8] = image[1, 2:7] = True
    hidden = torch.randn(2, 12, model.config.text_config.hidden_size)
    run = steer(model, VisualTokenMerge(keep=2), control=True)
    with run, entry(OUTER, run, Outer(image=image)), pytest.raises(SelectionError, match="equally many"):
        model.model.language_model(inputs_embeds=hidden)
