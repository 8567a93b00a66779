"""Order in time: causality, the cache, beams, and `generate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cases import NotApplicable
from .bench import Bench, attached, one_sample
from .compare import EXACT, close, moved, require, same, valid_rows
from .decoding import STEPS, decode, for_generate, other_tokens, score, with_continuation


def causal(bench: Bench) -> None:
    """A later token moves no earlier logit; for look-ahead methods: a scored continuation moves none."""
    if not bench.host.decoder:
        raise NotApplicable("no causal decoder")
    bench.need_action()
    made, target, host = bench.make(2), bench.target, bench.host
    inputs = bench.inputs(2)
    ids = inputs["input_ids"]
    n = ids.shape[1]
    if not made.looks_ahead:
        changed = {**inputs, "input_ids": other_tokens(ids, n - 2)}
        equal = _same_as(target, bench.plain(2)[:, : n - 2], host.run(target, changed)[:, : n - 2])
        if "residual" in made.needs:
            # Key sets found in hidden states: a later member is masked away, but changes the size of the gathered products.
            equal = _nearly
        with attached(target, made):
            first, second = host.run(target, inputs), host.run(target, changed)
        equal(first[:, : n - 2], second[:, : n - 2], f"logits before token {n - 2}, with that token and another one")
        moved(first[:, n - 2 :], second[:, n - 2 :], "logits behind a token that was changed")
    extra = ids[:, -5:]
    with attached(target, made) as run:
        first = score(target, run, inputs, extra)
        others = []
        for t in (1, 4):
            other = extra.clone()
            other[:, t:] = other_tokens(other, t)[:, t:]
            others.append((n + t, other, score(target, run, inputs, other)))
    plain = score(target, None, inputs, extra)
    for upto, other, second in others:
        equal = _same_as(target, plain[:, :upto], score(target, None, inputs, other)[:, :upto])
        equal(
            first[:, :upto],
            second[:, :upto],
            f"logits before token {upto} of a scored continuation that differs from there",
        )
        moved(first, second, "logits of a continuation that was changed")


def _nearly(a: Tensor, b: Tensor, what: str) -> None:
    close(a, b, EXACT, what)


def _same_as(target: nn.Module, plain: Tensor, changed: Tensor) -> Any:
    """Bit-equality, where the unsteered model has it: experts that batch tokens together round by their company.

    With such experts two unsteered outputs may still be equal by luck, so that proves nothing about the steered ones.
    """
    experts = any("experts" in name for name, _ in target.named_modules())
    if torch.equal(plain, changed) and not experts:
        return same
    close(plain, changed, EXACT, "earlier logits of the unsteered model")
    return _nearly


def cache(bench: Bench) -> None:
    """Decoding over a cache, whole or chunked prefill, equals one forward over all tokens.

    A look-ahead method's statistics stop at the prompt, so for it, and for a method that edits the last row of each
    call, a chunked prefill must equal the chunked prefill by the explicit map, and decoding must be repeatable.
    """
    if not bench.host.decoder:
        raise NotApplicable("no KV cache")
    bench.need_action()
    made, target = bench.make(3), bench.target
    inputs = bench.inputs(3, "left" if "left" in bench.host.padded else None, 8)
    with attached(target, made) as run:
        whole = decode(target, inputs)
        chunked = decode(target, inputs, (4, 1) if made.looks_ahead else (4, 3), steps=0, run=run)
    prompt = valid_rows(inputs, chunked)
    if made.looks_ahead or bench.last_row_only:
        with attached(target, made, reference=True) as run:
            slow = decode(target, inputs, (4, 1) if made.looks_ahead else (4, 3), steps=0, run=run)
        close(chunked, slow, EXACT, "a prefill in three chunks and the same by the explicit map", prompt)
    else:
        close(chunked, whole[:, : chunked.shape[1]], EXACT, "a prefill in three chunks and one call", prompt)
    if not bench.call_bound:
        longer = with_continuation(inputs, STEPS)
        with attached(target, made):
            once = bench.host.run(target, longer)
        close(whole, once, EXACT, "decoding over the cache and one call over all tokens", valid_rows(longer, once))
    with attached(target, made):
        same(decode(target, inputs), whole, "the same decoding a second time")


def beams(bench: Bench) -> None:
    """Beam search reorders state with the cache: same sequences and scores as with the explicit map."""
    if not bench.host.decoder:
        raise NotApplicable("no KV cache")
    bench.need_action()
    target, made = bench.target, bench.make(2)
    inputs = for_generate(bench.inputs(2, "left" if "left" in bench.host.padded else None, 4))
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "output_scores": True}

    def search(**more: Any) -> Any:
        # Looked up in each call: a steered model has a `generate` of its own.
        return target.generate(**inputs, **options, return_dict_in_generate=True, **more)

    with attached(target, made):
        fast = search()
    with attached(target, made, reference=True):
        slow = search()
    require(torch.equal(fast.sequences, slow.sequences), "beam search found other sequences than by the explicit map")
    close(fast.sequences_scores, slow.sequences_scores, EXACT, "scores of the beams and by the explicit map")
    if not bench.call_bound:
        with attached(target, made):
            again = search(use_cache=False)
        require(torch.equal(again.sequences, fast.sequences), "beam search without a cache found other sequences")


def generate(bench: Bench) -> None:
    """`generate` on one prompt without a mask is the same beside left padding, over a static cache, and by chunks.

    Chunks are left out for look-ahead methods, for those that edit the last row of each call, and for prompts with images,
    which cannot be cut.
    """
    if not bench.host.decoder:
        raise NotApplicable("no KV cache")
    bench.need_action()
    target, both = bench.target, bench.inputs(2, "left" if "left" in bench.host.padded else None, 6)
    alone = for_generate(one_sample(both, 1, 2))
    alone.pop("attention_mask", None)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def logits(row: int, inputs: dict[str, Any], batch: int, **more: Any) -> Tensor:
        with attached(target, bench.make(batch)):
            out = target.generate(**inputs, **options, **more)
        return torch.stack(out.logits, dim=1)[row]

    expected = logits(0, alone, 1)
    require(len(expected) == 4, f"generate made {len(expected)} tokens instead of 4")
    with attached(target, bench.make(1)):
        first = bench.host.run(target, alone)[0, -1]
    close(expected[0], first, EXACT, "the first logits of generate and those of a forward")
    close(logits(1, for_generate(both), 2), expected, EXACT, "generate in a left-padded batch and alone")
    close(
        logits(0, alone, 1, cache_implementation="static"),
        expected,
        EXACT,
        "generate over a static and a growing cache",
    )
    if not (bench.make(1).looks_ahead or bench.last_row_only or "pixel_values" in alone):
        more = logits(0, alone, 1, prefill_chunk_size=5)
        close(more, expected, EXACT, "generate with the prompt in chunks and in one call")
