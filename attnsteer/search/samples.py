"""Choice samples: a tokenised prompt, candidate continuations, the right one; and their log-likelihoods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SelectionError
from .state import digest


@dataclass(frozen=True)
class Choice:
    """One question.

    Args:
        prompt: token ids. candidates: token ids of each continuation; a single id stands for a one-token continuation.
        answer: index of the right candidate.

    Raises:
        SelectionError: an empty prompt or candidate, fewer than two candidates, an answer that is no index.
    """

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    answer: int

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("prompt", _ids(self.prompt))
        put("candidates", tuple(_ids(c) for c in _listed(self.candidates)))
        if not self.prompt or len(self.candidates) < 2 or not all(self.candidates):
            raise SelectionError(
                f"Choice with {len(self.prompt)} prompt tokens and candidates of {[len(c) for c in self.candidates]} "
                "tokens: give a prompt and at least two candidates, none of them empty."
            )
        if isinstance(self.answer, bool) or not isinstance(self.answer, int):
            raise SelectionError(f"Choice(answer={self.answer!r}): give the index of the right candidate.")
        if not 0 <= self.answer < len(self.candidates):
            raise SelectionError(f"Choice(answer={self.answer}): there are {len(self.candidates)} candidates, from 0.")

    def key(self) -> str:
        """A hash of the prompt: two samples with one prompt are the same sample for a train/test split."""
        return digest(self.prompt)


def choices(samples: Iterable[Any]) -> list[Choice]:
    """Samples as `Choice` objects; mappings with the same three names are taken too.

    Raises:
        SelectionError: there is none, or one is of another form.
    """
    found = []
    for i, sample in enumerate(samples):
        if isinstance(sample, Choice):
            found.append(sample)
            continue
        if not isinstance(sample, Mapping) or set(sample) != {"prompt", "candidates", "answer"}:
            raise SelectionError(
                f"sample {i} is {type(sample).__name__}; give Choice(prompt, candidates, answer), or a dictionary with these "
                "three."
            )
        found.append(Choice(**sample))
    if not found:
        raise SelectionError("there are no samples; give at least one.")
    return found


def split_digest(samples: Sequence[Choice]) -> str:
    """A hash of a split: prompts, candidates and answers, in order."""
    return digest([[s.prompt, s.candidates, s.answer] for s in samples])


@torch.no_grad()
def candidate_log_likelihoods(
    model: Any, sample: Choice, run: Any = None, inputs: Mapping[str, Any] | None = None
) -> list[float]:
    """log p(candidate | prompt) in nats for each candidate of one sample, from one prefill and one scored continuation.

    Args:
        model: a causal language model, steered or not. run: its `Steering`; the prompt's statistics are frozen while the
            candidates are scored, so these cannot move them. inputs: what else belongs to the prompt, such as `pixel_values`.
    """
    device = next(model.parameters()).device
    prompt = torch.tensor([sample.prompt], device=device)
    longer = [c for c in sample.candidates if len(c) > 1]
    output = model(input_ids=prompt, use_cache=bool(longer), **(inputs or {}))
    first = output.logits[0, -1].float().log_softmax(-1)
    total = [float(first[c[0]]) for c in sample.candidates]
    if not longer:
        return total
    fed = padded([c[:-1] for c in longer], device)
    cache = output.past_key_values
    cache.batch_repeat_interleave(len(longer))
    with contextlib.nullcontext() if run is None else run.freeze():
        logits = model(input_ids=fed, past_key_values=cache, use_cache=True).logits
    rest = iter(token_sums(logits, longer))
    return [t if len(c) == 1 else t + next(rest) for t, c in zip(total, sample.candidates, strict=True)]


def padded(rows: Sequence[Sequence[int]], device: Any = None) -> Tensor:
    """Rows of ids, filled up on the right, where a causal model cannot see it, [B, n]."""
    width = max(len(r) for r in rows)
    return torch.tensor([[*r, *[r[-1]] * (width - len(r))] for r in rows], device=device)


def token_sums(logits: Tensor, candidates: Sequence[Sequence[int]]) -> list[float]:
    """Sum of log p over all but the first token of each candidate, from logits [C, k, V] of all but its last."""
    p = logits.float().log_softmax(-1)
    return [float(sum(p[i, t, c[t + 1]] for t in range(len(c) - 1))) for i, c in enumerate(candidates)]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise SelectionError(f"Choice got candidates {value!r}; give a list of token ids, or of lists of them.")
    return list(value)


def _ids(value: Any) -> tuple[int, ...]:
    value = value.tolist() if isinstance(value, Tensor) else value
    items = (value,) if isinstance(value, int) else value
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        raise SelectionError(f"Choice got {value!r}; give token ids (tokenise the text first).")
    items = tuple(items)
    wrong = [i for i in items if isinstance(i, bool) or not isinstance(i, int) or i < 0]
    if wrong:
        raise SelectionError(
            f"Choice got {wrong[0]!r} among its token ids; give integers of 0 or more, without a batch axis."
        )
    return items
