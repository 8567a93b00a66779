"""CONFORM: moves the latent so that the maps of words that belong together become alike, and those of others unlike.

Meral et al., "CONFORM: Contrast is All You Need for High-Fidelity Text-to-Image Diffusion Models" (CVPR 2024,
arXiv 2312.06059), section 4; official code gemlab-vt/CONFORM at 4ad0e37, whose notebook has the settings of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SelectionError, brief
from ..maps.phrases import Prompt, is_phrase
from ..maps.words_to_image import COMPETE, Maps
from ..parameters import choice, flag, integer, number, parsed, plain
from ..registry import register_method
from .attend_and_excite import competing
from .bases.latent_loss import LatentLoss, Plan, at, calls

LOSSES = ("ntxent", "contrastive")


def _is_group(value: Any) -> bool:
    return is_phrase(value) or (isinstance(value, (list, tuple)) and bool(value) and all(map(is_phrase, value)))


def _groups(given: Any) -> Any:
    """Groups of phrases for all prompts, or a tuple of them, one for each prompt."""
    if isinstance(given, (list, tuple)) and given and not isinstance(given[0], str) and not all(map(_is_group, given)):
        return tuple(_of_prompt(own) for own in given)
    return _of_prompt(given)


def _of_prompt(given: Any) -> tuple[Any, ...]:
    if not isinstance(given, (list, tuple)) or not all(map(_is_group, given)) or len(given) < 2:
        raise SelectionError(
            f"give at least two groups of phrases, such as [('red', 'cube'), ('blue', 'ball')], or a list of such lists, one per "
            f"prompt; not {brief(given)}. One group alone has nothing to be unlike."
        )
    frozen = lambda p: p if isinstance(p, str) else tuple(p)  # noqa: E731
    groups = tuple((frozen(g),) if is_phrase(g) else tuple(frozen(p) for p in g) for g in given)
    every = [phrase for group in groups for phrase in group]
    twice = [phrase for phrase in every if every.count(phrase) > 1]
    if twice:
        raise SelectionError(f"the phrase {twice[0]!r} is in several groups, or twice in one; it can be in one only.")
    return groups


def _when(given: Any) -> tuple[int | float, ...]:
    given = plain(given)
    if not isinstance(given, (list, tuple)):
        raise SelectionError(f"give a list of numbers of calls, or of fractions of the loop; not {brief(given)}.")
    return tuple(calls(when) for when in given)


@register_method
@dataclass(frozen=True)
class CONFORM(LatentLoss):
    """L = mean over pairs (a, p) of one group of -log( e^(s_ap / tau) / (e^(s_ap / tau) + sum over others n of e^(s_an / tau)) ).

    s is the cosine similarity of two words' maps, as vectors over the image; each word has its map of now, and its map at the
    step before.

    Args:
        groups: groups of phrases, an object with its attributes in each: [("red", "cube"), ("blue", "ball")]; a phrase of
            several words is as many maps. Or a list of such lists, one per prompt.
        refine_at: calls in which the latent is moved `refinements` times more, whatever the loss: numbers of calls, or
            fractions of the loop (0, 10, 20 of 50). temperature: tau.
        form: "ntxent", the loss above; "contrastive": mean of max(0, 1 - s) over pairs of one group, plus mean of max(0, s) over
            pairs of two, each over those that are not 0 (the official code's other loss).
        anchor: the call whose maps stand for the step before, in all later calls; None: always the last one.
        sharpness, compete, smooth: of the maps, see `AttendAndExcite`; by default they are blurred only. The rest: see
            `LatentLoss`.

    A group of one word has no pair in the first call, which then does nothing. Defaults are those for 16 x 16 maps of Stable
    Diffusion 1.5; no layers or step sizes are published for other models, and joint attention is untried by the authors.
    """

    groups: Any = parsed(_groups, "at least two groups of phrases, or one list of them per prompt")
    refine_at: Sequence[int | float] = parsed(_when, "numbers of calls, or fractions of the loop", (0.0, 0.2, 0.4))
    refinements: int = integer(20, low=0)
    temperature: float = number(0.5, above=0, kw_only=True)
    form: str = choice("ntxent", LOSSES, kw_only=True)
    anchor: int | None = integer(None, low=0, optional=True, kw_only=True)
    sharpness: float | None = number(None, above=0, optional=True, kw_only=True)
    compete: str | None = choice(None, COMPETE, kw_only=True)
    smooth: bool = flag(True, kw_only=True)
    until: float = field(default=0.6, kw_only=True)

    @classmethod
    def released_code(cls, groups: Any, **changes: Any) -> CONFORM:
        """What the official code computes with the settings of its notebook: the latent unscaled, every call, 30 calls."""
        fixed = {"refine_at": (0, 10, 20), "until": 30, "scaled": False, "blind_calls": True}
        return cls(groups, **{**fixed, **changes})

    def _each(self) -> list[tuple[Any, ...]]:
        """Groups per prompt, or one list for all."""
        return list(self.groups) if not all(map(_is_group, self.groups)) else [self.groups]

    def phrases(self) -> list[list[Any]]:
        return [[phrase for group in groups for phrase in group] for groups in self._each()]

    def prepare(self, prompt: Prompt) -> None:
        super().prepare(prompt)
        # The token behind a phrase may belong to the next one.
        include = "last" if self.include == "last+1" else self.include
        phrases = self.phrases()
        terms = prompt.terms(phrases, include)
        for sample, own in zip(terms, phrases * len(terms) if len(phrases) == 1 else phrases, strict=True):
            owner: dict[int, int] = {}
            for n, tokens in sample:
                for token in tokens:
                    if token in owner:
                        raise SelectionError(
                            f"CONFORM: {own[owner[token]]!r} and {own[n]!r} share token {token} of the prompt; a word can be "
                            "in one group only, once."
                        )
                    owner[token] = n

    def plan(self, index: int, length: int) -> Plan:
        plan = super().plan(index, length)
        if any(at(when, length) == index for when in self.refine_at):
            # No loss is below this: the official code knows no threshold.
            return replace(plan, refine=self.refinements, target=-1.0)
        return plan

    def satisfied(self, maps: Maps, loss: Tensor) -> Tensor | None:
        """Samples without a pair, whose loss is 0 whatever the latent is, and those of `stop_loss`."""
        idle, rule = ~maps.memory["paired"], super().satisfied(maps, loss)
        return idle if rule is None else idle | rule

    def loss(self, maps: Maps) -> Tensor:
        rule = competing(self.compete, maps) if self.sharpness is not None else "all"
        A, _ = maps.words(self.phrases(), sharpness=self.sharpness, compete=rule, smooth=self.smooth)
        before = self._before(maps, A)
        each, losses, paired = maps.per_sample(self._each()), [], []
        for b, terms in enumerate(maps.terms(self.phrases())):
            of_phrase = [n for n, group in enumerate(each[b]) for _ in group]
            labels = [of_phrase[n] for n, _ in terms]
            vectors = A[b, : len(terms)].flatten(1)
            if before is not None:
                vectors, labels = torch.cat([vectors, before[b, : len(terms)].flatten(1)]), labels * 2
            same = torch.tensor([[x == y for y in labels] for x in labels], device=A.device)
            paired.append(bool(same.sum() > len(labels)) and not bool(same.all()))
            # Without a pair nothing is to be moved; the graph must be there all the same.
            losses.append(contrast(vectors, same, self.temperature, self.form) if paired[-1] else 0.0 * vectors.sum())
        maps.memory["paired"] = torch.tensor(paired, device=A.device)
        return torch.stack(losses)

    def _before(self, maps: Maps, A: Tensor) -> Tensor | None:
        """The maps [B, T, h, w] of the step before: those of the last pass of an earlier call. Remembers those of now."""
        index, last = maps.memory.get("last", (maps.index, None))
        if index != maps.index and (self.anchor is None or index == self.anchor):
            maps.memory["before"] = last
        maps.memory["last"] = maps.index, A.detach()
        return maps.memory.get("before")


def contrast(vectors: Tensor, same: Tensor, temperature: float, form: str) -> Tensor:
    """The loss of one sample.

    Args:
        vectors: [T, N]. same: bool [T, T], whether two of them are of one group.
    """
    s = F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).T
    pairs = same & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    if form == "contrastive":
        return _mean_of_positive(torch.relu(1.0 - s[pairs])) + _mean_of_positive(torch.relu(s[~same]))
    s = s / temperature
    others = torch.logsumexp(s.masked_fill(same, -torch.inf), dim=1, keepdim=True)
    return (torch.logaddexp(s, others) - s)[pairs].mean()


def _mean_of_positive(values: Tensor) -> Tensor:
    return values.sum() / (values > 0).sum().clamp_min(1)
