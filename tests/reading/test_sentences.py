"""Maps in words: places, sentences, and the view of a ledger."""

from __future__ import annotations

import pytest
import torch

from attnsteer import capture, zoo
from attnsteer.analysis import Ledger, trace
from attnsteer.errors import SelectionError
from attnsteer.reading import in_words, sentence, signals, trace_view
from attnsteer.reading.sentences import PLACES, place_of
from attnsteer.run.data.zoo import image as scene_image


def test_places() -> None:
    for y in range(3):
        for x in range(3):
            found = torch.full((9, 6), 0.01)
            found[3 * y + 1, 2 * x] = 5.0
            name, share = place_of(found)
            assert name == PLACES[y][x] and share > 0.9
    # A cell on the border between two thirds counts in both.
    name, share = place_of(torch.tensor([[1.0, 0.0]]).repeat(3, 1))
    assert name == "top left" and share == pytest.approx(2 / 9)
    assert place_of(torch.ones(8, 8))[1] == pytest.approx(1 / 9)
    for bad in (torch.zeros(2, 2), torch.tensor([[1.0, -1.0]]), torch.tensor([1.0])):
        with pytest.raises(SelectionError, match="no place"):
            place_of(bad)


def test_sentences() -> None:
    row = torch.tensor([0.05, 0.41, 0.2, 0.3, 0.04])
    assert sentence(row, list("abcde"), subject="'x'") == (
        "'x' looks 41 % on 'b', 30 % on 'd', 20 % on 'c', and 9 % on the rest."
    )
    image = torch.tensor([False, True, True, True, True])
    row = torch.tensor([0.2, 0.02, 0.7, 0.04, 0.04])
    said = sentence(row, list("abcde"), image, (2, 2))
    assert said == "the row looks 80 % on the image, mostly at its top right, 20 % on 'a'."
    flat = torch.ones(20)
    assert "nothing in particular (5 % at most" in sentence(flat, ["w"] * 20)
    assert "nowhere in particular" in sentence(torch.ones(64), ["i"] * 64, torch.ones(64).bool(), (8, 8))
    with pytest.raises(SelectionError, match="labels"):
        sentence(row, ["a"])


def test_the_sentence_is_about_the_models_row() -> None:
    model, processor = zoo.load("shapes-lvlm")
    picture = scene_image({"split": "test", "image": 0})
    inputs = processor(images=picture, text="<image> question is there a red circle ? answer", return_tensors="pt")
    said = in_words(model, inputs, processor.tokenizer, 1, 3)
    with torch.no_grad(), capture(model, rows="last") as seen:
        model(**inputs)
    row = seen.get(1, sample=0)[3, 0]
    image = inputs["input_ids"][0] == model.config.image_token_index
    assert said.startswith("'answer' (token 72) in layer 1, head 3, looks ")
    assert f"{100 * float(row[image].sum()):.0f} % on the image" in said and place_of(row[image].view(8, 8))[0] in said
    assert "token 70" in in_words(model, inputs, processor.tokenizer, 1, row=70)
    for bad in ({"row": 200}, {"row": -1}):
        with pytest.raises(SelectionError, match="73 tokens"):
            in_words(model, inputs, processor.tokenizer, 1, **bad)


def test_ledgers_in_view() -> None:
    ledger = Ledger(
        3.0,
        {("embedding",): 1.5, ("head", 0, 2): 2.0, ("block", 0): -0.7, ("bias",): 0.2},
        torch.tensor([0.5, 2.0, -0.5, 1.0]),
    )
    assert signals(ledger).tolist() == [1, 3] and signals(ledger, 0.5).tolist() == [1]
    text = trace_view(ledger, 2)
    assert text.splitlines()[3].split() == ["head", "0.2", "+2.000", "#" * 24]
    assert "others" in text and "direction 1" in text and "score +3.000" in text
    for bad in (lambda: signals(ledger, 0.0), lambda: trace_view(ledger, 0)):
        with pytest.raises(SelectionError):
            bad()
    with pytest.raises(SelectionError, match="positive"):
        signals(Ledger(-1.0, {}, torch.tensor([-1.0])))
    model, tokenizer = zoo.load("shapes-lm")
    ids = tokenizer("the star is red and small .", return_tensors="pt", return_token_type_ids=False)
    real = trace(model, ids, 2, 1, 6, 2)
    assert f"score {real.score:+.3f}" in trace_view(real) and "rest of block" in trace_view(real, 20)
