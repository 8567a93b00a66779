"""`maps`: functions of heads read from parameters alone.

Elhelo, Geva, "Inferring Functionality of Attention Heads from their Parameters" (ACL 2025, arXiv 2412.11965), MAPS; official code
amitelhelo/MAPS at 5f4799d (src/maps.py): M = E W_V W_O U, without norms and biases; a relation's score is the share of its pairs
(s, t) with t among the k largest of e_s M, its suppression score the same of -M. From layer 1 on, e_s is what the first MLP
makes of the embedding, MLP_0(LN2_0(e_s)), alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.projections import HeadWeights, Readout, evaluating, head_weights
from ..errors import SelectionError, UnsupportedHost, brief
from ..heads import HeadSet
from ..parameters import whole
from ..steering import find_host
from ..versions import library_versions
from ..where import Where, stack_shape
from .scored import table
from .state import digest, model_digest

# The official scripts: 10, or 25 for the Llama 3 family; a head has a function from 15 % on; 30 pairs or more.
TOP, THRESHOLD = 10, 0.15


@torch.no_grad()
def maps(
    model: nn.Module,
    pairs: Sequence[tuple[Any, Any]],
    *,
    tokenizer: Any = None,
    top: int = TOP,
    suppress: bool = False,
    first_mlp: bool | Callable[[Tensor], Tensor] = True,
    where: Where | None = None,
) -> HeadSet:
    """Score heads by a relation between tokens that their value and output weights carry out; no input is needed.

    Args:
        model: a language model.
        pairs: (source, target), token ids; or words, with `tokenizer`: each with a space before it, pairs of which one is more than
            one token are left out.
        top: k, how many of the largest entries count as a hit; 1 for copying in the official scripts.
        suppress: score -M: heads that write the target away.
        first_mlp: embeddings go through the first MLP for layers from 1 on; False: the raw ones everywhere (the official code for
            Llama-3.1-70B); or a function of embeddings [N, D], where the model's first block has no `mlp` behind one norm.
        where: the sites; None: the main stack's self-attention.

    Returns:
        All heads, scores 0 to 1 (the paper calls a function what reaches 0.15); pairs used are in the provenance.

    Raises:
        SelectionError: no pair left. UnsupportedHost: no unembedding, or weights that are not found.
    """
    weights, readout = head_weights(model, where=Where(kinds="self") if where is None else where)
    if readout is None:
        raise UnsupportedHost(
            f"{type(model).__name__} has no unembedding or no embedding, so its heads map no tokens to tokens. Give the model "
            "with its language head."
        )
    vocabulary = readout.unembedding.shape[1]
    kept = _single(pairs, tokenizer, vocabulary)
    if not 1 <= top <= vocabulary:
        raise SelectionError(f"top={top}: give 1 to {vocabulary}, the size of the vocabulary.")
    source, target = torch.tensor(kept, device=readout.unembedding.device).T
    raw = readout.embedding[source]
    later = _after_first_mlp(model, readout, weights, first_mlp)(raw)
    scores = {}
    for layer, w in weights.items():
        e = raw if layer == 0 else later
        for head in range(w.site.heads):
            projected = ((e @ w.value[w.kv(head)]) @ w.output[head]) @ readout.unembedding
            projected = -projected if suppress else projected
            hit = (projected.topk(top, dim=-1).indices == target[:, None]).any(dim=-1)
            scores[layer, head] = float(hit.float().mean())
    shape = stack_shape(next(iter(weights.values())).site, [w.site for w in weights.values()])
    provenance = {
        "search": "maps",
        "arxiv": "2412.11965",
        "model": model_digest(model),
        "pairs": len(kept),
        "given": len(pairs),
        "pairs_digest": digest(kept),
        "top": top,
        "suppress": suppress,
        "first_mlp": first_mlp if isinstance(first_mlp, bool) else "given",
        "metric": "relation",
        "gains": {"relation": table(shape, scores)},
        "versions": library_versions(),
    }
    return HeadSet(list(scores), scores=scores, shape=shape, provenance=provenance)


def salient_tokens(
    weights: Mapping[int, HeadWeights], readout: Readout, layer: int, head: int, tokens: int = 10, targets: int = 5
) -> list[tuple[int, list[int]]]:
    """The tokens that a head amplifies most, |e W_V W_O| / |e|, each with the tokens that it maps them to (MAPS, section 5)."""
    w, e = weights[layer], readout.embedding
    written = (e @ w.value[w.kv(head)]) @ w.output[head]
    strongest = (written.norm(dim=-1) / e.norm(dim=-1).clamp_min(1e-30)).topk(min(tokens, len(e))).indices
    mapped = (written[strongest] @ readout.unembedding).topk(targets, dim=-1).indices
    return list(zip(strongest.tolist(), mapped.tolist(), strict=True))


def _single(pairs: Sequence[tuple[Any, Any]], tokenizer: Any, vocabulary: int) -> list[list[int]]:
    def of(item: Any) -> list[int]:
        if not isinstance(item, str):
            if whole(item) is None:
                raise SelectionError(
                    f"maps got {brief(item)} for a token; give pairs (source, target) of ids or words."
                )
            return [whole(item)]
        if tokenizer is None:
            raise SelectionError(f"maps got the word {item!r}; give the tokenizer= too.")
        ids = tokenizer(f" {item}", add_special_tokens=False)["input_ids"]
        return [i for i in ids if i != getattr(tokenizer, "unk_token_id", None)]

    if any(isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 for pair in pairs):
        raise SelectionError(f"maps(pairs={brief(pairs)}): give pairs (source, target) of ids or words.")
    tokens = [(of(s), of(t)) for s, t in pairs]
    kept = [[s[0], t[0]] for s, t in tokens if len(s) == len(t) == 1]
    wrong = [i for pair in kept for i in pair if not 0 <= i < vocabulary]
    if wrong or not kept:
        raise SelectionError(
            f"maps: of {len(pairs)} pairs {len(kept)} have one token on either side, tokens outside of the vocabulary: "
            f"{wrong[:3]}. Give pairs of single tokens."
        )
    return kept


def _after_first_mlp(
    model: nn.Module, readout: Readout, weights: Mapping[int, HeadWeights], first_mlp: Any
) -> Callable[[Tensor], Tensor]:
    if callable(first_mlp):
        return first_mlp
    if not first_mlp:
        return lambda e: e
    path = weights[0].site.path if 0 in weights else find_host(model).sites()[0].path
    block = model.get_submodule(path.rpartition(".")[0])
    mlp = getattr(block, "mlp", None)
    # What is before the MLP: of one block with two norms the second, with one (parallel blocks) that one.
    norms = [
        getattr(block, n)
        for n in ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
        if hasattr(block, n)
    ]
    norms = norms or [getattr(block, n) for n in ("input_layernorm", "ln_1", "ln_attn") if hasattr(block, n)]
    if mlp is None or not norms:
        raise UnsupportedHost(
            f"{type(block).__name__} has no mlp behind a norm of a known name; give first_mlp= as a function of embeddings [N, D], "
            "or False for the raw embeddings."
        )
    dtype = next(block.parameters()).dtype

    def apply(e: Tensor) -> Tensor:
        with evaluating(model):
            made = mlp(norms[0](e.to(dtype)[None]))
        return (made[0] if isinstance(made, tuple) else made).float()[0]

    return apply
