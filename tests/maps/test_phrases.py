"""Words of a prompt as tokens of a pipeline: character spans, several tokenizers, several prompts, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from attnsteer import AttendAndExcite, AttentionRefocusing, Where, steer
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.hosts.diffusers.prompt_words import Prompts
from attnsteer.maps.phrases import Prompt, Segment
from attnsteer.maps.words_to_image import Maps, MapSite, SiteMaps, smoothed
from attnsteer.site import Site
from attnsteer.testing import tiny_clip_text_encoder, tiny_clip_tokenizer, tiny_pipeline

from ..methods.latent_common import call_of, double

# The tiny tokenizer has these words as one token each, others in letters: "p u r p l e" are six.
TEXT = "A red cube, a purple-ball and a red dog"


def segment(text: str = TEXT, start: int = 0, length: int = 24) -> Segment:
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    read = tiny_clip_tokenizer()(text, return_offsets_mapping=True, return_special_tokens_mask=True, **options)
    special = tuple(bool(x) for x in read["special_tokens_mask"])
    return Segment(text, start, length, tuple(map(tuple, read["offset_mapping"])), special)


PROMPT = Prompt(((segment(),),))


def found(phrase: Any, include: str = "words", prompt: Prompt = PROMPT) -> list[list[int]]:
    (terms,) = prompt.terms([[phrase]], include)
    return [tokens for _, tokens in terms]


def test_words_are_found_by_their_characters() -> None:
    """1 A, 2 red, 3 cube, 4 comma, 5 a, 6-11 purple, 12 -, 13 ball, 14 and, 15 a, 16 red, 17 dog."""
    assert found("cube") == [[3]] and found("CUBE") == [[3]] and found("dog") == [[17]]
    assert found("purple") == [[6, 7, 8, 9, 10, 11]] and found("purple-ball") == [[6, 7, 8, 9, 10, 11, 12, 13]]
    assert found("red cube") == [[2], [3]] and found("red dog") == [[16], [17]]
    assert found(("red", 1)) == [[2]] and found(("red", 2)) == [[16]]
    assert found((3, 5)) == [[3], [4]]
    assert PROMPT.content() == [list(range(1, 18))] and PROMPT.length == 24


def test_which_tokens_of_a_phrase_count() -> None:
    assert found("red cube", "last") == [[3]] and found("red cube", "last+1") == [[3, 4]]
    assert found("ball", "last+1") == [[13, 14]]
    # After the last word comes the end of the text, which a causal encoder fills with the whole prompt.
    assert found("red dog", "last+1") == [[17, 18]]
    assert found((3, 5), "last") == [[3], [4]]


@pytest.mark.parametrize(
    ("phrase", "message"),
    [
        ("fox", "'fox' is not in the prompt: 'A red cube"),
        ("pur", "'pur' is not in the prompt"),
        ("red", r"2 times in the prompt .*\('red', 1\) for the first"),
        (("red", 3), r"\('red', 3\): the phrase is 2 times"),
        ((20, 30), "there are 24 text keys"),
    ],
)
def test_words_that_are_not_there_once_are_refused(phrase: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        found(phrase)


def test_a_word_beyond_the_length_of_the_encoder_is_refused() -> None:
    short = Prompt(((segment(length=10),),))
    assert found("cube", prompt=short) == [[3]]
    for phrase in ("dog", "purple"):
        with pytest.raises(SelectionError, match="is cut off: the prompt is longer"):
            found(phrase, prompt=short)


def test_two_tokenizers_give_both_places_and_a_cut_one_is_left_out() -> None:
    """As in SD3: the second segment starts where the first ends."""
    both = Prompt(((segment(), segment(start=24, length=30)),))
    assert found("cube", prompt=both) == [[3, 27]] and found("red cube", prompt=both) == [[2, 26], [3, 27]]
    assert found("cube", "last+1", both) == [[3, 4, 27, 28]]
    cut = Prompt(((segment(length=10), segment(start=10, length=30)),))
    assert found("dog", prompt=cut) == [[27]]
    absent = Prompt(((segment(), Segment(TEXT, 24, 30)),))
    assert found("cube", prompt=absent) == [[3]] and absent.content() == [list(range(1, 18))] and absent.length == 54


def test_prompts_have_phrases_of_their_own() -> None:
    two = Prompt(((segment(),), (segment("a fox on a house"),)))
    assert [[t for _, t in terms] for terms in two.terms([["cube"], ["fox", "house"]])] == [[[3]], [[2], [5]]]
    with pytest.raises(SelectionError, match="'cube' is not in the prompt: 'a fox"):
        two.terms([["cube"]])
    with pytest.raises(SelectionError, match="3 lists of phrases for 2 prompts"):
        two.terms([["a"], ["b"], ["c"]])


def test_maps_of_words_and_of_samples_with_fewer_words() -> None:
    g = torch.Generator().manual_seed(0)
    P = torch.softmax(torch.randn(4, 2, 16, 24, generator=g, dtype=torch.float64), dim=-1)
    site = SiteMaps(Site("a", 0, "cross", 2, 2, "image", "denoiser"), (4, 4), P)
    two = Prompt(((segment(),), (segment("a fox on a house"),)))
    maps = Maps((site,), two, 0, 10)
    A = P.mean(dim=1).reshape(4, 4, 4, 24)
    words, valid = maps.words([["purple"], ["fox", "house"]])
    assert valid.tolist() == [[True, False]] * 2 + [[True, True]] * 2
    assert torch.allclose(words[:2, 0], A[:2, ..., 6:12].sum(dim=-1)) and torch.allclose(words[2:, 1], A[2:, ..., 5])
    assert not bool(words[:2, 1].any())
    for compete, keys in (("inner", range(1, 23)), ("all", range(24)), ("prompt", range(1, 6))):
        sharp, _ = maps.words([["purple"], ["fox", "house"]], sharpness=7.0, compete=compete)
        expected = torch.softmax(7.0 * A[2, ..., list(keys)], dim=-1)[..., list(keys).index(2)]
        assert torch.allclose(sharp[2, 0], expected)
    with pytest.raises(UnsupportedHost, match=r"the prompt has 20 tokens .* sees 24 text keys"):
        Maps((site,), Prompt(((segment(length=20),),)), 0, 10).words(["cube"])


def test_larger_maps_are_averaged_down_and_smaller_ones_grow() -> None:
    maps = []
    for side in (8, 4):
        P = torch.rand(1, 1, side * side, 3, dtype=torch.float64)
        maps.append(SiteMaps(Site(f"a{side}", 0, "cross", 1, 1, "image", "denoiser"), (side, side), P))
    fine, coarse = (m.text[0, 0].reshape(*m.grid, 3) for m in maps)
    pooled = fine.reshape(4, 2, 4, 2, 3).mean(dim=(1, 3))
    small = Maps(tuple(maps), Prompt(), 0, 1, size=4)
    assert small.grid == (4, 4) and torch.allclose(small.text()[0], (pooled + coarse) / 2)
    assert Maps(tuple(maps), Prompt(), 0, 1, size=None).text().shape == (1, 8, 8, 3)
    assert Maps(tuple(maps[:1]), Prompt(), 0, 1, size=8).text().shape == (1, 8, 8, 3)


def test_a_wrong_word_is_refused_before_the_first_step_and_the_next_call_is_right() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=2)
    steps: list[int] = []
    watch = {"callback_on_step_end": lambda p, i, t, k: steps.append(i) or k}
    with pytest.raises(SelectionError, match="'fox' is not in the prompt"), steer(pipe, AttendAndExcite("fox")):
        pipe(**call, **watch)
    assert not steps
    with steer(pipe, AttendAndExcite("cube", {}, until=1)) as run:
        with pytest.raises(SelectionError, match="'cube' is not in the prompt: 'a fox'"):
            pipe(**{**call, "prompt": ["a fox"]}, **watch)
        assert not steps
        pipe(**call, **watch)
    assert len(steps) == 2 and run.audit.extra[0]["latent updates"] == 1


def test_words_need_a_prompt_in_words() -> None:
    with pytest.raises(SelectionError, match=r"'cube' cannot be found: the pipeline was given embeddings.*ranges"):
        pipe = double("sd")
        with steer(pipe, AttendAndExcite("cube")):
            pipe(**call_of("sd", steps=1))
    pipe = tiny_pipeline("sdxl")
    call = call_of("sdxl", text=True, steps=1)
    call["latents"] = call["latents"].float()
    with pytest.raises(SelectionError, match="prompt and prompt_2 differ"), steer(pipe, AttendAndExcite("cube")):
        pipe(**call, prompt_2=["a cube"])
    with steer(pipe, AttendAndExcite("cube", {}, until=1)) as run:
        pipe(**call)
    assert run.audit.extra[0]["latent updates"] == 1


def test_phrases_of_the_wrong_form_are_refused() -> None:
    for words in ((), [], "", [""], [[]], [3], [("cat", 0)], [(4, 3)], None, [["cat"], "dog"]):
        with pytest.raises(SelectionError, match="words="):
            AttendAndExcite(words)
    assert AttendAndExcite(["cat", ["dog", 2], [1, 2]]).words == ("cat", ("dog", 2), (1, 2))
    assert AttendAndExcite([["cat"], ["dog", "fox"]]).words == (("cat",), ("dog", "fox"))


class _Pipe:
    """A pipeline of a known class as far as its prompts go."""

    def __init__(self, name: str, **parts: Any):
        import diffusers

        self.__class__ = type(name, (_Pipe, getattr(diffusers, name)), {})
        vars(self).update(parts)


def test_text_keys_of_sd3_and_flux() -> None:
    """SD3: 77 of CLIP, then T5, whose place is empty without it. FLUX: T5 alone, which reads prompt_2 where there is one."""
    tokenizer = tiny_clip_tokenizer()
    clip = {"tokenizer": tokenizer, "text_encoder": object()}
    seen = []
    for name, parts, asked in (
        ("StableDiffusion3Pipeline", {**clip, "tokenizer_3": tokenizer, "text_encoder_3": object()}, {}),
        ("StableDiffusion3Pipeline", {**clip, "tokenizer_3": None, "text_encoder_3": None}, {}),
        ("FluxPipeline", {"tokenizer_2": tokenizer, "text_encoder_2": object()}, {"prompt_2": "the red fox"}),
    ):
        prompts = Prompts(_Pipe(name, **parts))
        # Prompts are read where somebody listens.
        told: list[Prompt] = []
        prompts.listeners.append(told.append)

        def encode_prompt(
            prompt: Any, prompt_2: Any = None, prompt_3: Any = None, max_sequence_length: int = 32
        ) -> Any:
            return prompt

        encode = functools.partial(prompts.encode_prompt, encode_prompt)
        encode("a red fox and a dog", **asked)
        # The negative prompt of two-call guidance comes second, and does not count.
        encode("a blue cube")
        assert told == [prompts.current]
        seen.append((prompts.current.length, found("fox", prompt=prompts.current)))
    assert seen == [(77 + 32, [[3, 80]]), (77 + 32, [[3]]), (32, [[3]])]


def test_boxes_of_words_that_are_not_there_are_refused_before_the_first_step() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=1)
    with (
        pytest.raises(SelectionError, match="'fox' is not in the prompt"),
        steer(pipe, AttentionRefocusing({"red cube": (0, 0, 0.5, 0.5), "fox": (0.5, 0.5, 1, 1)})),
    ):
        pipe(**call)


def map_sites(*names: str, side: Any = 8, kind: str = "cross") -> list[MapSite]:
    grids = side if isinstance(side, list) else [side] * len(names)
    sites = [Site(n, i, kind, 4, 4, "image", "denoiser") for i, n in enumerate(names)]
    return [MapSite(s, None, None if g is None else (g, 2 * g)) for s, g in zip(sites, grids, strict=True)]


def chosen(sites: list[MapSite], **options: Any) -> list[str]:
    return [s.site.name for s in AttendAndExcite("cat", **options).choose(sites)]


def test_which_sites_are_read_where_none_are_named() -> None:
    """UNets by the size of their maps, SDXL by the published blocks, SD3 and Flux one block; named ones are all read."""
    names = ["down_blocks.0.a", "down_blocks.1.a", "mid_block.a", "up_blocks.1.a"]
    unet = map_sites(*names, side=[64, 16, 8, 16])
    assert chosen(unet) == [names[1], names[3]] and chosen(unet, size=32) == [names[0]]
    assert chosen(unet, size=8) == [names[2]] and chosen(unet, size=None) == [names[0]]
    assert chosen(map_sites(*names, side=[12, 6, 3, 6])) == [names[0]]
    assert chosen(unet, where=Where(layers=[0, 2])) == names
    blocks = [f"up_blocks.0.attentions.0.transformer_blocks.{i}.attn2" for i in range(10)]
    assert chosen(map_sites("down_blocks.1.a", *blocks, side=[64] + [32] * 10)) == blocks[1:7]
    double_blocks = [f"transformer_blocks.{i}.attn" for i in range(24)]
    assert chosen(map_sites(*double_blocks, kind="joint")) == ["transformer_blocks.9.attn"]
    single = [f"single_transformer_blocks.{i}.attn" for i in range(3)]
    assert chosen(map_sites(*double_blocks[:19], *single, kind="joint")) == ["transformer_blocks.18.attn"]
    with pytest.raises(SelectionError, match="needs where="):
        chosen(map_sites("blocks.0.attn2"))


def text_pipeline(name: str) -> Any:
    """A tiny SD3 (two CLIP encoders, no T5) or FLUX (a CLIP encoder in the place of T5) that reads prompts."""
    clip = tiny_clip_tokenizer()
    if name == "sd3":
        pipe = tiny_pipeline("sd3", joint_attention_dim=64, pooled_projection_dim=64)
        encoders = {f"text_encoder{n}": tiny_clip_text_encoder(clip, 3, projection=True) for n in ("", "_2")}
        pipe.register_modules(tokenizer=clip, tokenizer_2=tiny_clip_tokenizer(), **encoders)
    else:
        pipe = tiny_pipeline("flux")
        encoders = {f"text_encoder{n}": tiny_clip_text_encoder(clip, 3) for n in ("", "_2")}
        pipe.register_modules(tokenizer=clip, tokenizer_2=tiny_clip_tokenizer(), **encoders)
    return pipe


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_words_in_joint_attention_are_those_of_the_embeddings(name: str) -> None:
    """With prompts as strings, two images each: the same as with positions, among the prompt's own tokens."""
    pipe = text_pipeline(name)
    seen = []

    class Watched(AttendAndExcite):
        def loss(self, maps: Maps) -> torch.Tensor:
            value = super().loss(maps)
            P = torch.softmax(100 * maps.text()[..., 1:8], dim=-1)
            by_hand = [P[b, ..., 2 if b < 2 else 3] for b in range(4)]
            expected = [1 - smoothed(m[None, None]).max() for m in by_hand]
            seen.append((value.detach(), torch.stack(expected).detach(), maps.text().shape[-1]))
            return value

    prompts = ["a red cube and a blue ball", "the small black dog on the fox"]
    call = {"height": 128, "width": 128, "num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": 2}
    options = {"max_sequence_length": 16, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
    with steer(pipe, Watched([["cube"], ["dog"]], {}, until=1)) as run:
        pipe(prompts, **call, **options)
    ((value, expected, keys),) = seen
    assert keys == (77 + 16 if name == "sd3" else 16) and run.audit.extra[0]["latent updates"] == 4
    assert torch.allclose(value, expected, atol=1e-5) and value.unique().numel() == 4
    with pytest.raises(SelectionError, match="'cube' is not in the prompt: 'the small"), steer(pipe, Watched("cube")):
        pipe(prompts, **call, **options)
