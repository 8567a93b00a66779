"""Embedded models: what `load` gives, and what it says of broken files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnsteer import zoo
from attnsteer.errors import UnknownName, ZooError
from attnsteer.zoo import folders

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like an installed model."""
    monkeypatch.setattr(folders, "MODELS", tmp_path)
    target = tmp_path / "shapes-lm"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"weights" * 100)
    (target / "config.json").write_text("{}")
    zoo.seal(target)
    return target


def test_hashes_are_checked(fake: Path) -> None:
    assert zoo.folder("shapes-lm") == fake and zoo.available() == ("shapes-lm",)
    (fake / "model.safetensors").write_bytes(b"weights" * 99)
    with pytest.raises(ZooError, match=r"model\.safetensors is cut short or changed"):
        zoo.load("shapes-lm")
    (fake / "model.safetensors").unlink()
    with pytest.raises(ZooError, match=r"model\.safetensors is missing"):
        zoo.load("shapes-lm")


def test_a_changed_config_is_noticed(fake: Path) -> None:
    (fake / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(ZooError, match=r"config\.json"):
        zoo.folder("shapes-lm")
    (fake / zoo.HASHES).write_text("{")
    with pytest.raises(ZooError, match=r"sha256\.json is not JSON"):
        zoo.folder("shapes-lm")


def test_unknown_and_absent_names(fake: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'shapes-lvlm'"):
        zoo.load("shapes-lvml")
    with pytest.raises(ZooError, match=r"attnsteer\.zoo\.train shapes-sd"):
        zoo.load("shapes-sd")


PLAIN = {
    "shapes-lm": "from transformers import AutoTokenizer, LlamaForCausalLM as M\n"
    "m = M.from_pretrained(p); t = AutoTokenizer.from_pretrained(p)\n"
    "out = m.generate(**t('a small red star . question what colour is the star ? answer', return_tensors='pt'), max_new_tokens=1)\n"
    "assert t.decode(out[0, -1:]) == 'red', t.decode(out[0])",
    "shapes-lvlm": "import torch\nfrom transformers import AutoProcessor, LlavaForConditionalGeneration as M\n"
    "m = M.from_pretrained(p); t = AutoProcessor.from_pretrained(p)\n"
    "b = t(images=torch.full((3, 64, 64), 128, dtype=torch.uint8), text='<image> caption', return_tensors='pt')\n"
    "assert m.generate(**b, max_new_tokens=3, do_sample=False).shape[1] > 66",
    "shapes-sd": "from diffusers import StableDiffusionPipeline as M\nm = M.from_pretrained(p)\n"
    "assert m('a red circle', num_inference_steps=2).images[0].size == (64, 64)",
    "shapes-mmdit": "from diffusers import StableDiffusion3Pipeline as M\n"
    "m = M.from_pretrained(p, text_encoder_3=None, tokenizer_3=None)\n"
    "assert m('a red circle', num_inference_steps=2).images[0].size == (64, 64)",
}


@pytest.mark.long
def test_plain_libraries_load_them() -> None:
    """In a process that never imports attnsteer; one for all, since most of its time is the libraries'."""
    parts = [f"p = {str(zoo.MODELS / name)!r}\n{PLAIN[name]}" for name in zoo.available()]
    code = "\n".join(["import sys", *parts, "assert 'attnsteer' not in sys.modules"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.long
def test_loading_is_silent() -> None:
    """No bars, no remarks, and no warning, which would be an error here."""
    code = f"from attnsteer import zoo\nfor name in {zoo.available()!r}: zoo.load(name)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_libraries_speak_as_before() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    zoo.load("shapes-lm")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_recipes_know_the_models() -> None:
    from attnsteer.recipe.schema import FETCHED, ZOO_KINDS

    assert (
        set(ZOO_KINDS) == set(zoo.KNOWN)
        and (*zoo.FETCHED, *zoo.ASSEMBLED) == FETCHED
        and {n for n, k in ZOO_KINDS.items() if k == "image"} == set(zoo.PIPELINES)
    )


@pytest.mark.parametrize("name", zoo.available())
def test_size_card_and_record(name: str) -> None:
    folder = zoo.folder(name)
    weights = list(folder.rglob("*.safetensors"))
    # An adapter is loaded when somebody asks for it.
    adapters = [f for f in weights if "ip_adapter" in f.parts]
    assert sum(f.stat().st_size for f in weights if f not in adapters) <= 12_000_000
    assert sum(f.stat().st_size for f in adapters) <= 1_000_000
    card = (folder / "README.md").read_text()
    assert card.startswith(f"# {name}") and "## Measured" in card
    assert json.loads((folder / "training.json").read_text())
    assert sum(f.stat().st_size for f in zoo.MODELS.rglob("*.safetensors")) <= 36_000_000


@pytest.mark.parametrize("name", zoo.available())
def test_load(name: str) -> None:
    found = zoo.load(name, dtype=torch.bfloat16)
    models = (
        [found.model]
        if name in ("shapes-lm", "shapes-lvlm")
        else [found.unet if name == "shapes-sd" else found.transformer]
    )
    assert all(p.dtype == torch.bfloat16 for m in models for p in m.parameters())
