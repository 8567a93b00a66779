"""The hub: round trips through a stand-in on this machine, what is refused, and what each failure says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save
from torch import float32, int64, tensor, zeros
from typer.testing import CliRunner

from attnsteer import ACT, HeadGate, HeadSet, Intervention, SpotLight, Where, cli, get_method
from attnsteer.errors import AttnSteerError, HubError, RunError, SelectionError, SerializationError
from attnsteer.hub import card, check_model, model_facts
from attnsteer.manifest import MANIFEST, manifest_of
from attnsteer.results.hub_runs import evidence, pull_run, push_run
from attnsteer.results.verification import verify
from attnsteer.testing import tiny_transformers
from tests.hub import Hub, serve
from tests.results import folders

HEADS = HeadSet({0: [1], 1: [0, 3]}, scores={(0, 1): 0.5}, shape=(2, 4), provenance={"search": "by hand"})
TOKEN = "hf_stand_in"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name, folder in (("HF_HUB_CACHE", "cache"), ("HF_XET_CACHE", "xet"), ("HF_ASSETS_CACHE", "assets")):
        monkeypatch.setattr(constants, name, str(tmp_path / "hf" / folder))
    with serve() as found:
        yield found


def own(hub: Hub) -> dict[str, Any]:
    return {"token": TOKEN, "endpoint": hub.url}


# ------------------------------------------------------------------------------------------------ there and back


def test_heads_go_there_and_back(hub: Hub) -> None:
    model = tiny_transformers("llama")
    address = HEADS.push_to_hub("me/heads", model=model, **own(hub))
    assert address.startswith(f"{hub.url}/me/heads/commit/")
    found = HeadSet.from_pretrained("me/heads", model=model, **own(hub))
    assert found == HEADS and found.digest() == HEADS.digest() and dict(found.provenance) == {"search": "by hand"}
    assert set(hub.files("me/heads")) == {"heads.safetensors", MANIFEST, "README.md"}
    text = hub.files("me/heads")["README.md"].decode()
    assert (
        text.startswith('---\nlibrary_name: "attnsteer"\n')
        and "| 0 | 1 (0.5) |" in text
        and "| 1 | 0, 3 |" in text
        and "LlamaForCausalLM" in text
    )
    # A card that someone has written is kept, and an old version stays where it was.
    hub.files("me/heads")["README.md"] = b"my own words"
    first = hub.repos["model", "me/heads"][-1][0]
    HeadSet({0: [2]}, shape=(2, 4)).push_to_hub("me/heads", **own(hub))
    assert hub.files("me/heads")["README.md"] == b"my own words"
    assert HeadSet.from_pretrained("me/heads", revision=first, **own(hub)) == HEADS
    assert HeadSet.from_pretrained("me/heads", **own(hub)) == HeadSet({0: [2]})


@pytest.mark.parametrize(
    "method",
    [ACT(heads=HEADS, beta=0.3), SpotLight([[(1, 3)]], target=0.2, where=Where(layers=[1]))],
    ids=["heads", "plain"],
)
def test_methods_go_there_and_back(hub: Hub, method: Intervention) -> None:
    method.push_to_hub("me/method", model="org/model", **own(hub))
    assert Intervention.from_pretrained("me/method", model="org/model", **own(hub)) == method
    assert type(method).from_pretrained("me/method", **own(hub)) == method
    assert b'base_model: "org/model"' in hub.files("me/method")["README.md"]


def test_runs_go_there_and_back_and_are_verified(hub: Hub, tmp_path: Path) -> None:
    run = folders.text_run(tmp_path / "run")
    push_run(run, "me/run", **own(hub))
    back = pull_run("me/run", tmp_path / "back", **own(hub))
    for name in ("records.jsonl", "metrics.json", "recipe.yaml", "samples.jsonl", "status.json"):
        assert (back / name).read_bytes() == (run / name).read_bytes()
    assert verify(back, samples=0).checks[0].state == "pass" and not (back / ".cache").exists()
    text = hub.files("me/run", "dataset")["README.md"].decode()
    for words in (
        "**Better.**",
        "+20.0 points [+5.0 to +35.0]",
        "random heads",
        "attnsteer verify my-copy",
        "torch 2.13.0",
    ):
        assert words in text


def test_a_card_has_what_a_run_says_of_its_method_alone(hub: Hub, tmp_path: Path) -> None:
    run = folders.text_run(tmp_path / "run")
    step = json.loads((run / "arms.json").read_text())["arms"]
    step = next(a for a in step if a["kind"] == "method")["interventions"][0]
    heads = HeadSet({int(k): v for k, v in step["heads"].items()}) if step["heads"] else None
    method = get_method(step["method"])(**step["params"], **({"heads": heads} if heads else {}))
    method.push_to_hub("me/method", model="org/model", evidence=evidence(run, method), **own(hub))
    text = hub.files("me/method")["README.md"].decode()
    for words in (
        "**Better.**",
        "+20.0 points [+5.0 to +35.0]",
        "random heads",
        "not verified",
        "hash `",
        "torch 2.13.0",
    ):
        assert words in text, words
    for other in (HeadSet({7: [7]}), HeadGate({(0, 0): 0.0}), method.new(heads=HeadSet({0: [7]}))):
        with pytest.raises(RunError, match="give the run that measured it"):
            evidence(run, other)


def test_the_commands(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    HEADS.save(tmp_path / "heads.safetensors")
    ACT(heads=HEADS).save_pretrained(tmp_path / "act")
    folders.text_run(tmp_path / "run")
    for what in ("heads.safetensors", "act", "run"):
        done = CliRunner().invoke(cli.app, ["push", str(tmp_path / what), f"me/{what}", "--endpoint", hub.url])
        assert done.exit_code == 0 and "/commit/" in done.output, done.output
    done = CliRunner().invoke(cli.app, ["pull", "me/run", str(tmp_path / "back"), "--endpoint", hub.url])
    assert done.exit_code == 0 and (tmp_path / "back/records.jsonl").is_file(), done.output
    done = CliRunner().invoke(cli.app, ["push", str(tmp_path / "none"), "me/x", "--endpoint", hub.url])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1


def test_another_models_heads_are_refused(hub: Hub) -> None:
    model = tiny_transformers("llama")
    HEADS.push_to_hub("me/heads", model=model, **own(hub))
    ACT(heads=HEADS).push_to_hub("me/method", model=model, **own(hub))
    other = tiny_transformers("gpt2")
    for get in (HeadSet.from_pretrained, Intervention.from_pretrained):
        name = "me/heads" if get == HeadSet.from_pretrained else "me/method"
        with pytest.raises(
            SelectionError, match=r"made for another model \(class 'LlamaForCausalLM' instead of 'GPT2LMHeadModel'"
        ):
            get(name, model=other, **own(hub))
    with pytest.raises(SelectionError, match="id 'a/b' instead of 'a/c'"):
        check_model({"model": {"id": "a/b"}}, "a/c", "it")
    check_model({"model": None}, model, "what says nothing of a model")
    assert model_facts(model)["layers"] == model.config.num_hidden_layers


# ------------------------------------------------------------------------------------------------ what is refused


def artefact(tmp_path: Path, contents: dict[str, bytes], kind: str = "method", /, **about: Any) -> dict[str, bytes]:
    """Files with a manifest that is right about them."""
    folder = tmp_path / "made"
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    found = {**manifest_of(folder, contents, kind), **about}
    return {**contents, MANIFEST: json.dumps(found).encode()}


STEER = {"schema": 1, "method": "ACT", "parameters": {"beta": 0.4}, "versions": {}}
GOOD = json.dumps(STEER).encode()


def steer_json(**values: Any) -> bytes:
    return json.dumps({**STEER, **values}).encode()


def head_file(heads: Any, scores: Any, **meta: str) -> bytes:
    about = {"format": "attnsteer.headset", "schema": "1", "shape": "[2, 4]", "provenance": "{}", **meta}
    return save({"heads": heads, "scores": scores}, metadata=about)


WITH_HEADS = steer_json(parameters={"heads": {"$heads": "heads.safetensors"}})
PICKLE = b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00cposix\nsystem\n."
# Name -> files of the repository beside a right manifest, or a change of the manifest.
STRANGE_NAMES = [
    "method.py", "pytorch_model.bin", "heads.pkl", "steer.json.exe", "modeling_act.py", "../evil.json", "/abs.json",
    "a/../../x.json", "..\\..\\w.json", "c:steer.json", "sub/steer.json", "tokenizer.model", "heads.pt",
    ".git/config", "steer.JSON",
]  # fmt: skip
CONTENTS: dict[str, dict[str, bytes]] = {
    "pickle in place of heads": {"steer.json": WITH_HEADS, "heads.safetensors": PICKLE},
    "zip in place of heads": {"steer.json": WITH_HEADS, "heads.safetensors": b"PK\x03\x04" + b"\0" * 60},
    "header larger than the file": {"steer.json": WITH_HEADS, "heads.safetensors": b"\xff" * 8 + b"{}"},
    "cut heads": {"steer.json": WITH_HEADS, "heads.safetensors": head_file(zeros(3, 2, dtype=int64), zeros(3).double())[:-9]},
    "heads of floats": {"steer.json": WITH_HEADS, "heads.safetensors": head_file(zeros(3, 2, dtype=float32), zeros(3).double())},
    "heads of another shape": {"steer.json": WITH_HEADS, "heads.safetensors": head_file(tensor([[0, 1, 2]]), zeros(1).double())},
    "negative heads": {"steer.json": WITH_HEADS, "heads.safetensors": head_file(tensor([[0, -1]]), zeros(1).double())},
    "heads outside the shape": {"steer.json": WITH_HEADS, "heads.safetensors": head_file(tensor([[9, 9]]), zeros(1).double())},
    "newer heads": {"steer.json": WITH_HEADS, "heads.safetensors": head_file(tensor([[0, 1]]), zeros(1).double(), schema="9")},
    "heads elsewhere": {"steer.json": steer_json(parameters={"heads": {"$heads": "../../etc/passwd"}})},
    "no method of ours": {"steer.json": steer_json(method="os.system")},
    "a newer record": {"steer.json": steer_json(schema=9)},
    "not a number": {"steer.json": b'{"schema": 1, "method": "ACT", "parameters": {"beta": NaN}}'},
    "deep JSON": {"steer.json": b'{"schema": 1, "method": "ACT", "parameters": ' + b'{"a":' * 400 + b"1" + b"}" * 400 + b"}"},
    "very deep JSON": {"steer.json": b"[" * 200_000},
    "a list": {"steer.json": b"[]"},
    "bytes that are no text": {"steer.json": b"\xff\xfe\x00"},
    "unknown fields": {"steer.json": steer_json(parameters={"beta": 0.4, "code": "import os"})},
    "a value that is none": {"steer.json": steer_json(parameters={"beta": "$(rm)"})},
    "nothing to load": {"heads.safetensors": head_file(tensor([[0, 1]]), zeros(1).double())},
}  # fmt: skip
MANIFESTS: dict[str, Any] = {
    "another hash": {"files": {"steer.json": {"sha256": "0" * 64, "size": len(GOOD)}}},
    "another size": {"files": {"steer.json": {"sha256": "0" * 64, "size": 1}}},
    "a file that is not named": {"files": {}},
    "a file that is not there": {"files": {"gone.json": {"sha256": "0" * 64, "size": 1}}},
    "a path that leads out": {"files": {"../steer.json": {"sha256": "0" * 64, "size": 1}}},
    "another kind": {"kind": "heads"},
    "another format": {"format": "something"},
    "a newer schema": {"schema": 5},
    "files that are a list": {"files": ["steer.json"]},
}


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_names_that_no_method_has_are_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.put("me/bad", {**artefact(tmp_path, {"steer.json": GOOD}), name: PICKLE})
    with pytest.raises(SerializationError, match="nothing of it was fetched"):
        Intervention.from_pretrained("me/bad", **own(hub))
    assert not any("/resolve/" in path for _, path in hub.log)


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_are_none_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.put("me/bad", artefact(tmp_path, CONTENTS[name]))
    with pytest.raises(AttnSteerError) as caught:
        Intervention.from_pretrained("me/bad", **own(hub))
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_are_wrong_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.put("me/bad", artefact(tmp_path, {"steer.json": GOOD}, **MANIFESTS[name]))
    with pytest.raises(SerializationError):
        Intervention.from_pretrained("me/bad", **own(hub))


def test_what_is_right_is_taken(hub: Hub, tmp_path: Path) -> None:
    """The tests above fail for what they name, and for nothing else."""
    hub.put("me/good", artefact(tmp_path, {"steer.json": GOOD}))
    assert Intervention.from_pretrained("me/good", **own(hub)) == ACT(beta=0.4)


def test_a_repository_without_a_manifest_or_too_large_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/bad", {"steer.json": GOOD})
    with pytest.raises(SerializationError, match=r"has no MANIFEST.json.*push it again"):
        Intervention.from_pretrained("me/bad", **own(hub))
    from attnsteer import hub as module

    monkeypatch.setattr(module, "MOST_FILE", 10)
    hub.put("me/large", {"steer.json": GOOD, MANIFEST: b"{}"})
    with pytest.raises(SerializationError, match="larger than any method"):
        Intervention.from_pretrained("me/large", **own(hub))


def test_bytes_that_were_changed_on_the_way_are_noticed(hub: Hub, tmp_path: Path) -> None:
    """The client of the hub does not hash what it gets: as many other bytes pass it."""
    hub.put("me/method", artefact(tmp_path, {"steer.json": GOOD}))
    hub.wrong["steer.json"] = GOOD.replace(b"0.4", b"0.9")
    with pytest.raises(SerializationError, match=r"steer.json was changed.*Get it again"):
        Intervention.from_pretrained("me/method", **own(hub))


def test_a_run_that_is_no_run_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    run = folders.text_run(tmp_path / "run")
    push_run(run, "me/run", **own(hub))
    files = hub.files("me/run", "dataset")
    for name, content in (("images/../../evil.png", b"x"), ("run.py", b"x"), ("images/a/0/x.svg", b"<script>")):
        hub.put("me/run", {**files, name: content}, "dataset")
        with pytest.raises(SerializationError, match="which no run of attnsteer has"):
            pull_run("me/run", tmp_path / "back", **own(hub))
    hub.put("me/run", {**files, "records.jsonl": files["records.jsonl"].replace(b"-1", b"-2", 1)}, "dataset")
    with pytest.raises(SerializationError, match=r"records\.jsonl was changed"):
        pull_run("me/run", tmp_path / "back", **own(hub))
    assert not (tmp_path / "back").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("x")
    with pytest.raises(RunError, match="new or empty"):
        pull_run("me/run", tmp_path / "full", **own(hub))
    assert (tmp_path / "full/mine").is_file()


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ({"create": 401}, "does not know who you are; `hf auth login`"),
        ({"create": 403}, "you may not do this; take a repository under your own name"),
        ({"/commit/": 403}, "you may not do this"),
        ({"/commit/": 409}, "just been changed or is of another kind; try again"),
        ({"/preupload/": 404}, "there is no such repository"),
        ({"/commit/": 413}, "larger than the hub takes"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(hub: Hub, fail: dict[str, int], words: str) -> None:
    hub.fail.update(fail)
    with pytest.raises(HubError, match="heads to me/heads: ") as caught:
        HEADS.push_to_hub("me/heads", **own(hub))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_names_revisions_and_ports_that_do_not_exist(hub: Hub) -> None:
    HEADS.push_to_hub("me/heads", **own(hub))
    for repo, options, words in (
        ("me/none", {}, "no such repository, or it is private; check the name"),
        ("me/heads", {"revision": "v9"}, "no such revision; name a commit, tag or branch"),
        ("a/b/c", {}, "write owner/name"),
        ("me/heads", {"endpoint": "http://127.0.0.1:9"}, "the hub cannot be reached, or broke off"),
    ):
        with pytest.raises(HubError) as caught:
            HeadSet.from_pretrained(repo, **{**own(hub), **options})
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(HubError, match="cannot be reached"):
        HEADS.push_to_hub("me/heads", token=TOKEN, endpoint="http://127.0.0.1:9")


def test_a_body_that_breaks_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    HEADS.push_to_hub("me/heads", **own(hub))
    hub.cut = True
    with pytest.raises(AttnSteerError) as caught:
        HeadSet.from_pretrained("me/heads", **own(hub))
    assert "\n" not in str(caught.value) and "try again" in str(caught.value)


def test_no_right_to_write(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_run(folders.text_run(tmp_path / "run"), "me/run", **own(hub))

    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(HubError, match=r"back cannot be made \(Permission denied\); give a folder that you can write"):
        pull_run("me/run", tmp_path / "back", **own(hub))


def test_a_card_is_yaml_whatever_a_title_has() -> None:
    import yaml

    text = card("x", "run", "y", tags=['a": b', "- c"])
    assert yaml.safe_load(text.split("---")[1]) == {
        "library_name": "attnsteer",
        "tags": ["attnsteer", "run", 'a": b', "- c"],
    }
