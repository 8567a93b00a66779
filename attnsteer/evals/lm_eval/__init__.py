"""lm-evaluation-harness on a steered model: its model class `attnsteer`, and its command line that knows it.

`python -m attnsteer.evals.lm_eval --model attnsteer --model_args pretrained=...,steer=DIR --tasks ...`, or
`lm_eval.simple_evaluate(model=AttnSteerLM(model, steer=ACT(...), tokenizer=...), tasks=[...])`. Extra `lm-eval`.

The harness pads loglikelihood batches on the right, without a mask, and feeds context and continuation together; a method with
statistics would count both. Here the context is the prompt, and a continuation is scored over its cache
(`attnsteer.evals.continuations`). It does so without steering too: what differs between two runs is the method alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ... import zoo
from ..._version import __version__
from ...errors import CompositionError, MissingExtra, SelectionError, UnsupportedHost
from ...intervention import Intervention
from ...steering import Steering, steered
from ...steering import steer as attach
from ..continuations import Score, score_continuations
from ..templates import Marks

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingExtra(
        "the bridge to lm-evaluation-harness needs lm-eval, which is not installed: pip install 'attnsteer[lm-eval]'"
    ) from error


@register_model("attnsteer")
class AttnSteerLM(HFLM):
    """A causal language model of transformers, steered while the harness asks it.

    Args:
        pretrained: a hub id or folder, the name of an embedded model ("shapes-lm", in fp32 unless `dtype` says otherwise), a
            model, or what `attnsteer.zoo.load` gives.
        steer: None for the model as it is; an `Intervention`, or where `save_pretrained` wrote one (a folder or hub id), or
            several: in a list, or in one string separated by `os.pathsep` (":"); or the live `Steering` of the model that was
            given. Methods that look words up get the tokenizer. Spans may be templates over the task's documents,
            `SpotLight(spans=["{{passage}}"])` (see `attnsteer.evals.templates`).
        control: a steering that is meant to change nothing, such as one of strength zero: do not raise because of it.
        options: of lm-eval's `HFLM`: tokenizer, dtype, device, batch_size, max_length, ...

    The model is steered during the harness's requests only. Each kind of request ends as a steering context does: a method
    that never acted raises `NeverFired`. `audit` is the last one's.

    Raises:
        SelectionError: `steer` is none of these, or selects what the model does not have.
        CompositionError: the model is steered already.
        UnsupportedHost: an encoder-decoder, or a model that cannot be steered exactly.
        SerializationError: a folder holds no intervention.
    """

    def __init__(self, pretrained: Any, steer: Any = None, control: bool = False, **options: Any):
        pretrained, options = _found(pretrained, options)
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise UnsupportedHost(
                f"{type(self.model).__name__} is an encoder-decoder; the bridge scores continuations of causal language models."
            )
        self._run: Steering | None = None
        self._control = control
        self._texts: list[str] = []
        # Of methods with templates: whether requests are under way, and the last batch's steering.
        self._open, self._last = False, None
        if isinstance(steer, Steering):
            if getattr(steer.host, "model", None) is not self.model:
                raise SelectionError(
                    "steer= is the Steering of another model; give pretrained= the model that it steers."
                )
            self._run, self.interventions, self.audit = steer, steer.interventions, steer.audit
        else:
            self.interventions, self.audit = _interventions(steer, self.tokenizer), None
        self._marks = Marks(self.interventions)
        if self._marks and self._run is not None:
            raise SelectionError(
                "steer= is a live Steering whose spans are templates; give the methods, so that each batch gets its own spans."
            )
        # What cannot be attached is refused now, not after the tasks were built.
        if self.interventions and self._run is None:
            attach(self.model, *self.interventions, control=True).remove()

    @contextlib.contextmanager
    def _steered(self) -> Iterator[None]:
        """Steer the model in this block; nothing is left to do within another such block."""
        if self._run is not None or self._open:
            yield
        elif self._marks:
            # Each batch is steered with the spans of its documents; they share one audit.
            self._open, self.audit, last = True, None, None
            try:
                yield
                last = self._last
            finally:
                self._open, self._last = False, None
            if last is not None and not self._control:
                last.control = False
                last.check_fired()
        elif self.interventions:
            with attach(self.model, *self.interventions, control=self._control) as self._run:
                self.audit = self._run.audit
                try:
                    yield
                finally:
                    self._run = None
        elif steered(self.model):
            raise CompositionError(
                "the model is steered already, and the bridge has to know: AttnSteerLM(model, steer=run) with its Steering."
            )
        else:
            yield

    @contextlib.contextmanager
    def _batch(self, prompts: Sequence[str], rows: Sequence[Sequence[int]]) -> Iterator[None]:
        """Steer the model for one batch in this block, where its documents say what is marked.

        Args:
            prompts: the texts of its rows. rows: their token ids, without padding.
        """
        if not self._marks:
            yield
            return
        # Whether it acted is asked when all batches are done.
        run = attach(self.model, *self._marks.of(prompts, rows, self.tokenizer), control=True)
        run.audit = self.audit = run.audit if self.audit is None else self.audit
        self._run = self._last = run
        try:
            yield
        finally:
            self._run = None
            run.remove()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._note(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _note(self, requests: list[Any]) -> None:
        if self._marks:
            self._marks.note((r.args[0], getattr(r, "doc", None)) for r in requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts: nothing but the prefix token is their context.

        Raises:
            UnsupportedHost: a method takes statistics of the prompt, and there is none.
        """
        for method in self.interventions:
            if method.looks_ahead:
                raise UnsupportedHost(
                    f"loglikelihood_rolling scores texts without a prompt, and {type(method).__name__} edits by the statistics of "
                    "the prompt: it would edit nothing. Take tasks that have contexts, or a method that does not look ahead."
                )
        if self._marks:
            raise UnsupportedHost(
                "loglikelihood_rolling scores texts without a prompt, in which nothing is marked. Take tasks that have contexts."
            )
        with self._steered():
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._note(requests)
        with self._steered():
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def tok_batch_encode(self, strings: list[str], *args: Any, **options: Any) -> Any:
        # The texts of the batch that is generated for next.
        self._texts = list(strings)
        return super().tok_batch_encode(strings, *args, **options)

    def _model_generate(self, context: Tensor, *args: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        rows = context.tolist()
        if attention_mask is not None:
            rows = [
                [t for t, m in zip(r, own, strict=True) if m]
                for r, own in zip(rows, attention_mask.tolist(), strict=True)
            ]
        with self._batch(self._texts, rows):
            return super()._model_generate(context, *args, attention_mask=attention_mask, **options)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of each (key, context, continuation); requests with one context share its prefill."""
        asked: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not context or not 1 <= len(continuation) <= self.max_length:
                raise SelectionError(
                    f"request {i} has {len(context)} tokens of context and {len(continuation)} to score; at least one of each is "
                    f"needed, and at most max_length={self.max_length} to score."
                )
            # Too long: cut on the left, as the harness does; the last token is predicted, not fed.
            room = self.max_length + 1 - len(continuation)
            asked.setdefault(tuple(context[-room:]), []).append(i)
        # The longest first: it is padded least so, and shows at once whether it fits into memory.
        contexts = sorted(asked, key=lambda c: (-len(c), c))
        found: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with self._steered(), bar:
            size = override_bs or (self._detect_batch_size() if self.batch_size == "auto" else self.batch_size)
            for k in range(0, len(contexts), size):
                part = contexts[k : k + size]
                texts = [requests[asked[c][0]][0][0] if self._marks else "" for c in part]
                with self._batch(texts, part):
                    scores = self._scores(part, [[requests[i][2] for i in asked[c]] for c in part], size)
                for context, own in zip(part, scores, strict=True):
                    for i, score in zip(asked[context], own, strict=True):
                        found[i] = tuple(score)
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                    bar.update(len(own))
        return found

    def _scores(self, contexts: Any, continuations: Any, rows: int) -> list[list[Score]]:
        half = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            return score_continuations(
                self.model, contexts, continuations, self._run, rows=rows, dtype=self.softmax_dtype or torch.float32
            )

    def get_model_info(self) -> dict[str, Any]:
        """The harness's record of the model, with the interventions and what they did."""
        done = {} if self.audit is None else self.audit.to_dict()
        own = {"version": __version__, "interventions": [repr(m) for m in self.interventions], "audit": done}
        return super().get_model_info() | {"attnsteer": own}


def _found(pretrained: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What `HFLM` takes, from the names and pairs of `attnsteer.zoo` too."""
    if isinstance(pretrained, zoo.Text):
        return pretrained.model, {"tokenizer": pretrained.tokenizer} | options
    if pretrained in zoo.KNOWN and not Path(pretrained).exists():
        if pretrained not in ("shapes-lm", *zoo.FETCHED):
            texts = ", ".join(("shapes-lm", *zoo.FETCHED))
            raise UnsupportedHost(f"{pretrained} is no language model; lm-eval's tasks are for those: {texts}.")
        return str(zoo.folder(pretrained)), {"dtype": "float32"} | options
    if not isinstance(pretrained, (str, nn.Module)):
        raise SelectionError(
            f"pretrained={pretrained!r}: give a hub id, a folder, an embedded model's name, or a model."
        )
    return pretrained, options


def _interventions(steer: Any, tokenizer: Any) -> tuple[Intervention, ...]:
    """The interventions that `steer` names, in order; those that look words up have the tokenizer."""
    if steer is None:
        return ()
    if isinstance(steer, str):
        steer = [part for part in steer.split(os.pathsep) if part]
    parts = list(steer) if isinstance(steer, (list, tuple)) else [steer]
    if not parts or not all(isinstance(p, (Intervention, str, Path)) for p in parts):
        raise SelectionError(
            f"steer={steer!r}: give interventions, folders that save_pretrained wrote, or the Steering of the model."
        )
    methods = [p if isinstance(p, Intervention) else Intervention.from_pretrained(p) for p in parts]
    return tuple(
        m.new(tokenizer=tokenizer) if any(f.name == "tokenizer" for f in fields(m)) and m.tokenizer is None else m
        for m in methods
    )
