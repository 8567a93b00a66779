"""The server: requests over loopback, each as if it ran alone; and what is refused before the model hears of it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnsteer import ACT, PASTA, HeadGate, SpotLight, ZeroTuning, steer, zoo
from attnsteer.cli import app
from attnsteer.intervention import Intervention
from attnsteer.serving import LARGEST_BODY, Chooser, Server
from attnsteer.testing import tiny_transformers

NEW = 8
NAMED: dict[str, list[Intervention]] = {
    "flat": [ZeroTuning(gamma=6.0)],
    "focus": [PASTA(["red"], alpha=0.05)],
    "spot": [SpotLight([[(1, 3)]], target=0.5)],
    "act": [ACT(beta=0.1, threshold=0.05)],
    "both": [HeadGate({(0, 0): 0.2}), ZeroTuning(gamma=3.0)],
}


class Client:
    """Plain HTTP, so that a test sees what was answered."""

    def __init__(self, port: int):
        self.port = port

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, (bytes, str)) or body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json", "X-Request-ID": "the same for all"})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if answer.headers["content-type"] == "application/json" else text

    def complete(self, prompt: str, **fields: Any) -> tuple[int, Any]:
        return self.call("POST", "/v1/completions", {"prompt": prompt, "max_tokens": NEW, **fields})


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Server, Client]]:
    import uvicorn

    server = Server(
        "shapes-lm", NAMED, batching={"num_blocks": 64, "page_size": 16, "max_batch_tokens": 256}, device="cpu"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(server.app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    yield server, Client(port)
    running.should_exit = True
    thread.join()
    server.close()
    assert not {"generate_batch", "init_continuous_batching"} & set(vars(server.model))


@pytest.fixture(scope="module")
def alone() -> Any:
    """What the model of the server says to a prompt, alone."""
    model, tokenizer = zoo.load("shapes-lm")

    def say(prompt: str, methods: list[Intervention]) -> str:
        ids = tokenizer(prompt, return_tensors="pt")
        own = [m.new(tokenizer=tokenizer) if hasattr(m, "tokenizer") else m for m in methods]
        options = {"max_new_tokens": NEW, "do_sample": False}
        if not own:
            out = model.generate(**ids, **options)
        else:
            with steer(model, *own, control=True):
                out = model.generate(**ids, **options)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return say


PROMPTS = ["a red circle and", "a blue square left of a red triangle", "there is a green star and a red"]


def asked(i: int) -> tuple[str, Any, list[Intervention]]:
    """(prompt, the steering asked for, what that is)."""
    prompt = PROMPTS[i % 3]
    choices: list[tuple[Any, list[Intervention]]] = [
        ("flat", NAMED["flat"]),
        ({"name": "flat", "gamma": 0.2}, [ZeroTuning(gamma=0.2)]),
        ("focus", NAMED["focus"]),
        ({"name": "focus", "spans": [[0, 2]], "alpha": 0.2}, [PASTA([[(0, 2)]], alpha=0.2)]),
        ("spot", NAMED["spot"]),
        ("act", NAMED["act"]),
        ("both", NAMED["both"]),
        ("none", []),
    ]
    return (prompt, *choices[i % 8])


def test_32_clients_at_once(served: Any, alone: Any) -> None:
    server, client = served

    def one(i: int) -> str:
        prompt, chosen, _ = asked(i)
        streamed = {"stream": True} if i % 2 else {}
        status, answer = client.complete(prompt, steering=chosen, **streamed)
        assert status == 200, answer
        if not streamed:
            return answer["choices"][0]["text"]
        events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
        return "".join(e["choices"][0]["text"] for e in events)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(32)))
    assert answers == [alone(prompt, methods) for prompt, _, methods in map(asked, range(32))]
    assert len(set(answers)) > 3
    assert not server.app._chosen


def test_what_is_asked_wrongly(served: Any, alone: Any) -> None:
    server, client = served
    for steering, message in (
        ("flatt", "'flatt' does not exist; there are act, both, flat, focus, spot and none. Did you mean 'flat'"),
        ({"gamma": 2.0}, "gamma without a name"),
        (["flat"], "does not exist"),
        (3, "does not exist"),
        ({"name": "flat", "gamma": "2"}, "give a number"),
        ({"name": "flat", "gamma": -2}, "above 0"),
        ({"name": "flat", "gamma": [1, 2]}, "give a number"),
        ({"name": "flat", "heads": {"0": [0]}}, "may set gamma of 'flat', not 'heads'"),
        ({"name": "flat", "where": {"layers": [0]}}, "may set gamma of 'flat', not"),
        ({"name": "focus", "spans": "../etc"}, "a list of"),
        ({"name": "focus", "spans": [[0, 400]]}, "ends after its"),
        ({"name": "focus", "spans": ["purple"]}, "not in the text"),
        ({"name": "focus", "tokenizer": 1}, "not 'tokenizer'"),
    ):
        status, answer = client.complete(PROMPTS[0], steering=steering)
        assert (status, message in answer["error"]["message"]) == (400, True), (steering, answer)
    for body, status in (("{", 400), ("[1]", 400), (b"\xff", 400), ("1" * (LARGEST_BODY + 1), 413)):
        assert client.call("POST", "/v1/completions", body)[0] == status
    for fields in ({"temperature": 0.7}, {"top_p": 0.5}, {"seed": 1}, {"generation_config": "{}"}):
        status, answer = client.complete(PROMPTS[0], **fields)
        assert status == 400 and "sampled alike" in answer["error"]["message"]
    for method, path in (("POST", "/reset"), ("POST", "/load_model"), ("GET", "/docs"), ("POST", "/v1/systemone")):
        assert client.call(method, path, {} if method == "POST" else None)[0] == 404
    assert client.complete(PROMPTS[0], unknown=1)[0] == 422
    status, answer = client.complete(PROMPTS[0], temperature=0.0)
    assert (status, answer["choices"][0]["text"]) == (200, alone(PROMPTS[0], []))
    assert not server.app._chosen


def test_what_exists(served: Any) -> None:
    _, client = served
    status, answer = client.call("GET", "/v1/steerings")
    assert status == 200
    found = {entry["id"]: entry["methods"] for entry in answer["data"]}
    assert found["flat"] == [{"method": "ZeroTuning", "parameters": {"gamma": 6.0}}]
    assert [m["method"] for m in found["both"]] == ["HeadGate", "ZeroTuning"]
    assert client.call("GET", "/health") == (200, {"status": "ok"})
    assert client.call("GET", "/v1/models")[0] == 200


def test_a_client_that_goes_away(served: Any, alone: Any) -> None:
    server, client = served
    connection = HTTPConnection("127.0.0.1", client.port, timeout=60)
    body = {"prompt": PROMPTS[1], "max_tokens": 400, "stream": True, "steering": "act"}
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse()
    assert answer.readline()
    connection.sock.shutdown(socket.SHUT_RDWR) if connection.sock else answer.close()
    connection.close()
    prompt, chosen, methods = asked(3)
    assert client.complete(prompt, steering=chosen)[1]["choices"][0]["text"] == alone(prompt, methods)
    scheduler = server._state._cb_manager.scheduler
    until = time.monotonic() + 20
    while (scheduler.active_requests or server.app._chosen) and time.monotonic() < until:
        time.sleep(0.05)
    assert not scheduler.active_requests and not scheduler.waiting_requests and not server.app._chosen


def test_the_client_of_the_documentation(served: Any, alone: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import openai

    _, client = served
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    shared: dict[str, Any] = {}
    exec(block.replace("localhost:8000", f"127.0.0.1:{client.port}"), shared)
    assert capsys.readouterr().out == alone("a red circle and", [ZeroTuning(gamma=0.5)]) + "\n"
    options = {"model": shared["model"], "prompt": PROMPTS[0]}
    with pytest.raises(openai.BadRequestError, match="there are act, both, flat"):
        shared["client"].completions.create(**options, extra_body={"steering": "loud"})


def test_a_request_that_comes_by_another_way_is_refused() -> None:
    model = tiny_transformers("llama")
    with steer(model, named={"flat": ZeroTuning(gamma=6.0)}, control=True) as run:
        Chooser(None, run)
        manager = model.init_continuous_batching()
        with pytest.raises(Exception, match="another way than this server"):
            manager.add_request([1, 2, 3], request_id="x")
        manager.destroy()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr("attnsteer.serving.Server", lambda *args, **options: ran.append((args, options)) or _Idle())
    ZeroTuning(gamma=2.0).save_pretrained(tmp_path / "zero")
    HeadGate({(0, 0): 0.5}).save_pretrained(tmp_path / "gate")
    run = CliRunner()
    result = run.invoke(
        app,
        ["serve", "m", "--steer", f"a={tmp_path}/zero", "--steer", f"a={tmp_path}/gate", "--max-batch-tokens", "64"],
    )
    assert result.exit_code == 0, result.output
    ((model, named), options) = ran[0]
    assert model == "m" and [type(m) for m in named["a"]] == [ZeroTuning, HeadGate]
    assert options["batching"] == {"max_batch_tokens": 64}
    for wrong in ([], ["--steer", "zero"], ["--steer", "=x"], ["--steer", f"a={tmp_path}/none"]):
        assert run.invoke(app, ["serve", "m", *wrong]).exit_code == 2


class _Idle:
    def serve(self, host: str, port: int) -> None:
        assert (host, port) == ("localhost", 8000)


def test_other_protocols_pass() -> None:
    seen: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    with steer(tiny_transformers("llama"), named={"flat": ZeroTuning(gamma=6.0)}, control=True) as run:
        asyncio.run(Chooser(inner, run)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
