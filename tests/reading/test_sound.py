"""Words over time and frequency: against explicit maps of a denoiser with a latent that is no square."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer import capture
from attnsteer.errors import SelectionError
from attnsteer.reading import SoundMaps, sound_maps
from attnsteer.testing import tiny_denoiser, tiny_denoiser_inputs


@pytest.fixture(scope="module")
def unet() -> Any:
    return tiny_denoiser("sd")


@pytest.fixture(scope="module")
def inputs(unet: Any) -> dict[str, Any]:
    made = tiny_denoiser_inputs("sd", unet, batch=2)
    # Twelve cells of time by four of frequency, as the latent of a spectrogram has them.
    made["sample"] = torch.randn(2, made["sample"].shape[1], 16, 8, generator=torch.Generator().manual_seed(0))
    return made


@torch.no_grad()
def test_maps_are_columns_of_the_maps(unet: Any, inputs: dict[str, Any]) -> None:
    from attnsteer import Where

    plain = unet(**inputs, return_dict=False)[0]
    with sound_maps(unet, {"dog": (1, 3), "rain": [4]}) as heard:
        assert torch.equal(unet(**inputs, return_dict=False)[0], plain)
        unet(**inputs, return_dict=False)
    with capture(unet, Where(kinds="cross"), what=("q", "k")) as seen:
        unet(**inputs, return_dict=False)
    total, heads, finest = 0.0, 0, max(len(t.rows[0]) for t in seen.takes)
    for take in seen.takes:
        q, k = take.tensor("q").double(), take.tensor("k").double()
        A = (q @ k.transpose(-1, -2) * take.scale).softmax(dim=-1).sum(dim=1)
        n = A.shape[1]
        h, w = next((16 // f, 8 // f) for f in (1, 2, 4, 8) if (16 // f) * (8 // f) == n)
        own = torch.stack([A[..., [1, 2]].mean(dim=-1), A[..., 4]], dim=1).view(2, 2, h, w).float()
        if n < finest:
            side = next((16 // f, 8 // f) for f in (1, 2, 4, 8) if (16 // f) * (8 // f) == finest)
            own = torch.nn.functional.interpolate(own, size=side, mode="bilinear", align_corners=False)
        total, heads = total + own, heads + q.shape[1]
    # Two forwards of the same are the mean of one.
    assert (heard.maps() - total / heads).abs().max() <= 1e-6
    assert heard.calls == 2 * len(seen.takes) and heard.maps((4, 2)).shape == (2, 2, 4, 2)
    assert torch.equal(heard.over_time("rain", 1), heard.maps()[1, 1].mean(dim=-1))


def test_when_a_word_sounds() -> None:
    heard = SoundMaps(["dog"])
    line = torch.tensor([0.1, 0.2, 0.6, 1.0, 0.7, 0.3, 0.9, 0.1])
    heard.add((8, 2), line[None, None, :, None].expand(1, 1, 8, 2), 1)
    assert heard.when("dog", 4.0) == (1.0, 2.5)
    with pytest.raises(SelectionError, match="no map of 'cat'"):
        heard.over_time("cat")
    with pytest.raises(SelectionError, match="inside the block"):
        SoundMaps(["dog"]).maps()


def test_words_that_are_not_there(unet: Any, inputs: dict[str, Any]) -> None:
    class Tokenizer:
        is_fast = False

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(map(chr, ids))

    with torch.no_grad(), sound_maps(unet, ["og"], prompt="a dog", tokenizer=Tokenizer()) as heard:
        unet(**inputs, return_dict=False)
    with torch.no_grad(), sound_maps(unet, {"og": [3, 4]}) as same:
        unet(**inputs, return_dict=False)
    assert torch.equal(heard.maps(), same.maps())
    for words, more, said in (
        (["cat"], {"prompt": "a dog", "tokenizer": Tokenizer()}, "not in the prompt"),
        (["dog"], {}, "prompt="),
        ({"dog": (3, 1)}, {}, "text keys"),
        ({"dog": [-1]}, {}, "text keys"),
        ({}, {}, "at least one"),
    ):
        with pytest.raises(SelectionError, match=said), sound_maps(unet, words, **more):
            pass
