"""One group of heads of a site in one call: the doors of its methods, in order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import kernels
from .account import Samples
from .attention_map import FEW_ROWS, AttentionMap, DenseMap
from .audit import SMALL, Flag, Mark, mark_of, unchanged
from .bound import Bound, Heads
from .call import AttnCall
from .edits import BlockBias, Check, HeadOutputs, KeyBias, MergedTokens, Reweight, Share, check_state
from .errors import CompositionError, SelectionError, UnsupportedHost
from .forms import WholeForms
from .kernels import Attention
from .shared_rows import levels, together
from .tokens import Tokens

if TYPE_CHECKING:
    from .engine import SiteRuntime


_WEIGHTS = frozenset({"weights"})
# Rows of a call that are computed exactly beside an approximation, where its error is measured.
SAMPLED = 64


class SiteAttention:
    """The site's own attention, computed once, by the model's kernel or by the same kernel with its lse."""

    def __init__(self, att: Attention, base: Callable[[], Tensor], same_kernel: Callable[[], bool] | None):
        self.att = att
        self._base = base
        self._same_kernel = same_kernel
        self._pair: tuple[Tensor, Tensor] | None = None
        self._out: Tensor | None = None

    def out(self) -> Tensor:
        """[B, H, n, dv]."""
        if self._out is None:
            self._out = self._base()
        return self._out

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """(out, lse) from one call of the kernel that the model itself would use; None where that gives no lse, or rows are few."""
        if self._pair is None:
            few = self.att.shape[2] <= FEW_ROWS
            if few or self._same_kernel is None or not self._same_kernel():
                return None
            self._pair = kernels.attend_lse(self.att)
            if self._out is None:
                self._out = self._pair[0]
        return self._pair

    def part(self, kv: slice) -> Tensor | None:
        """[B, h, n, dv] of the query heads of some key heads, bit for bit as in `out`; None where `out` is there, or which
        kernel the model itself would use is not known."""
        if self._out is not None or self._same_kernel is None or not self._same_kernel():
            return None
        return kernels.attend(self.att.key_slice(kv))


class HeadGroup:
    """The four inside doors of the methods of one group of heads in one call, in order."""

    def __init__(
        self,
        runtime: SiteRuntime,
        whole: SiteAttention,
        group: Heads | None,
        offset: int,
        call: AttnCall,
        marks: dict[int, Mark],
        forms: WholeForms | None = None,
    ):
        size = whole.att.q.shape[1]
        local = local_heads(group, offset, size)
        pick = (lambda t: t) if local is None else (lambda t: t.index_select(1, runtime.index(local, t.device)))
        self.runtime, self.whole, self.local, self.marks, self.forms = runtime, whole, local, marks, forms
        self.pool = functools.partial(runtime.pool, group, size)
        # The door that was asked last, whether for the first time; and the maps that first edits made.
        self.asked: tuple[str, bool] = ("", False)
        self.fresh: list[tuple[Bound, str, AttentionMap]] = []
        # What merged tokens, their groups, and the map before.
        self.groups: tuple[Bound, Tensor, AttentionMap] | None = None
        # What computed the outputs in the place of attention.
        self.instead: Bound | None = None
        own = tuple(range(size)) if local is None else local
        self.heads = own if offset == 0 else tuple(h + offset for h in own)
        self.base = call.replace(heads=self.heads, branch=runtime.run.branch)
        self._pick, self._map = pick, None
        self.size = (whole.att.q.shape[0], len(own), *whole.att.shape[2:])
        if runtime.run.reference and not runtime.site.linear:
            self._map = DenseMap.of(whole.att.select(local), pick(whole.out()))

    @property
    def map(self) -> AttentionMap:
        """The map with the edits so far; made when somebody asks."""
        if self._map is None:
            whole, local, pick = self.whole, self.local, self._pick

            def fused() -> tuple[Tensor, Tensor] | None:
                pair = whole.pair()
                return None if pair is None else (pick(pair[0]), pick(pair[1]))

            selected = whole.att if local is None else lambda: whole.att.select(local)
            base = lambda: pick(whole.out())  # noqa: E731
            part = whole.part if local is None else None
            self._map = AttentionMap(selected, base, fused, whole=whole.att, heads=self.size[1], local=local, part=part)
        return self._map

    @map.setter
    def map(self, made: AttentionMap) -> None:
        self._map = made

    def run(self, bounds: list[Bound], maps: list[tuple[Heads | None, Tensor]] | None) -> Tensor | None:
        """The heads' edited output, or None where no method edits, or all heads take the edit together."""
        if self.forms is not None and len(bounds) == 1 and bounds[0].doors == _WEIGHTS:
            edit = self.ask(bounds[0], "weights", gather=False)
            if edit is None or self.together(bounds[0], edit):
                return None
            plain = self.map
            plain.att  # noqa: B018
            self.reweight(bounds[0], edit)
        else:
            plain = self.map
            for door in ("inputs", "bias"):
                for bound in bounds:
                    if door in bound.doors:
                        self._check_groups(bound, door)
                        getattr(self, door)(bound)
            weighing = [bound for bound in bounds if "weights" in bound.doors]
            if weighing:
                self._check_groups(weighing[0], "weights")
            if self.runtime.rows is None:
                for bound in weighing:
                    self.weights(bound)
            else:
                for apart in levels(weighing, self.runtime.rows):
                    self.weights_apart(apart)
        first = self.instead if self.groups is None else self.groups[0]
        if first is not None and maps is not None:
            raise UnsupportedHost(
                f"{self.runtime.site.path}: {first.name} has no map of all tokens to hand out as attention weights; call the model "
                "without output_attentions, on SDPA."
            )
        if self.groups is not None:
            self.unmerged(self.map.out)
        out = None if self.map is plain else self.map.out
        # Detached: nothing of a look may be kept for a gradient, since a checkpoint that computes it again does not look.
        if self.fresh and not bool(out.detach().isfinite().all()):
            self.check_result(plain)
        if maps is not None and self.map is not plain:
            maps.append((self.local, self.map.dense()))
        for bound in bounds:
            if "output" in bound.doors:
                out = self.output(bound, out)
        if self.runtime.run.measure and out is not None:
            self.measure_error(bounds, plain, out)
        return out

    def _check_groups(self, bound: Bound, door: str) -> None:
        """Raise where a method would meet groups in place of the tokens of its call, or no attention at all."""
        first = self.instead if self.groups is None else self.groups[0]
        if first is None or bound is first:
            return
        what = "computes outputs in the place of attention" if self.groups is None else "merges tokens"
        raise CompositionError(
            f"{self.runtime.site.path}: {first.name} {what}, and {bound.name}.{door} after it needs the attention of all of them. "
            f"Put "
            "it before, or on other layers."
        )

    def measure_error(self, bounds: list[Bound], plain: AttentionMap, out: Tensor) -> None:
        """How far some rows of the edited output are from exact attention, for the methods that approximate it."""
        approximate = [b for b in bounds if b.method.approximate and self.runtime.rows is None]
        if not approximate:
            return
        n = out.shape[2]
        index = torch.arange(0, n, -(-n // SAMPLED), device=out.device)
        with torch.no_grad():
            exact = kernels.attend(plain.att.take(index)).to(torch.float32)
            moved = out.index_select(2, index).to(torch.float32) - exact
            keep = self.base.rows.valid[:, index][:, None, :, None]
            moved, size = ((t * keep).square().sum() for t in (moved, exact))
            error = (moved / size.clamp_min(1e-30)).sqrt()
        for bound in approximate:
            self.marks[bound.index].record.err(error)

    def together(self, bound: Bound, edit: Any) -> bool:
        """Let all heads of the call take an edit in one form, where there is one."""
        chosen = self.chosen(bound)
        if self.forms.takes_bias(edit, chosen):
            moves = self.forms.add_bias(self.form_key(bound), self.local, edit, chosen)
            if moves is None:
                return False
            self.mark(bound, "bias", self.of_bias(bound, moves))
            return True
        if chosen is not None:
            # Where it acts on the same rows of all heads: a form may ask it of others than these. A host's own forms know no masks.
            if not isinstance(edit, Share) or chosen.shape[1] > 1 or not isinstance(self.forms, WholeForms):
                return False
            pair = self.forms.share(self.local, edit, chosen)
        else:
            more = {"prompts": bound.method.row_local} if isinstance(self.forms, WholeForms) else {}
            pair = self.forms.share(self.local, edit, **more)
        if pair is None:
            return False
        self.mark(bound, "shares", pair)
        return True

    def of_bias(self, bound: Bound, moves: tuple[Tensor, Tensor]) -> Tensor:
        """What a form says of what moves, as the audit counts it."""
        return moves[0] if self.marks[bound.index].parts is None else moves[1]

    def form_key(self, bound: Bound) -> Any:
        """What tells apart where a method acts in the calls of one forward."""
        if torch.compiler.is_compiling():
            return None
        by_layer = any(values.of_heads for values in bound.method.restricting)
        return id(bound), self.heads, self.base.site.layer if by_layer else None

    def ask(self, bound: Bound, door: str, *args: Tensor, gather: bool = True) -> Any:
        """What the method returns at a door, checked where it is its first answer there."""
        site = self.runtime.site.path
        state = self.base.states.setdefault((bound.index, site, self.heads), {})
        pool = self.pool if bound.method.pools_heads else None
        made = self._map
        view, size = (lambda: self.map, self.size) if made is None else (made, None)
        call = self.base.replace(view=view, size=size, state=state, method=bound.name, pool=pool, owner=id(bound))
        key = self.first_key(bound, door)
        first = key not in self.runtime.checked and not torch.compiler.is_compiling()
        # A method that answers None is not done with, and copies in each of its calls would cost more than the calls.
        copies = first and (key not in self.runtime.copied or self.whole.att.q.is_inference())
        before = self._shown(first, copies, args)
        self.asked = door, first
        if copies:
            self.runtime.copied.add(key)
            self.map.watch(True)
        if torch.compiler.is_compiling():
            # An error ends the compilation, which says where it was. Of the answer all is looked at that needs no values.
            edit = getattr(bound.method, door)(call, *args)
            if edit is not None:
                at = self.map.att if gather or self.map.gathered else self.whole.att.select(self.local)
                shown = args[0] if door == "output" else at
                getattr(Check(bound.name, door, site, shown, values=False), door)(edit)
        else:
            try:
                edit = getattr(bound.method, door)(call, *args)
            except Exception as error:
                error.add_note(f"attnsteer: raised in {bound.name}.{door} at {site}.")
                raise
        altered = self._altered(before, args)
        if copies:
            self.map.watch(False)
        if edit is not None and door != "output" and gather:
            # Gathered here in every call, so that a checkpoint that computes one again, unchecked, finds the same order.
            self.map.att  # noqa: B018
        if first and state:
            check_state(f"{bound.name}.{door} at {site}", state, self.whole.att.shape[0])
        if not altered and (edit is None or not first):
            if bound.method.observes:
                # Nothing of it will ever be checked; copies for it in each call would be.
                self.runtime.checked.add(key)
            return edit
        # Nothing of it is kept for a gradient, for the same reason.
        with torch.no_grad():
            shown = self.map.att if gather or self.map.gathered else self.whole.att.select(self.local)
            check = Check(bound.name, door, site, args[0] if door == "output" else shown)
            check.left_alone(altered)
            getattr(check, door)(edit)
        self.runtime.checked.add(key)
        return edit

    def factor(self, bound: Bound, out: Tensor) -> Tensor | None:
        """By what the method multiplies the heads' outputs `out`, [B or 1, H, 1, 1]; None: it leaves them as they are."""
        site = self.runtime.site.path
        state = self.base.states.setdefault((bound.index, site, self.heads), {})
        call = self.base.replace(view=lambda: self.map, size=self.size, state=state, method=bound.name, owner=id(bound))
        factor, mask = bound.method.head_factors(call, out), self.chosen(bound)
        if factor is None:
            return None
        factor = factor.reshape((1,) * (4 - factor.ndim) + factor.shape)
        return factor if mask is None else torch.where(mask[..., None], factor, 1.0)

    def first_key(self, bound: Bound, door: str) -> tuple[int, str, str, Heads]:
        """Under which a first edit is remembered as looked at."""
        return bound.index, door, self.base.phase, self.heads

    def _shown(self, first: bool, copies: bool, args: tuple[Tensor, ...]) -> list[tuple[str, Tensor, Any]]:
        """What a method must leave as it is, with its mark: the model's q, k and v, those of its heads, and `out`.

        Args:
            first: whether what the whole forward reads is among it. copies: see `mark_of`.
        """
        whole = self.whole.att
        if torch.compiler.is_compiling():
            return []
        found = [(name, getattr(whole, name)) for name in whole.held] + [("out", t) for t in args]
        # What counts no versions, if a method gathers it itself, could not be told from edits of it. With gradients nothing may be
        # gathered in another order than in the calls that are not looked at.
        early = copies and not torch.is_grad_enabled()
        if ((self._map is not None and self._map.gathered) or early) and self.map.att is not whole:
            found += [(name, getattr(self.map.att, name)) for name in self.map.att.held]
        if first:
            # What all methods and layers of this forward read; made here if it is not there yet.
            for name, track in (("call.rows", self.base.rows), ("call.keys", self.base.keys)):
                found += [(name, t) for t in track.tensors()]
            found += [(f"call.{name}", t) for name, fact in self.base.facts.items() for t in _tensors(fact)]
            others = ((name, getattr(whole, name)) for name in ("mask", "key_bias", "sinks"))
            found += [(f"call.map.att.{name}", t) for name, t in others if t is not None]
        if first:
            return [(name, t, mark_of(t, copies)) for name, t in found]
        return [(name, t, None if t.is_inference() else t._version) for name, t in found]

    def _altered(self, before: list[tuple[str, Tensor, Any]], args: tuple[Tensor, ...]) -> list[str]:
        """Names of what was changed in place."""
        # Copies were kept at a first edit only.
        names = [
            name
            for name, t, marked in before
            if not (marked is None or (t._version == marked if isinstance(marked, int) else unchanged(t, marked)))
        ]
        if self._map is None:
            # No map was made that could have been changed.
            return list(dict.fromkeys(names))
        gathered = self.map.gathered and self.map.att is not self.whole.att
        if gathered and sum(1 for name, _, _ in before if not name.startswith("call.")) == 3 + len(args):
            # Gathered by the method itself: new tensors, of version zero.
            own = ((name, getattr(self.map.att, name)) for name in self.map.att.held)
            names += [name for name, t in own if not t.is_inference() and t._version]
        if before and not names and self.map.touched():
            names.append("an answer of call.map")
        return list(dict.fromkeys(names))

    def mark(self, bound: Bound, path: str, *moved: Flag) -> None:
        """Something was edited by `path`; `moved`: see `Mark.edited`, with the batch in front where rows are shared."""
        if self.runtime.rows is None:
            self.marks[bound.index].edited(path, *moved)
        else:
            own = self.runtime.rows[id(bound)]
            rows = [(m[0] != m[1] if isinstance(m, tuple) else m).flatten(1).any(dim=1) for m in moved]
            flags = [own.flags(where) for where in rows]
            for i, index in enumerate(own.owners):
                self.marks[index].edited(path, *(flag[i] for flag in flags))
        door, first = self.asked
        if first and door != "output":
            self.fresh.append((bound, door, self.map))

    def check_result(self, plain: AttentionMap) -> None:
        """Refuse first edits after which outputs are infinite in the model's dtype, where the model's own are finite."""
        for bound, door, made in self.fresh:
            view = self.map if self.groups is not None else made
            if bool((view.out.detach().isfinite().logical_not() & plain.out.detach().isfinite()).any()):
                self.runtime.checked.discard(self.first_key(bound, door))
                raise Check(bound.name, door, self.runtime.site.path, view.out).refuse(
                    f"the edited attention has NaN or infinite outputs in {view.out.dtype}, in which the model takes them, where "
                    "the model's own has none."
                )

    def chosen(self, bound: Bound) -> Tensor | None:
        """bool [B or 1, H or 1, n or 1]: where the method acts, by `where` and by its values per sample; None for all."""
        where, call, q = bound.where, self.base, self.whole.att.q
        masks = [] if self.runtime.rows is None else [self.runtime.rows[id(bound)].mask]
        if bound.method.restricting:
            samples = Samples.plain(q.shape[0]) if call.samples is None else call.samples
            masks += [v.acts(samples, q.shape[0], q.device, call.site, self.heads) for v in bound.method.restricting]
        if where.rows is not None:
            masks.append(self._row_choice(where.rows)[:, None])
        if where.phases is not None and call.mixed:
            generated = call.rows.generated if "decode" in where.phases else ~call.rows.generated
            masks.append((generated if len(where.phases) == 1 else torch.ones_like(generated))[:, None])
        if where.branches is not None:
            masks.append(self._branch_choice(where.branches)[:, None, None])
        found = None
        for mask in masks:
            found = mask if found is None else found & mask
        return found

    def _row_choice(self, rows: Any) -> Tensor:
        """bool [B or 1, n]."""
        call = self.base
        if rows == "last":
            return call.rows.last
        if isinstance(rows, str):
            if rows not in call.segments:
                known = sorted(call.segments) or "none"
                raise SelectionError(f"Where(rows={rows!r}): {self.runtime.site.path} has row roles {known}.")
            mask = torch.zeros_like(call.rows.slot, dtype=torch.bool)
            mask[call.segments[rows]] = True
            return mask[None]
        index = call.rows.index
        return (index >= rows[0]) & (index < rows[1]) & call.rows.valid

    def _branch_choice(self, branches: tuple[str, ...]) -> Tensor:
        known = self.base.branch_rows
        if known is None:
            raise SelectionError(
                f"Where(branches={branches}): which rows of the batch are conditional is not known here. Steer the "
                'pipeline rather than its model, or enter run.branches("uncond", "cond") around the calls.'
            )
        found = [known[b] for b in branches if b in known]
        if not found:
            some = next(iter(known.values()))
            return torch.zeros_like(some)
        return torch.stack(found).any(dim=0)

    def rescore(self, att: Attention) -> None:
        """From here on the map is that of other scores or values."""
        plain = AttentionMap(att)
        self.map = DenseMap.of(att, plain.out) if self.runtime.run.reference else plain

    def inputs(self, bound: Bound) -> None:
        edited = self.ask(bound, "inputs")
        if edited is None:
            return
        att, mask = self.map.att, self.chosen(bound)
        if isinstance(edited, MergedTokens):
            self.merge(bound, edited)
            return
        if isinstance(edited, HeadOutputs):
            before, self.instead = self.map, bound
            new = edited.out if mask is None else torch.where(mask[..., None], edited.out, before.out)
            self.map = AttentionMap(att, lambda: new)
            self.mark(bound, "inputs", torch.ones(len(new), dtype=torch.bool, device=new.device))
            return
        q, k, v = edited
        if mask is not None:
            if max(mask.shape[1:]) > 1 and (k is not att.k or v is not att.v):
                raise CompositionError(
                    f"{bound.name} edits k or v: Where(rows=...) and heads for each sample cannot split that."
                )
            q = torch.where(mask[..., None], q, att.q)
            k, v = (torch.where(mask[:, :, :1, None], new, old) for new, old in ((k, att.k), (v, att.v)))
        self.rescore(att.replace(q=q, k=k, v=v))
        pairs = ((q, att.q), (k, att.k), (v, att.v))
        self.mark(bound, "inputs", *(new != old for new, old in pairs if new is not old))

    def merge(self, bound: Bound, edit: MergedTokens) -> None:
        """From here on the map is that of groups of tokens, until `unmerged`."""
        att = self.map.att
        size = edit.size
        bias = None if size is None else size.to(att.stat_dtype).log()[:, None]
        self.groups = (bound, edit.group, self.map)
        self.rescore(att.replace(q=edit.q, k=edit.k, v=edit.v, mask=None, key_bias=bias))
        counts = torch.zeros_like(edit.group).scatter_add(1, edit.group, torch.ones_like(edit.group))
        if self.runtime.run.measure:
            self.marks[bound.index].record.keep(torch.tensor(edit.q.shape[2] / edit.group.shape[1]))
        self.mark(bound, "inputs", counts > 1)

    def unmerged(self, out: Tensor) -> Tensor:
        """The outputs of groups [B, H, s, dv] as those of their tokens, where the method acts."""
        bound, group, before = self.groups
        out = out.gather(2, group[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3]))
        mask = self.chosen(bound)
        out = out if mask is None else torch.where(mask[..., None], out, before.out)
        # Later methods read the map of all tokens, with this output.
        self.map = AttentionMap(before.att, lambda: out)
        return out

    def bias(self, bound: Bound) -> None:
        term = self.ask(bound, "bias")
        if term is None:
            return
        att, mask = self.map.att, self.chosen(bound)
        if isinstance(term, BlockBias):
            self.hide(bound, term, mask)
            return
        if isinstance(term, KeyBias) and mask is not None and mask.shape[-1] == 1:
            term, mask = KeyBias(torch.where(mask, term.bias, torch.zeros_like(term.bias))), None
        if isinstance(term, KeyBias) and mask is None:
            old = att.key_bias
            self.rescore(att.replace(key_bias=term.bias if old is None else old + term.bias))
            moved = term.bias != 0
        else:
            full = term.bias[:, :, None] if isinstance(term, KeyBias) else term
            full = full if mask is None else torch.where(mask[..., None], full, torch.zeros_like(full))
            self.rescore(_with_bias(att, full))
            moved = full != 0
        self.mark(bound, "bias", moved)

    def hide(self, bound: Bound, term: BlockBias, chosen: Tensor | None) -> None:
        """From here on rows see the kept blocks only."""
        att = self.map.att
        keep = term.keep if chosen is None else term.keep | ~chosen[..., None]
        blocks, there = kernels.KeyBlocks(term.block, keep), torch.ones_like(keep) if term.there is None else term.there
        left_out = ~keep & there
        if self.runtime.run.reference:
            self.rescore(kernels.hide_blocks(att, blocks))
        else:
            pair = functools.cache(lambda: kernels.attend_blocks(att, blocks))
            # The mask is written out where a later method asks for more than the output.
            self.map = AttentionMap(
                lambda: kernels.hide_blocks(att, blocks), lambda: pair()[0], pair, whole=att, heads=att.shape[1]
            )
        if self.runtime.run.measure:
            share = left_out.sum().float() / there.expand(left_out.shape).sum().clamp_min(1)
            self.marks[bound.index].record.keep(1.0 - share)
        self.mark(bound, "bias", left_out)

    def weights(self, bound: Bound) -> None:
        edit = self.ask(bound, "weights")
        if edit is not None:
            self.reweight(bound, edit)

    def reweight(self, bound: Bound, edit: Reweight | Share) -> None:
        """The map from here on."""
        mask = self.chosen(bound)
        if self.forms is not None and type(self.map) is AttentionMap and self.forms.takes_bias(edit, mask):
            found = self.forms.rescored(self.form_key(bound), self.map.att, edit, mask)
            if found is not None:
                below = self.map.unweighted_att or self.map.att
                self.rescore(found[0])
                self.map.unweighted_att = below
                self.mark(bound, "bias", self.of_bias(bound, found[1]))
                return
        if mask is not None:
            edit = _masked(edit, mask, self.map.att.stat_dtype)
        self.map = self.map.reweighted(edit)
        if self.runtime.run.measure:
            moved = self.map.distance()
            keep = self.base.rows.valid[:, None].to(moved.dtype).expand_as(moved)
            self.marks[bound.index].record.measure((moved * keep).sum() / keep.sum().clamp_min(1.0))
        self.mark(bound, self.map.path, self.map.moved())

    def weights_apart(self, bounds: list[Bound]) -> None:
        """The edits of interventions that act on rows of different requests, as one."""
        assert self.runtime.rows is not None
        asked = [(b, self.runtime.rows[id(b)], self.ask(b, "weights")) for b in bounds]
        share = lambda edit: self.map.weights_of_share(edit) if isinstance(edit, Share) else edit  # noqa: E731
        asked = [(b, rows, share(edit)) for b, rows, edit in asked]
        for normalise in (True, False):
            own = [(b, rows, edit) for b, rows, edit in asked if edit is not None and edit.normalise == normalise]
            if not own:
                continue
            dtype, edits = self.map.att.stat_dtype, []
            for bound, rows, edit in own:
                mask = self.chosen(bound)
                finer = mask is not None and mask is not rows.mask
                edits.append((rows, _masked(edit, mask, dtype) if finer else edit))
            self.map = self.map.reweighted(together(edits, dtype))
            moved = self.map.distance() if self.runtime.run.measure else None
            differs = self.map.moved()
            for bound, rows, _ in own:
                if moved is not None:
                    for index, of in zip(rows.owners, rows.of, strict=True):
                        keep = (self.base.rows.valid & of[:, None])[:, None].to(moved.dtype).expand_as(moved)
                        self.marks[index].record.measure((moved * keep).sum() / keep.sum().clamp_min(1.0))
                self.mark(bound, self.map.path, differs)

    def output(self, bound: Bound, out: Tensor | None) -> Tensor | None:
        before = self.map.out if out is None else out
        edited = self.ask(bound, "output", before)
        if edited is None:
            return out
        if edited is before:
            # It has read the map and leaves the output as it is.
            self.mark(bound, "read")
            return out
        mask, edited = self.chosen(bound), edited.to(before.dtype)
        edited = edited if mask is None else torch.where(mask[..., None], edited, before)
        # Of a decode step, compared when somebody looks.
        small = before.shape[2] <= FEW_ROWS and before.numel() <= SMALL
        keep = (lambda t: t.detach()) if edited.requires_grad else (lambda t: t)
        self.mark(bound, "output", (keep(edited), keep(before)) if small else edited != before)
        return edited


def local_heads(heads: Heads | None, offset: int, size: int) -> Heads | None:
    if heads is None or (offset == 0 and max(heads, default=0) < size):
        return heads
    return tuple(h - offset for h in heads if offset <= h < offset + size)


def _tensors(fact: Any) -> list[Tensor]:
    """The tensors of a fact of the call: itself, or those that it holds."""
    if isinstance(fact, Tensor):
        return [fact]
    return [t for t in vars(fact).values() if isinstance(t, Tensor)] if isinstance(fact, Tokens) else []


def _masked(edit: Reweight | Share, mask: Tensor, dtype: torch.dtype) -> Reweight | Share:
    """Weight one, or the same share, outside the selected rows."""
    if isinstance(edit, Share):
        return Share(edit.keys, lambda share: torch.where(mask, edit.of(share), share), edit.scale_sinks)
    keep = lambda w: torch.where(mask, torch.as_tensor(w, dtype=dtype, device=mask.device), 1.0)  # noqa: E731
    return Reweight(tuple((keys, keep(w)) for keys, w in edit.groups), keep(edit.rest), edit.normalise, edit.positive)


def _with_bias(att: Attention, bias: Tensor) -> Attention:
    _, _, n, m = att.shape
    mask = att.additive(att.stat_dtype)
    if att.causal:
        # A mask and the causal flag do not go together in any kernel.
        lower = torch.ones(n, m, dtype=torch.bool, device=bias.device).tril()
        mask = bias.new_zeros((), dtype=att.stat_dtype).masked_fill(~lower, -torch.inf)[None, None]
    total = bias.to(att.stat_dtype) if mask is None else mask + bias.to(att.stat_dtype)
    return att.replace(mask=total, causal=False)
