"""Recipes whose model is behind vLLM, against a stub that speaks its protocol: what is asked and recorded, and going on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from attnsteer.errors import RecipeError, RunError
from attnsteer.recipe import load_recipe
from attnsteer.run import run
from attnsteer.run.folder import read_run
from attnsteer.run.served import NAMES, sampling
from tests.run.running import written

ROWS = [
    {
        "id": f"r{i}",
        "prompt": f"{word} is the word",
        "choices": ["yes it is", "no"],
        "answer": i % 2,
        "spans": [word],
        "name": "plain",
    }
    for i, word in enumerate(["red", "blue", "green", "white", "black"])
]
SPOTLIGHT = {"method": "SpotLight", "params": {"spans": {"sample": "spans"}, "target": 0.3}}


class Stub:
    """Answers with what it was asked; a choice is as likely as its steering and its tokens say."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.left = 10**6
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": "stub", "root": "/models/stub"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    start = [1] if body["add_special_tokens"] else []
                    return self.answer(200, {"tokens": start + [len(w) + 2 for w in body["prompt"].split()]})
                with stub.lock:
                    stub.left -= 1
                    stub.asked.append(body)
                if stub.left < 0:
                    return self.answer(400, {"error": {"message": "no more; there is calm"}})
                return self.answer(200, stub.completion(body))

            def answer(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @staticmethod
    def completion(body: dict[str, Any]) -> dict[str, Any]:
        steering = json.loads(body.get("vllm_xargs", {}).get("attnsteer", "{}"))
        choice: dict[str, Any] = {"text": f" {steering.get('target', 'plain')} ", "finish_reason": "stop"}
        if "prompt_logprobs" in body:
            less = 0.5 * (steering.get("target", 0.0) > 0)
            own = [{str(t): {"logprob": -t - less}, "7777": {"logprob": 0.0}} for t in body["prompt"][1:]]
            choice["prompt_logprobs"] = [None, *own]
        return {"choices": [choice], "usage": {"completion_tokens": 3}}


@pytest.fixture
def stub() -> Iterator[Stub]:
    own = Stub()
    yield own
    own.server.shutdown()
    own.server.server_close()


def recipe(folder: Path, stub: Stub, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    own = {
        "model": {"vllm": stub.url, "kind": "lm"},
        "data": {"file": "rows.jsonl", "format": "choices"},
        "interventions": [SPOTLIGHT],
        "controls": {"zero": True},
        "batch_size": 2,
        **changes,
    }
    return load_recipe(written(folder, **own))


def steering(body: dict[str, Any]) -> Any:
    return json.loads(body["vllm_xargs"]["attnsteer"]) if "vllm_xargs" in body else None


def test_choices_are_scored_behind_a_prompt_that_ends_before_them(tmp_path: Path, stub: Stub) -> None:
    folder = run(recipe(tmp_path, stub), tmp_path / "out", progress=False)
    found = read_run(folder)
    assert found.complete and set(found.records) == {"baseline", "zero", "method"}
    assert len(stub.asked) == 3 * len(ROWS) * 2 and all(b["max_tokens"] == 1 for b in stub.asked)
    # [1] and the words of the prompt; "yes it is" has the lengths 3, 2 and 2.
    plain, moved = (found.records[arm][0, "r0"] for arm in ("baseline", "method"))
    assert plain["scores"] == [-13.0, -4.0] and moved["scores"] == [-14.5, -4.5] and plain["answer"] == 0
    said = [steering(b) for b in stub.asked]
    targets = sorted({s["target"] for s in said if s is not None})
    assert targets == [0.0, 0.3] and sum(s is None for s in said) == 10
    assert all(s["prompt"] == 5 and s["method"] == "SpotLight" for s in said if s is not None)
    assert {json.dumps(s["spans"]) for s in said if s is not None} == {json.dumps([[r["spans"][0]]]) for r in ROWS}
    assert found.identity["model"] == {"served": "stub", "root": "/models/stub"}


def test_texts_and_what_is_said_of_an_arm_that_changes_nothing(tmp_path: Path, stub: Stub) -> None:
    rows = {"task": "answer", "metrics": ["contains"], "primary": "contains.accuracy"}
    own = recipe(tmp_path, stub, **rows, decoding={"max_new_tokens": 4})
    found = read_run(run(own, tmp_path / "out", progress=False))
    assert found.records["method"][0, "r1"]["generated"] == "0.3" and found.records["baseline"][0, "r1"]["finished"]
    assert all(b["max_tokens"] == 4 and b["temperature"] == 0.0 for b in stub.asked)
    assert all(b["prompt"] in {r["prompt"] for r in ROWS} for b in stub.asked)
    assert found.unchanged == set()


def test_a_stopped_run_goes_on_and_asks_nothing_twice(tmp_path: Path, stub: Stub) -> None:
    own = recipe(tmp_path, stub)
    # The first batch has 2 samples, 3 arms and 2 choices.
    stub.left = 12
    with pytest.raises(RunError, match="there is calm"):
        run(own, tmp_path / "out", progress=False)
    before = read_run(tmp_path / "out")
    assert before.status["state"] == "failed" and {len(r) for r in before.records.values()} == {2}
    stub.left, first = 10**6, len(stub.asked)
    found = read_run(run(own, tmp_path / "out", progress=False))
    assert found.complete and len(stub.asked) - first == 3 * 3 * 2
    alone = read_run(run(own, tmp_path / "other", progress=False))
    assert alone.records == found.records


def test_what_a_request_cannot_say_is_refused(tmp_path: Path, stub: Stub) -> None:
    assert sampling({"max_new_tokens": 3, "temperature": 0.5}, "0 a") == {"max_tokens": 3, "temperature": 0.0}
    drawn = sampling({"do_sample": True, "top_k": 5}, "0 a")
    assert drawn == {"temperature": 1.0, "top_k": 5, "seed": drawn["seed"]} != sampling({"do_sample": True}, "0 b")
    with pytest.raises(RecipeError, match="num_beams"):
        sampling({"num_beams": 2}, "0 a")
    assert set(NAMES) >= {"max_new_tokens"}
    two = recipe(tmp_path, stub, interventions=[SPOTLIGHT, {"method": "ZeroTuning", "params": {"gamma": 0.5}}])
    with pytest.raises(RecipeError, match="2 interventions"):
        run(two, tmp_path / "two", progress=False)
    for model in (
        {"vllm": "ftp://x", "kind": "lm"},
        {"vllm": "http://user:x@host/v1", "kind": "lm"},
        {"vllm": stub.url, "kind": "vlm"},
        {"vllm": {"max_model_len": 5}, "kind": "lm"},
        {"vllm": {"model": "m", "trust_remote_code": True}, "kind": "lm"},
        {"vllm": stub.url, "zoo": "shapes-lm", "kind": "lm"},
    ):
        with pytest.raises(RecipeError, match="vllm"):
            recipe(tmp_path, stub, model=model)
    stub.server.shutdown()
    stub.server.server_close()
    with pytest.raises(RunError, match="cannot be reached"):
        run(recipe(tmp_path, stub), tmp_path / "gone", progress=False)
