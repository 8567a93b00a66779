"""What an engine offers its requests: the sites of its model and its named steerings; and the check of what a request asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...bound import Bound
from ...choices import Choice, Choices, Part
from ...errors import SelectionError, UnsupportedHost, brief, did_you_mean, listing
from ...intervention import Intervention
from ...site import Site
from ...steering import bind_one
from ...tokens import Tokens
from ..base import Host
from . import wire

if TYPE_CHECKING:
    from ...steering import Steering
    from ...undo import Journal

# Also read from here: JSON of the form of the configuration's own entry.
VARIABLE = "ATTNSTEER_VLLM"
SETTINGS = ("steerings", "chunked_statistics", "untested_version")


@dataclass(frozen=True)
class Engine:
    """What the checks need to know of an engine.

    Attributes:
        model: its name, for messages. layers, heads, kv_heads: of the whole model. shards: processes that share a layer's heads.
        whole_prompts: whether prompts are never cut (no chunked prefill).
    """

    model: str
    layers: int
    heads: int
    kv_heads: int
    shards: int = 1
    whole_prompts: bool = False


def site_path(layer: int) -> str:
    """The path under which `Where(modules=...)` knows a layer, in every process the same."""
    return f"model.layers.{layer}.self_attn"


class Served(Host):
    """The model of an engine, as its layers are numbered in every process."""

    provides = frozenset({"tokens", "phases", "requests"})

    def __init__(self, facts: Engine):
        super().__init__(facts)
        self.main = ("text",)
        self._sites = [
            Site(site_path(i), i, "self", facts.heads, facts.kv_heads, causal=True) for i in range(facts.layers)
        ]

    def sites(self) -> list[Site]:
        return self._sites

    def attach(self, run: Steering, journal: Journal) -> None:
        raise UnsupportedHost("an engine is steered by its plug-in in each of its processes; nothing is attached here.")

    def absent(self) -> dict[str, str]:
        why = {
            "images": "the plug-in for vLLM does not tell image tokens apart",
            "image_free": "the plug-in for vLLM runs each prompt once, as it is",
            "residual": "the plug-in for vLLM sees the attention of a layer only, not the residual stream that enters it",
            "bases": "the plug-in for vLLM does not change positions",
        }
        return {need: f"{reason}. Steer the model in transformers." for need, reason in why.items()}

    def check(self, site: Site, bound: Bound) -> None:
        method, name = bound.method, bound.name
        if "around" in bound.doors:
            raise UnsupportedHost(f"{name} calls the model several times, which an engine does not.")
        if method.observes:
            raise UnsupportedHost(f"{name} only reads maps, and a request of an engine has nowhere to put them.")
        if self.target.shards > 1 and (method.pools_heads or method.whole_heads):
            raise UnsupportedHost(
                f"{name} takes statistics over all of its heads, which {self.target.shards} processes share here. Start the engine "
                "with tensor_parallel_size=1."
            )
        if bound.where.modules is not None:
            raise UnsupportedHost(f"{name}: layers of an engine have no names of modules. Select by layers or heads.")


def settings_of(additional: Any, environment: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """The settings of the plug-in, from the engine's `additional_config` or the environment; None: steering is off.

    Raises:
        SelectionError: they are of another form.
    """
    environment = os.environ if environment is None else environment
    found = additional.get(wire.KEY) if isinstance(additional, Mapping) else None
    if found is None and environment.get(VARIABLE):
        try:
            found = json.loads(environment[VARIABLE])
        except (ValueError, RecursionError) as error:
            raise SelectionError(f"{VARIABLE} is not JSON ({error}).") from None
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise SelectionError(
            f"{wire.KEY}={brief(found)}: give an object, e.g. {{}} or {{'steerings': {{'calm': 'folder'}}}}."
        )
    for name in found:
        if name not in SETTINGS:
            raise SelectionError(
                f"{wire.KEY} has no setting {name!r}; it has {listing(SETTINGS)}.{did_you_mean(name, SETTINGS)}"
            )
    return dict(found)


def methods_of(name: str, given: Any) -> list[Intervention]:
    """The methods of a steering that was given at the start: a folder or hub id, `{"method": ...}`, or a list of those."""
    own = given if isinstance(given, (list, tuple)) else [given]
    found = []
    for item in own:
        if isinstance(item, str):
            found.append(Intervention.from_pretrained(item))
        elif isinstance(item, Mapping) and wire.METHOD in item:
            found.append(wire.made(item))
        else:
            raise SelectionError(
                f"the steering {name!r} is {brief(item)}; give a folder of save_pretrained, or {{'{wire.METHOD}': ..., ...}}."
            )
    if not found:
        raise SelectionError(f"the steering {name!r} has no method.")
    return found


class Menu:
    """What requests of one engine may ask for.

    Args:
        settings: see `settings_of`. facts: of the engine.

    Raises:
        SelectionError, UnsupportedHost, SerializationError: a steering does not exist, or cannot act in this engine.
    """

    def __init__(self, settings: Mapping[str, Any], facts: Engine):
        self.facts, self.host = facts, Served(facts)
        self.sites = self.host.sites()
        self.chunked = bool(settings.get("chunked_statistics", False))
        given = settings.get("steerings") or {}
        if not isinstance(given, Mapping) or not all(isinstance(n, str) and n for n in given):
            raise SelectionError(f"steerings={brief(given)}: give an object of names.")
        parts: list[Part] = []
        names: dict[str, tuple[int, ...]] = {}
        for name, item in given.items():
            if name == wire.NOTHING:
                raise SelectionError(f"{name!r} stands for no steering; give another name.")
            first = len(parts)
            parts += [self.part(first + i, m) for i, m in enumerate(methods_of(name, item))]
            names[name] = tuple(range(first, len(parts)))
        self.choices = Choices(parts, names, self.part, lambda choice: None)
        for name, numbers in names.items():
            try:
                self._check(Choice(tuple(parts[i] for i in numbers)))
            except (SelectionError, UnsupportedHost) as error:
                raise type(error)(f"the steering {name!r}: {error}") from None

    @property
    def names(self) -> tuple[str, ...]:
        """The steerings that the engine was started with."""
        return tuple(self.choices.names)

    def part(self, index: int, method: Intervention) -> Part:
        """A method with its selection resolved."""
        bound, selected = bind_one(index, method, self.sites, self.host, attached=True)
        return Part(bound, {site.path: heads for site, heads in selected})

    def asked(self, value: Any, ids: Sequence[int], tokenizer: Any = None) -> Choice:
        """What a request gets.

        Args:
            value: what it says (see `wire`). ids: of its prompt. tokenizer: of the model, for spans that are strings.

        Raises:
            SelectionError, UnsupportedHost: what it asks for does not exist, or cannot be exact here.
        """
        given = wire.parsed(value)
        if given is None:
            return Choice()
        if isinstance(given, str):
            given = {wire.NAME: given}
        if wire.NAME in given:
            choice = self._named(given)
        else:
            method = wire.one(wire.made(given))
            choice = Choice() if method is None else Choice((self.part(0, method),))
        choice = Choice(tuple(self._with_tokenizer(p, tokenizer) for p in choice.parts))
        choice = choice.settled(Tokens(batch=1, length=len(ids), ids=torch.tensor([list(ids)]), prompt=len(ids)))
        self._check(choice)
        return choice

    def _named(self, given: Mapping[str, Any]) -> Choice:
        values = dict(given)
        name = values.pop(wire.NAME)
        if not isinstance(name, str) or name not in self.choices.names:
            have = listing(sorted(self.names), 40) or "none"
            hint = did_you_mean(name, self.names) if isinstance(name, str) else ""
            raise SelectionError(
                f"no steering is named {brief(name)}; this engine was started with {have}. A request may also give "
                f'{{"{wire.METHOD}": ...}}.{hint}'
            )
        found = []
        for i in self.choices.names[name]:
            part = self.choices.parts[i]
            method = part.bound.method
            known = wire.saved(type(method))
            own = {k: values.pop(k) for k in list(values) if k in known}
            if own and len(self.choices.names[name]) > 1:
                raise SelectionError(f"{name!r} has several methods, whose values are as the engine was started with.")
            changed = wire.new(type(method), method.new, own) if own else method
            single = wire.one(changed)
            if single is not None:
                found.append(part if single is method else self.part(i, single))
        if values:
            methods = [type(self.choices.parts[i].bound.method) for i in self.choices.names[name]]
            known = list(dict.fromkeys(n for m in methods for n in wire.saved(m)))
            wrong = next(iter(values))
            raise SelectionError(
                f"{name!r} has no parameter {wrong!r}; it has {listing(known, 30)}.{did_you_mean(wrong, known)}"
            )
        return Choice(tuple(found))

    @staticmethod
    def _with_tokenizer(part: Part, tokenizer: Any) -> Part:
        method = part.bound.method
        if tokenizer is None or getattr(method, "tokenizer", tokenizer) is not None:
            return part
        from dataclasses import replace

        return Part(replace(part.bound, method=method.new(tokenizer=tokenizer)), part.sites)

    def _check(self, choice: Choice) -> None:
        if choice.row_local or self.facts.whole_prompts or self.chunked:
            return
        names = [p.bound.name for p in choice.parts if not p.bound.method.row_local] or [choice.parts[0].bound.name]
        raise UnsupportedHost(
            f"{listing(names)} takes statistics over the prompt, which this engine may cut into chunks, at places that depend on "
            "its other requests. Start it with enable_chunked_prefill=False (--no-enable-chunked-prefill), or say in its "
            f'configuration {{"{wire.KEY}": {{"chunked_statistics": true}}}} that each chunk may go by the rows so far.'
        )

    def received(self, given: Mapping[str, Any]) -> Choice:
        """The choice behind what travelled with a request (see `wire.resolved`)."""
        methods = [wire.restored(item) for item in given["methods"]]
        return Choice(tuple(self.part(i, method) for i, method in enumerate(methods)))
