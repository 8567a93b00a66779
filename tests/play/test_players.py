"""What a page may ask of a model, and what it is told."""

from __future__ import annotations

import base64
import io
import threading
from typing import Any

import pytest
import torch
from PIL import Image

from attnsteer import steer
from attnsteer.errors import RecipeError, SelectionError
from attnsteer.methods import SpotLight
from attnsteer.play import player
from attnsteer.play.dials import TEXT
from attnsteer.play.players import sent_picture

PROMPT = "a small red star . a large blue cross . question what colour is the star ? answer"


@pytest.fixture(scope="module")
def reader() -> Any:
    return player("shapes-lm")


def request(**more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "method": "SpotLight", "value": 0.6, "spans": [[6, 10]], "heads": [], **more}


def test_the_answer_is_the_steered_models_own(reader: Any) -> None:
    found = reader.answer(request())
    model, tokenizer = reader.loaded.target, reader.loaded.tokenizer
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        before = model(**inputs).logits[0, -1].softmax(dim=-1)
        with steer(model, SpotLight([[(6, 10)]], target=0.6)):
            after = model(**inputs).logits[0, -1].softmax(dim=-1)
    for entry in found["answers"]:
        token = tokenizer.convert_tokens_to_ids(entry["text"].strip())
        assert entry["before"] == pytest.approx(float(before[token]), abs=2e-5)
        assert entry["after"] == pytest.approx(float(after[token]), abs=2e-5)
    # Every head gives the marked tokens a share of t / (1 + t - psi) or what it gave before, where that is more.
    for was, now in zip(found["mass"][0], found["mass"][1], strict=True):
        assert all(n >= 0.6 / 1.6 - 1e-3 for n in now) and now != was
    assert found["steered"] and found["changed"] and found["tokens"][6].strip() == "a"


def test_off_and_unmarked_are_the_model_as_it_is(reader: Any) -> None:
    for given in (request(value=0.0), request(spans=[]), request(method="HeadGate", value=0.0)):
        found = reader.answer(given)
        assert not found["steered"] and all(a["before"] == a["after"] for a in found["answers"])
    # A value that moves nothing is no error.
    found = reader.answer(request(spans=[[0, 19]], value=0.5))
    assert found["steered"] and not found["changed"]


def test_chosen_heads_are_the_only_ones(reader: Any) -> None:
    found = reader.answer(request(heads=[[5, 1], [5, 4]]))
    assert [h for h, c in enumerate(found["change"][5]) if c > 0] == [1, 4]
    assert not any(c for layer in found["change"][:5] for c in layer)


def test_every_dial_acts(reader: Any) -> None:
    for dial in TEXT:
        value = dial.start if dial.start != dial.off else dial.high
        found = reader.answer(request(method=dial.name, value=value, heads=[[0, 1], [3, 2]]))
        assert found["steered"] and found["changed"], dial.name
        assert dial.low <= dial.off <= dial.high and dial.low <= dial.start <= dial.high


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": " "}, "give a prompt"),
        ({"prompt": "a " * 30_000}, "characters"),
        ({"prompt": "red " * 600}, "the prompt has 601 tokens; this model and page take 512"),
        ({"method": "Nothing"}, "there are SpotLight"),
        ({"value": "1"}, "give a number"),
        ({"value": float("nan")}, "give a number"),
        ({"value": 2.0}, "target"),
        ({"spans": [[2, 900]]}, "among 19 tokens"),
        ({"spans": "all"}, "pairs of whole numbers"),
        ({"heads": [[0, 99]]}, "99"),
    ],
)
def test_wrong_requests_are_told_so(reader: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        reader.answer(request(**given))
    assert reader.answer(request())["steered"]


def test_two_clients_at_once_get_their_own_answers(reader: Any) -> None:
    alone = {v: reader.answer(request(value=v))["answers"] for v in (0.3, 0.9)}
    found: dict[tuple[float, int], Any] = {}

    def ask(value: float, i: int) -> None:
        found[value, i] = reader.answer(request(value=value))["answers"]

    threads = [threading.Thread(target=ask, args=(v, i)) for v in alone for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        len(found) == 6 and all(answers == alone[v] for (v, _), answers in found.items()) and alone[0.3] != alone[0.9]
    )


def test_pictures_that_are_sent() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert sent_picture(uri).size == (6, 4)
    for wrong in ("http://x/y.png", "data:image/png;base64,%%%", "data:image/png;base64,AAAA", "data:text/html,x"):
        with pytest.raises(SelectionError, match="picture"):
            sent_picture(wrong)


def test_a_picture_and_its_places() -> None:
    looker = player("shapes-lvlm")
    given = {
        "prompt": "question is there a star ? answer",
        "method": "InstABoost",
        "value": 8.0,
        "spans": [[1, 9]],
        "scene": 3,
    }
    found = looker.answer(given)
    assert found["image"] == [1, 8, 8] and found["picture"].startswith("data:image/png") and found["changed"]
    assert looker.answer({**given, "method": "PAI", "value": 1.0})["changed"]
    with pytest.raises(SelectionError, match="give a picture"):
        looker.answer({**given, "scene": None})


@pytest.mark.long
def test_seeds_of_a_pipeline() -> None:
    drawer = player("shapes-sd")
    given = {"prompt": "a red circle", "method": "PAG", "value": 3.0, "heads": [], "seed": 1, "steps": 2}
    found = drawer.answer(given)
    assert found["before"] != found["after"] and found["steered"]
    assert drawer.answer({**given, "value": 0.0})["after"] == found["before"]
    with pytest.raises(SelectionError, match="steps=0"):
        drawer.answer({**given, "steps": 0})


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(name: str, **_: Any) -> None:
        raise OSError(f"no {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(RecipeError, match="nobody/nothing cannot be had"):
        player("nobody/nothing")
