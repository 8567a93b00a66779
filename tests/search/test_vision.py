"""`find_sink_dims` on planted dimensions, the table of backbones, and `vhd` against outputs read at the projections."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnsteer.search
from attnsteer import ADHH, VAR, VHR, HeadSet, Where, steer
from attnsteer.errors import SelectionError
from attnsteer.methods._sink_dims import known_sink_dims
from attnsteer.methods.var import sink_tokens
from attnsteer.search import SINK_DIMS, Said, find_sink_dims, hallucination_heads, scaled_tau, vhd
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from attnsteer.testing.fingerprint import fingerprint
from tests.hosts.transformers.vision_families import build, prompts
from tests.reference import lvlm_methods


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def planted(name: str, dims: tuple[int, ...], size: float = 300.0) -> nn.Module:
    """A tiny model whose token 1 has massive activations, which the residual stream keeps."""
    # Wide enough for a gap: the ratio of one dimension to the whole is at most the square root of the width.
    model = tiny_transformers(name, hidden_size=1024, intermediate_size=64)
    words = model.get_input_embeddings().weight
    words[1, list(dims)] = size * torch.linspace(1.0, 0.8, len(dims))
    return model


def batches(name: str, model: nn.Module, count: int = 4) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(count):
        inputs = tiny_transformers_inputs(name, model, batch=2, length=12, padding="left", seed=seed)
        inputs["input_ids"][torch.arange(2), inputs["attention_mask"].argmax(dim=-1)] = 1
        found.append(inputs)
    return found


@pytest.mark.parametrize("name", ["llama", "llava"])
@pytest.mark.parametrize("dims", [(5,), (20, 7)])
def test_planted_dimensions_are_found(name: str, dims: tuple[int, ...]) -> None:
    model = planted(name, dims)
    model(**batches(name, model, 1)[0])  # the library installs hooks of its own at the first call
    mark = fingerprint(model)
    found = find_sink_dims(model, batches(name, model))
    assert found.dims == dims == tuple(found) and not found.reason
    assert found.prompts == 8 and found.tau == pytest.approx(scaled_tau(1024)) == 10.0 and found.layers == (1, 2)
    assert all(found.share[d] == 1.0 and found.strength[d] > 3 for d in dims)
    assert fingerprint(model) == mark
    assert VAR(found).sink_dims == dims


def test_a_model_without_sinks_is_said_to_have_none() -> None:
    model = tiny_transformers("llama")
    inputs = [tiny_transformers_inputs("llama", model, batch=4, seed=s) for s in range(2)]
    found = find_sink_dims(model, inputs, tau=4.5)
    assert found.dims == () and "no sink dimensions" in found.reason and len(found.strength) == 10
    with pytest.raises(SelectionError, match=r"no sink dimensions: .* give dimensions"):
        VAR(found)
    # Here the strongest dimension is the strongest by chance; asked for next to no gap, the search returns one.
    assert len(find_sink_dims(model, inputs, tau=1.0, drop=1.0)) == 1


def test_a_dimension_that_every_token_has() -> None:
    """As in SmolLM2: dimension 5 holds a quarter of every token's energy, and nearly all of the sinks'."""
    model = tiny_transformers("llama", hidden_size=256, intermediate_size=64)
    words = model.get_input_embeddings().weight
    words[:, 5] = words.square().sum(dim=-1).sub(words[:, 5] ** 2).div(3).sqrt() * 3
    words[1, [5, 9]] = torch.tensor([500.0, 200.0])
    found = find_sink_dims(model, batches("llama", model))
    assert found.dims == (5,)
    # The scaled threshold calls every token a sink, and the found one only those that are.
    ids = torch.tensor([[1, 2, 3, 4, 6, 7]])
    state = model(ids, output_hidden_states=True).hidden_states[1]
    assert sink_tokens(state, (5,), scaled_tau(256)).all() and found.tau > scaled_tau(256)
    assert sink_tokens(state, found, found.tau).tolist() == [[True, *[False] * 5]]


def test_the_found_dimensions_make_var_act() -> None:
    model = planted("llava", (20, 7))
    inputs = batches("llava", model, 1)[0]
    method = VAR(find_sink_dims(model, [inputs]), scaled_tau(1024), 0.3, 0.1)
    plain = model(**inputs).logits
    with steer(model, method) as run:
        out = model(**inputs).logits
    assert not torch.equal(out, plain) and all(r.edits for r in run.audit.records.values())


def test_what_the_search_refuses() -> None:
    model = tiny_transformers("llama")
    with pytest.raises(SelectionError, match="no batches"):
        find_sink_dims(model, [])
    with pytest.raises(SelectionError, match=r"tau=20.*at most 8\.0"):
        find_sink_dims(model, [tiny_transformers_inputs("llama", model)], tau=20)
    with pytest.raises(SelectionError, match="no batches"):
        vhd(build("llava"), [])
    with pytest.raises(SelectionError, match="no image in the prompt"):
        vhd(build("llava"), [prompts("llava", [[5]])[0] | {"pixel_values": None}])


def test_the_table_of_backbones() -> None:
    from transformers import LlamaConfig, LlavaConfig, Qwen2VLConfig

    llama = {"hidden_size": 4096, "num_hidden_layers": 32, "num_key_value_heads": 32}
    seven = LlavaConfig(text_config=LlamaConfig(**llama))
    assert known_sink_dims(SimpleNamespace(config=seven)) == (1415, 2533)
    thirteen = LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40)
    assert known_sink_dims(SimpleNamespace(config=thirteen)) == (2100, 4743)
    qwen = Qwen2VLConfig(text_config={"hidden_size": 3584, "num_hidden_layers": 28})
    assert known_sink_dims(SimpleNamespace(config=qwen)) == (458, 2570)
    small = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    assert known_sink_dims(SimpleNamespace(config=LlavaConfig(text_config=LlamaConfig(**small)))) == (507,)
    third = LlamaConfig(**{**llama, "num_key_value_heads": 8})
    with pytest.raises(SelectionError, match=r"not known\. Others use \(788, 1384, 4062\) .* unverified"):
        known_sink_dims(SimpleNamespace(config=third))
    assert scaled_tau(4096) == 20.0 and all(b.dims for b in SINK_DIMS.values())


@pytest.mark.parametrize("outliers", [False, True])
def test_vhd_is_the_divergence_at_the_projections(outliers: bool) -> None:
    model = build("llava")
    layers = model.model.language_model.layers
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, i=i: seen.update({i: args[0].unflatten(-1, (4, 8))})
        )
        for i, layer in enumerate(layers)
    ]
    data = [prompts("llava", [[2, "image", 3], [5, "image", 1]], seed=s)[0] for s in range(2)]
    expected = []
    for inputs in data:
        model(**inputs)
        whole = dict(seen)
        for b in range(2):
            ids, valid = inputs["input_ids"][b], inputs["attention_mask"][b].bool()
            model(input_ids=ids[valid & (ids != 3)][None])
            pairs = [(whole[i][b : b + 1, -1], seen[i][:, -1]) for i in range(2)]
            expected.append(torch.cat([lvlm_methods.vhd(a, f, outliers) for a, f in pairs]))
    for hook in hooks:
        hook.remove()
    found = vhd(model, data, outliers=outliers)
    assert isinstance(found, HeadSet) and found.shape == (2, 4) and len(found) == 8
    mean = torch.stack(expected).mean(dim=0)
    assert all(found.scores[i, h] == pytest.approx(float(mean[i, h]), abs=1e-5) for i in range(2) for h in range(4))
    assert found.provenance["samples"] == 4 and found.provenance["score"] == "vhd"
    with steer(model, VHR(where=Where(heads=found.top(4)))):
        model(**data[0])


def test_hallucination_heads_are_those_whose_loss_takes_the_wrong_words_away() -> None:
    model = build("llava")
    layers = model.model.language_model.layers
    data = [prompts("llava", [[2, "image", 3], [5, "image", 1]], seed=s)[0] for s in range(2)]
    tokens, wrong = [[4, 9], [7, 2]], [[True, False], [False, True]]
    batches = [Said(*each) for each in zip(data, tokens, wrong, strict=True)]

    def chances() -> list[float]:
        return [
            float(model(**inputs).logits[b, -1].double().softmax(-1)[own[b]])
            for inputs, own in zip(data, tokens, strict=True)
            for b in range(2)
        ]

    before, expected = chances(), {}
    for layer in range(2):
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)

            def zeroed(_: Any, args: Any, part: slice = part) -> Any:
                x = args[0].clone()
                x[..., part] = 0
                return (x,)

            hook = layers[layer].self_attn.o_proj.register_forward_pre_hook(zeroed)
            drop = [a - b for a, b in zip(before, chances(), strict=True)]
            hook.remove()
            expected[layer, head] = (drop[0] + drop[3]) / 2 - (drop[1] + drop[2]) / 2
    found = hallucination_heads(model, batches)
    assert found.scores == pytest.approx(expected, abs=1e-6) and found.shape == (2, 4)
    assert found.provenance["samples"] == 4 and found.provenance["hallucinated"] == 2
    with steer(model, ADHH(found.top(2), threshold=0.01)):
        model(**data[0])
    with pytest.raises(SelectionError, match="4 of 4 words are hallucinated"):
        hallucination_heads(model, [b._replace(hallucinated=[True, True]) for b in batches])
    with pytest.raises(SelectionError, match="2 prompts, 1 tokens"):
        hallucination_heads(model, [batches[0]._replace(tokens=[4])])
    right = {**data[0], "attention_mask": torch.ones_like(data[0]["input_ids"]).index_fill(1, torch.tensor([-1]), 0)}
    with pytest.raises(SelectionError, match="padded on the right"):
        hallucination_heads(model, [batches[0]._replace(inputs=right), batches[1]])


def test_the_package_names_are_lazy() -> None:
    assert {"find_sink_dims", "vhd", "SINK_DIMS"} <= set(attnsteer.search.__all__) <= set(dir(attnsteer.search))
    with pytest.raises(AttributeError, match="find_sink_dims"):
        attnsteer.search.find_sinks  # noqa: B018
