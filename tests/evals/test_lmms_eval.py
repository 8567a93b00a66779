"""The example for lmms-eval, on a stub of the parts of its interface that it uses (0.7.2, at 75571cf)."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from attnsteer import ACT, Where, ZeroTuning, steer, zoo
from attnsteer.errors import NeverFired, SelectionError, UnsupportedHost
from attnsteer.testing.fingerprint import fingerprint
from attnsteer.zoo.measure.text import inputs
from attnsteer.zoo.shapes.questions import picture

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "lmms_eval_attnsteer.py"
METHOD = ACT(beta=0.0, threshold=0.02)
QUESTIONS = ["is there a red circle ?", "how many circles are there ?", "caption", "caption"]


class Stub:
    """As lmms-eval's LlavaHf: one request at a time, arguments and errors included."""

    is_simple = True

    def __init__(self, pretrained: str, batch_size: int = 1) -> None:
        self._model, self.processor = zoo.load(pretrained)

    @property
    def model(self) -> Any:
        return self._model

    def generate_until(self, requests: list[Any]) -> list[str]:
        found = []
        for i, request in enumerate(requests):
            batch = inputs(self.processor, [picture("test", i)], [request.args[0]])
            try:
                out = self.model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=True)
                found.append(self.processor.batch_decode(out, skip_special_tokens=True)[0])
            except Exception:
                # So do several of its classes.
                found.append("")
        return found

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(0.0, True)] * len(requests)


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module, with lmms-eval's registry stubbed: it imports classes by their paths."""
    known = {"llava_hf": Manifest("llava_hf", f"{__name__}.Stub")}

    def get_model(name: str) -> type:
        module, _, attribute = known[name].simple_class_path.rpartition(".")
        return getattr(sys.modules[module], attribute)

    def register_manifest(manifest: Manifest, *, overwrite: bool = False) -> None:
        assert overwrite or manifest.model_id not in known
        known[manifest.model_id] = manifest

    def module(name: str, **members: Any) -> None:
        made = ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    def cli_evaluate() -> None:
        # What lmms-eval makes of its arguments.
        options = dict(pair.split("=") for pair in sys.argv[sys.argv.index("--model_args") + 1].split(","))
        loaded.lm = get_model(sys.argv[sys.argv.index("--model") + 1])(**options, batch_size=1)

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or SimpleNamespace(Stub=Stub))
    module("lmms_eval")
    module(
        "lmms_eval.models", get_model=get_model, MODEL_REGISTRY_V2=SimpleNamespace(register_manifest=register_manifest)
    )
    module("lmms_eval.models.registry_v2", ModelManifest=Manifest)
    module("lmms_eval.__main__", cli_evaluate=cli_evaluate)
    spec = importlib.util.spec_from_file_location("lmms_eval_attnsteer", EXAMPLE)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


def ask(lm: Any) -> list[str]:
    return lm.generate_until([SimpleNamespace(args=(q, {})) for q in QUESTIONS])


def test_answers_are_those_of_the_steered_model(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Stub("shapes-lvlm")
    before = ask(plain)
    with steer(plain.model, METHOD):
        want = ask(plain)
    assert want != before
    folder = METHOD.save_pretrained(tmp_path)
    options = f"pretrained=shapes-lvlm,steer={folder}"
    monkeypatch.setattr(sys, "argv", ["x", "--model", "llava_hf", "--tasks", "pope", "--model_args", options])
    example.main()
    lm = example.lm
    assert type(lm).__name__ == "SteeredStub" and lm.interventions == [METHOD]
    assert ask(lm) == want and lm.audit.fired(0)
    # The first call leaves hooks of transformers' own.
    state = fingerprint(lm.model)
    assert ask(lm) == want
    assert fingerprint(lm.model) == state and "generate" not in vars(lm.model)


def test_an_error_is_no_empty_answer(example: Any, tmp_path: Path) -> None:
    make = example.steered(Stub)
    late = ZeroTuning(gamma=2.0, where=Where(phases="prefill")).save_pretrained(tmp_path / "late")
    lm = make(pretrained="shapes-lvlm", steer=str(late))
    with pytest.raises(UnsupportedHost, match="Take a task that generates"):
        lm.loglikelihood([])

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise SelectionError("no image in the prompt")

    hook = lm.model.model.language_model.register_forward_pre_hook(refuse)
    with pytest.raises(SelectionError, match="no image in the prompt"):
        ask(lm)
    hook.remove()
    with pytest.raises(NeverFired):
        lm.generate_until([])


def test_what_cannot_be_steered_is_refused_at_once(example: Any, tmp_path: Path) -> None:
    make = example.steered(Stub)
    with pytest.raises(SelectionError, match="at least one"):
        make(pretrained="shapes-lvlm", steer="")
    folder = ACT(where=Where(layers=40)).save_pretrained(tmp_path)
    with pytest.raises(SelectionError, match=r"layers \[40\]"):
        make(pretrained="shapes-lvlm", steer=str(folder))
