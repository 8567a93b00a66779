"""lmms-eval on a steered model: `python -m attnsteer.evals.lmms_eval --model llava_hf --model_args pretrained=...,steer=DIR ...`.

lmms-eval knows models by name only, and tasks choose prompts by that name. So a steered class takes the place of one of its
classes, under the name that it has there. Any class will do whose `model` is a transformers model with `generate`. It runs in
lmms-eval's own environment, into which this package is installed too. Written for 0.7.2
(EvolvingLMMs-Lab/lmms-eval at 75571cf), run with 0.7.3.

An answer that is scored comes in one call with its prompt there, with labels that tell the two apart. Here the prompt is
prefilled, the statistics are frozen, and the answer is scored over the cache, as everywhere in this package.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import steering
from ...errors import AttnSteerError, SelectionError, UnsupportedHost
from ...intervention import Intervention
from ...tokens import char_offsets
from ..templates import Marks

IGNORED = -100


def steered(base: type) -> type:
    """A model class of lmms-eval that takes `steer`, and steers its model while it answers.

    `steer`: the folder or hub id where `save_pretrained` wrote an intervention, or several, separated by os.pathsep (":").
    Spans may be templates over the documents of a task (`attnsteer.evals.templates`). `audit` is that of the last kind of
    request; a method that changed nothing raises `NeverFired`.
    """

    class Steered(base):
        def __init__(self, steer: str, **options: Any):
            super().__init__(**options)
            folders = [folder for folder in str(steer).split(os.pathsep) if folder]
            self.interventions = [Intervention.from_pretrained(folder) for folder in folders]
            self.audit = None
            # Whatever cannot be steered is refused now. An empty `steer` is refused too: leave it out and use the class itself.
            steering.steer(self.model, *self.interventions, control=True).remove()

        def generate_until(self, requests: list[Any]) -> list[Any]:
            return self._answer(super().generate_until, requests, "generate", generated)

        def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
            return self._answer(super().generate_until_multi_round, requests, "generate", generated)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return self._answer(super().loglikelihood, requests, "forward", scored)

        def _answer(self, ask: Any, requests: list[Any], name: str, through: Callable[..., Any]) -> list[Any]:
            marks = Marks(
                [m if not hasattr(m, "tokenizer") else m.new(tokenizer=_tokenizer(self)) for m in self.interventions]
            )
            if marks:
                marks.note((str(r.args[0]), _document(self, r)) for r in requests)
            batches = Batches(self.model, marks, _tokenizer(self))
            with batches.watching(name, through):
                answers = ask(requests)
            # Some classes log an error and go on with an empty answer.
            if batches.failed:
                raise batches.failed[0]
            self.audit = batches.finish()
            print(self.audit, file=sys.stderr)
            return answers

    Steered.__name__ = Steered.__qualname__ = f"Steered{base.__name__}"
    return Steered


class Batches:
    """The batches of one kind of request: each call of the model is steered, with its own spans where documents mark some."""

    def __init__(self, model: Any, marks: Marks, tokenizer: Any):
        self.model, self.marks, self.tokenizer = model, marks, tokenizer
        self.failed: list[AttnSteerError] = []
        self._run: Any = None
        self._audit: Any = None
        self._inside = False

    @contextlib.contextmanager
    def watching(self, name: str, through: Callable[..., Any]) -> Iterator[None]:
        """Calls of a method of the model go through a function of this module in the block."""
        original, own = getattr(self.model, name), vars(self.model).get(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            # The function calls the model again, by the way that steering has laid around it.
            return original(*args, **kwargs) if self._inside else through(self, *args, **kwargs)

        setattr(self.model, name, call)
        try:
            yield
        finally:
            delattr(self.model, name)
            if own is not None:
                setattr(self.model, name, own)

    @contextlib.contextmanager
    def steered(self, ids: Tensor | None, mask: Tensor | None) -> Iterator[Any]:
        """Steer the calls in this block; the block has the steering. ids, mask: of the prompts, [B, n]."""
        try:
            run = steering.steer(self.model, *self._methods(ids, mask), control=True)
            self._audit = run.audit = run.audit if self._audit is None else self._audit
            self._run, self._inside = run, True
            try:
                yield run
            finally:
                self._inside = False
                run.remove()
        except AttnSteerError as error:
            self.failed.append(error)
            raise

    def _methods(self, ids: Tensor | None, mask: Tensor | None) -> Sequence[Intervention]:
        if not self.marks:
            return self.marks.methods
        if ids is None:
            raise SelectionError("spans: this class hands its model no input_ids, so its prompts cannot be told apart.")
        valid = torch.ones_like(ids) if mask is None else mask
        rows = [row[own.bool()].tolist() for row, own in zip(ids, valid, strict=True)]
        return self.marks.of([self._prompt(row) for row in rows], rows, self.tokenizer)

    def _prompt(self, ids: list[int]) -> str:
        """Which of the noted prompts a row holds: classes reorder their requests, and put templates around them."""
        text = _plain(char_offsets(ids, self.tokenizer)[1])
        found = [p for p in self.marks.texts if _plain(p) in text]
        if not found:
            raise SelectionError(f"spans: no request's text is in this prompt: {text[:200]!r}.")
        return max(found, key=lambda p: len(_plain(p)))

    def finish(self) -> Any:
        """The audit of all batches.

        Raises:
            NeverFired: a method changed nothing in any of them.
        """
        if self._run is None:
            with steering.steer(self.model, *self.marks.methods):
                # No request came: it says so.
                pass
        self._run.control = False
        self._run.check_fired()
        return self._audit


def generated(batches: Batches, *args: Any, **kwargs: Any) -> Any:
    """One call of `generate`."""
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    with batches.steered(ids, kwargs.get("attention_mask")):
        return batches.model.generate(*args, **kwargs)


def scored(batches: Batches, *args: Any, **kwargs: Any) -> Any:
    """One call of a model with labels: {"loss", "logits"} as it would give them, the answer scored over the cache of its prompt."""
    labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
    if labels is None or ids is None or args:
        raise UnsupportedHost(
            "this class scores answers without labels, which would tell them from their prompts, so they would be steered, and "
            "counted, as part of it. Take a task that generates."
        )
    starts = {int(row.ne(IGNORED).int().argmax()) for row in labels}
    start, n = min(starts), ids.shape[1]
    if len(starts) > 1 or not 0 < start < n:
        raise UnsupportedHost(
            "the answers of this batch begin at different places; use a batch size of 1 for tasks that score."
        )
    del kwargs["labels"]
    mask = kwargs.pop("attention_mask", None)
    mask = torch.ones_like(ids) if mask is None else mask
    # What speaks of tokens is cut with them; pictures belong to the prompt.
    by_token = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.ndim == 2 and v.shape == ids.shape}
    rest = {k: v for k, v in kwargs.items() if k not in by_token} | {"use_cache": True}
    with batches.steered(ids[:, :start], mask[:, :start]) as run:
        prompt = batches.model(attention_mask=mask[:, :start], **{k: v[:, :start] for k, v in by_token.items()}, **rest)
        rest = {k: v for k, v in rest.items() if not isinstance(v, Tensor)}
        with run.freeze():
            answer = batches.model(
                attention_mask=mask,
                past_key_values=prompt.past_key_values,
                **{k: v[:, start:] for k, v in by_token.items()},
                **rest,
            )
    logits = torch.cat([prompt.logits, answer.logits], dim=1)
    loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    return type(prompt)(loss=loss, logits=logits)


def _document(lm: Any, request: Any) -> Any:
    """The document of a request: its own, or that of the task and split that its arguments name."""
    found = getattr(request, "doc", None)
    if found is not None:
        return found
    try:
        doc_id, task, split = request.args[-3:]
        return lm.task_dict[task][split][doc_id]
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _tokenizer(lm: Any) -> Any:
    found = getattr(lm, "tokenizer", None)
    return found if found is not None else getattr(getattr(lm, "processor", None), "tokenizer", None)


def _plain(text: str) -> str:
    return " ".join(text.replace("<image>", " ").split())


def register(name: str, simple: bool = False) -> type:
    """Put the steered class in the place of lmms-eval's class of this name; simple: the one that `--force_simple` takes."""
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model
    from lmms_eval.models.registry_v2 import ModelManifest

    cls = steered(get_model(name, simple))
    # lmms-eval imports a class by its path.
    sys.modules[__name__].Steered = cls
    kind = "simple_class_path" if cls.is_simple else "chat_class_path"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(name, **{kind: f"{__name__}.Steered"}), overwrite=True)
    return cls


def main() -> int:
    """lmms-eval's command line; without `steer=` it is that program as it is. 2 after an error of this library."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--model")
    parser.add_argument("--model_args", default="")
    parser.add_argument("--force_simple", action="store_true")
    given = parser.parse_known_args()[0]
    try:
        if given.model and any(pair.strip().startswith("steer=") for pair in given.model_args.split(",")):
            register(given.model, given.force_simple)
        from lmms_eval.__main__ import cli_evaluate

        cli_evaluate()
    except AttnSteerError as error:
        print(f"attnsteer: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
