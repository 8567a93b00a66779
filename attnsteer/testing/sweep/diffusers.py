"""The part of the sweep for diffusers: every denoiser, in the small configs of `recorded/denoisers.json`.

A record has a class, the arguments of its constructor, and the form of its inputs (shapes, or the values of masks and positions),
taken from the library's own model tests and from ours. A class of which there is no record is listed as not built.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ... import PAG, HeadGate, Where, sites, steer
from ...errors import AttnSteerError
from ...hosts.diffusers.probe import Structure, probe
from ...hosts.diffusers.streams import listed_kind, pattern_of
from ...site import Site
from ..weights import randomize_
from .rows import Row
from .watch import inside, watching

RECORDS = Path(__file__).with_name("recorded") / "denoisers.json"
# Parts of other models, wrappers, and what predicts no noise: no denoisers of their own.
NO_DENOISERS = re.compile(r"ControlNet|Adapter|^(Dual)?Transformer2DModel$|^MotionModules$")
# Relative to the largest output: two ways to compute the same in float32.
LIMIT = 2e-5


def versions() -> dict[str, str]:
    """Library -> version that is installed."""
    import diffusers

    return {"diffusers": diffusers.__version__}


@functools.cache
def records() -> dict[str, dict[str, Any]]:
    """Name -> record."""
    return {record["name"]: record for record in json.loads(RECORDS.read_text(encoding="utf-8"))}


def names() -> list[str]:
    """All configs that are recorded, and all denoiser classes without one."""
    known = {record["model"] for record in records().values()}
    return sorted({*records(), *(name for name in classes() if name not in known)})


@functools.cache
def classes() -> dict[str, type]:
    """The denoiser classes of the library: its models below `transformers` and `unets`."""
    import importlib
    import pkgutil

    from diffusers.models.modeling_utils import ModelMixin

    found = {}
    for part in ("transformers", "unets", "controlnets"):
        folder = importlib.import_module(f"diffusers.models.{part}")
        for module in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
            for name, cls in vars(importlib.import_module(module.name)).items():
                if inspect.isclass(cls) and issubclass(cls, ModelMixin) and cls.__module__ == module.name:
                    found[name] = cls
    recorded = {record["model"] for record in records().values()}
    return {n: c for n, c in found.items() if n in recorded or not NO_DENOISERS.search(n)}


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A recorded model, random, in `eval()`, and the arguments of one forward."""
    record = records()[name]
    torch.manual_seed(seed)
    stand_in(classes()[record["model"]])
    model = randomize_(classes()[record["model"]](**record["config"]), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    return model, {key: _made(value, generator) for key, value in record["inputs"].items()}


def _made(spec: dict[str, Any], generator: torch.Generator) -> Any:
    """An argument from its record."""
    kind, value = next((k, v) for k, v in spec.items() if k != "dtype")
    dtype = getattr(torch, spec.get("dtype", "float32"))
    if kind == "randn":
        return torch.randn(*value, generator=generator).to(dtype)
    if kind == "complex":
        return torch.polar(torch.ones(*value), torch.randn(*value, generator=generator))
    if kind == "full":
        return torch.full(value[0], value[1], dtype=dtype)
    if kind == "values":
        return torch.tensor(value, dtype=dtype)
    if kind == "dict":
        return {int(k) if k.isdigit() else k: _made(v, generator) for k, v in value.items()}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_made(v, generator) for v in value)
    return value


class _Transforms:
    """What Cosmos takes from torchvision."""

    class InterpolationMode:
        NEAREST = "nearest"

    class functional:
        @staticmethod
        def resize(image: Tensor, size: list[int], interpolation: str) -> Tensor:
            return torch.nn.functional.interpolate(image, size=size, mode=interpolation)


def stand_in(cls: type) -> None:
    """Define torchvision's transforms in the module of a class where the package is not here: it leaves the name undefined."""
    vars(sys.modules[cls.__module__]).setdefault("transforms", _Transforms)


def forward(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """One forward; every tensor of numbers that comes out."""
    given = _fresh(inputs)
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        given["return_dict"] = False
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(**given)
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def _fresh(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _fresh(v) for k, v in value.items()}
    return type(value)(_fresh(v) for v in value) if type(value) in (list, tuple) else value


def measure(name: str) -> Row:
    """Build `name` small, and measure it."""
    if name not in records():
        return Row(name, name, reason="there is no record of a small config")
    row = Row(name, records()[name]["model"])
    try:
        model, inputs = build(name)
        plain = forward(model, inputs)
        with watching(model) as watch:
            forward(model, inputs)
    except Exception as error:  # of the library's: nothing of ours is attached
        row.reason = _brief(error)
        return row
    try:
        _measure(row, model, inputs, plain, {seen.owner for seen in watch.seen})
    except AttnSteerError as error:
        row.verdict, row.reason = "refused", _brief(error)
    except Exception as error:  # a fault of ours, whatever it is
        row.verdict, row.reason = "wrong", _brief(error)
    return row


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error) or 'without a message'}"[:240]


def _measure(row: Row, model: nn.Module, inputs: dict[str, Any], plain: list[Tensor], owners: set[str]) -> None:
    if not owners:
        row.verdict = "no softmax attention"
        return
    found = list(sites(model))
    row.sites, row.heads = len(found), sorted({s.heads for s in found})
    soft = [s for s in found if not s.linear]
    ran = {s.name: any(o == s.name or o.startswith(f"{s.name}.") for o in owners) for s in soft}
    processors = [getattr(s.module, "processor", None) for s in found]
    faults: list[str] = []
    lacks = sorted(o for o in owners if not any(o == s.name or o.startswith(f"{s.name}.") for s in found))
    # Each tower numbers its layers by itself.
    towers = {s.modality: [o for o in soft if o.modality == s.modality] for s in soft}
    with steer(model, *(_open(sites_) for sites_ in towers.values()), control=True):
        same = _equal(forward(model, inputs), plain)
    row.measured["identity"] = "bit-identical" if same else "differs"
    faults += [] if same else ["an identity gate is not bit-identical"]
    refused: dict[str, str] = {}
    gates = guided = 0
    for site in _samples([s for s in soft if ran[s.name]]):
        head = site.heads - 1
        try:
            with steer(model, HeadGate({(site.layer, head): 0.0}, where=_only(site))):
                ours = forward(model, inputs)
        except AttnSteerError as error:
            refused[_pattern(site.name)] = _brief(error)
            continue
        with watching(model, {site.name: (site.heads, head)}):
            expected = forward(model, inputs)
        gates += 1
        if not _near(ours, expected):
            faults.append(f"a closed head of {site.name} is not the edited map")
        elif _equal(ours, plain):
            faults.append(f"a closed head of {site.name} changed nothing")
    row.measured["gates"] = gates
    for site in _samples([s for s in soft if ran[s.name] and s.kind in ("self", "joint")])[:3]:
        outcome = _guidance(model, inputs, plain, site)
        guided += outcome == ""
        if outcome.startswith("wrong"):
            faults.append(outcome)
        elif outcome:
            row.measured[f"guidance at {_pattern(site.name)}"] = outcome
    row.measured["guidance"] = guided
    if not _equal(forward(model, inputs), plain) or any(
        getattr(s.module, "processor", None) is not p for s, p in zip(found, processors, strict=True)
    ):
        faults.append("something stays after removal")
    structures = looked_at(model, inputs)
    row.measured["structure"] = described(structures)
    for what in _contradictions(structures, {s.name: s for s in found}):
        faults.append(what)
    if faults:
        row.verdict, row.reason = "wrong", "; ".join(faults)[:240]
    elif refused and not gates:
        row.verdict, row.reason = "refused", next(iter(refused.values()))
    elif refused or lacks:
        row.verdict = "exact but"
        parts = [f"refused at {p}: {why}" for p, why in refused.items()]
        parts += [f"attention without a site: {', '.join(sorted({_pattern(o) for o in lacks}))}"] if lacks else []
        row.reason = "; ".join(parts)[:240]
    else:
        row.verdict = "exact"


def looked_at(model: nn.Module, inputs: dict[str, Any]) -> list[Structure]:
    """What the probe finds; nothing where the model cannot be looked at."""
    try:
        return probe(model, inputs)
    except Exception:  # caches among the arguments, or inputs that cannot be permuted
        return []


def described(structures: list[Structure]) -> dict[str, list[Any]]:
    """Pattern of a site's name -> [kind, order of the rows, where the own keys are ("first", "last" or "")], where all agree."""
    found: dict[str, set[tuple[Any, ...]]] = {}
    finer: dict[str, set[tuple[Any, ...]]] = {}
    for s in structures:
        own = ""
        if s.kind == "own":
            place = s.own_keys
            own = "" if place is None else "first" if place.start == 0 else "last"
        plain = not s.ragged and all(names for names, _ in s.queries[1:])
        entry = (s.kind, s.order if plain else (), own)
        found.setdefault(_pattern(s.site), set()).add(entry)
        finer.setdefault(pattern_of(s.site, 1), set()).add(entry)
    told = {name: entries for name, entries in found.items() if len(entries) == 1}
    # Blocks whose attentions take turns: by the number of each within its block.
    told |= {n: e for n, e in finer.items() if len(e) == 1 and len(found.get(re.sub(r"\.\d+(?=\.|$)", ".*", n), e)) > 1}
    return {name: [v[0], list(v[1]), v[2]] for name, (v,) in told.items()}


def _contradictions(structures: list[Structure], by_name: dict[str, Site]) -> list[str]:
    found = []
    for name, (kind, order, _) in described(structures).items():
        for site in by_name.values():
            if (
                name in (_pattern(site.name), pattern_of(site.name, 1))
                and kind != "?"
                and site.kind != listed_kind(kind, tuple(order))
            ):
                found.append(f"{site.name} is listed as {site.kind}, and by its rows it is {kind}")
                break
    return found


def _guidance(model: nn.Module, inputs: dict[str, Any], plain: list[Tensor], site: Site) -> str:
    """PAG at a site against an edit from outside; "" where they agree, else what is wrong, or why it was refused."""
    try:
        with (
            steer(model, PAG(2.0, joint="joint_identity", where=_only(site)), control=True) as run,
            run.branches("cond"),
        ):
            ours = forward(model, inputs)
    except AttnSteerError as error:
        return _brief(error)
    with identity_at(model, site.name, last="prefix" in site.parts):
        weak = forward(model, inputs)
    if _equal(weak, plain):
        return "the edit from outside does not reach it"
    expected = [s + 2.0 * (s - w) for s, w in zip(plain, weak, strict=True)]
    return "" if _near(ours, expected) else f"wrong: guidance at {site.name} is not the strong and the weak pass"


class _Values(TorchFunctionMode):
    on = False
    # Rows of the whole sequence, where only those that see all of it count.
    whole = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.on and func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = [*args, *(kwargs.get(n) for n in ("query", "key", "value")[len(args) :])][:3]
            v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
            if self.whole:
                return v[:, :, -q.shape[2] :].clone() if k.shape[2] == self.whole else func(*args, **kwargs)
            if q.shape[2] == k.shape[2]:
                return v.clone()
        return func(*args, **kwargs)


@contextlib.contextmanager
def identity_at(model: nn.Module, name: str, last: bool = False) -> Iterator[None]:
    """In this block the attention of one module gives its values; `last`: of the rows that see the whole sequence, alone."""
    mode, module = _Values(), model.get_submodule(name)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode.whole = (args[0] if args else kwargs["hidden_states"]).shape[1] if last else 0

    hook = module.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with inside(module, mode):
            yield
    finally:
        hook.remove()


def _open(found: list[Site]) -> HeadGate:
    """Every head of some sites with a gate of one; heads that a narrower layer's neighbour lacks are left out."""
    least = {s.layer: min(o.heads for o in found if o.layer == s.layer) for s in found}
    gates = {(layer, head): 1.0 for layer, heads in least.items() for head in range(heads)}
    return HeadGate(gates, where=Where(modalities=(found[0].modality,)))


def _only(site: Site) -> Where:
    return Where(modules=re.escape(site.path), modalities=(site.modality,), kinds=(site.kind,))


def _pattern(name: str) -> str:
    return pattern_of(name)


def _samples(found: list[Site]) -> list[Site]:
    """The first and the last of each name pattern."""
    groups: dict[str, list[Site]] = {}
    for site in found:
        groups.setdefault(_pattern(site.name), []).append(site)
    return [site for group in groups.values() for site in dict.fromkeys((group[0], group[-1]))]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _near(a: list[Tensor], b: list[Tensor], limit: Callable[[Tensor], float] = lambda t: LIMIT) -> bool:
    if len(a) != len(b):
        return False
    return all(
        float((x - y).abs().max()) <= limit(y) * max(1e-6, float(y.abs().max())) for x, y in zip(a, b, strict=True)
    )
