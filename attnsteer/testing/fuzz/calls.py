"""The calls of a case: tokens, masks and positions, a list of steps, and running them on a model, steered or with the oracle."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .case import SQUARE, Case
from .hosts import GENERATE, HOSTS, WINDOW, model_of
from .layout import Layout, Roles, both_ways, read
from .oracle import Oracle, instead

GUIDANCE = 1.7


@dataclass(frozen=True)
class Call:
    """Slots `start` to `stop`.

    Attributes:
        second: of the tokens that stand there after the cache was cut back. kept: compared. frozen: they are scored, and move
            nothing. more: the outputs belong to those of the call before.
    """

    start: int
    stop: int
    second: bool = False
    kept: bool = True
    frozen: bool = False
    more: bool = False


@dataclass(frozen=True)
class Cut:
    """The cache is cut back to `length` slots."""

    length: int


class Reorder:
    """Batch rows change places, as beams do."""


@dataclass(frozen=True)
class Inputs:
    """What a case gives to a model.

    Attributes:
        case: with a seed of its own in each thread. prompt: slots of the prompt. layout: of all slots.
        ids: int [2, B, T], the second after a cut.
    """

    case: Case
    prompt: int
    layout: Layout
    ids: Tensor

    @staticmethod
    def of(case: Case) -> Inputs:
        """Those of a case: prompt, and generated tokens that go on with the last sequence of each row."""
        steps = case.cuts[0] if case.way in ("decode", "score", "reorder", "rewind", *GENERATE) else 0
        prompt = sum(map(abs, case.rows[0]))
        rows = tuple(
            (*row[:-1], row[-1] + steps) if row[-1] > 0 else (*row, *(steps,) * bool(steps)) for row in case.rows
        )
        layout = Layout(rows, case.packed and not _joined(case))
        g = torch.Generator().manual_seed(case.seed)
        # Lookup finds something where few words come again and again.
        words = (8, 12) if case.way == "lookup" else (8, 99)
        ids = torch.randint(*words, (2, len(rows), layout.length), generator=g)
        shared = {"crop": case.cuts[1:2], "rewind": (prompt + case.cuts[-1],)}.get(case.way, ())
        for upto in shared:
            ids[1, :, :upto] = ids[0, :, :upto]
        image = torch.tensor(HOSTS[case.host].image, dtype=torch.long)
        valid, index = layout.roles.valid, layout.roles.index
        for b in range(len(rows) if len(image) else 0):
            ids[:, b, valid[b] & (index[b] >= 2) & (index[b] < 2 + len(image))] = image
        return Inputs(case, prompt, layout, ids.masked_fill(~valid, 0))

    @cached_property
    def roles(self) -> Roles | None:
        """Of all slots; by the mask of rows and keys, where that is what the model is given.

        None: the mask leaves them open, or means nothing to the method.
        """
        truth = self.layout.roles
        if self.case.form not in SQUARE:
            return truth
        host = HOSTS[self.case.host]
        window = None if host.mixed else host.window
        seen, ends = self.square(window)[:, 0].clone(), [0] * self.layout.length
        for step in steps(self):
            if isinstance(step, Call):
                ends[step.start : step.stop] = [step.stop] * (step.stop - step.start)
                # What a window cache does not hand out, its mask does not speak of.
                seen[:, step.start : step.stop, : max(0, step.start - window + 1) if window else 0] = False
        told = read(seen, ends)
        if told is not None and self.case.method == "ACT" and both_ways(seen, told, ends):
            # Its means are defined on causal maps.
            return None
        # Padding that sees itself and everything before it is a token by the mask; else the mask must say how things are.
        return told if told is not None and (self.case.blind == "all" or told.agree(truth)) else None

    def square(self, window: int | None) -> Tensor:
        """bool [B, 1, T, T]."""
        return self.layout.mask(self.case.blind, self.case.parents, window)

    def given(self, call: Call, order: Tensor, oracle: bool) -> dict[str, Any]:
        """The arguments of one call."""
        case, host, at = self.case, HOSTS[self.case.host], slice(call.start, call.stop)
        given: dict[str, Any] = {"input_ids": self.ids[int(call.second), order, at]}
        if case.form != "none" or case.host == "gpt2":
            # Positions restart in each piece, also where the model sees one sequence.
            pieces = Layout(self.layout.rows, case.packed)
            given["position_ids"] = pieces.positions(case.parents)[order, at]
        if case.form == "2d":
            given["attention_mask"] = self.layout.roles.valid[order, : call.stop].long()
        elif case.form in SQUARE:
            given["attention_mask"] = self._square(at, oracle)
        if call.start == 0:
            given |= {name: t[order] for name, t in host.pixels(len(case.rows), case.seed).items()}
        if host.types == "image":
            given["token_type_ids"] = (given["input_ids"] == 3).long()
        elif host.types == "suffix":
            given["token_type_ids"] = (self.layout.roles.index[order, at] >= 4 + len(host.image)).long()
        return given

    def _square(self, at: slice, oracle: bool) -> Any:
        case, host = self.case, HOSTS[self.case.host]
        # Eager attention adds its mask, whatever it is.
        eager = model_of(case.host).config._attn_implementation == "eager" and not oracle
        cached = case.way != "whole"

        def form(window: int | None) -> Tensor:
            seen = self.square(window)[:, :, at, : at.stop]
            if window is not None and cached:
                # A window cache hands out its last slots.
                seen = seen[..., -(min(at.start, window - 1) + at.stop - at.start) :]
            return seen if case.form in ("bool", "tree") and not eager else self._floats(seen)

        if host.mixed:
            return {"full_attention": form(None), "sliding_attention": form(WINDOW)}
        return form(host.window)

    def _floats(self, seen: Tensor) -> Tensor:
        added = torch.zeros(seen.shape)
        if self.case.form == "bias":
            # By distance, so that it is the same for a cell in each call.
            row, key = torch.arange(seen.shape[2]) + seen.shape[3] - seen.shape[2], torch.arange(seen.shape[3])
            added = torch.sin((row[:, None] - key).double()).float().expand(seen.shape)
        return added.masked_fill(~seen, torch.finfo(torch.float32).min)


def _joined(case: Case) -> bool:
    """Whether the library lets sequences packed by positions see each other: wherever there is a cache, and in Falcon."""
    return case.form == "positions" and (case.way != "whole" or case.host.startswith("falcon"))


def steps(inputs: Inputs, straight: bool = False) -> list[Any]:
    """What is done, in order; `straight`: the same calls of what is kept in the end, without a cut."""
    case, n, end = inputs.case, inputs.prompt, inputs.layout.length
    if case.way in ("whole", "chunks"):
        edges = [0, *(case.cuts if case.way == "chunks" else ()), n]
        return [Call(a, b) for a, b in itertools.pairwise(edges)]
    if case.way == "crop":
        cut, to, back = case.cuts
        again = [Call(a, b, second=True) for a, b in ((to, n - back), (n - back, n)) if a < b]
        again = again if to < n - back else [Call(to, n, second=True)]
        if straight:
            edges = [0, *([cut] if cut < to else []), to]
            return [*(Call(a, b, second=True, kept=False) for a, b in itertools.pairwise(edges)), *again]
        return [Call(0, cut, kept=False), Call(cut, n, kept=False), Cut(to), *again]
    if case.way == "rewind":
        to = n + case.cuts[1]
        first = [Call(0, n), *(Call(t, t + 1, kept=t < to) for t in range(n, to if straight else end))]
        return [*first, *([] if straight else [Cut(to)]), *(Call(t, t + 1, second=True) for t in range(to, end))]
    if case.way == "score":
        if not straight:
            return [Call(0, n), Call(n, end, frozen=True)]
        return [Call(0, n), *(Call(t, t + 1, frozen=True, more=t > n) for t in range(n, end))]
    again = [Reorder()] if case.way == "reorder" else []
    return [Call(0, n), *(step for t in range(n, end) for step in (*again, Call(t, t + 1)))]


def run(inputs: Inputs, done: list[Any], oracle: Oracle | None = None, steered: Any = None) -> list[Tensor]:
    """The logits of the calls that are kept, [B, n, V] each.

    Args:
        done: steps. steered: the steering, which is told where a prompt comes in pieces, and where tokens are scored.
    """
    case, model = inputs.case, model_of(inputs.case.host)
    order, cache, out = torch.arange(len(case.rows)), None, []
    if any(isinstance(step, Cut) for step in done) and HOSTS[case.host].window:
        cache = _recording(model)
    pieces = case.way in ("chunks", "crop") and steered is not None
    with steered.chunked_prefill(tokens=inputs.prompt) if pieces else contextlib.nullcontext():
        for step in done:
            if isinstance(step, Reorder):
                moved = torch.arange(len(order)).roll(1)
                cache.reorder_cache(moved)
                order = order[moved]
                if oracle is not None:
                    oracle.state = {name: t[moved] if len(t) == len(moved) else t for name, t in oracle.state.items()}
            elif isinstance(step, Cut):
                cache.crop(step.length - cache.get_seq_length())
            else:
                if oracle is not None:
                    roles = inputs.roles
                    oracle.roles = Roles(roles.valid[order, : step.stop], roles.request[order, : step.stop])
                    oracle.past, oracle.prompt, oracle.sample, oracle.frozen = (
                        step.start,
                        inputs.prompt,
                        order,
                        step.frozen,
                    )
                given = inputs.given(step, order, oracle is not None)
                given |= {"use_cache": False} if case.way == "whole" else {"past_key_values": cache, "use_cache": True}
                with steered.freeze() if step.frozen and steered is not None else contextlib.nullcontext():
                    found = model(**given)
                cache = found.past_key_values if case.way != "whole" else None
                if step.more:
                    out[-1] = torch.cat([out[-1], found.logits], dim=1)
                elif step.kept:
                    out.append(found.logits)
    return out


def valid(inputs: Inputs, done: list[Any]) -> list[Tensor]:
    """bool [B, n] for each of the logits of `run`: rows whose values mean something."""
    order, out = torch.arange(len(inputs.case.rows)), []
    for step in done:
        if isinstance(step, Reorder):
            order = order.roll(1)
        elif isinstance(step, Call) and step.kept:
            out.append(inputs.layout.roles.valid[order, step.start : step.stop])
    return out


def _recording(model: nn.Module) -> Any:
    """A cache whose windows can be cut back."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


@dataclass(frozen=True)
class Generated:
    """What `generate` gave: tokens int [B, steps], and the scores [B, V] from which each was taken."""

    tokens: Tensor
    scores: list[Tensor]


def generate(inputs: Inputs) -> Generated:
    """By the way of the case."""
    case, n, rows = inputs.case, inputs.prompt, len(inputs.case.rows)
    given = {**inputs.given(Call(0, n), torch.arange(rows), oracle=False)}
    given.pop("position_ids", None)
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    options: dict[str, Any] = {
        "beams": {"num_beams": 3},
        "guided": {"guidance_scale": GUIDANCE, "negative_prompt_ids": negative(inputs)},
        "lookup": {"prompt_lookup_num_tokens": 2},
        "assisted": {"assistant_model": model_of(case.host, assistant=True)},
        "uncached": {"use_cache": False},
        "static": {"cache_implementation": "static"},
    }[case.way]
    out = model_of(case.host).generate(
        **given, **options, max_new_tokens=case.cuts[0], do_sample=False, output_scores=True, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    scores = out.scores if case.way == "guided" else out.logits
    if case.way == "beams":
        scores = [s[out.beam_indices[:, t]] for t, s in enumerate(scores)]
    return Generated(out.sequences[:, n:], list(scores))


def negative(inputs: Inputs) -> Tensor:
    """int [B, n]: the prompt of the other stream of guidance."""
    g = torch.Generator().manual_seed(inputs.case.seed + 1)
    return torch.randint(8, 99, (len(inputs.case.rows), 7), generator=g)


def expected(inputs: Inputs, found: Generated | None) -> list[Tensor]:
    """What the oracle computes for the calls of a case, or for the tokens that were generated."""
    if found is None:
        return _by_oracle(inputs, steps(inputs, straight=True))
    last = lambda outs: [out[:, -1] for out in outs]  # noqa: E731
    follow = replace(inputs, ids=torch.cat([inputs.ids[..., : inputs.prompt], found.tokens.expand(2, -1, -1)], dim=-1))
    own = last(_by_oracle(follow, _stepwise(follow)))
    if inputs.case.way != "guided":
        return own
    prompt = negative(inputs)
    ids = torch.cat([prompt, found.tokens], dim=-1)
    case = replace(inputs.case, form="none", rows=((prompt.shape[1],),) * len(prompt))
    beside = Inputs(case, prompt.shape[1], Layout(((ids.shape[1],),) * len(ids)), ids.expand(2, -1, -1))
    other = last(_by_oracle(beside, _stepwise(beside)))
    scores = []
    for cond, uncond in zip(own, other, strict=True):
        cond, uncond = cond.log_softmax(dim=-1), uncond.log_softmax(dim=-1)
        scores.append(GUIDANCE * (cond - uncond) + uncond)
    return scores


def _stepwise(inputs: Inputs) -> list[Call]:
    """The prompt, and one call for each token but the last."""
    n = inputs.prompt
    return [Call(0, n), *(Call(t, t + 1) for t in range(n, inputs.layout.length - 1))]


def _by_oracle(inputs: Inputs, done: list[Any]) -> list[Tensor]:
    oracle = Oracle(inputs.case)
    with instead(model_of(inputs.case.host), oracle):
        return run(inputs, done, oracle)


def both(case: Case) -> Iterator[Inputs]:
    """The inputs of each thread; one where there is one."""
    for seed in (case.seed, case.seed + 1000) if case.threads else (case.seed,):
        yield Inputs.of(replace(case, seed=seed))
