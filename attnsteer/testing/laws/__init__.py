"""The laws: what must hold for every method on every host. Public, so that a plugin runs them on its own method.

`LAWS` lists them, one family a file. A law is a function of a `Bench`; it returns, or raises `Broken` with the
difference, or `NotApplicable` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import acting, around_the_model, batches, exactness, requests, selection, sequences, together
from .bench import Bench


@dataclass(frozen=True)
class Law:
    """One law: its name, what it says, the usual cause where it does not hold, and the function that checks it."""

    name: str
    says: str
    usual_cause: str
    holds: Callable[[Bench], None]


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law(
            "effect",
            "at full strength the output changes",
            "`acting` builds a method that is too weak, or that selects keys or rows which these short prompts (12 tokens) do "
            "not have",
            acting.effect,
        ),
        Law(
            "identity",
            "strength zero changes nothing, bit for bit",
            "the door computes with the neutral value, which rounds; return None where the strength changes nothing",
            acting.identity,
        ),
        Law(
            "fires",
            "every selected site reports its calls, and an attachment that never acts is an error",
            "the selection is open at other phases, steps or branches than those that ran",
            acting.fires,
        ),
        Law(
            "memory",
            "a method that has run before acts as a new one",
            "something is kept on the method, its class or its module from one sequence to the next; keep it in `call.state`",
            acting.memory,
        ),
        Law(
            "reference",
            "the fast identities give what the explicit map gives",
            "key sets of one Reweight overlap, or a weight of the wrong shape was broadcast over the wrong axis ([B, H, n] is "
            "expected)",
            exactness.reference,
        ),
        Law(
            "dtype",
            "in bf16 the edit stays close to the explicit map's",
            "a statistic was computed in the model's dtype; compute it in float32 and cast the result",
            exactness.dtype,
        ),
        Law(
            "backends",
            "eager and SDPA give the same steered output",
            "the method reads what one backend only hands out; ask `call.map`",
            exactness.backends,
        ),
        Law(
            "local",
            "heads and sites that are not selected compute what they computed before",
            "a tensor of the call was changed in place; return a new one",
            selection.local,
        ),
        Law(
            "rows",
            "Where(rows=...) leaves the other rows as they were",
            "a tensor of the call was changed in place; return a new one",
            selection.rows,
        ),
        Law(
            "batch",
            "a sample in a batch is the sample alone",
            "a statistic was taken over all samples, or the first sample's value was used for all; keep the batch axis. Just above "
            "the tolerance: a statistic that loses digits, such as a difference of large numbers",
            batches.batch,
        ),
        Law(
            "per_row",
            "with one value of a parameter per sample, each sample is the sample alone with its own",
            "a strength was used as a number; write call.each(self.strength), which is a number or [B, 1, 1], and "
            "is_all(self.strength, 1.0) to ask whether it is neutral",
            batches.per_row,
        ),
        Law(
            "padding",
            "a row in a padded batch is the row alone",
            "a slot number was used where a position was meant (use call.key_index()), or padding was counted in a statistic "
            "(use call.row_valid and call.key_valid)",
            batches.padding,
        ),
        Law(
            "mask",
            "a call without an attention mask is the call with a mask of ones",
            "the method reads validity from something that only calls with a mask have",
            batches.mask,
        ),
        Law(
            "causal",
            "a later token moves no earlier logit; for look-ahead methods, a scored continuation moves none",
            "a statistic runs over all rows of the call; use rows up to each row's own, or declare `looks_ahead = True` and "
            "keep the statistic in `call.state` while `call.frozen` or in decoding",
            sequences.causal,
        ),
        Law(
            "cache",
            "decoding over a cache, and a prefill in chunks, equals one call over all tokens",
            "a row or key was numbered within the call; use call.row_position and call.key_index(), and call.map.keys_seen() for "
            "how many keys a row sees. If the prompt is treated "
            "otherwise than generated tokens by definition, say `MethodCase(prompt_bound=True)`",
            sequences.cache,
        ),
        Law(
            "beams",
            "beam search finds the same sequences and scores as with the explicit map, and without a cache",
            "state is not a tensor in `call.state` with the batch first, so it does not follow the beams",
            sequences.beams,
        ),
        Law(
            "generate",
            "generate gives the same alone without a mask, beside left padding, over a static cache, and by chunks",
            "unused slots of a static cache or padding were counted as keys; use call.key_valid and call.key_index()",
            sequences.generate,
        ),
        Law(
            "undo",
            "after the context, and after an exception, the target is as if never steered",
            "the method changed the model or one of its modules; a method edits the tensors of its call only",
            around_the_model.undo,
        ),
        Law(
            "dispatch",
            "accelerate's hooks before or after steering change nothing",
            "the method holds a module's forward, which the hooks replace",
            around_the_model.dispatch,
        ),
        Law(
            "round_trip",
            "save, load, same output",
            "a hyper-parameter is no dataclass field, or `__post_init__` changes it; keep fields as they were given",
            around_the_model.round_trip,
        ),
        Law(
            "threads",
            "two threads with two models do not see each other",
            "something is kept on the method, its class or its module; keep it in `call.state`",
            around_the_model.threads,
        ),
        Law(
            "packed",
            "two sequences packed into one row are each the sequence alone, and a model that cannot keep them apart is refused",
            "a token was counted from the start of its batch row; use call.key_index(), call.rows.index and call.rows.request",
            requests.packed,
        ),
        Law(
            "ways",
            "greedy decoding, prompt lookup, an assistant, a static cache and no cache make the same tokens with the same logits",
            "what is prompt was taken from call.phase, which speaks of the call; ask call.rows.generated of each row",
            requests.ways,
        ),
        Law(
            "continuous",
            "requests that share a batch of continuous batching each get what generate gives them alone",
            "a statistic runs over the rows of the call, which are of several requests; take those of each by call.rows.request, "
            "and say `row_local = True` only where no row depends on another",
            requests.continuous,
        ),
        Law(
            "guided",
            "generate(guidance_scale=...) is two loops by hand, each with its own prompt",
            "the state of one stream is used for the other; keep it in `call.state`",
            requests.guided,
        ),
        Law(
            "crop",
            "a cache that is cut back is a copy made there, or it is refused",
            "a state tensor is longer than the cache and still used; cut it to call.past, or declare `follows_crop = False`",
            requests.crop,
        ),
        Law(
            "moved_caches",
            "copied, saved and reordered caches go on as the samples they hold",
            "state is not a tensor in `call.state` with the batch first, or cannot be pickled",
            requests.moved_caches,
        ),
        Law(
            "shared_model",
            "eight threads, and tasks with a pool of threads, on one steered model get what each gets alone",
            "something is kept on the method, its class or its module; keep it in `call.state`",
            together.shared_model,
        ),
        Law(
            "interrupted",
            "a call that is broken off anywhere never happened",
            "a tensor in `call.state` was changed in place; put a new one there",
            together.interrupted,
        ),
        Law(
            "checkpointed",
            "gradients with checkpointing are those without, re-entrant or not",
            "a door computes something else when it is run again, because it keeps what it saw the first time",
            together.checkpointed,
        ),
        Law(
            "inner",
            "the model below the head, and its forward called directly, compute what they compute inside the whole model",
            "the method reads what only the outer model is given",
            together.inner,
        ),
        Law(
            "beside",
            "two steerings on different sites of one model act as one of both, and leave in any order",
            "the method changed the model or one of its modules; a method edits the tensors of its call only",
            together.beside,
        ),
        Law(
            "compile",
            "a compiled model acts as the uncompiled one",
            "the door has Python control flow on tensor values, or side effects; use torch.where",
            around_the_model.compiled,
        ),
    )
}
