"""One method, each head alone: the outputs that it would give are recorded in a plain pass, and put in later."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall, KeyBias, Reweight
from ..heads import HeadSet
from ..intervention import Intervention
from ..where import Where


@dataclass
class Edit:
    """What a method would make of one site's heads in one forward: plain and edited outputs [B, H, n, dv]."""

    heads: tuple[int, ...]
    plain: Tensor
    edited: Tensor | None = None

    def changed(self) -> Tensor:
        """Which rows of which heads the method moves, bool [B, H, n]."""
        return (self.edited != self.plain).any(dim=-1)


@dataclass
class Script:
    """What the next forward is for.

    Attributes:
        recording: note edits instead of making them. edits: name of a call (its site's path) -> what was noted.
        path: the site at which outputs are put in; heads: global head of each batch row; values: [R, n, dv].
    """

    recording: bool = False
    edits: dict[Any, Edit] = field(default_factory=dict)
    path: str | None = None
    heads: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class EachHeadAlone(Intervention):
    """Runs `inner` in a recording pass without letting its edits through; in a later pass, row r gets one head's edit.

    A head's input does not depend on an edit in its own layer, so all edits of all layers come from one plain pass.
    """

    inner: Intervention
    # It holds tensors, which take long to print.
    script: Script = field(repr=False)

    kinds = property(lambda self: self.inner.kinds)
    needs = property(lambda self: self.inner.needs)
    looks_ahead = property(lambda self: self.inner.looks_ahead)
    causal_only = property(lambda self: self.inner.causal_only)
    follows_crop = property(lambda self: self.inner.follows_crop)

    def doors(self) -> set[str]:
        return self.inner.doors() | {"inputs", "output"}

    def selection(self) -> Where:
        return self.inner.selection()

    def default_where(self, sites: Any) -> Where | None:
        return self.inner.default_where(sites)

    def key(self, call: AttnCall) -> Any:
        """The name under which a call's edit is noted."""
        return call.site.path

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | None:
        if not self.script.recording:
            return None
        # Read before any edit: this is what the rest of the model goes on with.
        self.script.edits[self.key(call)] = Edit(call.heads, call.map.out)
        return self.inner.inputs(call)

    def bias(self, call: AttnCall) -> KeyBias | Tensor | None:
        return self.inner.bias(call) if self.script.recording else None

    def weights(self, call: AttnCall) -> Reweight | None:
        return self.inner.weights(call) if self.script.recording else None

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        script = self.script
        if script.recording:
            edit = script.edits[self.key(call)]
            new = self.inner.output(call, out)
            edit.edited = (out if new is None else new).to(edit.plain.dtype)
            return edit.plain
        if call.site.path != script.path:
            return None
        out = out.clone()
        place = torch.tensor([call.heads.index(h) for h in script.heads.tolist()], device=out.device)
        out[torch.arange(len(place), device=out.device), place] = script.values
        return out


def only(method: Intervention, *pair: Any) -> Intervention:
    """The same method in one head of its selection, (layer, head) or (tower, layer, head)."""
    one = HeadSet([pair])
    where = replace(method.where, layers=None, heads=None)
    if any(f.name == "heads" for f in fields(method)):
        return method.new(heads=one, where=where)
    return method.new(where=replace(where, heads=one))
