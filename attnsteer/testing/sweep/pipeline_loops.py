"""Runs of a small pipeline: plain, steered, and by hand. Nothing of the host tells the loop by hand which rows are conditional."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ... import HeadGate, SoftPAG, Where, sites, steer
from ...hosts.diffusers.rows import latent_name
from ...site import Site
from .pipeline_builds import DENOISERS, Built
from .watch import inside, watching

# Final latents, relative to the largest: two ways to compute the same, through several steps in float32.
LIMIT = 5e-4
# Arguments that say what to make.
TEXTS = ("prompt", "prompts", "text", "content_prompt", "transcription")
EMBEDS = (
    "prompt_embeds",
    "qwen_prompt_embeds",
    "connector_prompt_embeds",
    "text_features",
    "frame_hiddens",
    "image_embeds",
    "audio_embeds",
)
ASKED = {*TEXTS, *EMBEDS, "class_labels"}
# Models whose image keys stand before the text's, or a reference's, by their code.
OWN_FIRST = re.compile("Nucleus|StableCascade|Wuerstchen")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NEXT = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])
PICTURES = ("image", "example_image")


class _Mix(TorchFunctionMode):
    """Half of A V and half of V, or of nothing, wherever it is on."""

    on, off, first = False, False, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.on and func is torch.nn.functional.scaled_dot_product_attention:
            v = args[2] if len(args) > 2 else kwargs["value"]
            if self.off:
                return 0.5 * out
            n = out.shape[2]
            if v.shape[2] >= n:
                # Beside further keys, those of the rows themselves.
                v = v[:, :, :n] if self.first else v[:, :, -n:]
                v = v.repeat_interleave(out.shape[1] // v.shape[1], 1)
                return torch.lerp(out, v, 0.5)
        return out


@contextlib.contextmanager
def _mixed_at(module: nn.Module, off: bool, first: bool) -> Iterator[None]:
    mode = _Mix()
    mode.off, mode.first = off, first
    before = getattr(module, "processor", None)
    # Tests of the library put eager processors on; their twins call the primitive.
    eager = type(before).__name__ in ("AttnAddedKVProcessor", "AttnProcessor")
    try:
        if eager:
            from diffusers.models import attention_processor

            module.processor = getattr(attention_processor, f"{type(before).__name__}2_0")()
        with inside(module, mode):
            yield
    finally:
        if eager:
            module.processor = before


def _preferred(found: list[Site]) -> list[Site]:
    """Sites of one sort: self-attention of the main stream, else of another, else cross-attention."""
    own = [s for s in found if s.kind in ("self", "joint")]
    groups = ([s for s in own if s.modality == "image"], [s for s in own if s.modality != "text"], found)
    return next((group for group in groups if group), [])


def _schedulers(pipe: Any) -> dict[str, Any]:
    """Name -> scheduler, each once."""
    found: dict[str, Any] = {}
    for name in ("scheduler", *pipe.components):
        part = getattr(pipe, name, None)
        if callable(getattr(type(part), "step", None)) and not isinstance(part, nn.Module):
            if all(part is not other for other in found.values()):
                found[name] = part
    return found


def _sample(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result.prev_sample


@contextlib.contextmanager
def _stepping(schedulers: dict[str, Any], seen: Any) -> Iterator[None]:
    """In this block `seen(name, copied, step, scheduler, ...)` takes the place of each step, of copies of the schedulers too."""

    def watched(kind: type) -> Any:
        step = kind.step
        first = next(name for name, s in schedulers.items() if type(s) is kind)

        @functools.wraps(step)
        def observed(own: Any, *args: Any, **kwargs: Any) -> Any:
            name = next((name for name, s in schedulers.items() if s is own), None)
            return seen(name or first, name is None, step, own, *args, **kwargs)

        return observed

    with contextlib.ExitStack() as stack:
        for kind in dict.fromkeys(map(type, schedulers.values())):
            stack.enter_context(mock.patch.object(kind, "step", watched(kind)))
        yield


class UnseenError(Exception):
    """The steps of a run could not be seen, so that there is nothing to compare."""


class Loop:
    """Runs of one pipeline: plain, steered, and by hand.

    Attributes:
        verdict, reason: why there is nothing to compare; "" where there is.
        calls: for each denoiser call of a step, which of its rows are conditional.
    """

    def __init__(self, found: Built):
        self.pipe, self.inputs = found.pipe, found.inputs
        self.verdict, self.reason = "not built", ""
        first, second = self._record(None), self._record("changed")
        pipe = self.pipe
        self.name = first["name"]
        if self.name is None:
            self.verdict, self.reason = "no softmax attention", "it calls no denoiser with attention sites"
            return
        self.scheduler = first["scheduler"]
        if not first["steps"]:
            self.reason = "it makes no step of a scheduler, and gives nothing else that could be compared"
            return
        self.plain = first["steps"][-1]
        # Numbers of tokens change only where the most likely one does.
        self.scale = 2.0 if self.plain.is_floating_point() else 100.0
        if not bool(self.plain.isfinite().all()):
            self.reason = "its small random parts give numbers that are not finite"
            return
        self.calls = [self._changed(a, b) for a, b in zip(first["first"], second["first"], strict=True)]
        self.given = first["given"]
        found = [s for s in sites(pipe) if s.component == self.name]
        self.sites = found
        ran = first["ran"]
        usable = _preferred([s for s in found if not s.linear and s.name in ran])
        if not usable:
            self.verdict, self.reason = "no softmax attention", "no softmax attention of its denoiser ran"
            return
        self.site: Site = usable[len(usable) // 2]
        if not any(any(rows) for rows in self.calls):
            if ASKED & set(self.inputs()):
                self.reason = "no row of its denoiser changes with the prompt"
                return
            # Nothing is asked of it: what it makes, all rows make.
            self.calls = [[True] * len(rows) for rows in self.calls]

    def described(self) -> str:
        """The rows of a step's calls: c conditional, u not."""
        return " ".join("".join("c" if r else "u" for r in rows) for rows in self.calls)

    @staticmethod
    def _changed(a: list[Tensor], b: list[Tensor]) -> list[bool]:
        batch = len(a[0]) if isinstance(a[0], (Tensor, list)) else 1
        found: list[list[bool]] = []
        for x, y in zip(a[1:], b[1:], strict=False):
            if isinstance(x, list):
                found.append([not _alike(x[i], y[i]) for i in range(batch)])
            elif x.shape != y.shape:
                found.append([batch == 1] * batch)
            elif x.shape[0] % batch == 0:
                found.append((x != y).reshape(batch, -1).any(dim=1).tolist())
            elif batch == 1:
                found.append([bool((x != y).any())])
        found = [rows for rows in found if any(rows)] or [[False] * batch]
        # Where the first axis is one of layers, all rows seem to change: those that no argument denies have.
        both = [all(row) for row in zip(*found, strict=True)]
        return both if any(both) else [any(row) for row in zip(*found, strict=True)]

    def _record(self, change: str | None) -> dict[str, Any]:
        """One plain run: float arguments of the first step's calls, and what the scheduler's steps gave."""
        pipe, given = self.pipe, self.inputs()
        for key in TEXTS:
            if change and isinstance(given.get(key), str):
                given[key] = _others(given[key])
            elif change and isinstance(given.get(key), list) and given[key] and isinstance(given[key][0], str):
                given[key] = [_others(t) for t in given[key]]
        for key in EMBEDS:
            if change and isinstance(given.get(key), Tensor):
                given[key] = given[key] + 0.5
            elif change and isinstance(given.get(key), list) and isinstance(given[key][0], Tensor):
                given[key] = [t + 0.5 for t in given[key]]
        if change and isinstance(given.get("class_labels"), list):
            given["class_labels"] = [c + 1 for c in given["class_labels"]]
        for key in PICTURES:
            if change and key in given and not ASKED & set(given):
                given[key] = _negative(given[key])
        found: dict[str, Any] = {"name": None, "first": [], "given": [], "steps": [], "ran": set(), "scheduler": None}

        def around(name: str, inner: Any, values: dict[str, Any]) -> Any:
            found["name"] = found["name"] or name
            if name == found["name"] and not found["steps"]:
                found["first"].append(_floats(values))
                found["given"].append(frozenset(values))
            if found["ran"]:
                return inner()
            with watching(getattr(pipe, name)) as watch:
                out = inner()
            found["ran"] |= {seen.owner for seen in watch.seen}
            return out

        def stepped(out: Any, scheduler: str, copied: bool) -> None:
            if found["name"] is None:
                return
            # That of the first denoiser: pipelines that are made of several have one for each, or one for all.
            found["scheduler"] = found["scheduler"] or scheduler
            if scheduler == found["scheduler"] and self.running == found["name"]:
                (copies if copied else found["steps"]).append(out)

        copies: list[Tensor] = []
        result = self._run(pipe, given, around, stepped)
        # A pipeline may step by copies of its scheduler, one for each frame; or by one of them for what goes beside, as its sound.
        self.copied = not found["steps"]
        found["steps"] = found["steps"] or copies
        # One that makes no step is compared by what comes out of it.
        self.stepless = not found["steps"]
        found["steps"] = found["steps"] or [t for t in [_made(result)] if t is not None]
        self.count = len(found["steps"])
        return found

    def _run(self, pipe: Any, given: Any, around: Any, stepped: Any, before: Any = None) -> Any:
        undo = []
        for name in DENOISERS:
            model = getattr(pipe, name, None)
            if not isinstance(model, nn.Module):
                continue
            attends = any(callable(getattr(m, "processor", None)) for m in model.modules())
            inner, names_ = model.forward, list(inspect.signature(type(model).forward).parameters)[1:]

            @functools.wraps(inner)
            def forward(
                *args: Any,
                _inner: Any = inner,
                _names: Any = names_,
                _name: str = name,
                _attends: bool = attends,
                **kwargs: Any,
            ) -> Any:
                values = dict(zip(_names, args, strict=False)) | kwargs
                self.running = _name
                if not _attends:
                    return _inner(*args, **kwargs)
                return around(_name, lambda own=None: _inner(*_fresh(args, own), **_fresh(kwargs, own)), values)

            vars(model)["forward"] = forward
            undo.append(model)
        schedulers = _schedulers(pipe)

        def seen(name: str, copied: bool, step: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
            output = args[0] if args else kwargs["model_output"]
            if before is not None and name == self.scheduler and self.running == self.name and not copied:
                output = before(output)
            if args:
                args = (output, *args[1:])
            else:
                kwargs["model_output"] = output
            result = step(own, *args, **kwargs)
            stepped(_sample(result), name, copied)
            return result

        torch.manual_seed(0)
        try:
            with _stepping(schedulers, seen):
                return pipe(**given)
        finally:
            for model in undo:
                vars(model).pop("forward", None)

    def compare(self, what: str) -> str:
        """ "" where the steered run is the one made by hand, else what is wrong."""
        ours, expected = self._steered(what), self._by_hand(what)
        if what != "HeadGate" and any(self.calls[0]) and _gap(ours, expected) > LIMIT:
            # Where the pipeline turns predictions into something else, the term is one of predictions.
            expected = self._by_hand(what, rows=True)
        if self.stepless and torch.equal(expected, self.plain):
            raise UnseenError("it makes no step of its scheduler, and its result, cut off at both ends, shows no edit")
        if not _gap(ours, expected) <= LIMIT:
            return f"wrong: {_gap(ours, expected):.1e} from the loop made by hand"
        if torch.equal(ours, self.plain):
            return "wrong: nothing changed"
        return "exact"

    def _method(self, what: str) -> Any:
        site = self.site
        where = {"modules": re.escape(site.path), "kinds": site.kind}
        if what == "HeadGate":
            return HeadGate({(site.layer, 0): 0.0}, where=Where(branches="cond", **where))
        if site.kind == "cross":
            # Rows have no keys of their own there.
            return SoftPAG(self.scale, 0.5, target="zero", where=Where(**where))
        return SoftPAG(self.scale, 0.5, joint="joint_identity", where=Where(**where))

    def _steered(self, what: str) -> Tensor:
        pipe, given = self.pipe, self.inputs()
        steps: list[Tensor] = []

        def seen(name: str, copied: bool, step: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(own, *args, **kwargs)
            if name == self.scheduler and copied == self.copied:
                steps.append(_sample(result))
            return result

        torch.manual_seed(0)
        with _stepping(_schedulers(pipe), seen), steer(pipe, self._method(what), control=True):
            result = pipe(**given)
        return _made(result) if self.stepless else self._last(steps)

    def _last(self, steps: list[Tensor]) -> Tensor:
        """What the last step of the denoiser gave; those of a denoiser after it may follow."""
        if len(steps) < self.count:
            raise UnseenError("it exchanges what its scheduler holds, so its steps are not seen")
        return steps[self.count - 1]

    def _by_hand(self, what: str, rows: bool = False) -> Tensor:
        """The run with a loop's own weak pass. `rows`: the term goes on every row, instead of on their combination."""
        pipe, given = self.pipe, self.inputs()
        rows = rows or self.stepless
        state: dict[str, Any] = {"call": 0, "term": None, "rows": [], "own": {}}
        steps: list[Tensor] = []

        def around(name: str, inner: Any, values: dict[str, Any]) -> Any:
            if name != self.name:
                return inner()
            at = self._place(values, state["call"])
            cond = torch.tensor(self.calls[at])
            state["call"] = at + 1
            seed = torch.get_rng_state()
            strong = inner()
            module = getattr(pipe, name).get_submodule(self.site.name)
            owner = type(getattr(pipe, name)).__name__
            after = torch.get_rng_state()
            torch.set_rng_state(seed)
            if what == "HeadGate":
                with watching(getattr(pipe, name), {self.site.name: (self.site.heads, 0)}):
                    # What it leaves for later calls counts where all rows are edited.
                    weak = inner(None if bool(cond.all()) else state["own"])
            else:
                with _mixed_at(module, self.site.kind == "cross", bool(OWN_FIRST.match(owner))):
                    weak = inner(state["own"])
            torch.set_rng_state(after)
            if what == "HeadGate":
                return _picked(strong, weak, cond)
            s, w = _predicted(strong, len(cond)), _predicted(weak, len(cond))
            if bool(cond.any()):
                terms = [self.scale * (a - b) for a, b in zip(s, w, strict=True)]
                state["terms"] = [t[cond] if len(cond) == len(t) else t for t in terms]
                state["term"] = state["terms"][0]
            if rows and state["term"] is not None:
                return _shifted(strong, state["terms"])
            s = s[0]
            state["rows"].append(s)
            return strong

        def before(output: Tensor) -> Tensor:
            term, seen = state["term"], state["rows"]
            state["rows"] = []
            state["call"] = 0
            if what == "HeadGate" or term is None or rows:
                return output
            cut = tuple(slice(0, n) for n in output.shape)
            if term.numel() == output.numel():
                # Frames of which there is one may be left out.
                size = output[:1].numel()
                term = term.reshape(output.shape)
                seen = [r.reshape(-1, *output.shape[1:]) for r in seen if r.numel() % size == 0]
            if term.ndim != output.ndim:
                return output
            return output + self._sign(seen, output) * term[cut]

        def stepped(out: Any, scheduler: str, copied: bool) -> None:
            if scheduler == self.scheduler and copied == self.copied:
                steps.append(out)

        result = self._run(pipe, given, around, stepped, before)
        return _made(result) if self.stepless else self._last(steps)

    def _place(self, values: dict[str, Any], call: int) -> int:
        """Which of the first step's calls one is: later steps lack those with which a run begins, as for a reference's keys."""
        order = [i % len(self.given) for i in range(call, call + len(self.given))]
        return next((i for i in order if self.given[i] == frozenset(values)), order[0])

    @staticmethod
    def _sign(rows: list[Tensor], output: Tensor) -> float:
        """Whether the pipeline negates its predictions: by the weights with which the first sample's rows make the combination."""
        size, y = max(1, len(output)), output[0].flatten().double()
        cut = tuple(slice(0, n) for n in output.shape[1:])
        found = [r[i][cut] for r in rows if r.ndim == output.ndim for i in range(0, len(r), size)]
        found = [r.flatten().double() for r in found if r.shape == output.shape[1:]]
        if not found:
            return 1.0
        return 1.0 if float((torch.linalg.pinv(torch.stack(found, 1)) @ y).sum()) >= 0 else -1.0


def _made(result: Any) -> Tensor | None:
    """The latents, or else the first numbers, of what a pipeline gives; None where there are none."""
    found = result.get("latents") if hasattr(result, "get_by_kwargs") else result
    leaves = [torch.as_tensor(t) for t in tree_leaves(found) if isinstance(t, Tensor) or type(t).__name__ == "ndarray"]
    return next((t for t in leaves if t.is_floating_point()), None)


def _fresh(value: Any, own: dict[int, Any] | None = None) -> Any:
    """Containers are copied: some models empty the lists that they get.

    Args:
        own: the copies that such a pass has of what the model keeps keys and values in; None: it has what it is given.
    """
    if isinstance(value, dict):
        return {k: _fresh(v, own) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fresh(v, own) for v in value)
    if own is None or isinstance(value, nn.Module) or not type(value).__module__.startswith("diffusers"):
        return value
    return own.setdefault(id(value), (value, copy.deepcopy(value)))[1]


def _others(text: str) -> str:
    """Other words of as many letters; of JSON, other values."""
    if text.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.dumps({k: _others(v) if isinstance(v, str) else v for k, v in json.loads(text).items()})
    return text.translate(NEXT)


def _shifted(out: Any, terms: list[Tensor]) -> Any:
    """A prediction with a term of one branch on each part of its rows."""
    leaves, form = tree_flatten(out)
    places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
    for i, term in zip(places, terms, strict=False):
        leaves[i] = leaves[i] + term.repeat(len(leaves[i]) // len(term), *[1] * (term.ndim - 1))
    return tree_unflatten(leaves, form)


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((a - b).abs().max() / b.abs().max()) if a.shape == b.shape else float("inf")


def _negative(picture: Any) -> Any:
    """The negative of an image, a list of them, or a tensor from 0 to 1."""
    if isinstance(picture, list):
        return [_negative(p) for p in picture]
    if isinstance(picture, Tensor):
        return 1.0 - picture
    from PIL import ImageOps

    return ImageOps.invert(picture.convert("RGB"))


def _alike(a: Any, b: Any) -> bool:
    pairs = [(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=False) if isinstance(x, Tensor)]
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def _floats(values: dict[str, Any]) -> list[Any]:
    """The latent first, then the arguments that have an entry for each row, and the tensors of all others."""
    latent = values.get(latent_name(values) or "")
    rest = {k: v for k, v in values.items() if v is not latent}
    batch = len(latent) if isinstance(latent, (list, Tensor)) else 1
    lists = [v for v in rest.values() if isinstance(v, list) and len(v) == batch and isinstance(latent, list)]
    leaves = tree_leaves({k: v for k, v in rest.items() if not any(v is other for other in lists)})
    tensors = [t.clone() for t in leaves if isinstance(t, Tensor) and t.ndim and t.dtype != torch.bool]
    return [latent, *lists, *tensors]


def _predicted(out: Any, rows: int) -> list[Tensor]:
    """The predictions of a call, one of each modality; stacked, where it gives one tensor for each row."""
    tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    apart = len(tensors) == rows > 1 and all(len(t) != rows for t in tensors)
    return [torch.stack(tensors)] if apart else tensors


def _picked(strong: Any, weak: Any, cond: Tensor) -> Any:
    """The weak prediction in the conditional rows, the strong one in the others, in the form of the model's own."""
    a, form = tree_flatten(strong)
    b = tree_leaves(weak)
    tensors = [i for i, t in enumerate(a) if isinstance(t, Tensor)]
    # One tensor for each row, or rows in each tensor.
    apart = len(tensors) == len(cond) and all(len(a[i]) != len(cond) for i in tensors)
    for n, i in enumerate(tensors):
        if apart:
            a[i] = b[i] if cond[n] else a[i]
        else:
            same = len(a[i]) == len(cond)
            a[i] = torch.where(cond.view(-1, *[1] * (a[i].ndim - 1)) if same else cond.any(), b[i], a[i])
    return tree_unflatten(a, form)
