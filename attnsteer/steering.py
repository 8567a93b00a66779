"""`steer()`: attach interventions to a model or pipeline; `Steering`: the context and handle."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .account import Samples
from .audit import Audit
from .bound import Bound
from .choices import NAME, NOTHING, Choice, Choices, Part
from .engine import SiteRuntime
from .errors import (
    CompositionError,
    ContractError,
    NeverFired,
    NothingChanged,
    SelectionError,
    UnsupportedHost,
    brief,
    did_you_mean,
    listing,
)
from .intervention import PASSES, Intervention
from .parameters import Flag, named
from .registry import get_host, hosts
from .scope import PLAIN, SCOPES, Scope
from .site import Site, SiteList
from .tokens import checked_images
from .undo import Journal
from .where import Where

# What `Where` selects over time; a host that cannot tell one of them refuses a selection by it.
CLOCKS = ("phases", "steps", "branches")


# Attached steerings, so that a site is steered once, and a lost handle can be found.
_LIVE: weakref.WeakSet[Steering] = weakref.WeakSet()
# One is attached or removed at a time: threads may steer, each its own layers of one model.
_ATTACHING = threading.RLock()


class Steering:
    """A live attachment: context manager and handle.

    Attributes:
        audit: what each intervention saw, returned and changed. sites: the sites that are steered.
        measure: whether reweightings also record the total-variation distance that they cause.
        opened: numbers of the `around` methods whose passes run now.
        control: whether it is meant to change nothing (a zero-strength control), so that this is no error.
        attached: False from the moment on at which it is removed.
        choices: how requests of a batch that many share choose among the interventions. asked_for: numbers of those that some
            request has chosen. by_id: what a request chooses that says nothing, by its id; None: the default.
        failures: errors of threads that had nobody to raise them to; the first is raised on leaving.
    """

    def __init__(
        self,
        target: Any,
        interventions: tuple[Intervention, ...],
        measure: bool = False,
        reference: bool = False,
        control: bool = False,
        host: Any = None,
        names: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self.target = target
        self.measure = measure
        self.reference = reference
        self.control = control
        self.branch: str | None = None
        self.audit = Audit([_describe(m) for m in interventions])
        self.opened: list[int] = []
        # Blocks around calls that are entered now, in any thread: compiled code, which cannot ask for them, asks for this.
        self.scopes = 0
        self._journal = Journal()
        self._lock = threading.RLock()
        self.attached = True
        self._entered = False
        self.host = find_host(target) if host is None else host
        if names and "requests" not in self.host.provides:
            raise UnsupportedHost(
                f"a {type(target).__name__} has no requests that could choose among named steerings; language models of "
                "transformers have. Give the interventions without names."
            )
        self.asked_for: set[int] = set()
        self.by_id: Callable[[str | None], Any] | None = None
        self.failures: list[BaseException] = []
        with _ATTACHING:
            self._attach(interventions, names)

    def _attach(self, interventions: tuple[Intervention, ...], names: Mapping[str, tuple[int, ...]] | None) -> None:
        every = self.host.sites()
        self.bounds, plan = bind(interventions, every, self.host)
        self.sites = SiteList(site for site in every if site.path in plan)
        names = {} if names is None else names
        self.runtimes = {s.path: SiteRuntime(self, s, plan[s.path], together=not names) for s in self.sites}
        self.choices = Choices(self._parts(plan), names, self._variant, self._check_choice)
        for name in names:
            self._check_choice(self.choices.choose(name))
        try:
            self.host.attach(self, self._journal)
            for site in self.sites:
                self._journal.wrap(site.module, "_replicate_for_data_parallel", _refuse_replica)
        except BaseException:
            self._journal.undo()
            raise
        _LIVE.add(self)

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The attached interventions, in order of application."""
        return tuple(b.method for b in self.bounds)

    @property
    def scope(self) -> Scope:
        """What the blocks around the running call say."""
        return SCOPES.get().get(id(self), PLAIN)

    def _parts(self, plan: Mapping[str, list[tuple[Bound, tuple[int, ...] | None]]]) -> list[Part]:
        sites: list[dict[str, Any]] = [{} for _ in self.bounds]
        for path, entries in plan.items():
            for bound, heads in entries:
                sites[bound.index][path] = heads
        return [Part(bound, sites[bound.index]) for bound in self.bounds]

    def _variant(self, index: int, method: Intervention) -> Part:
        """An intervention with other heads or layers for one request; they must be among those that are attached."""
        bound, selected = bind_one(index, method, self.host.sites(), self.host, attached=True)
        own = {site.path for site in self.sites}
        other = [site.path for site, _ in selected if site.path not in own]
        if other:
            raise SelectionError(
                f"{bound.name} of this request selects {listing(other, 4)}, where nothing is attached. Attach it there: give the "
                "layers and heads of all requests to steer()."
            )
        return Part(bound, {site.path: heads for site, heads in selected})

    def _check_choice(self, choice: Choice) -> None:
        for site in self.sites:
            SiteRuntime(self, site, [(p.bound, p.sites[site.path]) for p in choice.parts if site.path in p.sites])

    def request(self, name: str | None = None, /, **parameters: Any) -> Choice:
        """What one request of continuous batching gets: `manager.add_request(ids, steer=run.request("calm", beta=0.2))`.

        Args:
            name: one of the steerings that `steer(named=...)` was given; None where there are no names.
            parameters: values for this request alone, by the names of the interventions' hyper-parameters.

        Raises:
            SelectionError: the name or a parameter does not exist, or a value does not fit.
        """
        return self.choices.choose(parameters if name is None else {NAME: name, **parameters})

    def _check_attached(self, asked: str) -> None:
        """Raise where the steering was removed: what runs in its block would be the plain target, and nobody would notice."""
        if not self.attached:
            raise CompositionError(f"{self} was removed, so nothing would be steered: {asked} before, or steer again.")

    @contextlib.contextmanager
    def _scoped(self, **changes: Any) -> Iterator[None]:
        self._check_attached("enter its blocks")
        token = SCOPES.set({**SCOPES.get(), id(self): replace(self.scope, **changes)})
        with self._lock:
            self.scopes += 1
        try:
            yield
        finally:
            SCOPES.reset(token)
            with self._lock:
                self.scopes -= 1

    def is_open(self, bound: Bound) -> bool:
        """Whether the inside edits of `bound` act now (those of an `around` method only inside its pass)."""
        return not bound.guides or bound.index in self.opened

    @contextlib.contextmanager
    def inside(self, method: Intervention) -> Iterator[None]:
        """Switch the inside edits of an `around` method on for the model calls in this block.

        Raises:
            ContractError: `method` is none that is attached.
        """
        index = next((b.index for b in self.bounds if b.method is method), None)
        if index is None:
            raise ContractError(f"run.inside({brief(method)}): enter it with the method itself, run.inside(self).")
        self.opened.append(index)
        before, self.branch = self.branch, "weak"
        self.audit.count(index, "inside passes")
        try:
            yield
        finally:
            self.opened.pop()
            self.branch = before

    def freeze(self) -> contextlib.AbstractContextManager[None]:
        """Statistics stay as the prompt left them: score a continuation over its cache in this block.

        This block and the others hold for the calls of the thread (or asyncio task) that enters them.
        """
        return self._scoped(frozen=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The calls in this block run as if nothing were attached, and nothing of them is noted.

        A cache that is filled here is one that the steering does not know.

        Raises:
            UnsupportedHost: the target is no model of transformers.
        """
        with self._scoped(paused=True), self.host.pause(self):
            yield

    def chunked_prefill(
        self, tokens: int | None = None, *, samples: Samples | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """The calls in this block are chunks of one prompt: one-token calls too, and spans may lie in later chunks.

        Args:
            tokens: slots of the whole prompt, padding included; methods that act at its last token need it.
            samples: which sample each row belongs to, where rows are what several samples begin with.
        """
        return self._scoped(chunked=True, chunk_total=tokens, samples=samples)

    def images(self, where: Any) -> contextlib.AbstractContextManager[None]:
        """Say where the images are for the calls in this block, which the calls themselves do not tell (`inputs_embeds`).

        Args:
            where: the processor's output (its `input_ids` are read, or `mm_token_type_ids`), or for each sample a list of
                (start, stop) token ranges counted from its first token that is not padding.
        """
        return self._scoped(images=checked_images(where))

    def branches(self, *names: str) -> contextlib.AbstractContextManager[None]:
        """Name the equal parts of the batch of the denoiser calls in this block, e.g. ("uncond", "cond")."""
        wrong = [n for n in names if n not in ("cond", "uncond")]
        if wrong or not names:
            raise SelectionError(f"branches{names}: name each part of the batch 'cond' or 'uncond'.")
        return self._scoped(layout=tuple(names))

    def remove(self) -> None:
        """Detach; the target is as it was before. A second call does nothing.

        Warns with `NothingChanged` where an intervention changed nothing while it was attached.
        """
        attached = self.attached
        self._detach()
        if attached and self.failures:
            raise self.failures[0]
        if attached and not self.control:
            silent = " ".join(filter(None, (self._unseen(), self._idle(resting=False), self._idle(resting=True))))
            if silent:
                warnings.warn(silent, NothingChanged, stacklevel=2)

    def _detach(self) -> None:
        with _ATTACHING, self._lock:
            self.attached = False
            _LIVE.discard(self)
            self._journal.undo()

    def __enter__(self) -> Steering:
        self._check_attached("enter it as a context")
        if self._entered:
            raise CompositionError(
                f"{self} is entered already, and the first block that ends would remove it from under the other. Use one "
                "`with` block, or steer again for each."
            )
        self._entered = True
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._detach()
        if kind is None and self.failures:
            raise self.failures[0]
        if kind is None and not self.control:
            self.check_fired()

    def check_fired(self, changed: bool = True) -> None:
        """Raise `NeverFired` if an attached intervention was never asked, or changed nothing.

        Args:
            changed: whether it must have changed something; not asked of a control steering, nor of methods that only read or
                whose own rule leaves some inputs alone (those warn).
        """
        silent = " ".join(filter(None, (self._unseen(), self._idle(resting=False) if changed else "")))
        if silent:
            raise NeverFired(silent)
        resting = self._idle(resting=True) if changed else ""
        if resting:
            warnings.warn(resting, NothingChanged, stacklevel=3)

    def _expected(self) -> list[Bound]:
        """The interventions that should have acted: of those with names, what some request has chosen."""
        return [b for b in self.bounds if not self.choices.names or b.index in self.asked_for]

    def _unseen(self) -> str:
        """What to say of the interventions that were never asked, or ""."""
        names = [self.audit.names[b.index] for b in self._expected() if not self.audit.saw(b.index)]
        if not names:
            return ""
        return (
            f"{listing(names)} never acted: no selected site ran while it was attached ({len(self.sites)} sites: "
            f"{listing((s.path for s in self.sites), 4)}). Call the steered model inside the context, and check phases, "
            "steps and branches in Where."
        )

    def _idle(self, resting: bool) -> str:
        """What to say of the interventions that changed nothing, or ""; `resting`: of those that may."""
        names = [
            self.audit.names[b.index]
            for b in self._expected()
            if not b.method.observes
            # What the heads of other processes did is not known here: no error, then.
            and (b.method.may_rest or self.audit.elsewhere(b.index)) == resting
            and self.audit.saw(b.index)
            and not self.audit.absent(b.index)
            and not self.audit.fired(b.index)
        ]
        if not names or self.control:
            return ""
        return (
            f"{listing(names)} was asked, but changed nothing: its strength is neutral, or what it acts on was not there. Print "
            "run.audit; a control that is meant to change nothing is steer(..., control=True)."
        )

    def __repr__(self) -> str:
        return f"<Steering of {type(self.target).__name__} at {len(self.sites)} sites: {', '.join(self.audit.names)}>"


def _refuse_replica(inner: Any) -> Any:
    # A replica shares the attributes of its original, our layers too, and would run the original in its place.
    raise UnsupportedHost(
        "a steered model cannot be replicated by torch.nn.DataParallel. Use DistributedDataParallel, or detach first."
    )


def _refuse_twice(sites: Iterable[Site]) -> None:
    taken = {id(s.module): s.path for run in list(_LIVE) for s in run.sites}
    for site in sites:
        if id(site.module) in taken:
            raise CompositionError(
                f"{site.path} is steered already; give all interventions to one call, steer(model, first, second), or release "
                "the other one: attnsteer.detach(model)."
            )


def detach(target: Any) -> int:
    """Remove every steering of a model or pipeline, also those whose handle is lost; returns how many there were."""
    found = steered(target)
    for run in found:
        run._detach()
    return len(found)


def steered(target: Any) -> list[Steering]:
    """The steerings that are attached to a model or pipeline now."""
    own = {id(m) for m in _modules(target)}
    with _ATTACHING:
        live = list(_LIVE)
    return [run for run in live if any(id(s.module) in own for s in run.sites)]


def _modules(target: Any) -> Iterator[Any]:
    if isinstance(target, nn.Module):
        yield from target.modules()
        return
    parts = getattr(target, "components", None)
    for part in [getattr(target, "model", None), *(parts.values() if isinstance(parts, dict) else ())]:
        if isinstance(part, nn.Module):
            yield from part.modules()


@named
def steer(
    target: Any,
    *interventions: Intervention,
    measure: bool = False,
    reference: bool = False,
    control: bool = False,
    named: Mapping[str, Intervention | Sequence[Intervention]] | None = None,
) -> Steering:
    """Attach interventions to a model or pipeline, without changing how it is called.

    Args:
        target: a transformers model or `Pipeline`, a diffusers model or `DiffusionPipeline`, or any
            `nn.Module` that reaches `F.scaled_dot_product_attention`.
        interventions: applied in this order, within each stage (inputs, bias, weights, output).
        measure: also record how far reweightings move the map (total variation; costs a little), and how far methods that
            approximate attention are from it, on some rows of each call.
        reference: compute every edit from the explicit [n, m] map instead of the identities: slow, for checking.
        control: this steering is meant to change nothing (a zero-strength control): that is no error then.
        named: in place of `interventions`, several steerings under names, each one intervention or a list. Requests of
            continuous batching choose among them; those that choose none are not steered.

    Returns:
        A `Steering`: use it as a context manager, or call `remove()`.

    Raises:
        SelectionError: a selection matches nothing or names what does not exist; a parameter does not exist, or is no bool.
        UnsupportedHost: the target, its backend or a processor cannot be steered exactly.
        CompositionError: a site is steered already.
        NeverFired: on leaving the context without an error, an intervention had changed nothing.
    """
    # What is asked of comes first: what is said of the interventions would be beside the point.
    host = None if isinstance(target, Intervention) else find_host(target)
    for name, value in (("measure", measure), ("reference", reference), ("control", control)):
        Flag().check("steer", name, value)
    names = None
    if named is not None:
        names, interventions = _named(named, interventions)
    if not interventions:
        raise SelectionError("steer() got no intervention; give at least one, e.g. steer(model, HeadGate({...})).")
    for method in interventions:
        if not isinstance(method, Intervention):
            hint, shown = "", repr(method)
            if isinstance(method, type):
                hint = " It is a class: make an instance."
            elif isinstance(target, Intervention):
                hint = " The target comes first: steer(model, method)."
            if len(shown) > 80:
                shown = f"a {type(method).__name__}"
            raise SelectionError(f"steer() got {shown}, which is no Intervention.{hint}")
    return Steering(target, interventions, measure, reference, control, host, names)


def _named(named: Any, interventions: tuple[Any, ...]) -> tuple[dict[str, tuple[int, ...]], tuple[Any, ...]]:
    """(name -> numbers, all interventions in order)."""
    if interventions:
        raise SelectionError("steer() got interventions with names and without; give all of them names, or none.")
    if not isinstance(named, Mapping) or not named:
        raise SelectionError(f"named={brief(named)}: give a mapping of names to interventions.")
    names: dict[str, tuple[int, ...]] = {}
    every: list[Any] = []
    for name, given in named.items():
        if not isinstance(name, str) or not name or name == NOTHING:
            raise SelectionError(
                f"a steering is named {brief(name)}; give a string other than {NOTHING!r}, which stands for no steering."
            )
        own = list(given) if isinstance(given, (list, tuple)) else [given]
        if not own:
            raise SelectionError(
                f"the steering {name!r} has no intervention; requests without steering choose {NOTHING!r}."
            )
        names[name] = tuple(range(len(every), len(every) + len(own)))
        every += own
    return names, tuple(every)


def sites(target: Any) -> SiteList:
    """The attention sites of a model or pipeline; prints as a table."""
    return SiteList(find_host(target).sites())


def find_host(target: Any) -> Any:
    """The host instance that takes `target`.

    Raises:
        UnsupportedHost: no host does.
    """
    for name in hosts():
        cls = get_host(name)
        if cls.takes(target):
            return cls(target)
    raise UnsupportedHost(
        f"nothing here can steer a {type(target).__module__}.{type(target).__name__}; hosts: {', '.join(hosts())}. "
        "Give a transformers or diffusers model or pipeline, or an nn.Module that calls "
        "torch.nn.functional.scaled_dot_product_attention." + _kept_from_torch(target)
    )


def _kept_from_torch(target: Any) -> str:
    """A word on modules in plain containers: torch does not know them as parts of the model, so nobody finds them."""
    for name, module in target.named_modules() if isinstance(target, nn.Module) else ():
        for key, held in vars(module).items():
            if key.startswith("_") or not isinstance(held, (list, tuple, dict)):
                continue
            parts = held.values() if isinstance(held, dict) else held
            if any(isinstance(part, nn.Module) for part in parts):
                return (
                    f" Its {f'{name}.{key}'.lstrip('.')} keeps modules in a plain {type(held).__name__}, where they are no parts "
                    "of the model; attention in there is found once it is an nn.ModuleList or nn.ModuleDict."
                )
    return ""


def bind(
    interventions: tuple[Intervention, ...], every: list[Site], host: Any
) -> tuple[list[Bound], dict[str, list[tuple[Bound, tuple[int, ...] | None]]]]:
    """Resolve each selection against the sites; all errors come before anything is patched."""
    if not every:
        raise UnsupportedHost(
            f"{type(host.target).__name__} has no attention that can be reached: no module looks its attention "
            "function up, calls torch.nn.functional.scaled_dot_product_attention, or has an attention processor. A map that "
            "is written out by hand cannot be edited from outside: have the module call SDPA."
        )
    bounds: list[Bound] = []
    plan: dict[str, list[tuple[Bound, tuple[int, ...] | None]]] = {}
    for index, method in enumerate(interventions):
        bound, selected = bind_one(index, method, every, host)
        for site, heads in selected:
            plan.setdefault(site.path, []).append((bound, heads))
        bounds.append(bound)
    return bounds, plan


def bind_one(
    index: int, method: Intervention, every: list[Site], host: Any, attached: bool = False
) -> tuple[Bound, list[tuple[Site, tuple[int, ...] | None]]]:
    """One intervention with its selection resolved: (it, [(site, heads)]); `attached`: a variant of one that is."""
    # What kind of target it is comes first: what is said of layers and backbones would be beside the point.
    _check_host(method, host)
    method = method.prepared(host.target)
    where = method.selection()
    if where == Where():
        where = method.default_where(every) or where
    refused = [k for k in where.kinds or () if k not in method.kinds]
    if refused:
        raise SelectionError(f"{type(method).__name__} is defined on {method.kinds} attention, not on {refused}.")
    if not any(s.kind in method.kinds for s in every):
        raise SelectionError(
            f"{type(method).__name__} is defined on {method.kinds} attention; the target has "
            f"{sorted({s.kind for s in every})}."
        )
    bound = Bound(index, method, where, frozenset(method.doors()))
    _check_clocks(where, host)
    selected = where.resolve(every, host.main, method.kinds)
    if not attached:
        # What another steering has put on a module would be taken for something foreign.
        _refuse_twice(site for site, _ in selected)
    for site, _ in selected:
        if site.linear and not method.linear:
            raise UnsupportedHost(
                f"{site.path} is linear attention: it has no softmax map, so {type(method).__name__} is not "
                "defined there. Leave it out, e.g. Where(kinds='cross')."
            )
        if method.causal_only and not site.causal:
            raise UnsupportedHost(
                f"{type(method).__name__} is defined on causal self-attention; {site.path} sees both ways. "
                'Leave it out, e.g. Where(modules=r".*decoder.*").'
            )
        host.check(site, bound)
    return bound, selected


def _check_host(method: Intervention, host: Any) -> None:
    """Refuse a method that needs what the host, or this target of it, does not have."""
    name, target, doors = type(method).__name__, type(host.target).__name__, method.doors()
    if not isinstance(method.where, Where):
        # A class with a `__post_init__` that does not call the base's has not checked its fields.
        raise SelectionError(f"{name}(where={brief(method.where)}): give a Where, e.g. Where(layers=[0]).")
    if not doors:
        raise SelectionError(f"{name} overrides no method of the contract; it would do nothing.")
    if "around" in doors and "around" not in host.provides and not PASSES & set(method.needs):
        raise UnsupportedHost(
            f"{name} calls the model several times and combines the predictions, which is defined for denoisers and "
            f"pipelines of diffusers; {target} is neither."
        )
    absent = host.absent()
    for need in method.needs:
        if need in absent:
            raise UnsupportedHost(f"{name} needs {need}: {absent[need]}")
    lacking = [need for need in method.needs if need not in host.provides]
    if lacking:
        given = sorted(host.provides - {*CLOCKS, "around"})
        every = {need for known in hosts() for need in get_host(known).provides}
        # One that some other host has is no slip.
        hint = "".join(did_you_mean(need, every) for need in lacking if need not in every)
        raise UnsupportedHost(
            f"{name} needs {listing(lacking)}, which a call of a {target} does not give; it gives "
            f"{listing(given) or 'nothing beyond q, k and v'}.{hint}"
        )


def _check_clocks(where: Where, host: Any) -> None:
    """Refuse a selection over time that the host could only ignore."""
    unknown = [f for f in CLOCKS if getattr(where, f) is not None and f not in host.provides]
    if unknown:
        known, target = [f for f in CLOCKS if f in host.provides], type(host.target).__name__
        raise SelectionError(f"{where}: a {target} has no {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")


def _describe(method: Intervention) -> str:
    text = repr(method)
    return text if len(text) <= 120 else text[:117] + "..."


__all__ = ["Steering", "detach", "find_host", "sites", "steer"]
