"""The bridge to lmms-eval, on a stub of the parts of its interface that it uses (0.7.2, at 75571cf)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from attnsteer import ACT, PASTA, SpotLight, Where, ZeroTuning, steer, zoo
from attnsteer.errors import NeverFired, SelectionError, UnsupportedHost
from attnsteer.evals import lmms_eval as bridge
from attnsteer.testing.fingerprint import fingerprint
from attnsteer.zoo.measure.text import inputs
from attnsteer.zoo.shapes.questions import picture

METHOD = ACT(beta=0.0, threshold=0.02)
QUESTIONS = [
    "is there a red circle ?",
    "how many circles are there ?",
    "is there a blue star ?",
    "how many stars are there ?",
]
WORDS = ["red circle", "circles", "blue star", "stars"]


class Stub:
    """As lmms-eval's classes: reordered requests in padded batches, arguments and errors included; scores with labels."""

    is_simple = True

    def __init__(self, pretrained: str, batch_size: int = 1) -> None:
        self._model, self.processor = zoo.load(pretrained)
        self.size = int(batch_size)
        self.task_dict = {"pope": {"test": [{"question": q, "word": w} for q, w in zip(QUESTIONS, WORDS, strict=True)]}}

    @property
    def model(self) -> Any:
        return self._model

    def generate_until(self, requests: list[Any]) -> list[str]:
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
        found = [""] * len(requests)
        for k in range(0, len(order), self.size):
            part = order[k : k + self.size]
            batch = inputs(
                self.processor,
                [picture("test", requests[i].args[3]) for i in part],
                [requests[i].args[0] for i in part],
            )
            try:
                out = self.model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=True)
                texts = self.processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
                for i, text in zip(part, texts, strict=True):
                    found[i] = text
            except Exception:
                # So do several of its classes.
                pass
        return found

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        found = []
        for request in requests:
            context, answer, _, number, _, _ = request.args
            batch, start = answered(self.processor, number, context, answer)
            labels = batch["input_ids"].clone()
            labels[:, :start] = -100
            with torch.inference_mode():
                out = self.model(**batch, labels=labels)
            best = out["logits"].argmax(-1)[:, start - 1 : -1]
            found.append((float(out["loss"]), bool((best == batch["input_ids"][:, start:]).all())))
        return found


class Chat(Stub):
    """The other of two classes of one name, which is taken unless `--force_simple` is given."""

    is_simple = False


def answered(processor: Any, number: int, context: str, answer: str) -> tuple[Any, int]:
    """A prompt with its answer behind it, and where that begins."""
    batch = dict(inputs(processor, [picture("test", number)], [context]))
    start = batch["input_ids"].shape[1]
    more = torch.tensor([processor.tokenizer(answer, add_special_tokens=False).input_ids])
    batch["input_ids"] = torch.cat([batch["input_ids"], more], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch, start


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


def requests(*between: str) -> list[Any]:
    """As its instances: (context, further arguments, what gives pictures, document, task, split)."""
    extra = between or ({},) * len(QUESTIONS)
    return [
        SimpleNamespace(args=(q, e, None, i, "pope", "test"))
        for i, (q, e) in enumerate(zip(QUESTIONS, extra, strict=True))
    ]


def by_hand(lm: Any, methods: list[Any]) -> list[str]:
    """Each question alone, with its own method."""
    found = []
    for i, method in enumerate(methods):
        with steer(lm.model, method):
            found += Stub.generate_until(
                SimpleNamespace(model=lm.model, processor=lm.processor, size=1), [requests()[i]]
            )
    return found


def made(tmp_path: Path, method: Any, **options: Any) -> Any:
    return bridge.steered(Stub)(
        pretrained="shapes-lvlm", steer=str(method.save_pretrained(tmp_path / "steer")), **options
    )


def test_the_command_puts_a_steered_class_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With lmms-eval's registry stubbed: it imports classes by their paths."""
    known = {"llava_hf": Manifest("llava_hf", f"{__name__}.Stub")}
    ran: list[Any] = []

    def get_model(name: str, force_simple: bool = False) -> type:
        found = known[name]
        path = (found.simple_class_path if force_simple else None) or found.chat_class_path or found.simple_class_path
        module, _, attribute = str(path).rpartition(".")
        return getattr(sys.modules[module], attribute)

    def register_manifest(manifest: Manifest, *, overwrite: bool = False) -> None:
        assert overwrite or manifest.model_id not in known
        known[manifest.model_id] = manifest

    def module(name: str, **members: Any) -> None:
        new = ModuleType(name)
        vars(new).update(members)
        monkeypatch.setitem(sys.modules, name, new)

    def cli_evaluate() -> None:
        # What lmms-eval makes of its arguments.
        options = dict(pair.split("=") for pair in sys.argv[sys.argv.index("--model_args") + 1].split(","))
        cls = get_model(sys.argv[sys.argv.index("--model") + 1], "--force_simple" in sys.argv)
        ran.append(cls(**options, batch_size=1))

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or SimpleNamespace(Stub=Stub, Chat=Chat))
    module("lmms_eval")
    registry = SimpleNamespace(register_manifest=register_manifest)
    module("lmms_eval.models", get_model=get_model, MODEL_REGISTRY_V2=registry)
    module("lmms_eval.models.registry_v2", ModelManifest=Manifest)
    module("lmms_eval.__main__", cli_evaluate=cli_evaluate)
    folder = METHOD.save_pretrained(tmp_path)
    argv = ["x", "--model", "llava_hf", "--tasks", "pope", "--model_args", "pretrained=shapes-lvlm"]
    monkeypatch.setattr(sys, "argv", argv)
    assert bridge.main() == 0 and type(ran[-1]) is Stub
    monkeypatch.setattr(sys, "argv", [*argv[:-1], f"{argv[-1]},steer={folder}"])
    assert bridge.main() == 0
    lm = ran[-1]
    assert type(lm).__name__ == "SteeredStub" and lm.interventions == [METHOD]
    before, want = Stub.generate_until(lm, requests()), by_hand(lm, [METHOD] * 4)
    assert lm.generate_until(requests()) == want != before and lm.audit.fired(0)
    # The first call leaves hooks of transformers' own.
    state = fingerprint(lm.model)
    assert lm.generate_until(requests()) == want
    assert fingerprint(lm.model) == state and "generate" not in vars(lm.model)
    for forced, name in (([], "SteeredChat"), (["--force_simple"], "SteeredStub")):
        known["llava_hf"] = Manifest("llava_hf", f"{__name__}.Stub", f"{__name__}.Chat")
        monkeypatch.setattr(sys, "argv", [*argv[:-1], f"{argv[-1]},steer={folder}", *forced])
        assert bridge.main() == 0 and type(ran[-1]).__name__ == name
    known["llava_hf"] = Manifest("llava_hf", f"{__name__}.Stub")
    monkeypatch.setattr(sys, "argv", [*argv[:-1], f"{argv[-1]},steer={tmp_path / 'none'}"])
    assert bridge.main() == 2


@pytest.mark.parametrize(
    "method",
    [SpotLight(spans=["{{word}}"], target=0.9), PASTA(["there", "{{word}}"], alpha=0.01)],
    ids=["SpotLight", "PASTA"],
)
def test_spans_are_those_of_each_document_in_any_batch(tmp_path: Path, method: Any) -> None:
    lm = made(tmp_path, method, batch_size=3)
    spans = [[w] if len(method.spans) == 1 else ["there", w] for w in WORDS]
    want = by_hand(lm, [method.new(spans=[s], tokenizer=lm.processor.tokenizer) for s in spans])
    assert lm.generate_until(requests()) == want != Stub.generate_until(lm, requests()) and lm.audit.fired(0)
    with pytest.raises(SelectionError, match=r"the document has no field 'words' .*word"):
        made(tmp_path, method.new(spans=["{{words}}"])).generate_until(requests())


def test_an_answer_that_is_scored_is_no_part_of_the_statistics(tmp_path: Path) -> None:
    lm = made(tmp_path, METHOD)
    answers = [" yes", " two circles", " no .", " one"]
    plain = Stub.loglikelihood(lm, requests(*answers))
    found = lm.loglikelihood(requests(*answers))
    assert max(abs(a[0] - b[0]) for a, b in zip(found, plain, strict=True)) > 1e-3 and "forward" not in vars(lm.model)
    for i, (answer, (loss, _)) in enumerate(zip(answers, found, strict=True)):
        batch, start = answered(lm.processor, i, QUESTIONS[i], answer)
        ids = batch["input_ids"]
        with torch.no_grad(), steer(lm.model, METHOD) as run:
            out = lm.model(pixel_values=batch["pixel_values"], input_ids=ids[:, :start], use_cache=True)
            p = [out.logits[:, -1]]
            with run.freeze():
                for k in range(start, ids.shape[1] - 1):
                    out = lm.model(input_ids=ids[:, k : k + 1], past_key_values=out.past_key_values, use_cache=True)
                    p.append(out.logits[:, -1])
        want = torch.nn.functional.cross_entropy(torch.cat(p), ids[0, start:])
        assert loss == pytest.approx(float(want), abs=1e-5)
    with pytest.raises(UnsupportedHost, match="without labels"):
        bridge.scored(bridge.Batches(lm.model, bridge.Marks([METHOD]), None), input_ids=ids)


def test_an_error_is_no_empty_answer(tmp_path: Path) -> None:
    late = ZeroTuning(gamma=2.0, where=Where(phases="prefill"))
    lm = made(tmp_path, late)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise SelectionError("no image in the prompt")

    hook = lm.model.model.language_model.register_forward_pre_hook(refuse)
    with pytest.raises(SelectionError, match="no image in the prompt"):
        lm.generate_until(requests())
    hook.remove()
    with pytest.raises(NeverFired):
        lm.generate_until([])


def test_what_cannot_be_steered_is_refused_at_once(tmp_path: Path) -> None:
    make = bridge.steered(Stub)
    with pytest.raises(SelectionError, match="at least one"):
        make(pretrained="shapes-lvlm", steer="")
    folder = ACT(where=Where(layers=40)).save_pretrained(tmp_path)
    with pytest.raises(SelectionError, match=r"layers \[40\]"):
        make(pretrained="shapes-lvlm", steer=str(folder))
