"""`head_pursuit`: the words that a head's outputs are made of, and the heads that write a concept.

Basile et al., "Head Pursuit: Probing Attention Specialization in Multimodal Transformers" (NeurIPS 2025, arXiv 2510.21518): greedy
sparse coding (SOMP) of a head's residual contributions over unembedding rows; heads are ranked by the share of variance that the
rows of a concept's tokens explain, and rescaled: -1 inhibits, 5 enhances. Its own code (lorenzobasile/HeadPursuit) was not readable
here. Centred rows, a normalised dictionary and the share of variance are those of the pursuit that its first two authors published
before (Flegyas/ResiDual at 004b0aa, src/residual/sparse_decomposition.py, `SOMP`, and its callers); the text says neither, so both
are options. Which tokens of a word of several count is ours (the first, with and without a space before it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.projections import HeadWeights, evaluating, head_weights, unembedding_of
from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost
from ..heads import HeadSet
from ..intervention import Intervention
from ..methods.headgate import HeadGate
from ..steering import steer
from ..versions import library_versions
from ..where import Where, stack_shape
from .scored import table
from .state import digest, model_digest

Pair = tuple[int, int]
# The paper's number of atoms, and its factors.
ATOMS, INVERT, ENHANCE = 50, -1.0, 5.0


@dataclass(frozen=True)
class Pursuit:
    """Sparse coding of rows over a dictionary.

    Attributes:
        atoms: the chosen dictionary rows, in order. explained: share of variance explained by the first 1, 2, ... of them, 0 to 1.
    """

    atoms: tuple[int, ...]
    explained: tuple[float, ...]


def somp(
    rows: Tensor, dictionary: Tensor, atoms: int = ATOMS, *, centre: bool = True, normalise: bool = True
) -> Pursuit:
    """Simultaneous orthogonal matching pursuit (Tropp et al. 2006, as in the paper): the atoms that explain all rows together.

    p = argmax_j sum_rows |<atom_j, residual>|; all coefficients are fitted anew by least squares.

    Args:
        rows: [N, D]. dictionary: [v, D]. atoms: at most; fewer where the dictionary or the residual is used up.
        centre: subtract the rows' mean first. normalise: atoms are chosen by their direction.
    """
    H = rows.double()
    H = H - H.mean(dim=0) if centre else H
    total = float(H.pow(2).sum())
    if total == 0 or not len(dictionary):
        return Pursuit((), ())
    D = dictionary.double()
    norms = D.norm(dim=1)
    chosen, explained, basis, residual = [], [], H.new_zeros(0, H.shape[1]), H
    for _ in range(min(atoms, *dictionary.shape)):
        score = (D @ residual.T).abs().sum(dim=1)
        score = score / norms.clamp_min(1e-30) if normalise else score
        score[chosen] = -1.0
        score[norms == 0] = -1.0
        best = int(score.argmax())
        # The part of the new atom that the others do not span: least squares over all of them, one direction at a time.
        new = D[best] - (D[best] @ basis.T) @ basis
        new = new - (new @ basis.T) @ basis
        size = float(new.norm())
        if float(score[best]) <= 0 or size <= 1e-9 * float(norms[best]):
            break
        new = new / size
        chosen.append(best)
        basis = torch.cat([basis, new[None]])
        residual = residual - torch.outer(residual @ new, new)
        explained.append(1.0 - float(residual.pow(2).sum()) / total)
        if explained[-1] > 1 - 1e-12:
            break
    return Pursuit(tuple(chosen), tuple(explained))


@dataclass(frozen=True)
class _Means(Intervention):
    """Keeps each head's output, averaged over the tokens of each prompt (or its images, or the last one), [B, H, dv]."""

    rows: str = "prompt"
    found: dict[int, list[Tensor]] = field(default_factory=dict, compare=False, repr=False)

    observes = True
    needs = property(lambda self: ("tokens", "images") if self.rows == "image" else ("tokens",))

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Average the rows."""
        if self.rows == "image":
            chosen = call.at_rows(call.image_tokens())
        elif self.rows == "last":
            chosen = call.prompt_end
        else:
            chosen = call.rows.prompt
        weight = chosen.expand(len(out), -1).to(torch.float32)
        total = weight.sum(dim=1)
        if bool((total == 0).any()):
            raise SelectionError(f'rows="{self.rows}": a sample has no such token at {call.site.path}.')
        mean = torch.einsum("bn,bhnd->bhd", weight, out.float()) / total[:, None, None]
        self.found.setdefault(call.site.layer, []).append(mean.cpu())


@torch.no_grad()
def head_outputs(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], rows: str = "prompt", where: Where | None = None
) -> dict[int, Tensor]:
    """Mean head outputs by layer, [N, H, dv], before the output projection.

    Args:
        batches: keyword arguments of the model. rows: "prompt" (all of its tokens), "image" or "last".
    """
    if rows not in ("prompt", "image", "last"):
        raise SelectionError(f"rows={rows!r} is one of 'prompt', 'image', 'last'.")
    probe = _Means(rows, where=Where(kinds="self") if where is None else where)
    with evaluating(model), steer(model, probe, control=True):
        for inputs in batches:
            model(**inputs)
    if not probe.found:
        raise SelectionError("there are no inputs; give one batch of prompts or more.")
    return {layer: torch.cat(parts) for layer, parts in probe.found.items()}


def head_pursuit(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    concept: Sequence[int] | Sequence[str],
    *,
    tokenizer: Any = None,
    atoms: int = ATOMS,
    rows: str = "prompt",
    centre: bool = True,
    normalise: bool = True,
    words: int = 0,
    where: Where | None = None,
) -> HeadSet:
    """Rank heads by how much of the variance of what they write the unembedding rows of a concept explain.

    Args:
        model: a language model, or a vision-language one; weights are read without its final norm, as in the paper.
        batches: keyword arguments of the model, one sample a row; other ones than those of the evaluation. Two samples or more.
        concept: token ids; or words, with `tokenizer`: of each, with and without a space before it, the first token.
        atoms: T; capped at the size of the concept, beyond which the ranking would be by rank, not by fit.
        rows: which outputs are averaged: "prompt" (all tokens of the prompt), "image" (its image tokens) or "last".
        centre, normalise: of `somp`; as in the authors' code before, not stated in the paper.
        words: also explain each head over the whole vocabulary with so many atoms; in the provenance as "words".
        where: the sites; None: the main stack's self-attention.

    Returns:
        All heads, scores 0 to 1. `inverted(found.top(8))` and `enhanced(...)` are the paper's interventions.

    Raises:
        SelectionError: an empty concept, a token that does not exist, fewer than two samples.
        UnsupportedHost: a model without unembedding, or whose output projection is not found.
    """
    unembedding = unembedding_of(model)
    tokens = concept_tokens(concept, tokenizer, len(unembedding))
    outputs = head_outputs(model, batches, rows, where)
    samples = len(next(iter(outputs.values())))
    if samples < 2:
        raise SelectionError(f"head_pursuit got {samples} sample; variance over samples needs two or more.")
    weights = _weights(model, outputs, where)
    dictionary = unembedding[tokens].cpu().double()
    full = unembedding.cpu().double() if words else None
    scores: dict[Pair, float] = {}
    found_words: dict[str, list[Any]] = {}
    for layer, means in outputs.items():
        W_O = weights[layer].output.cpu().double()
        for head in range(means.shape[1]):
            # What the head writes into the residual; its own norm behind it is frozen where there is one, and left out here.
            written = means[:, head].double() @ W_O[head]
            written = written if weights[layer].post is None else written * weights[layer].post.gain.cpu().double()
            fit = somp(written, dictionary, atoms, centre=centre, normalise=normalise)
            scores[layer, head] = fit.explained[-1] if fit.explained else 0.0
            if words:
                own = somp(written, full, words, centre=centre, normalise=normalise)
                found_words[f"{layer}.{head}"] = [tokenizer.decode([a]) if tokenizer else a for a in own.atoms]
    site = next(iter(weights.values())).site
    provenance = {
        "search": "head_pursuit",
        "arxiv": "2510.21518",
        "model": model_digest(model),
        "concept": tokens,
        "concept_digest": digest(tokens),
        "samples": samples,
        "atoms": min(atoms, len(tokens)),
        "rows": rows,
        "centre": centre,
        "normalise": normalise,
        "metric": "explained",
        "versions": library_versions(),
    }
    shape = stack_shape(site, [w.site for w in weights.values()])
    provenance["gains"] = {"explained": table(shape, scores)}
    if words:
        provenance["words"] = found_words
    return HeadSet(list(scores), scores=scores, shape=shape, provenance=provenance)


def inverted(heads: HeadSet, factor: float = INVERT) -> HeadGate:
    """The paper's inhibition: the heads' contributions with the other sign (not removed)."""
    return HeadGate(dict.fromkeys(heads, factor))


def enhanced(heads: HeadSet, factor: float = ENHANCE) -> HeadGate:
    """The paper's enhancement: the heads' contributions five times (swept from 2 to 8)."""
    return HeadGate(dict.fromkeys(heads, factor))


def concept_tokens(concept: Sequence[Any], tokenizer: Any, vocabulary: int) -> list[int]:
    """Token ids of a concept.

    Raises:
        SelectionError: none, words without a tokenizer, or an id outside of the vocabulary.
    """
    if isinstance(concept, str) or not len(concept):
        raise SelectionError(f"the concept is {concept!r}; give a list of words or of token ids.")
    found: list[int] = []
    for item in concept:
        if isinstance(item, str):
            if tokenizer is None:
                raise SelectionError(f"the concept has the word {item!r}; give the tokenizer= too.")
            unknown = getattr(tokenizer, "unk_token_id", None)
            for text in (item, f" {item}"):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                found += [i for i in ids[:1] if i != unknown]
        else:
            found.append(int(item))
    wrong = [i for i in found if not 0 <= i < vocabulary]
    if wrong or not found:
        raise SelectionError(
            f"the concept {list(concept)[:5]} has tokens {wrong or 'of none'}; the vocabulary has 0 to {vocabulary - 1}."
        )
    return sorted(set(found))


def _weights(model: nn.Module, outputs: Mapping[int, Tensor], where: Where | None) -> dict[int, HeadWeights]:
    weights, _ = head_weights(model, where=Where(kinds="self") if where is None else where)
    wrong = [n for n in outputs if n not in weights or weights[n].output.shape[0] != outputs[n].shape[1]]
    if wrong:
        raise UnsupportedHost(f"layers {wrong} have no output projection that was found by a forward of one token.")
    return weights
