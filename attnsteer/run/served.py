"""A model behind vLLM: a server that speaks OpenAI's protocol, or an engine in this process (docs/vllm.md).

Each sample is a request of its own with the steering of its arm, and all arms of a batch are sent together: what shares a step is
the engine's business. Choices are scored as the rest of a prompt that is said to end before them, so that they move no statistic of
a method and count as generated, as they do here.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError, RunError, did_you_mean, listing
from .loaded import Loaded

if TYPE_CHECKING:
    from ..intervention import Intervention
    from ..recipe.arms import Arm
    from ..recipe.schema import ModelSpec
    from .data.sample import Sample

# Requests that are under way at once, and how long one may take, in seconds.
MOST, PATIENCE = 64, 3600
# Arguments of `generate` by what vLLM calls them.
NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
}
SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Asked:
    """One request. prompt: a text, or token ids. steering: as a request has it (`attnsteer.hosts.vllm.wire`). scored: whether the
    log-probabilities of the prompt's tokens are wanted."""

    prompt: str | list[int]
    steering: dict[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    scored: bool = False


@dataclass(frozen=True)
class Said:
    """Its answer. tokens: how many were written. finished: whether the model ended by itself. logs: of the prompt, in nats."""

    text: str
    tokens: int
    finished: bool
    logs: list[float] | None = None


class Server:
    """A server of this protocol, such as `vllm serve`. url: with or without /v1.

    Raises:
        RunError: it does not answer, or says that something is wrong.
    """

    def __init__(self, url: str):
        self.root = url.rstrip("/").removesuffix("/v1")
        # Proxies are for what is far away.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        found = self._call("/v1/models")
        self.name = str(found["data"][0]["id"])
        self.files = {"served": self.name, "root": str(found["data"][0].get("root") or self.name)}

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(asked, timeout=PATIENCE) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise RunError(f"{self.root}{path} refused a request ({error.code}): {_message(error.read())}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                f"{self.root}{path} cannot be reached ({error}); start the server, and run the recipe again to go on."
            ) from error

    def sites(self) -> None:
        """A server does not say what layers and heads its model has."""

    def tokenizer(self, text: str, add_special_tokens: bool = True) -> Any:
        """Its tokens of a text, as `input_ids`."""
        body = {"model": self.name, "prompt": text, "add_special_tokens": add_special_tokens}
        return SimpleNamespace(input_ids=list(self._call("/tokenize", body)["tokens"]))

    def answers(self, asked: Sequence[Asked]) -> list[Said]:
        """The answers, in order."""
        with ThreadPoolExecutor(MOST) as pool:
            return list(pool.map(self._answer, asked))

    def _answer(self, asked: Asked) -> Said:
        body: dict[str, Any] = {"model": self.name, "prompt": asked.prompt, **asked.sampling}
        if asked.scored:
            body["prompt_logprobs"] = 0
        if asked.steering is not None:
            # Its fields hold no objects.
            body["vllm_xargs"] = {"attnsteer": json.dumps(asked.steering)}
        found = self._call("/v1/completions", body)
        choice, logs = found["choices"][0], None
        if asked.scored:
            every = zip(asked.prompt, choice["prompt_logprobs"], strict=True)
            logs = [0.0 if own is None else float(own[str(token)]["logprob"]) for token, own in every]
        return Said(choice["text"], found["usage"]["completion_tokens"], choice["finish_reason"] == "stop", logs)


def _message(data: bytes) -> str:
    try:
        found = json.loads(data)
        return str(found.get("error", found).get("message", found))
    except (ValueError, AttributeError, RecursionError):
        return data.decode(errors="replace")[:300]


class Engine:
    """An engine of vLLM in this process.

    Args:
        source: folder of the model. options: of `vllm.LLM`. files: hashes of what is in it.
    """

    def __init__(self, source: Path, options: Mapping[str, Any], files: dict[str, str]):
        from vllm import LLM

        self.llm = LLM(str(source), load_format="safetensors", additional_config={"attnsteer": {}}, **options)
        self.files, self.tokenizer = files, self.llm.get_tokenizer()

    def sites(self) -> Any:
        """Of the whole model."""
        from ..hosts.vllm.admission import facts_of
        from ..hosts.vllm.menu import Served

        return Served(facts_of(self.llm.llm_engine.vllm_config)).sites()

    def answers(self, asked: Sequence[Asked]) -> list[Said]:
        """The answers, in order.

        Raises:
            RunError: a request was refused.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        prompts = [{"prompt": a.prompt} if isinstance(a.prompt, str) else {"prompt_token_ids": a.prompt} for a in asked]
        params = [
            SamplingParams(
                **a.sampling,
                prompt_logprobs=0 if a.scored else None,
                extra_args=None if a.steering is None else {"attnsteer": a.steering},
            )
            for a in asked
        ]
        try:
            outs = self.llm.generate(prompts, params, use_tqdm=False)
        except VLLMValidationError as error:
            raise RunError(f"the engine refused a request: {error}") from error
        found = []
        for a, out in zip(asked, outs, strict=True):
            own, logs = out.outputs[0], None
            if a.scored:
                every = zip(a.prompt, out.prompt_logprobs, strict=True)
                logs = [0.0 if step is None else step[token].logprob for token, step in every]
            found.append(Said(own.text, len(own.token_ids), own.finish_reason == "stop", logs))
        return found


def server(spec: ModelSpec) -> Loaded:
    """The model of a recipe that names a server.

    Raises:
        RunError: it does not answer.
    """
    target = Server(str(spec.vllm))
    return Loaded(spec.kind, target, target.tokenizer, files=target.files, stream=True)


def engine(spec: ModelSpec, options: Mapping[str, Any], source: Path, files: dict[str, str]) -> Loaded:
    """The model of a recipe in an engine of this process. options: of it, without the model, whose folder is `source`."""
    target = Engine(source, {"dtype": spec.dtype, **options}, files)
    return Loaded(spec.kind, target, target.tokenizer, files=files, stream=True)


def answers(
    loaded: Loaded, arms: Sequence[Arm], samples: Sequence[Sample], task: Any, seed: int
) -> list[tuple[list[dict[str, Any]], list[int], list[dict[str, Any]]]]:
    """(records, units of each, audit) of each arm for a batch, asked for together.

    Raises:
        RecipeError: an arm's steering or decoding has no form of a request. RunError: a request was refused.
    """
    ask = _choices if "scores" in task.RECORD_KEYS else _texts
    asked, made = [], []
    for arm in arms:
        for sample in samples:
            steering = _steering(arm, sample, loaded)
            own, read = ask(loaded, sample, steering, {**task.DECODING, **arm.decoding}, seed)
            made.append((slice(len(asked), len(asked) + len(own)), read))
            asked += own
    said = loaded.target.answers(asked)
    found = [read(said[place]) for place, read in made]
    out = []
    for i, arm in enumerate(arms):
        own = found[i * len(samples) : (i + 1) * len(samples)]
        fields = [{k: s[k] for k in task.SAMPLE_KEYS if k in s} for s in samples]
        records = [{**f, **record} for f, (record, _) in zip(fields, own, strict=True)]
        # What changed is in the engine's log.
        audit = [{"intervention": m.name, "sites": {}, "elsewhere": True} for m in arm.interventions]
        out.append((records, [units for _, units in own], audit))
    return out


def _steering(arm: Arm, sample: Sample, loaded: Loaded) -> dict[str, Any] | None:
    """What a request says of its steering; None: nothing."""
    from ..hosts.vllm.wire import KEY, request_args

    methods: list[Intervention] = arm.make([sample], loaded)
    if len(methods) > 1:
        raise RecipeError(
            f"the arm {arm.id} has {len(methods)} interventions, and a request of vLLM says one. Start the server with a steering "
            "that has them, or run the recipe in this process."
        )
    return dict(request_args(methods[0])[KEY]) if methods else None


def _texts(
    loaded: Loaded, sample: Sample, steering: dict[str, Any] | None, decoding: Mapping[str, Any], seed: int
) -> tuple[list[Asked], Any]:
    def read(said: Sequence[Said]) -> tuple[dict[str, Any], int]:
        (one,) = said
        return {"generated": one.text.strip(), "finished": one.finished}, one.tokens

    return [Asked(sample["prompt"], steering, sampling(decoding, f"{seed} {sample['id']}"))], read


def _choices(
    loaded: Loaded, sample: Sample, steering: dict[str, Any] | None, decoding: Mapping[str, Any], seed: int
) -> tuple[list[Asked], Any]:
    from .tasks.prompts import continuations

    start, every = continuations(loaded.tokenizer, sample["prompt"], sample["choices"])
    ended = None if steering is None else {**steering, "prompt": len(start)}
    one = {"max_tokens": 1, "temperature": 0.0}

    def read(said: Sequence[Said]) -> tuple[dict[str, Any], int]:
        return {"scores": [sum(s.logs[len(start) :]) for s in said]}, 1  # type: ignore[index]

    return [Asked([*start, *own], ended, one, scored=True) for own in every], read


def sampling(decoding: Mapping[str, Any], seed: str) -> dict[str, Any]:
    """Arguments of `generate` as vLLM has them.

    Args:
        seed: what tells draws apart.

    Raises:
        RecipeError: there is no such argument there.
    """
    values = dict(decoding)
    drawn = values.pop("do_sample", False)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in NAMES:
            raise RecipeError(
                f"decoding.{name}: a request of vLLM has no such argument; there are do_sample, {listing(NAMES, 20)}."
                f"{did_you_mean(name, NAMES)}"
            )
        if drawn or name not in SAMPLING:
            found[NAMES[name]] = value
    if drawn:
        return {"temperature": 1.0, **found, "seed": zlib.crc32(seed.encode())}
    return {**found, "temperature": 0.0}
