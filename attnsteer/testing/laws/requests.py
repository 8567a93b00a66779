"""Every row knows its request: packed sequences, ways of decoding, caches that are cut, copied and reordered."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import torch
from torch import Tensor

from ...errors import AttnSteerError
from ..cases import NotApplicable
from .bench import Bench, attached, shared_target
from .compare import EXACT, Broken, close, gap, require
from .decoding import other_tokens

# Two sequences of this many tokens; no window of the hosts is shorter, so one mask serves all layers.
SHORT = 5
NEW = 4
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def _need_decoder(bench: Bench) -> None:
    if not bench.host.decoder:
        raise NotApplicable("no KV cache")
    bench.need_action()


def _need_text(bench: Bench) -> None:
    _need_decoder(bench)
    if bench.host.images:
        raise NotApplicable("prompts with images are not cut or packed here; tests/hosts/transformers does it")


def packed(bench: Bench) -> None:
    """Two sequences in one row are each the sequence alone: by positions, and by masks with padding around and between them."""
    _need_text(bench)
    bench.need_prefill()
    target, ids = bench.target, bench.inputs(2)["input_ids"][:, :SHORT]
    made = bench.make(1)
    for before, between, after in ((0, 0, 0), (2, 1, 0), (0, 1, 2)):
        request = torch.tensor([-1] * before + [0] * SHORT + [-1] * between + [1] * SHORT + [-1] * after)
        line = torch.zeros(1, len(request), dtype=torch.long)
        line[0, request == 0], line[0, request == 1] = ids[0], ids[1]
        position = torch.zeros_like(line)
        position[0, request >= 0] = torch.arange(SHORT).repeat(2)
        slot = torch.arange(len(request))
        seen = (request[:, None] == request) & (slot <= slot[:, None]) & (request >= 0) & (request >= 0)[:, None]
        floats = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        forms: dict[str, dict[str, Any]] = {"a float mask": {"attention_mask": floats[None, None]}}
        if target.config._attn_implementation != "eager":
            forms["a bool mask"] = {"attention_mask": seen[None, None]}
        if not before + between + after:
            forms["positions that restart"] = {}
        for form, mask in forms.items():
            given = {"input_ids": line, "position_ids": position, "use_cache": False, **mask}
            _each_is_alone(bench, made, given, request, ids, form)


def _each_is_alone(bench: Bench, made: Any, given: dict[str, Any], request: Tensor, ids: Tensor, form: str) -> None:
    target = bench.target
    alone = lambda b: target(input_ids=ids[b : b + 1], use_cache=False).logits[0]  # noqa: E731
    together = target(**given).logits[0]
    apart = all(gap(together[request == b], alone(b)) <= EXACT for b in (0, 1))
    with attached(target, made):
        try:
            together = target(**given).logits[0]
        except AttnSteerError:
            if apart:
                raise
            # The model itself lets them see each other, and that is said.
            return
        require(
            apart, f"the model does not keep sequences apart that are packed by {form}; steering it must be refused"
        )
        for b in (0, 1):
            close(
                together[request == b], alone(b), EXACT, f"sequence {b} of 2, packed by {form}, and the sequence alone"
            )


def ways(bench: Bench) -> None:
    """Greedy decoding, prompt lookup, another model as assistant, and no cache make the same tokens with the same logits."""
    target = bench.target
    encoded = bool(getattr(getattr(target, "config", None), "is_encoder_decoder", False))
    if encoded:
        bench.need_action()
    else:
        _need_text(bench)
    if bench.last_row_only:
        raise NotApplicable("it edits the last row of each call, and ways of decoding differ in what a call is")
    inputs = bench.inputs(1)
    if not encoded:
        # Repeats itself, so that lookup finds candidates.
        ids = inputs["input_ids"]
        prompt = torch.cat([ids, ids[:, :6]], dim=1)
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    others = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "an assistant": {"assistant_model": shared_target(bench.host, 1)},
        "no cache": {"use_cache": False},
        "a static cache": {"cache_implementation": "static"},
    }
    plain, plainly = target.generate(**inputs, **OPTIONS), {}
    for name, options in others.items():
        try:
            plainly[name] = _same_logits(target.generate(**inputs, **OPTIONS, **options), plain)
        except (ValueError, RuntimeError, AttributeError, TypeError):
            # The library has no such decoding for this model.
            plainly[name] = False
    with attached(target, bench.make(1)):
        greedy = target.generate(**inputs, **OPTIONS)
        for name, options in others.items():
            if plainly[name]:
                far = _difference(target.generate(**inputs, **OPTIONS, **options), greedy)
                if not far <= EXACT:
                    raise Broken(f"logits of greedy decoding and with {name}", far, EXACT)


def _difference(a: Any, b: Any) -> float:
    if not torch.equal(a.sequences, b.sequences):
        return float("inf")
    return max(gap(x, y) for x, y in zip(a.logits, b.logits, strict=True))


def continuous(bench: Bench) -> None:
    """Requests of several lengths in one batch of continuous batching each get what `generate` gives them alone."""
    _need_text(bench)
    target = bench.target
    if not hasattr(target, "generate_batch"):
        raise NotApplicable("the library has no continuous batching for this model")
    ids = bench.inputs(3)["input_ids"]
    length = ids.shape[1]
    prompts = [ids[0].tolist(), ids[1, : length - 2].tolist(), torch.cat([ids[2], ids[0, 1:5]]).tolist()]
    made = bench.make(1)

    def alone(*methods: Any) -> list[Any]:
        found = []
        with attached(target, *methods) if methods else contextlib.nullcontext():
            for prompt in prompts:
                given = torch.tensor([prompt])
                found.append(target.generate(given, attention_mask=torch.ones_like(given), **OPTIONS))
        return found

    plain = _batch(target, prompts)
    if plain is None or any(_differs(r, out, p) is not None for r, out, p in zip(plain, alone(), prompts, strict=True)):
        raise NotApplicable("the library has no continuous batching for this model")
    try:
        with attached(target, named={"it": made}):
            found = _batch(target, prompts, steer="it")
    except AttnSteerError:
        # Refused by name is as good as exact.
        return
    require(found is not None, "continuous batching ended without an answer")
    for i, (result, out, prompt) in enumerate(zip(found, alone(made), prompts, strict=True)):
        far = _differs(result, out, prompt)
        if far is not None:
            raise Broken(f"request {i} of 3 in one batch and alone, log-probabilities", far, EXACT)


def _batch(target: Any, prompts: list[list[int]], **given: Any) -> list[Any] | None:
    """The results of `generate_batch`; None where the library fails on this model."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    sampling = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=128, return_logprobs=True)
    try:
        found = list(
            target.generate_batch(
                prompts, generation_config=sampling, continuous_batching_config=batching, **given
            ).values()
        )
    except AttnSteerError:
        raise
    except Exception:
        return None
    return found if len(found) == len(prompts) and all(r.error is None for r in found) else None


def _differs(result: Any, out: Any, prompt: list[int]) -> float | None:
    """How far the log-probabilities of a request are from those of `generate`, if more than rounding; ties may fall either way."""
    tokens = out.sequences[0, len(prompt) :].tolist()
    for step, (token, known) in enumerate(zip(result.generated_tokens, result.logprobs, strict=True)):
        own = out.logits[step][0].log_softmax(-1)
        far = max(abs(float(own[token]) - known), float(own.max() - own[token]))
        if not far <= EXACT:
            return far
        if token != tokens[step]:
            return None
    return None if len(result.generated_tokens) == NEW else float("inf")


def _same_logits(a: Any, b: Any) -> bool:
    return _difference(a, b) <= EXACT


def guided(bench: Bench) -> None:
    """`generate(guidance_scale=...)` is two loops by hand, each with its own prompt, with a cache and without one."""
    _need_text(bench)
    if bench.last_row_only:
        raise NotApplicable("it edits the last row of each call, and ways of decoding differ in what a call is")
    target, ids = bench.target, bench.inputs(2)["input_ids"]
    prompt, negative, s = ids[:1], ids[1:, :7], 1.7
    options = {**OPTIONS, "output_scores": True, "guidance_scale": s, "negative_prompt_ids": negative}
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    with attached(target, bench.make(1)):
        cached = target.generate(**inputs, **options)
        uncached = target.generate(**inputs, **options, use_cache=False)
        outs = [target(input_ids=t, use_cache=True) for t in (prompt, negative)]
        for step in range(NEW):
            cond, uncond = (o.logits[:, -1].log_softmax(-1) for o in outs)
            for name, got in (("with a cache", cached), ("without a cache", uncached)):
                close(
                    got.scores[step],
                    s * (cond - uncond) + uncond,
                    3 * EXACT,
                    f"guided scores of step {step}, {name}, and by hand",
                )
            token = cached.sequences[:, prompt.shape[1] + step, None]
            outs = [target(input_ids=token, past_key_values=o.past_key_values, use_cache=True) for o in outs]


def crop(bench: Bench) -> None:
    """A cache that is cut back is a copy made there: at the end of an earlier call, among generated tokens; or it is refused."""
    _need_text(bench)
    target, ids = bench.target, bench.inputs(2)["input_ids"]
    more, made = other_tokens(ids, 0), bench.make(2)
    call = lambda tokens, cache: target(input_ids=tokens, past_key_values=cache, use_cache=True)  # noqa: E731
    with attached(target, made):
        cache = call(ids[:, :8], None).past_key_values
        copies = [copy.deepcopy(cache)]
        for t in (8, 9):
            call(ids[:, t : t + 1], cache)
            copies.append(copy.deepcopy(cache))
        call(more[:, :3], cache)
        # Behind the first call, and behind each of the generated tokens.
        for length, kept in zip((10, 9, 8), reversed(copies), strict=True):
            for name, tokens in (("one token", more[:, 4:5]), ("another turn", more[:, 5:9])):
                short = copy.deepcopy(cache)
                try:
                    short.crop(length - short.get_seq_length())
                except (RuntimeError, ValueError) as error:
                    raise NotApplicable("the library cannot cut the cache of this model back") from error
                try:
                    found = call(tokens, short).logits
                except AttnSteerError:
                    require(_refused(call, tokens, short), f"a cut to {length} tokens was refused once and then ran")
                    continue
                expected = call(tokens, copy.deepcopy(kept)).logits
                close(found, expected, EXACT, f"{name} behind a cut to {length} tokens and behind a copy made there")


def _refused(call: Any, tokens: Tensor, cache: Any) -> bool:
    try:
        call(tokens, cache)
    except AttnSteerError:
        return True
    return False


def moved_caches(bench: Bench) -> None:
    """Copies, saved copies, reordered, repeated and selected caches go on as the samples they hold."""
    _need_decoder(bench)
    target, inputs = bench.target, bench.inputs(3, "full")
    token = other_tokens(inputs["input_ids"][:, :1], 0)
    order = torch.tensor([2, 0, 1])

    def step(cache: Any, rows: Tensor) -> Tensor:
        mask = torch.ones(len(rows), inputs["attention_mask"].shape[1] + 1, dtype=torch.long)
        position = torch.full((len(rows), 1), mask.shape[1] - 1)
        return target(input_ids=token[rows], attention_mask=mask, position_ids=position, past_key_values=cache).logits

    every = torch.arange(3)
    with attached(target, bench.make(3)):
        cache = target(**inputs, use_cache=True).past_key_values
        expected = step(copy.deepcopy(cache), every)
        held = io.BytesIO()
        torch.save(cache, held)
        held.seek(0)
        saved = torch.load(held, weights_only=False)
        for name, start in (("a copy", copy.deepcopy(cache)), ("a saved copy", saved)):
            start.reorder_cache(order)
            # What the user says of each sample (spans) is the same for all of them here.
            close(step(start, order), expected[order], EXACT, f"{name} whose batch rows were reordered")
