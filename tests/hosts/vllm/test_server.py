"""The OpenAI-compatible server of vLLM with steering by request: many clients at once, wrong requests, clients that leave."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch

from attnsteer import PASTA, InstABoost, SpotLight, ZeroTuning, steer
from attnsteer.hosts.vllm.wire import request_args
from tests.hosts.vllm.served import Client, server, widened

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ("input two A answer objects above ?", "a red circle and", "there is a blue square left of", "answer")
TOKENS = 8
CLOSE = 1e-4


@pytest.fixture(scope="module")
def path(tmp_path_factory: Any) -> Any:
    return widened(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def client(path: Any, tmp_path_factory: Any) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    calm = tmp_path_factory.mktemp("steerings") / "calm"
    ZeroTuning(gamma=0.5).save_pretrained(calm)
    with server(path, {"steerings": {"calm": str(calm)}}, log) as client:
        client.log = log
        yield client


METHODS = [
    None,
    ZeroTuning(gamma=0.5),
    ZeroTuning(gamma=0.05, heads={1: [0, 1], 2: [0, 2]}),
    SpotLight(spans=[[(1, 3)]], target=0.5),
    PASTA(spans=[[(1, 3)]], alpha=0.05),
    InstABoost(spans=[[(1, 3)]], factor=6.0),
    ZeroTuning(gamma=4.0),
    ZeroTuning(gamma=2.0),
]


def body(text: str, method: Any, **other: Any) -> dict[str, Any]:
    own: dict[str, Any] = dict(
        model="shapes", prompt=text, max_tokens=TOKENS, temperature=0, logprobs=1, ignore_eos=True
    )
    if method is not None:
        own["vllm_xargs"] = {"attnsteer": json.dumps(request_args(method)["attnsteer"])}
    return {**own, **other}


def said(answer: Any) -> tuple[str, list[float]]:
    choice = answer["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


@pytest.fixture(scope="module")
def oracle(path: Any) -> dict[tuple[str, int], list[float]]:
    """Log-probabilities of each text under each method, alone in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = {}
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        if ids.shape[1] < 4:
            continue
        for i, method in enumerate(METHODS):

            def go(ids: Any = ids) -> list[float]:
                out = model.generate(
                    ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=None, output_logits=True,
                    return_dict_in_generate=True, pad_token_id=0,
                )  # fmt: skip
                new = out.sequences[0, ids.shape[1] :].tolist()
                return [torch.log_softmax(l[0].float(), -1)[t].item() for l, t in zip(out.logits, new, strict=True)]

            if method is None:
                found[text, i] = go()
            else:
                with steer(model, method):
                    found[text, i] = go()
    return found


def far(answer: Any, wanted: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(said(answer)[1], wanted, strict=True))


def test_many_clients_with_steerings_of_their_own(client: Client, oracle: Any) -> None:
    # The effects are not what an error could hide in.
    texts = {text for text, _ in oracle}
    assert all(
        max(abs(a - b) for a, b in zip(oracle[t, 0], oracle[t, i], strict=True)) > 10 * CLOSE
        for t in texts
        for i in (1, 3)
    )
    work = [key for key in oracle for _ in range(3)][:96]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda key: client.call("/v1/completions", body(key[0], METHODS[key[1]])), work))
    assert {status for status, _ in answers} == {200}
    assert max(far(answer, oracle[key]) for key, (_, answer) in zip(work, answers, strict=True)) < CLOSE
    named = body(work[0][0], None, vllm_xargs={"attnsteer": "calm"})
    assert far(client.call("/v1/completions", named)[1], oracle[work[0][0], 1]) < CLOSE


def test_text_of_a_prompt_is_found(client: Client, oracle: Any, path: Any) -> None:
    from transformers import AutoTokenizer

    text = next(t for t, _ in oracle)
    ids = AutoTokenizer.from_pretrained(path)(text).input_ids
    words = AutoTokenizer.from_pretrained(path).decode(ids[1:3]).strip()
    asked = body(
        text, None, vllm_xargs={"attnsteer": json.dumps({"method": "SpotLight", "spans": [words], "target": 0.5})}
    )
    status, answer = client.call("/v1/completions", asked)
    assert status == 200, answer
    assert far(answer, oracle[text, 3]) < CLOSE


def malformed() -> list[Any]:
    """Fifty requests that ask for steering wrongly: (what is said, words of the answer)."""
    z = {"method": "ZeroTuning"}
    values: list[tuple[Any, str]] = [
        ("calmer", "calm"), ("", "calm"), ("{", "JSON"), ("[1]", "give a name"), ("5", "5"), (5, "give a name"),
        (1.5, "give a name"), (["calm"], "give a name"), ("{}", "one of the two"), ('{"name": 5}', "calm"),
        ('{"name": "calm", "x": 1}', "gamma"), ("null}", "null"), ("../../etc/passwd", "calm"), ("/tmp", "calm"),
        ("hf://x/y", "calm"),
    ]  # fmt: skip
    objects: list[tuple[Any, str]] = [
        ({"method": "Nope"}, "ZeroTuning"), ({"method": None}, "name of a method"), ({"method": ["a"]}, "name of a method"),
        ({"method": "os:system"}, "no method"), ({**z, "gamma": "1"}, "gamma"), ({**z, "gamma": None}, "gamma"),
        ({**z, "gamma": 0}, "above 0"), ({**z, "gamma": -1}, "above 0"), ({**z, "gamma": 1e300}, "gamma"),
        ({**z, "gamma": True}, "gamma"), ({**z, "gamma": {}}, "gamma"), ({**z, "gamma": [1, 2]}, "2 samples"),
        ({**z, "beta": 1}, "gamma"), ({**z, "heads": {"0": [99]}}, "heads"), ({**z, "heads": {"99": [0]}}, "layers"),
        ({**z, "heads": {"0": [-1]}}, "heads"), ({**z, "heads": {}}, "head"), ({**z, "heads": "all"}, "heads"),
        ({**z, "heads": {"a": [0]}}, "heads"), ({**z, "where": 5}, "where"), ({**z, "where": {"layers": 99}}, "layers"),
        ({**z, "where": {"x": 1}}, "layers"), ({**z, "where": {"steps": [0]}}, "steps"),
        ({**z, "where": {"modules": ".*"}}, "modules"), ({"method": "SpotLight"}, "spans"),
        ({"method": "SpotLight", "spans": [[0, 500]]}, "tokens"), ({"method": "SpotLight", "spans": [[4, 2]]}, "("),
        ({"method": "SpotLight", "spans": ["not there"]}, "not there"),
        ({"method": "SpotLight", "spans": [[0, 2]], "target": 2}, "target"),
        ({"method": "PASTA", "spans": [[0, 2]], "scale_position": "both"}, "exclude"),
        ({"method": "HeadGate", "gates": {"0": 1}}, "gate"), ({"method": "HeadGate", "gates": [[0, 0, "x"]]}, "gate"),
        ({"method": "VAR", "sink_dims": [1]}, "image"), ({"method": "PAG"}, "denoisers"), ({"method": "ACT"}, "chunked"),
    ]  # fmt: skip
    return [*values, *((json.dumps(o), word) for o, word in objects)]


def test_wrong_requests_are_told_what_exists_and_change_nothing(client: Client, oracle: Any) -> None:
    wrong, text = malformed(), next(t for t, _ in oracle)
    assert len(wrong) == 50
    right = [key for key in oracle][:10]

    def ask(item: Any) -> Any:
        if item in right:
            return client.call("/v1/completions", body(item[0], METHODS[item[1]]))
        return client.call("/v1/completions", body(text, None, vllm_xargs={"attnsteer": item[0]}))

    work = [*wrong[:25], *right, *wrong[25:]]
    with ThreadPoolExecutor(16) as pool:
        answers = dict(zip(range(len(work)), pool.map(ask, work), strict=True))
    for i, item in enumerate(work):
        status, answer = answers[i]
        if item in right:
            assert status == 200 and far(answer, oracle[item]) < CLOSE
        else:
            assert 400 <= status < 500, (item, status, answer)
            assert item[1].lower() in json.dumps(answer).lower(), (item, answer)
    nested = body(text, None, vllm_xargs={"attnsteer": {"method": "ZeroTuning"}})
    assert client.call("/v1/completions", nested)[0] == 400
    assert client.call("/v1/completions", body(text, None, cache_salt="attnsteer:x:"))[0] == 400
    assert client.call("/v1/completions", data=b"{")[0] in (400, 422)
    assert client.call("/health")[0] == 200


@pytest.mark.parametrize("where", ["server", "engine"])
def test_a_recipe_asks_vllm(where: str, request: Any, path: Any, tmp_path: Any) -> None:
    """The records of a run through a server, or an engine of its own, are those of the same run in this process, with choices of
    several tokens; an engine knows its sites, so that random heads can be drawn."""
    from attnsteer.run import run
    from attnsteer.run.folder import read_run
    from tests.run.running import MARKED, ROWS, recipe

    if where == "server":
        there: dict[str, Any] = {"vllm": f"{request.getfixturevalue('client').url}/v1"}
        controls: dict[str, Any] = {"zero": True}
    else:
        there = {"vllm": {"model": str(path), "max_model_len": 512, "enforce_eager": True}}
        controls = {"zero": True, "random_heads": 1, "random_from": "both"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    own = {"data": {"file": "rows.jsonl", "format": "choices"}, "interventions": [MARKED], "batch_size": 3}
    found = []
    for name, model in (("here", {"path": str(path)}), (where, there)):
        asked = recipe(tmp_path, **own, controls=controls, model={**model, "kind": "lm", "architecture": "llama"})
        found.append(read_run(run(asked, tmp_path / name, progress=False)).records)
    here, said = found
    assert set(here) == set(said) >= {"baseline", "zero", "method"} and len(here) == (3 if where == "server" else 5)
    pairs = [(here[arm][k]["scores"], said[arm][k]["scores"]) for arm in here for k in here[arm]]
    assert len(pairs) == len(here) * len(ROWS)
    assert max(abs(a - b) for own in pairs for a, b in zip(*own, strict=True)) < 5e-4
    moved = [abs(said["method"][k]["scores"][0] - said["baseline"][k]["scores"][0]) for k in said["method"]]
    assert max(moved) > 1e-2


def test_each_steered_request_has_a_line_in_the_log(client: Client, oracle: Any) -> None:
    text = next(t for t, _ in oracle)
    asked = {**body(text, METHODS[3]), "request_id": "asked-for-a-line"}
    assert client.call("/v1/completions", asked)[0] == 200
    client.call("/v1/completions", body(text, None))
    end = time.monotonic() + 20
    found = ""
    while time.monotonic() < end and not found:
        found = next(
            (l for l in client.log.read_text().splitlines() if "asked-for-a-line" in l and "SpotLight" in l), ""
        )
        time.sleep(0.2)
    assert "edited" in found and "changed nothing" not in found


def test_a_client_that_leaves_leaves_nothing_behind(client: Client, oracle: Any) -> None:
    text = next(t for t, _ in oracle)
    before = len(client.log.read_text())
    for _ in range(4):
        line = http.client.HTTPConnection(client.url.removeprefix("http://"), timeout=60)
        line.request(
            "POST",
            "/v1/completions",
            json.dumps(body(text, METHODS[3], max_tokens=200, stream=True)),
            {"Content-Type": "application/json"},
        )
        line.getresponse().read(64)
        line.sock.close() if line.sock else line.close()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        lines = client.call("/metrics")[1].splitlines()
        running = [
            float(l.split()[-1])
            for l in lines
            if l.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
        ]
        if running and not any(running):
            break
        time.sleep(0.5)
    assert running and not any(running)
    assert far(client.call("/v1/completions", body(text, METHODS[3]))[1], oracle[text, 3]) < CLOSE
    # A control at zero strength says so, rightly.
    assert "changed nothing" not in client.log.read_text()[before:]
