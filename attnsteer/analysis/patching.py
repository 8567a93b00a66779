"""What another prompt's head outputs do to an answer: all of it, and what reaches the logits without passing another head.

Lieberum et al., "Does Circuit Analysis Interpretability Scale?" (2023, arXiv 2307.09458): its text could not be read; total and
direct effects are the usual ones of activation patching, the names here ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing import capture
from ..errors import SelectionError, UnsupportedHost, brief
from ..methods.patchheads import PatchHeads
from ..parameters import whole
from ..search.gradients import as_list
from ..search.state import model_digest
from ..steering import steer
from ..versions import library_versions
from ..where import Where
from .projections import HeadWeights, Norm, Readout, evaluating, head_weights, module_of
from .table import Column, HeadTable

Pair = tuple[int, int]
NORMS = ("frozen", "live")
# How far the read-out that was found may be from the model's own logits, in parts of the largest one.
CLOSE = 1e-3


@dataclass(frozen=True)
class Swap:
    """A prompt, the prompt whose head outputs are put in, and the answer that is looked at.

    Args:
        prompt, donor: token ids. target: the id of the answer. foils: ids of the other answers, at least one.

    Raises:
        SelectionError: an empty prompt, no foil, or ids that are none.
    """

    prompt: Sequence[int]
    donor: Sequence[int]
    target: int
    foils: Sequence[int]

    def __post_init__(self) -> None:
        for name in ("prompt", "donor", "foils"):
            given = getattr(self, name)
            ids = tuple(whole(i) for i in given) if isinstance(given, Iterable) else ()
            if not ids or any(i is None or i < 0 for i in ids):
                raise SelectionError(f"Swap({name}={brief(getattr(self, name))}): give token ids, at least one.")
            object.__setattr__(self, name, ids)
        if whole(self.target) is None or self.target < 0 or self.target in self.foils:
            raise SelectionError(f"Swap(target={self.target!r}): give one token id that is none of the foils.")


@torch.no_grad()
def patch_effects(
    model: nn.Module,
    swaps: Iterable[Swap],
    *,
    where: Where | None = None,
    rows: str | None = "prompt_end",
    norm: str = "frozen",
    total: bool = True,
    batch: int = 32,
) -> HeadTable:
    """What each head alone changes of an answer when its output is that of another prompt, with a value for every sample.

    Readings, all in logits, of m = logit(target) - mean logit(foils) behind the prompt's last token:

    - patch_total: m with the head's output patched and everything behind it live, less m of the prompt.
    - patch_direct: of that, what goes from the head through the final norm to the logits and past no other head or block.
    - patch_indirect: the rest. restored: patch_total over (m of the donor less m of the prompt), pooled over samples; it may
      leave [0, 1].

    Args:
        model: a causal language model with an unembedding. swaps: the samples. where: the heads; None: the main stack's.
        rows: "prompt_end": the last token's output is patched; None: all tokens', of prompts as long as their donors.
        norm: "frozen": the final norm keeps the prompt's own scale, so that direct effects of heads add up; "live": it is taken
            anew for each head.
        total: measure patch_total, a forward for each head and batch; False: direct effects only, two forwards in all.
        batch: samples at once, of one length.

    Raises:
        SelectionError: no samples, an unknown option, or prompts of another length than their donors where all rows are patched.
        UnsupportedHost: output projections or the read-out cannot be found, or logits are no linear reading of the final norm
            (soft-capped or scaled), or branches are scaled before they join the residual.
    """
    swaps = as_list(swaps)
    wrong = [s for s in swaps if not isinstance(s, Swap)]
    if wrong or not swaps or whole(batch) is None or batch < 1:
        raise SelectionError(
            f"patch_effects: {brief(wrong[0]) if wrong else len(swaps)} samples; give Swap(...), one or more."
        )
    if norm not in NORMS or rows not in ("prompt_end", None):
        raise SelectionError(
            f'patch_effects(norm={norm!r}, rows={rows!r}): norm is one of {NORMS}, rows "prompt_end" or None.'
        )
    where = Where(kinds="self") if where is None else where
    if rows is None and any(len(s.prompt) != len(s.donor) for s in swaps):
        raise SelectionError("patch_effects(rows=None) patches all tokens: give donors as long as their prompts.")
    model = module_of(model)
    weights, readout = head_weights(model, where=where)
    known = 0 if readout is None else len(readout.embedding)
    far = [i for s in swaps for i in (*s.prompt, *s.donor, *s.foils, s.target) if known and i >= known]
    if far:
        raise SelectionError(f"patch_effects: token {far[0]} is none of the {known} of {type(model).__name__}.")
    if readout is None:
        raise UnsupportedHost(f"{type(model).__name__} has no unembedding; give the model with its language head.")
    multiplier = getattr(model.config.get_text_config(), "residual_multiplier", 1.0)
    if multiplier != 1.0:
        raise UnsupportedHost(
            f"{type(model).__name__} scales its branches by {multiplier} before they join the residual; what a head writes is then "
            "not its output through its projection. Use rows of `PatchHeads` and measure."
        )
    found = _Found(model, where, weights, readout, rows, norm)
    with evaluating(model):
        for group in _groups(swaps, batch):
            found.add(group, total)
    return found.table(len(swaps), total)


def _groups(swaps: list[Swap], size: int) -> Iterator[dict[int, Swap]]:
    """Samples of one length of prompt and donor, by their places."""
    lengths: dict[tuple[int, int], list[int]] = {}
    for i, s in enumerate(swaps):
        lengths.setdefault((len(s.prompt), len(s.donor)), []).append(i)
    for places in lengths.values():
        for start in range(0, len(places), size):
            yield {i: swaps[i] for i in places[start : start + size]}


class _Found:
    """Values by sample, collected batch by batch."""

    def __init__(
        self,
        model: nn.Module,
        where: Where,
        weights: dict[int, HeadWeights],
        readout: Readout,
        rows: str | None,
        norm: str,
    ):
        self.model, self.where, self.weights, self.readout = model, where, weights, readout
        self.rows, self.norm = rows, norm
        self.heads: tuple[Pair, ...] = ()
        self.values: dict[str, dict[int, Tensor]] = {n: {} for n in ("direct", "total", "plain", "donor")}

    def add(self, group: Mapping[int, Swap], total: bool) -> None:
        """One batch of samples."""
        device = next(self.model.parameters()).device
        ids = torch.tensor([s.prompt for s in group.values()], device=device)
        others = torch.tensor([s.donor for s in group.values()], device=device)
        donor, _, given, _ = self._run(others, self.rows)
        own, logits, _, scales = self._run(ids, "prompt_end")
        m = lambda x: self._metric(x, group)  # noqa: E731
        plain = m(logits)
        pairs, direct = self._direct(group, own, donor, logits, scales)
        totals = torch.zeros_like(direct)
        for column, (layer, head) in enumerate(pairs if total else ()):
            with steer(self.model, PatchHeads(donor, heads={layer: [head]}, rows=self.rows), control=True):
                totals[:, column] = m(self._last(ids)) - plain
        self.heads = pairs
        for i, place in enumerate(group):
            self.values["direct"][place], self.values["total"][place] = direct[i], totals[i]
            self.values["plain"][place], self.values["donor"][place] = plain[i], m(given)[i]

    def _last(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits[:, -1].double()

    def _run(self, ids: Tensor, rows: str | None) -> tuple[Any, Tensor, Tensor, dict[str, Tensor]]:
        """(head outputs at `rows`, last logits, the same, what each norm took at the last row)."""
        taken: dict[str, Tensor] = {}
        norms = [w.post for w in self.weights.values()] + [self.readout.norm]
        with contextlib.ExitStack() as hooks:
            for norm in norms:
                if norm is not None:
                    module = self.model.get_submodule(norm.name)
                    keep = lambda _, args, name=norm.name: taken.__setitem__(name, args[0][:, -1].double())  # noqa: E731
                    hooks.callback(module.register_forward_pre_hook(keep).remove)
            with capture(self.model, self.where, what="output", rows=rows) as seen:
                logits = self._last(ids)
        return seen, logits, logits, taken

    def _metric(self, logits: Tensor, group: Mapping[int, Swap]) -> Tensor:
        swaps = group.values()
        return torch.stack([x[s.target] - x[list(s.foils)].mean() for x, s in zip(logits, swaps, strict=True)])

    def _direct(
        self, group: Mapping[int, Swap], own: Any, donor: Any, logits: Tensor, taken: dict[str, Tensor]
    ) -> tuple[tuple[Pair, ...], Tensor]:
        """The heads, and patch_direct of each sample [b, heads]."""
        U, final, device = self.readout.unembedding.double(), self.readout.norm, logits.device
        residual = taken[final.name] if final is not None else None
        directions = torch.stack([U[:, s.target] - U[:, list(s.foils)].mean(dim=1) for s in group.values()]).to(device)
        read = None
        if final is not None:
            final = _double(final)
            read = final(residual)
            said, wanted = (read * directions).sum(dim=-1), self._metric(logits, group)
            if not torch.allclose(said, wanted, atol=CLOSE * float(logits.abs().max())):
                raise UnsupportedHost(
                    f"the logits of {type(self.model).__name__} are not its unembedding's reading of its final norm (they are "
                    "soft-capped, scaled or have a bias), so that direct effects are not linear in the heads."
                )
        pairs: list[Pair] = []
        columns: list[Tensor] = []
        for layer, w in self.weights.items():
            site = w.site.path
            for place, head in enumerate(own.of(site)[0].heads):
                change = torch.stack(
                    [
                        donor.get(site, "output", sample=b)[place, -1] - own.get(site, "output", sample=b)[place, -1]
                        for b in range(len(group))
                    ]
                ).to(device, torch.float64)
                written = change @ w.output[head].to(device, torch.float64)
                if w.post is not None:
                    post = _double(w.post)
                    written = post(written, post.scale(taken[w.post.name]))
                if final is not None and self.norm == "frozen":
                    written = final(written, final.scale(residual))
                elif final is not None:
                    written = final(residual + written) - read
                pairs.append((layer, head))
                columns.append((written * directions).sum(dim=-1))
        return tuple(pairs), torch.stack(columns, dim=1)

    def table(self, count: int, total: bool) -> HeadTable:
        """All samples."""
        stacked = {n: torch.stack([v[i].cpu() for i in range(count)]) for n, v in self.values.items()}
        direct, totals = stacked["direct"], stacked["total"]
        one = torch.ones_like(direct)
        columns = {
            "patch_direct": Column(direct, one, f"direct effect of the donor's output, logits, {self.norm} norm")
        }
        if total:
            room = (stacked["donor"] - stacked["plain"])[:, None].expand_as(totals)
            sign = -1.0 if float(room.sum()) < 0 else 1.0
            columns |= {
                "patch_total": Column(totals, one, "effect of the donor's output, logits"),
                "patch_indirect": Column(totals - direct, one, "what passes later heads and blocks, logits"),
                "restored": Column(sign * totals, sign * room, "share of the difference between donor and prompt"),
            }
        sites = [w.site for w in self.weights.values()]
        shape = (max(s.layer for s in sites) + 1, max(s.heads for s in sites))
        facts = {
            "search": "patch_effects",
            "model": model_digest(self.model),
            "samples": count,
            "rows": self.rows,
            "norm": self.norm,
            "plain": float(stacked["plain"].mean()),
            "donor": float(stacked["donor"].mean()),
            "versions": library_versions(),
        }
        return HeadTable(self.heads, shape, columns, facts)


def _double(norm: Norm) -> Norm:
    shift = None if norm.shift is None else norm.shift.double()
    return Norm(norm.name, norm.gain.double(), shift, norm.centred, norm.eps)
