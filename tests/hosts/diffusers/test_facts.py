"""Facts that are found by looking: a pipeline that cannot guide, a guider's names, own keys behind the text's, poolers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attnsteer import HeadGate, SoftPAG, Where, sites, steer
from attnsteer.branches import BranchInputs
from attnsteer.errors import UnsupportedHost
from attnsteer.hosts.diffusers.formula import Formula
from attnsteer.hosts.diffusers.guiders import _normalises
from attnsteer.hosts.diffusers.pipelines import one_branch
from attnsteer.hosts.diffusers.rows import Conditions, _numbered, _row_of
from attnsteer.hosts.diffusers.steps import Sampling
from attnsteer.hosts.diffusers.streams import own_place
from attnsteer.hosts.sdpa.rebind import helpers, primitive_count
from attnsteer.testing.sweep.diffusers import build, forward
from attnsteer.testing.sweep.watch import inside, watching
from tests.hosts.diffusers.common import _Values, at, relative

SITE = "mid_block.attentions.0"


def unconditional():
    """DDIM on a UNet without a prompt."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
    ).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe) -> torch.Tensor:
    out = pipe(num_inference_steps=3, output_type="np", return_dict=False, generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(out[0])


def test_a_pipeline_without_a_scale_and_a_negative_prompt_has_one_branch() -> None:
    from diffusers import StableDiffusionPipeline

    pipe = unconditional()
    assert one_branch(pipe)
    assert not one_branch(object.__new__(StableDiffusionPipeline)) and not one_branch(None)
    plain = run(pipe)
    with steer(pipe, SoftPAG(2.0, 1.0, where=at([SITE]))):
        ours = run(pipe)
    unet, inner = pipe.unet, pipe.unet.forward

    def by_hand(*args, **kwargs):
        out, mode = inner(*args, **kwargs), _Values()
        with inside(unet.get_submodule(SITE), mode):
            weak = inner(*args, **kwargs).sample
        out.sample = out.sample + 2.0 * (out.sample - weak)
        return out

    unet.forward = by_hand
    expected = run(pipe)
    assert relative(ours, expected) < 1e-5
    assert relative(plain, expected) > 1e-3


def test_what_a_guider_calls_its_batches_names_their_branches() -> None:
    sampling = Sampling(None)

    @contextlib.contextmanager
    def inner(name: str) -> Iterator[None]:
        yield

    for name, branch in (("pred_cond", "cond"), ("pred_uncond", "uncond"), ("cond", "cond"), ("other", "other")):
        with sampling._enter_context(inner, name):
            assert sampling.context == branch
    assert sampling.context is None


def test_own_keys_stand_behind_those_that_a_processor_adds() -> None:
    from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor2_0

    model = torch.nn.Identity()
    added = SimpleNamespace(processor=AttnAddedKVProcessor2_0(), only_cross_attention=False)
    crossed = SimpleNamespace(processor=AttnAddedKVProcessor2_0(), only_cross_attention=True)
    plain = SimpleNamespace(processor=AttnProcessor2_0())
    found = [own_place(SimpleNamespace(name="attn", module=m), model) for m in (added, crossed, plain)]
    assert found == ["last", "", ""]


def test_a_pooler_of_the_prompt_is_a_site() -> None:
    """Mochi pools its prompt by an attention that has no processor."""
    model, inputs = build("MochiTransformer3DModel")
    site = next(s for s in sites(model) if s.name == "time_embed.pooler")
    assert (site.kind, site.modality, site.layer) == ("cross", "text", 0)
    plain = forward(model, inputs)
    where = Where(modules=r"time_embed\.pooler", modalities="text", kinds="cross")
    with steer(model, HeadGate({(0, 0): 1.0}, where=where), control=True):
        assert torch.equal(forward(model, inputs)[0], plain[0])
    with steer(model, HeadGate({(0, 0): 0.0}, where=where)):
        ours = forward(model, inputs)
    with watching(model, {site.name: (site.heads, 0)}):
        expected = forward(model, inputs)
    assert relative(ours[0], expected[0]) < 2e-5
    assert not torch.equal(ours[0], plain[0])
    assert torch.equal(forward(model, inputs)[0], plain[0])


def test_any_name_that_a_value_has_may_have_a_negative_twin() -> None:
    """Kandinsky's prior holds the same embedding under two names, of which one has a twin."""
    u, c = torch.randn(1, 4), torch.randn(1, 4)
    both = torch.cat([u, c])
    positive, negative = [("text_output", c), ("prompt_embeds", both)], [("negative_prompt_embeds", u)]
    given = [("proj_embedding", "proj_embedding", both)]
    for order in (positive, positive[::-1]):
        assert Conditions._told(given, {"proj_embedding": both}, 2, order, negative) == ["uncond", "cond"]
    # Without the twin's name too: a row of it is negative, so the other one, which is not, is conditional.
    assert Conditions._told(given, {"proj_embedding": both}, 2, [("joined", both)], negative) == ["uncond", "cond"]


def test_the_parts_of_an_argument_tell_each_for_itself() -> None:
    """Cosmos gives its denoiser (prompt, image), and the image is that of both branches."""
    u, c, image = torch.randn(1, 4, 8), torch.randn(1, 4, 8), torch.randn(1, 2, 8)
    positive, negative = [("hidden", c), ("hidden", image)], [("neg_hidden", u), ("neg_hidden", image)]
    for text, label in ((c, "cond"), (u, "uncond")):
        given = [("hidden", "hidden[0]", text), ("hidden", "hidden[1]", image)]
        assert Conditions._told(given, {"hidden": (text, image)}, 1, positive, negative) == [label]


def test_lists_of_lists_have_an_entry_for_each_row() -> None:
    c, u = torch.randn(3, 4), torch.randn(3, 4)
    given = [("caps", "caps[0][0]", c), ("caps", "caps[1][0]", u)]
    labels = Conditions._told(given, {"caps": [[c], [u]]}, 2, [("prompt_embeds", c)], [("negative_prompt_embeds", u)])
    assert labels == ["cond", "uncond"]


def test_the_class_that_stands_for_none_is_unconditional() -> None:
    given, groups = (
        torch.tensor([3, 5, 1000, 1000]),
        [{"class_labels": [3, 5], "class_null": torch.tensor([1000, 1000])}],
    )
    assert _numbered(given, groups, 4) == ["cond", "cond", "uncond", "uncond"]
    assert _numbered(given, [{"class_labels": [3, 5]}], 4) is None and _numbered(given.float(), groups, 4) is None


def test_what_calls_its_attention_by_a_helper_is_reached() -> None:
    from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2KVAttnProcessor

    assert list(helpers(Flux2KVAttnProcessor.__call__)) == ["_flux2_kv_causal_attention"]
    assert primitive_count(Flux2KVAttnProcessor.__call__) > 2 and not helpers(Flux2AttnProcessor.__call__)


def test_an_exchanged_scheduler_or_processor_is_refused_and_its_own_may_be_put_back() -> None:
    from attnsteer.testing import tiny_call, tiny_pipeline

    pipe = tiny_pipeline("sd")
    with steer(pipe, SoftPAG(2.0, 1.0), control=True):
        pipe.unet.set_attn_processor(pipe.unet.attn_processors)
        plain = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        own, plain.processor = plain.processor, type(plain.processor).__mro__[1]()
        with pytest.raises(UnsupportedHost, match="exchanged while it is steered"):
            pipe(**tiny_call("sd", steps=1))
        plain.processor = own
        pipe.scheduler.__dict__.update(copy.deepcopy(pipe.scheduler.__dict__))
        with pytest.raises(UnsupportedHost, match="exchanges what its scheduler holds"):
            pipe(**tiny_call("sd", steps=1))


def test_a_list_of_layers_is_not_one_of_rows() -> None:
    layers = [torch.randn(2, 3, 4), torch.randn(2, 3, 4)]
    assert torch.equal(_row_of(layers, "layers[0]", layers[0], 1, 2, []), layers[0][1])
    apart = [torch.randn(3, 4), torch.randn(5, 4)]
    assert _row_of(apart, "rows[0]", apart[0], 1, 2, []) is None
    assert torch.equal(_row_of(apart, "rows[1]", apart[1], 1, 2, []), apart[1])


def test_a_block_that_normalises_behind_the_guider_is_seen() -> None:
    from diffusers.modular_pipelines import QwenImageAutoBlocks, StableDiffusionXLAutoBlocks

    assert _normalises(SimpleNamespace(blocks=QwenImageAutoBlocks()))
    assert not _normalises(SimpleNamespace(blocks=StableDiffusionXLAutoBlocks()))
    assert not _normalises(SimpleNamespace())


def test_numbers_in_a_row_take_the_form_of_the_output_if_they_lie_alike() -> None:
    """Z-Image predicts a list with a tensor for each sample, negates it, and may normalise the combination."""
    c, u, term = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(1, 24)
    combined = -(u + 3.0 * (c - u))[None]

    def waiting() -> Formula:
        formula = Formula(None)
        formula.outside, formula.held, formula._rows = True, term, [c.flatten(), u.flatten()]
        return formula

    assert torch.allclose(waiting().step(combined), combined - term.reshape(1, 2, 3, 4))
    with pytest.raises(UnsupportedHost, match="changes the prediction's form"):
        waiting().step(combined.flip(-1))


def test_a_pair_of_rotary_tables_is_no_list_of_two_rows() -> None:
    """HunyuanDiT and StableAudio: a cosine and a sine of an odd number of positions, beside two rows."""
    tables = (torch.randn(5, 4), torch.randn(5, 4))
    values = {"hidden_states": torch.randn(2, 5, 4), "image_rotary_emb": tables}
    part = BranchInputs(values, ("uncond", "cond"), 2, None, {}).only("cond")
    assert all(a is b for a, b in zip(part.values["image_rotary_emb"], tables, strict=True))
    assert torch.equal(part.values["hidden_states"], values["hidden_states"][1:])


@pytest.mark.parametrize(
    "made",
    [
        lambda t: t,
        lambda t: -t.reshape(2, 3, 4),
        lambda t: t[:, -2:],
        lambda t: -t[:, :2],
        lambda t: t.to(torch.float64),
    ],
)
def test_a_term_takes_the_form_that_a_guider_combines(made: Callable[[Tensor], Tensor]) -> None:
    given, term = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    formula = Formula(None)
    formula.held, formula.given = term, given
    assert torch.equal(formula.take(made(given)).to(made(term).dtype), made(term))
    assert formula.take(made(given)) is None


@pytest.mark.parametrize(
    "made", [lambda t: 2 * t, lambda t: t[:, 1:3], lambda t: t.flip(1), lambda t: t[..., None, :2]]
)
def test_a_term_whose_prediction_was_changed_is_refused(made: Callable[[Tensor], Tensor]) -> None:
    given = torch.randn(2, 4, 3)
    formula = Formula(None)
    formula.held = formula.given = given
    with pytest.raises(UnsupportedHost, match="changed before they are combined"):
        formula.take(made(given))
