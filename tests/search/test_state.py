"""The state of a search: atomic, checked, and only for the search that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attnsteer.errors import SelectionError, SerializationError
from attnsteer.search import SearchState
from attnsteer.search.state import model_digest, refuse_overlap

SETTINGS = {"search": "x", "samples": 3}


def test_what_is_saved_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.safetensors"
    with pytest.raises(ZeroDivisionError), SearchState(path, SETTINGS) as state:
        state.data["scores"] = {"a": [1.0, 2.5]}
        state.tensors["done"] = torch.tensor([True, False])
        1 / 0  # noqa: B018
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    again = SearchState(path, SETTINGS)
    assert again.data == {"scores": {"a": [1.0, 2.5]}}
    assert torch.equal(again.tensors["done"], torch.tensor([True, False]))


def test_writes_are_as_rare_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    rare, often = SearchState(path, SETTINGS, every=1000.0), SearchState(path, SETTINGS, every=0.0)
    rare.tick()
    assert not path.exists()
    often.tick()
    assert path.exists()
    nowhere = SearchState(None, SETTINGS, every=0.0)
    nowhere.tick()
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    state = SearchState(path, SETTINGS)
    state.data["n"] = 1
    state.save()
    state.data["n"] = 2

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        state.save()
    assert SearchState(path, SETTINGS).data == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        (None, "not a whole state file"),
        ({"format": "other"}, "has format 'other'"),
        ({"format": "attnsteer.search", "schema": "2"}, "reads up to 1"),
        ({"format": "attnsteer.search", "schema": "1"}, "does not hold the state"),
        (
            {"format": "attnsteer.search", "schema": "1", "settings": '{"search": "x", "samples": 4}', "data": "{}"},
            r"other settings \(samples: 4 there, 3 here\)",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, meta: dict[str, str] | None, match: str) -> None:
    path = tmp_path / "state.safetensors"
    if meta is None:
        path.write_bytes(b"half a file")
    else:
        save_file({"x": torch.zeros(1)}, str(path), metadata=meta)
    with pytest.raises(SerializationError, match=match):
        SearchState(path, SETTINGS)


def test_digests_tell_models_apart() -> None:
    one, two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert model_digest(one) == model_digest(one) != model_digest(two)


def test_overlap() -> None:
    refuse_overlap(["a", "b"], ["c"], "samples")
    with pytest.raises(SelectionError, match=r"2 samples of the test split are also used .*\(a, b\)"):
        refuse_overlap(["a", "b"], ["b", "c", "a"], "samples")
