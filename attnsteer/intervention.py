"""`Intervention`: the contract of a method, and its save and load."""

from __future__ import annotations

import inspect
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .errors import HubError, RegistrationError, SelectionError, SerializationError, brief, did_you_mean
from .heads import HeadSet, checked_path, union
from .parameters import Named, PerSample, check_fields, declared, parsed, sample_values
from .registry import base_of, get_method, registered_name
from .where import Where

if TYPE_CHECKING:
    from torch import Tensor

    from .account import Samples
    from .call import AttnCall, BlockBias, HeadOutputs, KeyBias, MergedTokens, Reweight
    from .site import Site
    from .tokens import Tokens

SCHEMA_VERSION = 1
RECORD, HEADS = "steer.json", "heads.safetensors"
# Needs of methods whose `around` door a language model has: streams of it, or the layers behind some one.
PASSES = frozenset({"bases", "layers"})
# The methods of the contract, and what each is called with.
DOORS = {
    "inputs": ("call",),
    "bias": ("call",),
    "weights": ("call",),
    "output": ("call", "out"),
    "around": ("forward", "inputs", "run"),
}


def _where(value: Any) -> Where:
    if not isinstance(value, Where):
        raise SelectionError("give a Where, e.g. Where(layers=[0]).")
    return value


@base_of("methods")
@dataclass(frozen=True)
class Intervention(Named):
    """Base of all methods: a frozen dataclass of hyper-parameters and a `where`.

    Hyper-parameters are declared with their ranges (see `parameters`), and checked when the object is made. Every strength, target,
    scale and gate takes one number, or a list with one for each sample (None: it is left alone). A method's own
    `__post_init__` calls this one first; it is for checks that tie fields together.

    A method overrides any of `inputs`, `bias`, `weights`, `output` (inside attention; pure tensor maths on the
    selected heads) and `around` (outside: several model calls). Shapes: q [B, H, n, d], k and v [B, Hkv, m, d],
    out [B, H, n, dv].

    Class attributes:
        looks_ahead: statistics run over the whole prompt, so a later prompt token moves an earlier row.
        kinds: the kinds of site the method is defined on; others are refused (or left out when `where`
            names no kind).
        needs: names of what the host must provide: "tokens", "images" (their image roles), "residual", "image_free",
            "segments", "grid", "steps", "prompt" as attributes of the call (see `AttnCall`); "contrast" as one, the negative
            prompt that the method names in `negative`, while its `on` holds; "image_prompt" as one, where it acts on
            the attention to an image prompt and on no other; "latent" in `inputs.loop`, the latent of the sampling loop.
        causal_only: the method is defined on causal self-attention only.
        follows_crop: whether the state stays right when the cache is cut back behind the prompt.
        linear: whether the method only edits values and outputs, so that linear attention can take it.
        observes: whether it only reads, so that changing nothing is no error.
        may_rest: whether its own rule leaves some inputs alone, so that changing nothing is a warning instead of an error.
        whole_heads: its statistics run over all of its heads at a site, so neither another method nor tensor parallelism may
            divide them.
        pools_heads: the same, but as sums that it takes through `call.over_heads`, so tensor parallelism may divide them.
        skips_blocks: whether the blocks that hold its sites are left out of its weak passes.
        approximate: whether it computes less than the model's attention on purpose; `steer(..., measure=True)` records its error.
        row_local: whether what a row gets depends on that row, its keys and the parameters alone: nothing is pooled over rows, and
            nothing is kept in `call.state`. Such a method takes prompts in chunks and shared prefixes as they come; the prompts
            of others are kept whole in continuous batching.
        prefix_local: whether what the rows of a prompt get, and what is kept of them, depends on these rows and those before them
            alone once it is known that the prompt goes on (`call.tokens.more_to_come`); what several prompts begin with can then be
            read once. As `row_local`, unless it is said.
        steady: whether what it answers in a decode step is its answer of the step before, so that the step can be done again
            without asking it: neither the row, nor the map, nor what was generated since decides it, and keys that came since
            stand where the row's own key stands.
        frozen_keys: for a method that keeps something in `call.state`: the entry that is all it reads there for rows behind the
            prompt, a key set [B, H, T] by slot, which moves no more; so requests can share batches from there on. None: there is
            no such entry.
    """

    # Said so that type checkers see it too.
    _: KW_ONLY
    where: Where = parsed(_where, "Where", default_factory=Where, kw_only=True)

    looks_ahead: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross", "joint")
    needs: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = False
    causal_only: ClassVar[bool] = False
    follows_crop: ClassVar[bool] = True
    whole_heads: ClassVar[bool] = False
    pools_heads: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    may_rest: ClassVar[bool] = False
    skips_blocks: ClassVar[bool] = False
    row_local: ClassVar[bool] = False
    steady: ClassVar[bool] = False
    frozen_keys: ClassVar[str | None] = None
    approximate: ClassVar[bool] = False
    # Set when it is made: the parameters with one value per sample, by name; and those of them by which it leaves some
    # samples, or heads of samples, alone.
    sample_values: ClassVar[dict[str, PerSample]] = {}
    restricting: ClassVar[tuple[PerSample, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check what the class says of itself.

        Raises:
            RegistrationError: `needs` is no tuple of names; a string would be taken for its letters. Or a door takes other
                parameters than the contract's, or a field has the name of a door or of another function of this class.
        """
        super().__init_subclass__(**kwargs)
        for name in inspect.get_annotations(cls):
            if callable(getattr(Intervention, name, None)):
                raise RegistrationError(
                    f"{cls.__name__}.{name}: a method has a function {name}() already, which this field would take the place of; "
                    "give the field another name."
                )
        if "row_local" not in vars(cls) and any(door in vars(cls) for door in DOORS):
            # What a base says of its own doors says nothing of new ones.
            cls.row_local = False
            if "frozen_keys" not in vars(cls):
                cls.frozen_keys = None
        if "prefix_local" not in vars(cls) and any(door in vars(cls) for door in DOORS):
            cls.prefix_local = vars(Intervention)["prefix_local"]
        if "steady" not in vars(cls):
            # Each class says it for itself: what a base asks in its doors may be another's.
            cls.steady = False
        # A property decides it for each object.
        fixed = () if isinstance(cls.needs, property) else cls.needs
        if isinstance(fixed, str) or not all(isinstance(need, str) for need in fixed):
            raise RegistrationError(
                f'{cls.__name__}.needs is {brief(cls.needs)}; give a tuple of names, e.g. needs = ("tokens",).'
            )
        for door, arguments in DOORS.items():
            function = vars(cls).get(door)
            if inspect.isfunction(function):
                signature = inspect.signature(function)
                try:
                    signature.bind(None, *arguments)
                except TypeError:
                    raise RegistrationError(
                        f"{cls.__name__}.{door}{signature} is called as {door}({', '.join(arguments)}); give it these parameters "
                        "after self."
                    ) from None

    @property
    def prefix_local(self) -> bool:
        """As `row_local`."""
        return self.row_local

    def __post_init__(self) -> None:
        check_fields(self)
        found = sample_values(self)
        if found:
            object.__setattr__(self, "sample_values", found)
            object.__setattr__(self, "restricting", tuple(v for name, v in found.items() if self._restricts(name, v)))

    def _restricts(self, name: str, value: PerSample) -> bool:
        """Whether a field leaves samples alone: by None, unless that means for one sample what it means for all."""
        form = declared(type(self), name)
        return value.of_heads or (value.rests and form is not None and not form.optional)

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | MergedTokens | HeadOutputs | None:
        """Return edited (q, k, v), `MergedTokens`, `HeadOutputs`, or None for no edit."""

    def bias(self, call: AttnCall) -> KeyBias | BlockBias | Tensor | None:
        """Return an additive score term: a `KeyBias`, a tensor broadcastable to [B, H, n, m], or a `BlockBias`."""

    def weights(self, call: AttnCall) -> Reweight | None:
        """Return weights for groups of keys, or None for no edit."""

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        """Return the edited head outputs [B, H, n, dv], or None for no edit."""

    def head_factors(self, call: AttnCall, out: Tensor) -> Tensor | None:
        """Of a steady method that edits `out` [B, H, n, dv] by a product: its factor [B or 1, H, 1, 1], or None for no edit."""

    def around(self, forward: Callable[..., Any], inputs: Any, run: Any) -> Any:
        """Call `forward` any number of times, with inside edits on where `run.inside(self)` is entered."""
        return forward(inputs)

    def of_sample(self, which: Callable[[str, int], int]) -> Intervention | None:
        """The method for one sample by itself; None where it leaves that sample alone.

        Args:
            which: (name of a parameter, number of samples that it has values for) -> which of them.
        """
        changes = {}
        for f in fields(self):
            form, value = declared(type(self), f.name), getattr(self, f.name)
            count = None if form is None else form.count(value)
            if count is None:
                if isinstance(value, PerSample):
                    # A tensor that needs a gradient, with one value for all.
                    changes[f.name] = value.values[0]
                continue
            changes[f.name] = form.of_sample(value, which(f.name, count))
            if changes[f.name] is None and (isinstance(value, Mapping) or self._restricts(f.name, value)):
                return None
        return self.new(**changes) if changes else self

    def check_samples(self, samples: Samples) -> None:
        """Raise a SelectionError if parameters have values for another number of samples; asked before the model's layers run."""
        for name, value in self.sample_values.items():
            if value.count is not None and value.count not in samples.of_row:
                many = f"{value.count} value{'' if value.count == 1 else 's'}"
                raise SelectionError(
                    f"{type(self).__name__}({name}=...) has {many}, and this is {samples}. Give one value for all, or one for "
                    "each sample."
                )

    def check_tokens(self, tokens: Tokens) -> None:
        """Raise a SelectionError if a call lacks tokens that the method speaks of; asked before the model's layers run."""

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        """The selection that stands for an empty `where` on these sites; None: the host's main sites."""

    def prepared(self, target: Any) -> Intervention:
        """The method with what it looks up about `target` filled in; called when it is attached, before any patch."""
        return self

    def selection(self) -> Where:
        """`where`, with the method's own `heads` folded in."""
        heads = getattr(self, "heads", None)
        return self.where if heads is None else self.where & Where(heads=union(heads))

    def doors(self) -> set[str]:
        """Which of the five methods of the contract the class overrides."""
        return {n for n in DOORS if getattr(type(self), n) is not getattr(Intervention, n)}

    def new(self, **changes: Any) -> Self:
        """A copy with some hyper-parameters changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Hyper-parameters as JSON-able values (head sets as {"layer": [heads]}); runtime-only fields left out."""
        return {f.name: plain_value(getattr(self, f.name)) for f in _saved(type(self))}

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write `steer.json` and, for a head set, `heads.safetensors` into `directory`.

        Raises:
            UnknownName: the class is not registered, so that it could not be found again.
            SerializationError: a value has no form in JSON, there are two different head sets, or `directory` is no path.
        """
        from .versions import library_versions

        directory = checked_path(f"{type(self).__name__}.save_pretrained", directory)
        values, sets = {}, []
        for f in _saved(type(self)):
            value = getattr(self, f.name)
            values[f.name] = plain_value(value)
            if isinstance(value, HeadSet):
                sets.append(value)
                values[f.name] = {"$heads": HEADS}
            elif isinstance(value, PerSample) and value.of_heads:
                raise SerializationError(
                    f"{type(self).__name__}({f.name}=...) has a head set for each sample, which a file has no place for; save one "
                    "method for each."
                )
            elif isinstance(value, Where) and isinstance(value.heads, HeadSet):
                sets.append(value.heads)
                values[f.name]["heads"] = {"$heads": HEADS}
        if any(other != sets[0] for other in sets):
            raise SerializationError(
                f"{type(self).__name__} has two different head sets, {' and '.join(map(repr, sets))}; give it one."
            )
        record = {
            "schema": SCHEMA_VERSION,
            "method": registered_name(type(self)),
            "parameters": values,
            "versions": library_versions(),
        }
        text = json.dumps(record, indent=2, allow_nan=False)
        directory.mkdir(parents=True, exist_ok=True)
        if sets:
            sets[0].save(directory / HEADS)
        (directory / RECORD).write_text(text + "\n", encoding="utf-8")
        return directory

    def push_to_hub(
        self,
        repo: str,
        *,
        model: Any = None,
        evidence: str = "",
        private: bool | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Share the method as a repository of the hub, with a card and a manifest; returns the address of the commit.

        Args:
            repo: owner/name; made where there is none. model: the model that it is for, or its id; others are refused when it is
                loaded for them. evidence: what a run says of it, for the card (`attnsteer.results.hub_runs.evidence`).
            private, token, endpoint: of the hub.

        Raises:
            HubError: the hub refuses or cannot be reached.
            UnknownName, SerializationError: see `save_pretrained`.
        """
        from .hub import card, model_facts, origin, upload

        facts = model_facts(model)
        with tempfile.TemporaryDirectory(prefix="attnsteer-") as scratch:
            folder = self.save_pretrained(scratch)
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            body = [f"`{record['method']}`, a training-free attention intervention of attnsteer.", "", origin(facts)]
            body += [f"- {k}: `{json.dumps(v)}`" for k, v in record["parameters"].items()]
            body += [f"- {k}: {v}" for k, v in record["versions"].items()]
            body += ["", "```python", "from attnsteer import Intervention, steer"]
            body += [f'with steer(model, Intervention.from_pretrained("{repo}", model=model)):', "    ...", "```"]
            body += ["", evidence] if evidence else []
            base = (facts or {}).get("id")
            text = card(repo, "method", "\n".join(body), base_model=base, tags=[record["method"]])
            names = [n for n in (RECORD, HEADS) if (folder / n).is_file()]
            return upload(
                folder,
                names,
                repo,
                "method",
                about={"model": facts},
                card=text,
                private=private,
                token=token,
                endpoint=endpoint,
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        model: Any = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> Intervention:
        """Load what `save_pretrained` wrote, from a local folder, or what `push_to_hub` made, by its hub id.

        Called on `Intervention` it returns whatever class was saved; on a subclass it checks the class.

        Args:
            revision: commit, tag or branch. model: what it shall act in, or its id: a method of the hub that was made for
                another model is refused. token, endpoint: of the hub.

        Raises:
            SerializationError: missing or broken files, unknown fields, a newer schema, another class.
            HubError: the hub has no such repository, or cannot be reached.
            SelectionError: it was made for another model.
            UnknownName: a method that is not registered here.
        """
        directory = _directory(source, revision, model, token, endpoint)
        record = _read_record(directory / RECORD)
        found = get_method(record["method"])
        if not issubclass(found, cls):
            raise SerializationError(
                f"{cls.__name__}.from_pretrained: {directory} holds a {found.__name__}; "
                f"use {found.__name__}.from_pretrained or Intervention.from_pretrained."
            )
        known = {f.name: f for f in _saved(found)}
        values = {}
        for name, value in record["parameters"].items():
            if name not in known:
                raise SerializationError(
                    f"{directory}/steer.json has a field {name!r} that {found.__name__} does not know; "
                    f"it has {sorted(known)}.{did_you_mean(name, known)}"
                )
            try:
                values[name] = _restore(name, value, directory)
            except SerializationError:
                raise
            except (TypeError, ValueError) as error:
                raise SerializationError(f"{directory}/{RECORD}, field {name!r}: {error}") from error
        missing = [
            n for n, f in known.items() if n not in values and f.default is MISSING and f.default_factory is MISSING
        ]
        if missing:
            raise SerializationError(f"{directory}/steer.json lacks the fields {missing} of {found.__name__}.")
        try:
            return found(**values)
        except (TypeError, ValueError) as error:
            raise SerializationError(
                f"{directory}/steer.json has values that do not make a {found.__name__}: {error}"
            ) from error


def _saved(cls: type) -> list[Any]:
    return [f for f in fields(cls) if f.metadata.get("save", True)]


def plain_value(value: Any) -> Any:
    """The value of a field in the form that JSON has (see `save_pretrained`).

    Raises:
        SerializationError: it has none.
    """
    if isinstance(value, PerSample):
        return value.values[0] if value.count is None else [plain_value(v) for v in value.values]
    if isinstance(value, HeadSet):
        return value.to_json()
    if isinstance(value, Where):
        return {k: plain_value(v) for k, v in value.to_dict().items()}
    if isinstance(value, dict):
        return {"$pairs": [[plain_value(k), plain_value(v)] for k, v in value.items()]}
    if isinstance(value, (tuple, list)):
        return [plain_value(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no infinity; repr and float are each other's inverse.
        return {"$float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise SerializationError(f"a value of type {type(value).__name__} cannot be saved in steer.json.")


def _restore(name: str, value: Any, directory: Path) -> Any:
    if name == "where" and not isinstance(value, dict):
        raise SerializationError(f"{directory}/{RECORD}: where is {value!r}; expected an object of selections.")
    if isinstance(value, dict):
        if set(value) == {"$heads"}:
            # Only a plain file name inside the folder: a saved method must not read elsewhere.
            if value["$heads"] != HEADS:
                raise SerializationError(f"{directory}/{RECORD} points to {value['$heads']!r}; expected {HEADS}.")
            return HeadSet.load(directory / HEADS)
        if set(value) == {"$float"}:
            return float(value["$float"])
        if set(value) == {"$pairs"}:
            return {_hashable(_restore(name, k, directory)): _restore(name, v, directory) for k, v in value["$pairs"]}
        if name == "where":
            return Where(**{k: _restore(k, v, directory) for k, v in value.items()})
        return {k: _restore(k, v, directory) for k, v in value.items()}
    if isinstance(value, list):
        return [_restore(name, v, directory) for v in value]
    return value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def needs_of(cls: type[Intervention]) -> tuple[str, ...]:
    """What a class needs whatever its hyper-parameters are; nothing where they decide it (a property)."""
    return () if isinstance(cls.needs, property) else cls.needs


def _directory(
    source: str | Path, revision: str | None, model: Any = None, token: str | None = None, endpoint: str | None = None
) -> Path:
    if checked_path("from_pretrained", source).is_dir():
        return Path(source)
    from .hub import check_model, download
    from .manifest import read_manifest

    try:
        found = download(
            str(source),
            "method",
            lambda name: name in (RECORD, HEADS),
            revision=revision,
            token=token,
            endpoint=endpoint,
        )
    except HubError as error:
        raise HubError(f"{source!r} is neither a folder nor a hub repository that can be had. {error}") from error
    check_model(read_manifest(found, links=True), model, f"the method {source}")
    return found


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SerializationError(f"there is no {path}; save_pretrained writes it.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise SerializationError(f"{path} is not JSON: {error}.") from error
    wanted = {"schema": int, "method": str, "parameters": dict}
    if not isinstance(record, dict) or any(not isinstance(record.get(k), t) for k, t in wanted.items()):
        raise SerializationError(f"{path} must be an object with an integer 'schema', a 'method' and 'parameters'.")
    if not 1 <= record["schema"] <= SCHEMA_VERSION:
        raise SerializationError(
            f"{path} has schema {record['schema']}, this version reads up to {SCHEMA_VERSION}; upgrade attnsteer."
        )
    return record
