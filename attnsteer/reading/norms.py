"""Maps by size of what is moved: norms of what each token adds to a row, through the feed-forward block on request.

Kobayashi et al., "Attention is Not Only a Weight" (EMNLP 2020, arXiv 2004.10102): the norm of P_ij v_j W_O in place of P_ij.
Kobayashi et al., "Analyzing Feed-Forward Blocks in Transformers through the Lens of Attention Maps" (ICLR 2024, arXiv
2302.00456; abstract and summaries read, not the code): row i as a sum over tokens j of vectors F_ij, carried through the residual,
the normalisation (with the statistics of the whole row, so that it is linear) and the feed-forward block (integrated
gradients). Formulas here, with y = x + attention:

    attention     F_ij = sum_h P_ij^h v_j^h W_O^h
    residual      F_ij + [i = j] x_i
    feed_forward  integral over t in [0, 1] of J(c + t s) N(residual_ij), s = sum_j N(residual_ij), c what no token brings
    block         residual + feed_forward

N is the norm in front of the feed-forward block with its scale frozen, J the block's Jacobian; c (biases, the norm's shift) stays
on along the path. The sum over j of each is exact up to the quadrature: of feed_forward, f(c + s) - f(c). Gated blocks need
nothing of their own. Pre-norm blocks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.projections import HeadWeights, Norm, evaluating, head_weights, norm_before
from ..call import AttnCall
from ..captured import checked_rows, map_rows, places
from ..errors import SelectionError, UnsupportedHost, brief, did_you_mean
from ..intervention import Intervention
from ..parameters import whole
from ..steering import steer
from ..where import Where
from ._rows import needs_of_rows, rows_of
from .chains import Relevance

SCOPES = ("heads", "attention", "residual", "feed_forward", "block")
# Numbers of vectors that are held at once.
TILE = 1 << 24
# Of what a block is found to be made of, against its output.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class NormMap:
    """Norms by row and token of one layer: `relevance.tensor` [B, r, m]; of the scope "heads" `heads` [B, H, r, m]."""

    layer: int
    scope: str
    relevance: Relevance
    heads: Tensor | None = None

    def of(self, sample: int = 0) -> Tensor:
        """[rows, tokens] of one sample, without padding; of the scope "heads" [H, rows, tokens]."""
        if self.heads is None:
            return self.relevance.of(sample)
        self.relevance.of(sample)
        r = self.relevance
        return self.heads[sample][:, r.rows[sample] >= 0][..., r.keys[sample] >= 0]


@dataclass(frozen=True)
class _Vectors(Intervention):
    """Keeps the chosen rows of each map, and the values; edits nothing."""

    rows: Any = None
    tokenizer: Any = field(default=None, compare=False, repr=False)
    asks: tuple[str, ...] = ()
    found: dict[int, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    observes = True
    whole_heads = True
    kinds = ("self",)
    needs = property(lambda self: self.asks)

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Take what the norms are made of."""
        B, _, n, m = call.map.shape
        if n != m:
            raise UnsupportedHost(
                f"norm_maps: {call.site.path} has {n} rows and {m} keys; give a whole sequence, without a cache."
            )
        at, there = places(rows_of(call, self.rows, self.tokenizer))
        if call.site.layer in self.found:
            raise SelectionError(f"norm_maps: two calls of layer {call.site.layer}; select one stack with where=.")
        self.found[call.site.layer] = {
            "map": map_rows(call, at) * there[:, None, :, None],
            "values": call.values.detach(),
            "at": torch.where(there, at, -1),
            "rows": torch.where(there, call.rows.index.expand(B, n).gather(1, at), -1),
            "keys": torch.where(call.keys.valid, call.keys.index, -1).expand(B, m),
            "residual": call.residual.detach(),
        }


@torch.no_grad()
def norm_maps(
    model: nn.Module,
    inputs: Mapping[str, Any],
    scope: str = "attention",
    *,
    layers: Sequence[int] | None = None,
    rows: Any = None,
    nodes: int = 16,
    tokenizer: Any = None,
) -> dict[int, NormMap]:
    """Norms of what each token adds to a row, by layer, from one forward.

    Vectors [rows, tokens, width] are built in blocks of rows and reduced at once; the map is kept of the chosen rows alone. The
    scopes behind "attention" take `nodes` Jacobian products of the feed-forward block for each row and token.

    Args:
        model: a language model of transformers whose heads' weights can be read (see `head_weights`). inputs: of its forward.
        scope: "heads": each head alone; "attention": all of them together; "residual": and what the row itself was;
            "feed_forward": what the feed-forward block makes of it; "block": both.
        layers: which; None: all. rows: as of `capture`; None: all. nodes: of the quadrature (Gauss-Legendre), 1 or more.
        tokenizer: for rows that are strings.

    Raises:
        SelectionError: no such scope, layer or row.
        UnsupportedHost: weights that cannot be read, or a block that is no pre-norm one.
    """
    if scope not in SCOPES:
        raise SelectionError(f"norm_maps(scope={scope!r}): one of {SCOPES}.{did_you_mean(str(scope), SCOPES)}")
    if whole(nodes) is None or nodes < 1:
        raise SelectionError(f"norm_maps(nodes={brief(nodes)}): give a number of nodes, 1 or more.")
    where = Where(kinds="self") if layers is None else Where(layers=list(layers), kinds="self")
    weights, _ = head_weights(model, where=Where(kinds="self"))
    asks = tuple(sorted({*needs_of_rows(model, rows), "residual"}))
    probe = _Vectors(checked_rows(rows), tokenizer, asks, where=where)
    passed = _Passed(model if scope in ("feed_forward", "block") else None)
    with evaluating(model), passed, steer(model, probe):
        model(**inputs)
    found = {}
    for layer, seen in sorted(probe.found.items()):
        w = weights[layer]
        if scope == "heads":
            sizes = torch.einsum("bhmd,hdD->bhmD", seen["values"].float(), w.output).norm(dim=-1)
            heads = (seen["map"] * sizes[:, :, None]).cpu()
            found[layer] = NormMap(layer, scope, _relevance(seen, heads.sum(dim=1), layer), heads)
            continue
        block = passed.block(layer, seen["residual"], w) if passed.model is not None else None
        sizes = torch.zeros(seen["map"].shape[0], *seen["map"].shape[2:], device=seen["map"].device)
        for b in range(len(sizes)):
            for r in range(sizes.shape[1]):
                i = int(seen["at"][b, r])
                if i >= 0:
                    sizes[b, r] = _row(scope, w, seen, block, b, r, i, nodes).norm(dim=-1)
        found[layer] = NormMap(layer, scope, _relevance(seen, sizes, layer))
    return found


def _relevance(seen: Mapping[str, Tensor], sizes: Tensor, layer: int) -> Relevance:
    rows, keys = seen["rows"].cpu(), seen["keys"].cpu()
    valid = (rows >= 0)[..., None] & (keys >= 0)[:, None]
    return Relevance(sizes.cpu() * valid, rows, keys, (layer,))


def _row(
    scope: str, w: HeadWeights, seen: Mapping[str, Tensor], block: _Block | None, b: int, r: int, i: int, nodes: int
) -> Tensor:
    """F_ij of one row, [m, D]."""
    A, v = seen["map"][b, :, r].float(), seen["values"][b].float()
    parts = torch.einsum("hm,hmd->mhd", A, v).flatten(1) @ w.output.flatten(0, 1)
    if w.post is not None:
        # A norm behind the heads, frozen at what they and the bias wrote.
        written = parts.sum(dim=0)
        parts = w.post(parts, w.post.scale(written))
    if scope == "attention":
        return parts
    residual = parts.clone()
    residual[i] += seen["residual"][b, i].float()
    if scope == "residual":
        return residual
    carried = block.carried(b, i, residual, nodes)
    return carried if scope == "feed_forward" else residual + carried


@dataclass
class _Block:
    """y -> y + f(N(y)) of one layer, with the rows y that were seen [B, n, D]."""

    rows: Tensor
    norm: Norm
    f: nn.Module

    def carried(self, b: int, i: int, parts: Tensor, nodes: int) -> Tensor:
        """What f makes of each part of row i, [m, D]; summed, f of the row minus f of what no part brings."""
        y = self.rows[b, i].float()
        own = self.norm(parts, self.norm.scale(y))
        total = own.sum(dim=0)
        rest = self.norm(y) - total
        x, weight = gauss(nodes)
        out = torch.zeros_like(own)
        dtype = next(self.f.parameters()).dtype
        for start in range(0, len(own), max(1, TILE // max(own.shape[1], 1))):
            piece = own[start : start + max(1, TILE // max(own.shape[1], 1))]
            for t, share in zip(x, weight, strict=True):
                at = (rest + t * total).to(dtype).repeat(len(piece), 1)
                _, change = torch.func.jvp(_plain(self.f), (at,), (piece.to(dtype),))
                out[start : start + len(piece)] += share * change.float()
        return out


def _plain(f: nn.Module) -> Any:
    def run(x: Tensor) -> Tensor:
        out = f(x[None])
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(x.shape)

    return run


def gauss(nodes: int) -> tuple[list[float], list[float]]:
    """Gauss-Legendre nodes and weights on [0, 1] (Golub, Welsch): eigenvalues of the Jacobi matrix."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    beta = k / (4 * k.pow(2) - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return ((values + 1) / 2).tolist(), vectors[0].pow(2).tolist()


class _Passed:
    """Inputs and outputs of the modules of one forward, to find what stands behind attention."""

    def __init__(self, model: nn.Module | None):
        self.model = model
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.hooks: list[Any] = []

    def __enter__(self) -> _Passed:
        for name, module in self.model.named_modules() if self.model is not None else ():
            self.hooks.append(module.register_forward_hook(self._took(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _took(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) and output else output
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor) and args[0].shape == out.shape:
                self.seen[name] = (args[0].detach(), out.detach())

        return hook

    def block(self, layer: int, residual: Tensor, w: HeadWeights) -> _Block:
        """The feed-forward part of the block of a site.

        Raises:
            UnsupportedHost: the block is not y + f(norm(y)).
        """
        path = w.site.path.split(".")
        for cut in range(len(path) - 1, 0, -1):
            name = ".".join(path[:cut])
            if name not in self.seen or not torch.equal(self.seen[name][0], residual):
                continue
            after = self.seen[name][1]
            for inner, (entered, left) in self.seen.items():
                module = self.model.get_submodule(inner)
                if not inner.startswith(f"{name}.") or w.site.path.startswith(inner) or not any(module.children()):
                    continue
                # What the block ends with is a sum of this module's output and what stood before its norm.
                y = after - left
                norms = {n: own for n, own in self.seen.items() if n.startswith(f"{name}.") and close(own[0], y, after)}
                norm = norm_before(self.model, entered, norms)
                if norm is not None:
                    return _Block(norms[norm.name][0], norm, module)
        raise UnsupportedHost(
            f"norm_maps: the block of {w.site.path} is not found to be y + f(norm(y)), so what its feed-forward part makes of each "
            'token is not defined here (post-norm and parallel blocks). scope="attention" and "residual" need no such part.'
        )


def close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Whether two tensors are one up to rounding of a sum."""
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * scale.abs().max())
