"""`Bench`: one method on one host, with the target and the plain results that all laws share."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import AttnSteerError
from ...intervention import Intervention, needs_of
from ...site import Site
from ...steering import Steering, sites, steer
from ...where import Where
from ..cases import HostCase, MethodCase, NotApplicable, Setting
from ..fingerprint import fingerprint
from .decoding import decode
from .head_outputs import head_outputs

_SHARED: dict[tuple[HostCase, int], tuple[Any, Any]] = {}
_PLAIN: dict[tuple[Any, ...], Tensor] = {}


# What the laws about single sites say of a method on the whole model.
WHOLE = "it runs the whole model several times, and acts at no site by itself"


def shared_target(host: HostCase, number: int = 0) -> Any:
    """A target of this host that all laws use, built once, for as long as every law leaves it as it was."""
    if (host, number) not in _SHARED:
        target = host.build()
        _SHARED[host, number] = target, fingerprint(target)
    return _SHARED[host, number][0]


def own_target(host: HostCase) -> Any:
    """A target for one law alone, which may change it: a copy where the host's is a model, since building one takes longer."""
    shared = shared_target(host)
    return copy.deepcopy(shared) if isinstance(shared, torch.nn.Module) else host.build()


def discard_if_changed(host: HostCase) -> None:
    """Forget the shared targets where a law has not left them as they were."""
    if any(fingerprint(target) != mark for (of, _), (target, mark) in _SHARED.items() if of is host):
        discard(host)


def discard(host: HostCase) -> None:
    """Forget the shared targets and what was computed with them."""
    for key in [k for k in _SHARED if k[0] is host]:
        del _SHARED[key]
    for key in [k for k in _PLAIN if k[0] is host]:
        del _PLAIN[key]


@contextlib.contextmanager
def attached(target: Any, *methods: Intervention, **options: Any) -> Iterator[Steering]:
    """`steer` without its check that every method has acted: a law may well make a call in which one does not."""
    run = steer(target, *methods, control=True, **options)
    try:
        yield run
    finally:
        run.remove()


class Bench:
    """One method on one host.

    Attributes:
        case, host: what the laws are run on. target: shared by all laws, which leave it as it was.
    """

    def __init__(self, case: MethodCase, host: HostCase):
        self.case, self.host = case, host
        self._settings: dict[int, Setting] = {}
        self._taken: set[tuple[int, bool]] = set()
        if "images" in needs_of(case.method) and not host.images:
            raise NotApplicable(f"needs images, which {host.name} does not have")

    @property
    def target(self) -> Any:
        """The shared target."""
        return shared_target(self.host)

    def inputs(self, batch: int, padding: str | None = None, seed: int = 0) -> dict[str, Any]:
        """Arguments of a call; without padding there is no mask among them."""
        return self.host.inputs(self.target, batch, padding, seed)

    def setting(self, batch: int) -> Setting:
        """The sites that the method may be put on: of its kinds, of the main modality, causal where it must be."""
        if batch not in self._settings:
            self._settings[batch] = Setting(self.host.name, self._sites(), batch)
        return self._settings[batch]

    def _sites(self) -> tuple[Site, ...]:
        cls, every = self.case.method, sites(self.target)
        main = "text" if any(s.modality == "text" for s in every) else every[0].modality
        found = [
            s
            for s in every
            if s.kind in cls.kinds
            and s.modality == main
            and (s.causal or not cls.causal_only)
            and (cls.linear or not s.linear)
        ]
        if not found:
            raise NotApplicable(f"no site of kind {'/'.join(cls.kinds)}{', causal' if cls.causal_only else ''}")
        return tuple(found)

    def make(self, batch: int, zero: bool = False) -> Intervention:
        """A new method for this target; a refusal when it is attached is a refusal of the combination."""
        build = self.case.zero if zero else self.case.acting
        if build is None:
            missing = "no strength that changes nothing" if zero else "only the strength that changes nothing"
            raise NotApplicable(f"the case of the method has {missing}")
        setting = self.setting(batch)
        made = build(setting)
        if made.selection() == Where() and not self.case.whole_model:
            made = made.new(where=setting.where & Where(heads=setting.heads))
        if (batch, zero) not in self._taken:
            try:
                steer(self.target, made, control=True).remove()
            except AttnSteerError as error:
                raise NotApplicable(f"refused: {type(error).__name__}: {error}") from error
            self._taken.add((batch, zero))
        return made

    def whole(self, target: Any, inputs: dict[str, Any]) -> Tensor:
        """The outputs [B, T, ...] of a call, and of a few decoding steps behind it where the host has them.

        Behind padding on the right nothing is decoded: the new tokens would stand after a hole.
        """
        mask = inputs.get("attention_mask")
        if not self.host.decoder or (mask is not None and bool((mask[:, -1] == 0).any())):
            return self.host.run(target, inputs)
        return decode(target, inputs)

    def run(self, target: Any, inputs: dict[str, Any]) -> Tensor:
        """The shortest run in which the method acts: one forward, or decoding behind it."""
        return self.host.run(target, inputs) if self.prefills else self.whole(target, inputs)

    def plain(self, batch: int, padding: str | None = None, seed: int = 0) -> Tensor:
        """`whole` of the unsteered target on `inputs` of the same arguments, computed once for all methods."""
        key = (self.host, batch, padding, seed)
        if key not in _PLAIN:
            _PLAIN[key] = self.whole(self.target, self.inputs(batch, padding, seed))
        return _PLAIN[key]

    def plain_run(self) -> Tensor:
        """One forward of the unsteered target on two unpadded samples, computed once for all methods."""
        key = (self.host, "run")
        if key not in _PLAIN:
            _PLAIN[key] = self.host.run(self.target, self.inputs(2))
        return _PLAIN[key]

    @functools.cached_property
    def steered_run(self) -> Tensor:
        """`run` on two unpadded samples with the method on."""
        if not self.host.decoder:
            return self.acting[0]
        with attached(self.target, self.make(2)):
            return self.run(self.target, self.inputs(2))

    @functools.cached_property
    def acting(self) -> tuple[Tensor, int, int]:
        """The output of a steered `whole` on two unpadded samples; changes in its first call, and edits in all."""
        made, inputs = self.make(2), self.inputs(2)
        with attached(self.target, made) as run:
            out, first = self._first_changes(run, inputs)
            return out, first, _edits(run)

    def _first_changes(self, run: Steering, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        if not self.host.decoder:
            out = self.host.run(self.target, inputs)
            return out, _changes(run)
        first: list[int] = []
        hook = self.target.register_forward_hook(lambda *_: first.append(_changes(run)))
        try:
            return self.whole(self.target, inputs), first[0]
        finally:
            hook.remove()

    @property
    def prefills(self) -> bool:
        """Whether the method changes anything in a forward over a prompt; edits of weight one in all of its rows do not."""
        return self.acting[1] > 0

    def need_prefill(self) -> None:
        """For laws of one forward over a prompt.

        Raises:
            NotApplicable: the method changes nothing in it.
        """
        self.need_action()
        if not self.prefills:
            raise NotApplicable("it changes nothing in a forward over a prompt, which is all that this law looks at")

    def need_action(self) -> None:
        """For all laws but "effect", which says that a method that edits nothing at all is wrong.

        Raises:
            NotApplicable: the method edits nothing on this host.
        """
        if not self.acting[2]:
            raise NotApplicable("it edits nothing here: every door returned None, or its selection was never open")

    @functools.cached_property
    def moved_rows(self) -> list[int]:
        """Rows of the first steered site whose head outputs a forward over the prompt changes."""
        made, inputs = self.make(2), self.inputs(2)
        with attached(self.target, made) as run:
            first = run.sites[0].path
        before = head_outputs(self.target, self.host, inputs)[first]
        after = head_outputs(self.target, self.host, inputs, made)[first]
        changed = (before != after).transpose(1, 2).flatten(2).any(dim=-1).any(dim=0)
        return changed.nonzero()[:, 0].tolist()

    @functools.cached_property
    def last_row_only(self) -> bool:
        """Whether it edits the last row of a call and no other: how tokens are divided into calls then matters."""
        return self.host.decoder and self.moved_rows == [self.inputs(2)["input_ids"].shape[1] - 1]

    @property
    def call_bound(self) -> bool:
        """Whether running all tokens in one call is by definition something else than decoding the last ones."""
        return self.case.prompt_bound or self.make(1).looks_ahead or not self.prefills or self.last_row_only


def _edits(run: Steering) -> int:
    return sum(r.edits for r in run.audit.records.values()) + _guided(run)


def _changes(run: Steering) -> int:
    return sum(r.changed for r in run.audit.records.values()) + _guided(run)


def _guided(run: Steering) -> int:
    return sum(extra.get("guided calls", 0) for extra in run.audit.extra.values())


def to_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with their floating-point tensors cast."""
    cast = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return {k: {a: cast(b) for a, b in v.items()} if isinstance(v, dict) else cast(v) for k, v in inputs.items()}


def one_sample(inputs: dict[str, Any], b: int, batch: int) -> dict[str, Any]:
    """Sample b of a batch without its padding."""
    mask = inputs.get("attention_mask")
    valid = None if mask is None else mask[b].bool()

    def pick(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: pick(k, v) for k, v in value.items()}
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch:
            return value
        row = value[b : b + 1]
        padded = valid is not None and row.ndim == 2 and row.shape[1] == len(valid) and not name.startswith("decoder")
        return row[:, valid] if padded else row

    return {k: pick(k, v) for k, v in inputs.items()}
