"""The bridge to lm-evaluation-harness: its figures are ours, whatever the batch, steered or not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnsteer import (
    ACT,
    PASTA,
    HeadGate,
    HeadSet,
    InstABoost,
    SpotLight,
    Where,
    ZeroTuning,
    steer,
    zoo,
)
from attnsteer.errors import (
    CompositionError,
    MissingExtra,
    NeverFired,
    SelectionError,
    SerializationError,
    UnsupportedHost,
)
from attnsteer.search import Choice, candidate_log_likelihoods
from attnsteer.testing import tiny_transformers
from attnsteer.testing.fingerprint import fingerprint
from attnsteer.zoo.measure.text import choose
from attnsteer.zoo.shapes.reading import reading
from tests.laws.cases import METHODS

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from attnsteer.evals.lm_eval import AttnSteerLM  # noqa: E402

ROOT = Path(__file__).parents[2]
COUNT = 9
# Strong enough to change answers; few sinks of shapes-lm have a column mean of a tenth.
METHOD = ACT(beta=0.0, threshold=0.03)
TASKS = {
    # One-token choices, as in our own measure of reading.
    "letters": ("multiple_choice", "{{prompt}}", "{{choices}}"),
    # Choices of one to six tokens.
    "phrases": ("multiple_choice", "{{prompt}}", "{{phrases}}"),
    "rolling": ("loglikelihood_rolling", "", "{{prompt}}"),
    "words": ("generate_until", "{{prompt}}", "{{right}}"),
}


@pytest.fixture(scope="module")
def text() -> Any:
    return zoo.load("shapes-lm")


@pytest.fixture(scope="module")
def items() -> list[Any]:
    return [reading("test", i, task) for i in range(COUNT // 3) for task in ("lookup", "one-shot", "few-shot")]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, items: list[Any]) -> Path:
    """A folder of task files, and the questions."""
    folder = tmp_path_factory.mktemp("tasks")
    words = "the small red circle is large".split()
    with (folder / "reading.jsonl").open("w", encoding="utf-8") as file:
        for i, item in enumerate(items):
            phrases = [" ".join([c, *words[: (i + k) % 6]]) for k, c in enumerate(item.choices)]
            record = {
                "prompt": item.prompt,
                "choices": list(item.choices),
                "phrases": phrases,
                "answer": item.answer,
                "right": item.choices[item.answer],
            }
            file.write(json.dumps(record) + "\n")
    for name, (kind, asked, given) in TASKS.items():
        config = {
            "task": f"shapes_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / "reading.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": asked,
        }
        if kind == "multiple_choice":
            config |= {"doc_to_choice": given, "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
        elif kind == "generate_until":
            config |= {
                "doc_to_target": given,
                "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": False},
            }
            config |= {"metric_list": [{"metric": "exact_match"}]}
        else:
            config |= {"doc_to_target": given, "metric_list": [{"metric": "word_perplexity"}]}
        (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")
    return folder


def evaluate(lm: Any, tasks: Path, *names: str) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=lm, tasks=[f"shapes_{n}" for n in names], task_manager=manager, bootstrap_iters=0
    )


def responses(found: dict[str, Any], name: str) -> list[list[Any]]:
    """What the model gave for each document: pairs of log-likelihood and greediness, or a text."""
    samples = sorted(found["samples"][f"shapes_{name}"], key=lambda s: s["doc_id"])
    return [[r[0] for r in s["resps"]] for s in samples]


def flat(rows: list[list[Any]]) -> list[float]:
    return [r[0] for row in rows for r in row]


def ours(text: Any, items: list[Any], method: Any, phrases: list[list[str]]) -> list[list[float]]:
    """`candidate_log_likelihoods` of the choices, one question at a time."""
    ids = lambda t: text.tokenizer(t).input_ids  # noqa: E731
    asked = [Choice(ids(r.prompt), [ids(p)[1:] for p in own], r.answer) for r, own in zip(items, phrases, strict=True)]
    if method is None:
        return [candidate_log_likelihoods(text.model, c) for c in asked]
    with steer(text.model, method) as run:
        return [candidate_log_likelihoods(text.model, c, run) for c in asked]


@pytest.mark.parametrize("method", [None, METHOD])
@pytest.mark.parametrize("name", ["letters", "phrases"])
def test_figures_are_ours_and_the_batch_does_not_matter(
    text: Any, items: list[Any], tasks: Path, method: Any, name: str
) -> None:
    one = evaluate(AttnSteerLM(text, method, batch_size=1), tasks, name)
    eight = evaluate(AttnSteerLM(text, method, batch_size=8), tasks, name)
    documents = sorted(one["samples"][f"shapes_{name}"], key=lambda s: s["doc_id"])
    want = ours(text, items, method, [d["doc"]["choices" if name == "letters" else "phrases"] for d in documents])
    for found in (one, eight):
        assert flat(responses(found, name)) == pytest.approx([v for row in want for v in row], abs=1e-4)
    best = [max(range(len(w)), key=w.__getitem__) for w in want]
    accuracy = sum(b == r.answer for b, r in zip(best, items, strict=True)) / COUNT
    for found in (one, eight):
        assert found["results"][f"shapes_{name}"]["acc,none"] == accuracy
    greedy = [[[r[1] for r in row] for row in responses(found, name)] for found in (one, eight)]
    assert greedy[0] == greedy[1]
    if name == "letters":
        assert method is not None or (accuracy > 0.5 and any(any(row) for row in greedy[0]))
        # The measure of the card of the model, which pads prompts too.
        if method is None:
            assert choose(text.model, text.tokenizer, items) == best
        else:
            with steer(text.model, method):
                assert choose(text.model, text.tokenizer, items) == best


def test_steering_changes_the_figures_and_is_on_record(text: Any, tasks: Path) -> None:
    before = fingerprint(text.model)
    plain, steered = (evaluate(AttnSteerLM(text, m, batch_size=8), tasks, "letters") for m in (None, METHOD))
    assert plain["results"]["shapes_letters"]["acc,none"] > steered["results"]["shapes_letters"]["acc,none"]
    assert plain["config"]["attnsteer"]["interventions"] == [] and plain["config"]["attnsteer"]["audit"] == {}
    record = steered["config"]["attnsteer"]
    assert record["interventions"] == [repr(METHOD)]
    [entry] = record["audit"]["interventions"]
    assert len(entry["sites"]) == 6 and all(s["edits"] == s["calls"] > 0 for s in entry["sites"].values())
    assert fingerprint(text.model) == before


def test_strength_zero_is_the_model_as_it_is(text: Any, tasks: Path) -> None:
    plain = evaluate(AttnSteerLM(text, batch_size=8), tasks, "phrases")
    neutral = [ACT(beta=1.0), HeadGate({(0, 0): 1.0})]
    zero = evaluate(AttnSteerLM(text, neutral, control=True, batch_size=8), tasks, "phrases")
    assert responses(plain, "phrases") == responses(zero, "phrases")
    with pytest.raises(NeverFired, match="changed nothing"):
        evaluate(AttnSteerLM(text, neutral, batch_size=8), tasks, "phrases")


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args, task_name="a task")


def test_a_longer_continuation_in_the_batch_changes_no_other_score(text: Any, items: list[Any]) -> None:
    lm = AttnSteerLM(text, METHOD, batch_size=8)
    some = [request(r.prompt, f" {c} the small") for r in items[:4] for c in r.choices]
    before = lm.loglikelihood(some, disable_tqdm=True)
    long = [request(items[0].prompt, " A" + " the small red star ." * 8), request("", " the circle")]
    after = lm.loglikelihood([*long, *some], disable_tqdm=True)[2:]
    # Sums of several words: fp32 keeps seven digits of them.
    assert [a[0] for a in after] == pytest.approx([b[0] for b in before], rel=1e-6, abs=1e-5)


def test_too_long_is_cut_on_the_left(text: Any, items: list[Any]) -> None:
    lm, continuation = AttnSteerLM(text, METHOD, max_length=20), " A the small"
    [(cut, _)] = lm.loglikelihood([request(items[0].prompt, continuation)], disable_tqdm=True)
    ids = text.tokenizer(items[0].prompt + continuation).input_ids
    with steer(text.model, METHOD) as run:
        [want, _] = candidate_log_likelihoods(text.model, Choice(ids[-21:-3], [ids[-3:], ids[-3:]], 0), run)
    assert cut == pytest.approx(want, abs=1e-5)
    with pytest.raises(SelectionError, match="21 to score; at least one of each is needed, and at most max_length=20"):
        lm.loglikelihood([request("A", " A" * 21)], disable_tqdm=True)


def test_whole_texts(text: Any, tasks: Path, items: list[Any]) -> None:
    method = ZeroTuning(gamma=3.0)
    one, eight, plain = (
        responses(evaluate(AttnSteerLM(text, m, batch_size=b), tasks, "rolling"), "rolling")
        for m, b in ((method, 1), (method, 8), (None, 8))
    )
    one, eight, plain = ([r[0] for r in rows] for rows in (one, eight, plain))
    assert eight == pytest.approx(one, abs=1e-3) and max(abs(a - b) for a, b in zip(one, plain, strict=True)) > 1.0
    # The harness puts its prefix token before a text, and the tokenizer one of its own.
    ids = torch.tensor([[text.tokenizer.bos_token_id, *text.tokenizer(items[0].prompt).input_ids]])
    with torch.no_grad():
        p = text.model(ids).logits[0, :-1].log_softmax(-1)
    assert plain[0] == pytest.approx(float(p.gather(-1, ids[0, 1:, None]).sum()), abs=1e-3)
    with pytest.raises(UnsupportedHost, match="texts without a prompt, and ACT edits by the statistics"):
        evaluate(AttnSteerLM(text, METHOD), tasks, "rolling")


@pytest.mark.parametrize("method", [None, METHOD, ACT(beta=0.0, threshold=0.03, decode="running")])
def test_generation(text: Any, tasks: Path, items: list[Any], method: Any) -> None:
    one, eight = (responses(evaluate(AttnSteerLM(text, method, batch_size=b), tasks, "words"), "words") for b in (1, 8))
    assert one == eight
    ids = torch.tensor([text.tokenizer(items[2].prompt).input_ids])
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, use_cache=True)
    if method is None:
        out = text.model.generate(ids, **options)
    else:
        with steer(text.model, method):
            out = text.model.generate(ids, **options)
    assert one[2] == [text.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split(".")[0]]


class TestSteer:
    def test_what_it_may_be(self, text: Any, tmp_path: Path) -> None:
        gate = HeadGate({(1, 2): 0.0})
        one, two = METHOD.save_pretrained(tmp_path / "act"), gate.save_pretrained(tmp_path / "gate")
        for given in ([METHOD, gate], (one, two), f"{one}:{two}", [str(one), gate]):
            assert AttnSteerLM(text, given).interventions == (METHOD, gate)
        assert AttnSteerLM(text, str(one)).interventions == (METHOD,)
        assert AttnSteerLM(text).interventions == ()

    def test_a_live_steering(self, text: Any, items: list[Any]) -> None:
        asked = [request(r.prompt, " A the small red") for r in items[:3]]
        want = AttnSteerLM(text, METHOD).loglikelihood(asked, disable_tqdm=True)
        with steer(text.model, METHOD) as run:
            lm = AttnSteerLM(text, run)
            assert lm.loglikelihood(asked, disable_tqdm=True) == want and lm.audit is run.audit
            unaware = AttnSteerLM(text)
            with pytest.raises(CompositionError, match="the bridge has to know"):
                unaware.loglikelihood(asked, disable_tqdm=True)
            with pytest.raises(CompositionError, match="steered already"):
                AttnSteerLM(text, METHOD)
            with pytest.raises(SelectionError, match="the Steering of another model"):
                AttnSteerLM(zoo.load("shapes-lm"), run)

    def test_words_are_found_with_the_tokenizer(self, text: Any, items: list[Any], tmp_path: Path) -> None:
        folder = PASTA("question", alpha=0.1).save_pretrained(tmp_path)
        asked = [request(r.prompt, " A") for r in items if r.task == "lookup"]
        found = AttnSteerLM(text, folder, batch_size=4).loglikelihood(asked, disable_tqdm=True)
        alone = AttnSteerLM(text, folder, batch_size=1).loglikelihood(asked, disable_tqdm=True)
        plain = AttnSteerLM(text, batch_size=4).loglikelihood(asked, disable_tqdm=True)
        assert [f[0] for f in found] == pytest.approx([a[0] for a in alone], abs=1e-5)
        assert all(abs(f[0] - p[0]) > 1e-3 for f, p in zip(found, plain, strict=True))

    def test_one_that_never_acts(self, text: Any, items: list[Any]) -> None:
        lm = AttnSteerLM(text, ZeroTuning(gamma=2.0, where=Where(phases="decode")))
        with pytest.raises(NeverFired):
            lm.loglikelihood([request(items[0].prompt, " A")], disable_tqdm=True)
        lm.loglikelihood([request(items[0].prompt, " A the")], disable_tqdm=True)

    def test_refusals(self, text: Any, tmp_path: Path) -> None:
        for steered, match in (("", "give interventions"), ([3], "give interventions"), (ACT, "give interventions")):
            with pytest.raises(SelectionError, match=match):
                AttnSteerLM(text, steered)
        with pytest.raises(SelectionError, match=r"layers \[40\]"):
            AttnSteerLM(text, ACT(where=Where(layers=40)))
        with pytest.raises(SerializationError):
            AttnSteerLM(text, str(tmp_path / "nothing"))
        with pytest.raises(UnsupportedHost, match="shapes-lvlm is no language model"):
            AttnSteerLM("shapes-lvlm")
        with pytest.raises(SelectionError, match="pretrained=3"):
            AttnSteerLM(3)
        with pytest.raises(UnsupportedHost, match="encoder-decoder"):
            AttnSteerLM(tiny_transformers("t5"), tokenizer=text.tokenizer)


class TestSpansByTemplate:
    """What documents mark, in prompts of unlike lengths, is what each one alone marks."""

    METHODS = (
        SpotLight(spans=["{{fact}}"], target=0.6),
        PASTA(["{{fact}}", ("star", "all")], alpha=0.01),
        [InstABoost("the {{shape}} is", factor=5.0), ACT(beta=0.0, threshold=0.03)],
    )
    DOCS = (
        {"fact": "a red star", "shape": "star", "extra": ["square", "star"]},
        {"fact": "two large blue squares", "shape": "square", "extra": []},
        {"fact": "no circle", "shape": "circle", "extra": ["circle"]},
    )
    LEAD = "a blue star . a red star is above a square . "

    def asked(self) -> list[Any]:
        """An example comes first, so that what is marked is there more than once."""
        found = []
        for n, doc in enumerate(self.DOCS):
            prompt = self.LEAD * (n + 1) + f"{doc['fact']} . the {doc['shape']} is red . star ? answer"
            found += [
                SimpleNamespace(args=(prompt, c), doc=doc, task_name="a task") for c in (" red", " blue square .")
            ]
        return found

    def by_hand(self, text: Any, methods: Any) -> list[float]:
        ids, found = text.tokenizer, []
        for request in self.asked():
            prompt, continuation = request.args
            own = []
            for m in methods if isinstance(methods, list) else [methods]:
                spans = getattr(m, "spans", None)
                if spans is None:
                    own.append(m)
                    continue
                texts = []
                for s in (spans,) if isinstance(spans, str) else spans:
                    if isinstance(s, str):
                        s = s.replace("{{fact}}", request.doc["fact"]).replace("{{shape}}", request.doc["shape"])
                        s = (s, prompt.count(s) - 1)
                    texts.append(s)
                own.append(m.new(spans=[texts], tokenizer=text.tokenizer))
            whole = Choice(ids(prompt).input_ids, [ids(continuation).input_ids[1:]] * 2, 0)
            with steer(text.model, *own) as run:
                found.append(candidate_log_likelihoods(text.model, whole, run)[0])
        return found

    @pytest.mark.parametrize(
        "methods",
        [METHODS[0], pytest.param(METHODS[1], marks=pytest.mark.long), METHODS[2]],
        ids=["SpotLight", "PASTA", "two"],
    )
    def test_figures_are_those_of_each_document_alone(self, text: Any, methods: Any) -> None:
        want, plain = (
            self.by_hand(text, methods),
            AttnSteerLM(text, batch_size=4).loglikelihood(self.asked(), disable_tqdm=True),
        )
        for size in (1, 4):
            lm = AttnSteerLM(text, methods, batch_size=size)
            found = [f[0] for f in lm.loglikelihood(self.asked(), disable_tqdm=True)]
            assert found == pytest.approx(want, abs=1e-4) and lm.audit.fired(0)
            assert any(abs(f - p[0]) > 1e-2 for f, p in zip(found, plain, strict=True))
        record = lm.get_model_info()["attnsteer"]
        assert "{{" in record["interventions"][0] and record["audit"]["interventions"][0]["sites"]

    def test_generation_too(self, text: Any) -> None:
        requests = [
            SimpleNamespace(args=(r.args[0], {"until": ["."], "max_gen_toks": 3}), doc=r.doc) for r in self.asked()[::2]
        ]
        one, four = (
            AttnSteerLM(text, self.METHODS[0], batch_size=b).generate_until(requests, disable_tqdm=True) for b in (1, 4)
        )
        assert one == four
        for request, answer in zip(requests, one, strict=True):
            prompt, fact = request.args[0], request.doc["fact"]
            ids = torch.tensor([text.tokenizer(prompt).input_ids])
            method = self.METHODS[0].new(spans=[[(fact, prompt.count(fact) - 1)]], tokenizer=text.tokenizer)
            with steer(text.model, method):
                out = text.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, use_cache=True
                )
            assert answer == text.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split(".")[0]

    def test_what_cannot_be_filled_in_is_said(self, text: Any) -> None:
        def score(spans: Any, **doc: Any) -> Any:
            requests = [SimpleNamespace(args=("a red star .", " red"), doc=doc or None)]
            return AttnSteerLM(text, SpotLight(spans=spans, target=0.5)).loglikelihood(requests, disable_tqdm=True)

        for spans, doc, match in (
            (["{{facts}}"], {"fact": "red"}, r"no field 'facts' .*fact.*Did you mean|no field 'facts'"),
            (["{{fact}}"], {"fact": "blue"}, "'blue', which its document marks, is not in the prompt"),
            (["{{fact}}"], {"fact": {"a": 1}}, "is dict, and no text"),
            (["{{fact|upper}}"], {"fact": "red"}, "a template is {{field}}"),
            (["{{fact}}"], {}, "no document with this request"),
        ):
            with pytest.raises(SelectionError, match=match):
                score(spans, **doc)
        with pytest.raises(NeverFired):
            score(["{{extra}}"], extra=[])
        score(["{{extra.1}}"], extra=["x", "star"])
        with pytest.raises(UnsupportedHost, match="nothing is marked"):
            AttnSteerLM(text, self.METHODS[0]).loglikelihood_rolling([request("a red star")], disable_tqdm=True)
        with (
            steer(text.model, SpotLight(spans=["{{fact}}"], target=0.5), control=True) as run,
            pytest.raises(SelectionError, match="a live Steering whose spans are templates"),
        ):
            AttnSteerLM(text, run)


CASES = [
    pytest.param(c, id=c.method.__name__, marks=() if c.method in (ACT, InstABoost) else pytest.mark.long)
    for c in METHODS
]


@pytest.mark.parametrize("case", CASES)
def test_every_method_of_language_models_in_any_batch(text: Any, items: list[Any], case: Any) -> None:
    """The cases of the laws, in batches of four and alone, and as each question by itself."""
    heads = HeadSet({1: [0, 2], 3: [1], 4: [3]})
    for_batch = lambda b: case.acting(SimpleNamespace(heads=heads, where=Where(), batch=b))  # noqa: E731
    prompts = [items[0].prompt, items[1].prompt, items[0].prompt + " A . and"]
    asked = [request(p, c) for p in prompts for c in (" A", " B the small")]
    method = for_batch(1)
    if isinstance(getattr(method, "spans", None), tuple):
        # Ranges are those of a sample; a harness has many.
        method = method.new(spans=[("question", "all")], tokenizer=text.tokenizer)
    one, four = (AttnSteerLM(text, method, batch_size=b).loglikelihood(asked, disable_tqdm=True) for b in (1, 4))
    assert [f[0] for f in four] == pytest.approx([f[0] for f in one], abs=1e-4)
    ids = text.tokenizer
    for (want, _), r in zip(one, asked, strict=True):
        with steer(text.model, method) as run:
            choice = Choice(ids(r.args[0]).input_ids, [ids(r.args[1]).input_ids[1:]] * 2, 0)
            assert candidate_log_likelihoods(text.model, choice, run)[0] == pytest.approx(want, abs=1e-4)


@pytest.mark.long
def test_the_command_line(tasks: Path, text: Any, tmp_path: Path) -> None:
    folder = METHOD.save_pretrained(tmp_path / "act")
    command = [sys.executable, "-m", "attnsteer.evals.lm_eval", "--model", "attnsteer"]
    command += ["--include_path", str(tasks), "--tasks", "shapes_letters", "--batch_size", "8", "--log_samples"]
    command += ["--output_path", str(tmp_path), "--model_args"]
    done = subprocess.run(
        [*command, f"pretrained=shapes-lm,steer={folder}"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    want = evaluate(AttnSteerLM(text, METHOD, batch_size=8), tasks, "letters")
    assert found["results"]["shapes_letters"]["acc,none"] == want["results"]["shapes_letters"]["acc,none"]
    assert found["config"]["attnsteer"]["interventions"] == [repr(METHOD)]


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from attnsteer.evals.lm_eval import __main__ as program

    def broken() -> None:
        raise SelectionError("two\nlines")

    monkeypatch.setattr(program, "cli_evaluate", broken)
    assert program.main() == 2 and capsys.readouterr().err == "attnsteer: two lines\n"


def test_later_releases_find_the_model_by_its_entry_point() -> None:
    """lm-eval after 0.4.13 reads this group; the name must be the class."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = project["entry-points"]["lm_eval.models"]["attnsteer"].split(":")
    assert getattr(sys.modules[module], name) is AttnSteerLM
    from lm_eval.api.registry import get_model

    assert get_model("attnsteer") is AttnSteerLM and get_model("hf").__name__ == "HFLM"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "attnsteer.evals.lm_eval")
    with pytest.raises(MissingExtra, match=r"attnsteer\[lm-eval\]"):
        importlib.import_module("attnsteer.evals.lm_eval")
