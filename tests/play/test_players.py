"""What a page may ask of a model, and what it is told."""

from __future__ import annotations

import base64
import io
import struct
import threading
import time
import zlib
from typing import Any

import pytest
import torch
from PIL import Image

from attnsteer import PAG, steer
from attnsteer.errors import RecipeError, SelectionError
from attnsteer.methods import SpotLight
from attnsteer.play import player
from attnsteer.play.dials import TEXT
from attnsteer.play.drawing import Stale, whole
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
        ({"prompt": "a \ud83d star"}, "half of a character"),
        ({"value": 10**400}, "give a number"),
        ({"method": "Nothing"}, "there are SpotLight"),
        ({"value": "1"}, "give a number"),
        ({"value": float("nan")}, "give a number"),
        ({"value": 2.0}, "target"),
        ({"spans": [[2, 900]]}, "among 19 tokens"),
        ({"heads": [[90, 0]], "spans": []}, r"\(90, 0\) is no \(layer, head\)"),
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
    # A few bytes that say they are 60,000 pixels a side.
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    with pytest.raises(SelectionError, match="cannot be read"):
        sent_picture("data:image/png;base64," + base64.b64encode(bomb).decode())


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
    with pytest.raises(SelectionError, match="one picture do not fit"):
        looker.answer({**given, "prompt": "<image> <image> is there a star ?"})


@pytest.fixture(scope="module")
def drawer() -> Any:
    return player("shapes-sd")


DRAWN = {"prompt": "a red circle", "method": "PAG", "value": 3.0, "heads": [], "seed": 1, "steps": 3}


def shown(uri: str) -> torch.Tensor:
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255


def test_seeds_of_a_pipeline(drawer: Any) -> None:
    found = drawer.answer(DRAWN)
    assert found["before"] != found["after"] and found["steered"]
    assert drawer.answer({**DRAWN, "value": 0.0})["after"] == found["before"]


def test_a_preview_is_one_step_of_the_run(drawer: Any) -> None:
    """The unsteered one is what the scheduler's equation takes the finished latent to be; the steered one is another picture."""
    found = drawer.answer({**DRAWN, "stage": "preview"})
    assert (found["step"], found["of"]) == (3, 3) and found["changed"] and found["before"] != found["after"]
    pipe, seen = drawer.loaded.target, []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, t, z, **k: seen.append((output, t, z.clone())) or step(output, t, z, **k)
    try:
        pipe(DRAWN["prompt"], num_inference_steps=3, generator=torch.Generator().manual_seed(1))
    finally:
        del pipe.scheduler.step
    output, t, z = seen[2]
    level = pipe.scheduler.alphas_cumprod[t]
    clean = (z - (1 - level).sqrt() * output) / level.sqrt()
    with torch.no_grad():
        picture = (pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample[0] / 2 + 0.5).clamp(0, 1)
    assert float((shown(found["before"]) - picture.permute(1, 2, 0).flatten()).abs().max()) <= 1.01 / 255
    # Nothing stays behind: the same picture as before, and off is off.
    still = drawer.answer({**DRAWN, "stage": "preview", "value": 0.0})
    assert still["after"] == still["before"] == found["before"] and "step" not in vars(pipe.scheduler)


def test_a_preview_runs_no_block_again_that_the_method_does_not_touch(drawer: Any) -> None:
    """The strong pass up to the first edited block is known; with nothing kept the picture is the same."""
    given, unet, ran = {**DRAWN, "stage": "preview"}, drawer.loaded.target.unet, {"first": 0, "last": 0}
    drawer.answer({**given, "value": 0.0})
    moment = drawer._known[DRAWN["prompt"], DRAWN["seed"], DRAWN["steps"]][1]
    count = lambda name: lambda *_: ran.update({name: ran[name] + 1})  # noqa: E731
    hooks = [
        b.resnets[0].register_forward_hook(count(n))
        for n, b in (("first", unet.down_blocks[0]), ("last", unet.up_blocks[-1]))
    ]
    try:
        found = drawer.answer(given)
        assert moment.blocks and ran == {"first": 0, "last": 2}
        moment.blocks.clear()
        assert drawer.answer(given)["after"] == found["after"] != found["before"]
        assert ran == {"first": 1, "last": 4}
    finally:
        for hook in hooks:
            hook.remove()


def test_a_pipeline_that_cannot_be_entered_in_the_middle_has_no_previews(
    drawer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, given = drawer.loaded.target, {**DRAWN, "seed": 2, "value": 0.0}
    drawer.answer(given)
    prepare = type(pipe).prepare_latents
    monkeypatch.setattr(type(pipe), "prepare_latents", lambda *a, **k: prepare(*a, **k)[:, :, :8])
    found = drawer.answer({**given, "stage": "preview"})
    assert found["before"] is None and "no previews" in found["why"]


@pytest.mark.parametrize("methods", [(), (PAG(3.0),)], ids=["plain", "steered"])
def test_a_picture_is_given_up_inside_a_step(drawer: Any, methods: tuple[Any, ...]) -> None:
    pipe, asked, stepped = drawer.loaded.target, [], []
    draw = lambda wanted: whole(pipe, DRAWN["prompt"], 1, 3, *methods, wanted=wanted)[0]  # noqa: E731
    before, step = draw(lambda: True), pipe.scheduler.step
    pipe.scheduler.step = lambda *a, **k: stepped.append(1) or step(*a, **k)
    try:
        with pytest.raises(Stale):
            draw(lambda: asked.append(1) or len(asked) < 3)
    finally:
        del pipe.scheduler.step
    assert len(asked) == 3 and not stepped
    assert draw(lambda: True).tobytes() == before.tobytes()


def test_a_picture_that_nobody_waits_for_is_given_up(drawer: Any) -> None:
    drawer.answer(DRAWN)
    given, ended = {**DRAWN, "client": "a", "steps": 50}, []

    def draw() -> None:
        try:
            drawer.answer({**given, "turn": 1})
        except Stale:
            ended.append(True)

    thread = threading.Thread(target=draw)
    thread.start()
    while not drawer._turns.get("a"):
        time.sleep(0.01)
    # Another client does not end it; the next turn of this one, about another prompt, does.
    drawer._hear({**given, "client": "b", "turn": 9})
    found = drawer.answer({**DRAWN, "client": "a", "turn": 2})
    thread.join(timeout=60)
    assert ended == [True] and found["after"] == drawer.answer(DRAWN)["after"]
    with pytest.raises(Stale):
        drawer.answer({**DRAWN, "client": "a", "turn": 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"stage": "draft"}, "there are picture, preview"),
        ({"client": ["a"]}, "client, turn"),
        ({"client": "a" * 65}, "client, turn"),
        ({"client": "c", "turn": True}, "client, turn"),
    ],
)
def test_wrong_requests_to_a_pipeline_are_told_so(drawer: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        drawer.answer({**DRAWN, **given})


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(name: str, **_: Any) -> None:
        raise OSError(f"no {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(RecipeError, match="nobody/nothing cannot be had"):
        player("nobody/nothing")
