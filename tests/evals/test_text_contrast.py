"""Logits contrasted with those of the prompt without its images, against a loop that recomputes everything."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import PAI, steer
from attnsteer.errors import CompositionError, SelectionError, UnsupportedHost
from attnsteer.evals.text_contrast import TextContrast
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs

GAMMA, CUT, NEW = 1.7, 0.05, 5


@pytest.fixture(scope="module")
def llava() -> tuple[Any, dict[str, Tensor]]:
    model = tiny_transformers("llava")
    inputs = dict(tiny_transformers_inputs("llava", model))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model, inputs


def by_hand(model: Any, inputs: dict[str, Tensor], pai: PAI, row: int) -> list[int]:
    """Greedy decoding of one sample, both prompts anew for each token."""
    plain = copy.deepcopy(model)
    valid = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row][valid]
    pixels = {"pixel_values": inputs["pixel_values"][row : row + 1]}
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(NEW):
            more = torch.tensor(answer, dtype=ids.dtype)
            with steer(model, pai):
                steered = model.generate(
                    input_ids=ids[None],
                    attention_mask=torch.ones_like(ids)[None],
                    **pixels,
                    max_new_tokens=len(answer) + 1,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                    logits_processor=[_Forced(answer, len(ids))],
                ).logits[-1][0]
            text = torch.cat([ids[ids != model.config.image_token_id], more])
            other = plain(input_ids=text[None]).logits[0, -1]
            p, u = steered.double().softmax(-1), other.double().softmax(-1)
            scores = [
                GAMMA * math.log(a / b) + math.log(b) if a >= CUT * float(p.max()) else -math.inf
                for a, b in zip(p.tolist(), u.tolist(), strict=True)
            ]
            answer.append(max(range(len(scores)), key=scores.__getitem__))
    return answer


class _Forced:
    """Makes `generate` say these tokens first."""

    def __init__(self, tokens: list[int], prompt: int):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self.prompt
        if place < len(self.tokens):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.tokens[place]] = 0.0
        return scores


def test_equal_to_a_loop_that_recomputes_everything(llava: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = llava
    pai = PAI(alpha=0.8)
    with steer(model, pai) as run:
        contrast = TextContrast(model, inputs, run, gamma=GAMMA, cut=CUT)
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, logits_processor=[contrast])
        plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(out, plain)
    for row in range(len(out)):
        assert out[row, inputs["input_ids"].shape[1] :].tolist() == by_hand(model, inputs, pai, row)


def test_beams_change_places(llava: tuple[Any, dict[str, Tensor]]) -> None:
    """Over the cache that follows them, and anew in each step."""
    model, inputs = llava

    class Anew(TextContrast):
        def _before(self, ids: Tensor) -> None:
            return None

    with steer(model, PAI(alpha=0.8)) as run:
        found = [
            model.generate(
                **inputs,
                max_new_tokens=NEW,
                do_sample=False,
                num_beams=3,
                return_dict_in_generate=True,
                output_scores=True,
                logits_processor=[kind(model, inputs, run, gamma=GAMMA, cut=0.0)],
            )
            for kind in (TextContrast, Anew)
        ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.allclose(found[0].sequences_scores, found[1].sequences_scores, atol=1e-5)


def test_a_gamma_of_one_is_the_model(llava: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = llava
    contrast = TextContrast(model, inputs, gamma=1.0, cut=0.0)
    with_it = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, logits_processor=[contrast])
    assert torch.equal(with_it, model.generate(**inputs, max_new_tokens=NEW, do_sample=False))


def test_what_cannot_be_contrasted_is_refused(llava: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = llava
    for wrong in ({"gamma": -1.0}, {"gamma": math.nan}, {"cut": 1.5}):
        with pytest.raises(SelectionError, match="gamma="):
            TextContrast(model, inputs, **wrong)
    with pytest.raises(UnsupportedHost, match="no image tokens"):
        TextContrast(tiny_transformers("llama"), inputs)
    image = {"input_ids": torch.full((1, 4), model.config.image_token_id)}
    with pytest.raises(SelectionError, match="no token besides"):
        TextContrast(model, image)
    contrast = TextContrast(model, inputs)
    with pytest.raises(SelectionError, match="Make one for each call"):
        contrast(inputs["input_ids"][:, 1:], torch.zeros(len(inputs["input_ids"]), 8))


def test_a_pause_leaves_nothing(llava: tuple[Any, dict[str, Tensor]]) -> None:
    """In a pause the model is the plain one, bit for bit, nothing is counted, and a cache of it is not gone on with."""
    model, inputs = llava
    plain = copy.deepcopy(model)(**inputs).logits
    with steer(model, PAI(alpha=0.8)) as run:
        steered = model(**inputs).logits
        seen = str(run.audit)
        with run.paused():
            output = model(**inputs, use_cache=True)
            written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(output.logits, plain) and str(run.audit) == seen
        assert torch.equal(model(**inputs).logits, steered) and not torch.equal(steered, plain)
        with pytest.raises(SelectionError, match="its cache was filled before"):
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=output.past_key_values)
    assert torch.equal(written, copy.deepcopy(model).generate(**inputs, max_new_tokens=3, do_sample=False))
    with pytest.raises(CompositionError, match="was removed"), run.paused():
        pass
