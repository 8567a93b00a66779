"""FreezeMaps: the attention patterns of one run with the live values of another.

The patterns are those of an unedited run, held while something else is edited (safety-research/circuit-tracer,
replacement_model.py, 2025, `freeze_attention`; there every map is stored). A pattern is made by q and k alone, so that the kernel
is run with those of the clean run and with the values of this one: no map is built or stored. Freezing derivatives, with the same
values, is another thing and not meant here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..attention_map import AttentionMap
from ..call import AttnCall
from ..captured import Captured
from ..errors import CompositionError, SelectionError
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import choice, flag, parsed
from ..registry import register_method
from ._sources import Tables, check_keys, check_length, checked_source, of_prompts


def _run(value: Any) -> Captured:
    found = checked_source(value)
    if not isinstance(found, Captured) or not {"q", "k"} <= set(found.what):
        raise SelectionError("give a capture with what=('q', 'k') of the clean run, or the folder of one.")
    return found


@register_method
@dataclass(frozen=True)
class FreezeMaps(Intervention):
    """A_i is that of the clean run for the tokens of its prompt; values are live.

        with capture(model, what=("q", "k")) as clean:
            model(**inputs)
        with steer(model, other_edit, FreezeMaps(clean)):
            model(**inputs)

    Args:
        source: the clean run: a `Captured` with "q" and "k" of all tokens of the prompt, or its folder.
        heads: the heads to freeze; None: all that `where` selects.
        new_tokens: what the rows behind those of the clean run are: "live", their own queries and the live keys, as in
            circuit-tracer; "paired": there are none, since the clean run has every token of the edited one, and a row that it
            lacks is refused. Such a run is captured over the whole text, or goes beside (`analysis.generate_frozen`).
        same_tokens: refuse a call of other tokens than the clean run's.

    With the model itself unedited, what is frozen is what is live, and the outputs are the model's own bit for bit. Methods that
    edit scores or weights act on the frozen maps; one that edits q or k before would be void, and is refused.
    """

    source: Any = parsed(_run, "a Captured with q and k, or its folder")
    heads: HeadSet | None = head_set()
    new_tokens: str = choice("live", ("live", "paired"))
    same_tokens: bool = flag(True, kw_only=True)
    _tables: Tables = field(default_factory=Tables, init=False, repr=False, compare=False, metadata={"save": False})

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Denoisers have patterns of each step."""
        return ("steps",) if any(t.step is not None for t in self.source.takes) else ()

    @property
    def steady(self) -> bool:  # type: ignore[override]
        """Rows behind the clean run are live."""
        return self.new_tokens == "live" and of_prompts(self.source)

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | None:
        if type(call.map) is AttentionMap and call.map._whole is None:
            raise CompositionError(
                f"FreezeMaps at {call.site.path} puts the q and k of the clean run in place, and a method before it edited "
                "them; its edit would be lost. Leave one of them out, or give them different heads."
            )
        if call.mixed or (call.phase == "decode" and self.new_tokens == "live" and not self._goes_on(call)):
            return None
        found = self._frozen(call)
        if found is None:
            return None
        att, _, q, k = found
        return None if torch.equal(q, att.q) and torch.equal(k, att.k) else (q, k, att.v)

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        if not call.mixed:
            return None
        # Rows of the prompt see clean keys, those of generated tokens live ones, so that no one set of keys serves both.
        found = self._frozen(call)
        if found is None:
            return None
        if out is not call.map.out:
            raise CompositionError(
                f"FreezeMaps at {call.site.path}: in a call that holds a prompt and generated tokens (generation without a "
                "cache) it makes head outputs, and a method before it edited them. Put FreezeMaps before that method, or use "
                "a cache."
            )
        att, present, q, k = found
        if torch.equal(torch.where(present[:, None, :, None], q, att.q), att.q) and torch.equal(k, att.k):
            return None
        return torch.where(present[:, None, :, None], kernels.attend(att.replace(q=q, k=k)).to(out.dtype), out)

    def _goes_on(self, call: AttnCall) -> bool:
        """Whether the clean run has rows behind its prompt."""
        return any(t.phase == "decode" for t in self.source.of(call.site.path))

    def _frozen(self, call: AttnCall) -> tuple[kernels.Attention, Tensor, Tensor, Tensor] | None:
        """(the call, the frozen rows bool [B, n], q and k with those of the clean run where it has them)."""
        if self.same_tokens:
            call.once("tokens", lambda: self._check_tokens(call) or True)
        q_of, k_of = (self._tables.of(call, self.source, what) for what in ("q", "k"))
        check_length(call, q_of, "FreezeMaps")
        q, present = q_of.of(call, call.rows)
        if self.new_tokens == "paired":
            self._check_all(call, q, present)
        if q is None or not (present is None or bool(present.any())):
            return None
        att = call.map.att
        if q.shape[3] != att.q.shape[3] or k_of.rows.shape[3] != att.k.shape[3]:
            raise SelectionError(
                f"FreezeMaps at {call.site.path}: q and k of the clean run have widths {q.shape[3]} and {k_of.rows.shape[3]}, "
                f"this model's {att.q.shape[3]} and {att.k.shape[3]}. Capture a run of this model; `InjectMap` takes another's."
            )
        k, known = k_of.of(call, call.keys)
        check_keys(call, present, known, k is None)
        q, k = q.to(att.q.dtype), k.to(att.k.dtype)
        # One key head for each query head, of which those that share one are alike.
        k = k[:, :: att.q.shape[1] // att.k.shape[1]]
        q = q if present is None else torch.where(present[:, None, :, None], q, att.q)
        k = k if known is None else torch.where(known[:, None, :, None], k, att.k)
        if present is None:
            present = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        return att, present, q, k

    @staticmethod
    def _check_all(call: AttnCall, q: Tensor | None, present: Tensor | None) -> None:
        if q is not None and present is None:
            return
        missing = call.rows.valid if q is None else call.rows.valid & ~present
        if bool(missing.any()):
            number = int(call.rows.index.expand_as(missing)[missing].min())
            raise SelectionError(
                f"FreezeMaps(new_tokens='paired') at {call.site.path}: the clean run has no row of token {number}. Capture a run "
                "over all tokens of this one, or generate with attnsteer.analysis.generate_frozen."
            )

    def _check_tokens(self, call: AttnCall) -> None:
        ids, clean = call.facts.get("tokens"), self.source.ids_of.get(call.site.path, self.source.ids)
        ids = None if ids is None or call.site.kind != "self" else ids.ids
        if ids is None or clean is None or call.samples is not None:
            return
        tokens = call.tokens
        valid = torch.ones_like(ids, dtype=torch.bool) if tokens.valid is None else tokens.valid.to(ids.device)
        for b, (row, keep) in enumerate(zip(ids, valid.expand(len(ids), -1), strict=True)):
            live = row[keep][tokens.virtual :].tolist()
            known = clean[0] if len(clean) == 1 else clean[b] if b < len(clean) else []
            both = min(len(live), len(known), tokens.prompt or len(live))
            if live[:both] != known[:both]:
                first = next(i for i in range(both) if live[i] != known[i])
                raise SelectionError(
                    f"FreezeMaps: sample {b} has other tokens than the clean run, from token {first} on; capture a run of this "
                    "batch, or pass same_tokens=False."
                )
