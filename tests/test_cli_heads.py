"""`attnsteer profile` and `attnsteer bake`, in process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attnsteer import HeadGate, HeadSet, ZeroTuning, steer, zoo
from attnsteer.cli import app


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("a small red star . a large blue ring .\n\na large green square . a small red ring .\n")
    return path


def test_profile_writes_table_heads_and_plot(texts: Path, tmp_path: Path) -> None:
    files = {
        name: tmp_path / f"{name}{end}" for name, end in (("out", ".csv"), ("heads", ".safetensors"), ("plot", ".png"))
    }
    given = [part for name, path in files.items() for part in (f"--{name}", path)]
    done = run("profile", "shapes-lm", texts, "--reading", "induction", "--top", 3, *given)
    assert done.exit_code == 0, done.output
    heads = HeadSet.load(files["heads"])
    assert len(heads) == 3 and all(path.stat().st_size for path in files.values())
    best = max(heads.scores, key=heads.scores.get)
    assert f"{heads.scores[best]:.3f}" in done.output
    for wrong, said in (
        (["--heads", files["heads"]], "give --reading"),
        (["--reading", "inductoin"], "Did you mean 'induction'"),
        (["--out", tmp_path / "x.txt"], "ends in .csv or .json"),
    ):
        done = run("profile", "shapes-lm", texts, *wrong)
        assert done.exit_code == 2 and said in done.output
    assert "no file" in run("profile", "shapes-lm", tmp_path / "none.txt").output
    texts.write_text("\n\n")
    assert "no line with text" in run("profile", "shapes-lm", texts).output


def test_bake_writes_a_checkpoint_of_the_gated_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gates = HeadGate({(1, 0): 0.0, (2, 3): 0.5})
    gates.save_pretrained(tmp_path / "gate")
    done = run("bake", "shapes-lm", tmp_path / "gate", tmp_path / "baked")
    assert done.exit_code == 0, done.output
    model, tokenizer = zoo.load("shapes-lm")
    inputs = dict(tokenizer("a small red star .", return_tensors="pt", return_token_type_ids=False))
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    again = AutoTokenizer.from_pretrained(tmp_path / "baked")
    with torch.no_grad(), steer(model, gates):
        wanted = model(**inputs).logits
    with torch.no_grad():
        assert torch.allclose(baked(**inputs).logits, wanted, atol=1e-4, rtol=1e-5)
    assert again("a small red star .").input_ids == inputs["input_ids"][0].tolist()

    done = run("bake", "shapes-lm", tmp_path / "gate", tmp_path / "baked")
    assert done.exit_code == 2 and "nothing is replaced" in done.output
    done = run("bake", "shapes-sd", tmp_path / "gate", tmp_path / "other")
    assert done.exit_code == 2 and "shapes-sd is no language model" in done.output
    ZeroTuning(gamma=2.0).save_pretrained(tmp_path / "zero")
    done = run("bake", "shapes-lm", tmp_path / "zero", tmp_path / "other")
    assert done.exit_code == 2 and "ZeroTuning" in done.output and not (tmp_path / "other").exists()
