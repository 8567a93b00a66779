"""The laws: what must hold for every method on every host. Public, so that a plugin runs them on its own method.

A law is a function of a `MethodCase` and a `HostCase`; it returns, or raises an AssertionError, or `NotApplicable`
with the reason. `LAWS` lists them; `check(law, method, host)` runs one.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttnSteerError
from ..intervention import Intervention
from ..site import Site
from ..steering import Steering, sites, steer
from .fingerprint import fingerprint

EXACT = 1e-5
# bf16 carries 8 bits: the kernel's own output and the merged one are each off by up to half of the last.
HALF = 2e-2


class NotApplicable(Exception):
    """The law does not speak about this method on this host; the message says why."""


@dataclass(frozen=True)
class MethodCase:
    """How to build a method for a target.

    Attributes:
        name: shown in test ids. build: (selectable sites, batch size) -> a method that acts visibly.
        identity: the same at the strength that changes nothing; None where there is no such strength.
    """

    name: str
    build: Callable[[Sequence[Site], int], Intervention]
    identity: Callable[[Sequence[Site], int], Intervention] | None = None

    def kind(self) -> type[Intervention]:
        """The class of the method, from its registered name."""
        from ..registry import get_method

        return get_method(self.name)


@dataclass(frozen=True)
class HostCase:
    """How to build and run a target.

    Attributes:
        name: shown in test ids. family: "transformers", "denoiser" or "pipeline".
        build: a fresh target, always with the same weights. inputs: (target, batch, padding, seed) -> arguments.
        run: (target, inputs) -> the tensor that the laws compare, batch first.
        decoder: has a causal KV cache. padded: padding is defined; "left", "right" or both.
    """

    name: str
    family: str
    build: Callable[[], Any]
    inputs: Callable[[Any, int, str | None, int], dict[str, Any]]
    run: Callable[[Any, dict[str, Any]], Tensor]
    decoder: bool = False
    padded: tuple[str, ...] = ()

    def module(self, target: Any) -> nn.Module:
        """The (first) model of the target."""
        if isinstance(target, nn.Module):
            return target
        return getattr(target, "transformer", None) or target.unet


def pool(method: MethodCase, target: Any) -> list[Site]:
    """The sites that the method may be put on: of its kinds, of the main modality, causal where it must be."""
    cls, every = method.kind(), sites(target)
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
    return found


def make(method: MethodCase, target: Any, batch: int, identity: bool = False) -> Intervention:
    """The method for this target; a refusal at binding is a refusal of the combination."""
    build = method.identity if identity else method.build
    if build is None:
        raise NotApplicable("the method has no strength that changes nothing")
    made = build(pool(method, target), batch)
    try:
        steer(target, made).remove()
    except AttnSteerError as error:
        raise NotApplicable(f"refused: {type(error).__name__}") from error
    return made


def valid_rows(inputs: dict[str, Any], out: Tensor) -> Tensor:
    """bool [B, T] of the rows whose outputs mean something."""
    mask = inputs.get("attention_mask")
    if mask is None or "decoder_input_ids" in inputs or out.ndim != 3 or mask.shape != out.shape[:2]:
        return torch.ones(out.shape[:2], dtype=torch.bool)
    return mask.bool()


def _far(a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
    gap = (a.float() - b.float()).abs()
    gap = gap if where is None else gap[where]
    assert torch.isfinite(gap).all(), "NaN or infinity in the output"
    return float(gap.max()) if gap.numel() else 0.0


def _scale(host: HostCase, plain: Tensor) -> float:
    """Latents are compared relative to their size, logits as they are."""
    return 1.0 if host.family == "transformers" else max(1.0, float(plain.abs().max()))


@torch.no_grad()
def law_effect(method: MethodCase, host: HostCase) -> None:
    """At full strength the output changes: without this, the other laws would be vacuous."""
    target = host.build()
    inputs = host.inputs(target, 2, None, 0)
    plain = host.run(target, inputs)
    with steer(target, make(method, target, 2)):
        out = host.run(target, inputs)
    assert _far(out, plain) > 20 * EXACT * _scale(host, plain)


@torch.no_grad()
def law_identity(method: MethodCase, host: HostCase) -> None:
    """Strength zero changes nothing, bit for bit."""
    target = host.build()
    for padding in (None, *host.padded[:1]):
        inputs = host.inputs(target, 3, padding, 1)
        plain = host.run(target, inputs)
        with steer(target, make(method, target, 3, identity=True)):
            out = host.run(target, inputs)
        rows = valid_rows(inputs, plain)
        assert torch.equal(out[rows], plain[rows])
    if host.decoder:
        expected = _decode(target, host, 3)
        with steer(target, make(method, target, 3, identity=True)):
            got = _decode(target, host, 3)
        assert torch.equal(got, expected)


@torch.no_grad()
def law_fires(method: MethodCase, host: HostCase) -> None:
    """Every selected site reports its calls, and an unused attachment is an error."""
    from ..errors import NeverFired

    target = host.build()
    made = make(method, target, 2)
    with steer(target, made) as run:
        host.run(target, host.inputs(target, 2, None, 0))
    for site in run.sites:
        record = run.audit.record(0, site.path)
        assert record.calls >= 1 and record.edits >= 1 and record.rows > 0 and record.heads > 0, site.path
    assert run.audit.fired(0)
    try:
        with steer(target, made):
            pass
    except NeverFired:
        return
    raise AssertionError("leaving without a call must raise NeverFired")


@torch.no_grad()
def law_reference(method: MethodCase, host: HostCase) -> None:
    """The identities give what the explicit map gives."""
    target = host.build()
    made = make(method, target, 4)
    for padding in (None, *host.padded):
        inputs = host.inputs(target, 4, padding, 2)
        with steer(target, made):
            fast = host.run(target, inputs)
        with steer(target, made, reference=True):
            slow = host.run(target, inputs)
        assert _far(fast, slow, valid_rows(inputs, fast)) <= EXACT * _scale(host, slow)
    if host.decoder:
        with steer(target, made) as run:
            fast = _decode(target, host, 4, (5, 2), run=run)
        with steer(target, made, reference=True) as run:
            slow = _decode(target, host, 4, (5, 2), run=run)
        assert _far(fast, slow, _decode_rows(target, host, 4)) <= EXACT


@torch.no_grad()
def law_local(method: MethodCase, host: HostCase) -> None:
    """Heads and sites that are not selected compute what they computed before."""
    target = host.build()
    made = make(method, target, 2)
    inputs = host.inputs(target, 2, None, 3)
    if "around" in made.doors():
        raise NotApplicable(
            "what it changes is no head output of the strong pass; tests/hosts/diffusers compares it whole"
        )
    run = steer(target, made)
    chosen = {r.site.path: r.entries[0][1] for r in run.runtimes.values()}
    run.remove()
    first = next(iter(chosen))
    before = _head_outputs(target, host, inputs, None)
    after = _head_outputs(target, host, inputs, made)
    order = list(before)
    for path in order:
        if path == first:
            heads = chosen[first]
            if heads is not None:
                others = [h for h in range(before[path].shape[1]) if h not in heads]
                assert torch.equal(after[path][:, others], before[path][:, others]), path
                assert not torch.equal(after[path][:, list(heads)], before[path][:, list(heads)]), path
            return
        assert torch.equal(after[path], before[path]), path


@torch.no_grad()
def law_rows(method: MethodCase, host: HostCase) -> None:
    """Where(rows=...) leaves the other rows of the site bit for bit as they were."""
    target = host.build()
    made = make(method, target, 2)
    if "around" in made.doors() or made.where.rows is not None:
        raise NotApplicable(
            "what it changes is no head output of the strong pass; tests/hosts/diffusers compares it whole"
        )
    inputs = host.inputs(target, 2, None, 3)
    before = _head_outputs(target, host, inputs, None)
    with steer(target, made) as run:
        first = run.sites[0].path
        host.run(target, inputs)
    # Two rows that the method edits: some act on a part of the rows by their nature.
    moved = (
        (_head_outputs(target, host, inputs, made)[first] != before[first])
        .transpose(1, 2)
        .flatten(2)
        .any(dim=-1)
        .any(dim=0)
    )
    pairs = [i for i in range(3, len(moved) - 1) if moved[i] and moved[i + 1]]
    own = [pairs[0], pairs[0] + 1]
    limited = made.new(where=made.where & type(made.where)(rows=(own[0], own[0] + 2)))
    after = _head_outputs(target, host, inputs, limited)
    keep = [i for i in range(before[first].shape[2]) if i not in own]
    assert torch.equal(after[first][:, :, keep], before[first][:, :, keep])
    assert not torch.equal(after[first][:, :, own], before[first][:, :, own])


@torch.no_grad()
def law_undo(method: MethodCase, host: HostCase) -> None:
    """After the context, and after an exception in the forward, the target is as if never steered."""
    target = host.build()
    inputs = host.inputs(target, 2, None, 0)
    plain, mark = host.run(target, inputs), fingerprint(target)
    made = make(method, target, 2)
    with steer(target, made):
        host.run(target, inputs)
        assert fingerprint(target) != mark
    assert fingerprint(target) == mark
    assert torch.equal(host.run(target, inputs), plain)

    class Broken(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Broken

    with steer(target, made) as run:
        last = run.sites[-1].module
        host.run(target, inputs)
        hook = last.register_forward_hook(fail)
        try:
            host.run(target, inputs)
        except Broken:
            pass
        else:
            raise AssertionError("the hook did not run")
        finally:
            hook.remove()
    assert fingerprint(target) == mark
    assert torch.equal(host.run(target, inputs), plain)


@torch.no_grad()
def law_causal(method: MethodCase, host: HostCase) -> None:
    """A later token moves no earlier logit; for look-ahead methods: a scored continuation moves none."""
    if not host.decoder:
        raise NotApplicable("no causal decoder")
    target = host.build()
    made = make(method, target, 2)
    inputs = host.inputs(target, 2, None, 0)
    ids = inputs["input_ids"]
    n = ids.shape[1]
    if not made.looks_ahead:
        changed = {**inputs, "input_ids": _other_tokens(ids, n - 2)}
        same = _same_as(target, host.run(target, inputs)[:, : n - 2], host.run(target, changed)[:, : n - 2])
        if "residual" in made.needs:
            # Key sets found in hidden states: a later member is masked away, but changes the size of the gathered products.
            same = lambda a, b: _far(a, b) <= EXACT  # noqa: E731
        with steer(target, made):
            first, second = host.run(target, inputs), host.run(target, changed)
        assert same(first[:, : n - 2], second[:, : n - 2])
        assert not torch.equal(first[:, n - 2 :], second[:, n - 2 :])
    extra = ids[:, -5:]
    with steer(target, made) as run:
        first = _score(target, host, run, inputs, extra)
        others = []
        for t in range(1, 5):
            other = extra.clone()
            other[:, t:] = _other_tokens(other, t)[:, t:]
            others.append((n + t, other, _score(target, host, run, inputs, other)))
    plain = _score(target, host, None, inputs, extra)
    for upto, other, second in others:
        same = _same_as(target, plain[:, :upto], _score(target, host, None, inputs, other)[:, :upto])
        assert same(first[:, :upto], second[:, :upto])
        assert not torch.equal(first, second)


@torch.no_grad()
def law_padding(method: MethodCase, host: HostCase) -> None:
    """A row in a padded batch is the row alone."""
    if not host.padded:
        raise NotApplicable("no padding on this host, or its positions count padding")
    target = host.build()
    for padding in host.padded:
        inputs = host.inputs(target, 4, padding, 7)
        with steer(target, make(method, target, 4)):
            together = host.run(target, inputs)
        mask = inputs["attention_mask"].bool()
        for b in range(4):
            single = {k: _one_row(k, v, b, mask[b]) for k, v in inputs.items()}
            with steer(target, make(method, target, 1)):
                alone = host.run(target, single)
            rows = together[b] if "decoder_input_ids" in inputs or together.ndim < 3 else together[b][mask[b]]
            assert _far(rows, alone[0]) <= EXACT, (padding, b)


@torch.no_grad()
def law_cache(method: MethodCase, host: HostCase) -> None:
    """Decoding over a cache, whole or chunked prefill, equals one forward over all tokens.

    A look-ahead method's statistics stop at the prompt, so for it the last chunk must equal the whole prefill's
    rows, and decoding after chunks must equal decoding after one prefill.
    """
    if not host.decoder:
        raise NotApplicable("no KV cache")
    target = host.build()
    made = make(method, target, 3)
    if made.looks_ahead:
        with steer(target, made):
            whole = _decode(target, host, 3)
        with steer(target, made) as run:
            chunked = _decode(target, host, 3, (4, 1), steps=0, run=run)
        with steer(target, made, reference=True) as run:
            slow = _decode(target, host, 3, (4, 1), steps=0, run=run)
        rows = _decode_rows(target, host, 3, steps=0)
        assert _far(chunked, slow, rows) <= EXACT
        # The last chunk has seen all rows, so below the first steered layer's output it is the whole prefill.
        with steer(target, made):
            again = _decode(target, host, 3)
        assert torch.equal(again, whole)
        return
    with steer(target, made) as run:
        whole = _decode(target, host, 3)
        chunked = _decode(target, host, 3, (4, 3), steps=0, run=run)
    rows = _decode_rows(target, host, 3)[:, : chunked.shape[1]]
    assert _far(chunked, whole[:, : chunked.shape[1]], rows) <= EXACT
    with steer(target, made) as run:
        plain = _decode(target, host, 3)
    assert torch.equal(plain, whole)


@torch.no_grad()
def law_beams(method: MethodCase, host: HostCase) -> None:
    """Beam search reorders state with the cache: same sequences and scores as with the explicit map."""
    if not host.decoder:
        raise NotApplicable("no KV cache")
    target = host.build()
    made = make(method, target, 2)
    inputs = host.inputs(target, 2, "left" if "left" in host.padded else None, 4)
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "output_scores": True}
    results = []
    for reference in (False, True):
        with steer(target, made, reference=reference):
            out = target.generate(**_generation(inputs), **options, return_dict_in_generate=True)
        results.append(out)
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert _far(results[0].sequences_scores, results[1].sequences_scores) <= EXACT
    if not made.looks_ahead and not _prompt_bound(made):
        with steer(target, made):
            again = target.generate(**_generation(inputs), **options, return_dict_in_generate=True, use_cache=False)
        assert torch.equal(again.sequences, results[0].sequences)


@torch.no_grad()
def law_dtype(method: MethodCase, host: HostCase) -> None:
    """In bf16, head outputs at the steered site stay close to the explicit map's, whose statistics are fp32."""
    if host.family == "pipeline":
        raise NotApplicable("fp32 pipelines only; the denoisers are tested in bf16")
    target = host.build().to(torch.bfloat16)
    made = make(method, target, 2)
    inputs = _to(host.inputs(target, 2, None, 5), torch.bfloat16)
    run = steer(target, made)
    site = run.sites[0].path
    run.remove()
    plain = _head_outputs(target, host, inputs, None)[site]
    fast = _head_outputs(target, host, inputs, made)[site]
    slow = _head_outputs(target, host, inputs, made, reference=True)[site]
    assert fast.dtype == torch.bfloat16
    assert _far(fast, slow) <= HALF * float(plain.float().abs().max())
    assert _far(fast, plain) > 0


@torch.no_grad()
def law_backends(method: MethodCase, host: HostCase) -> None:
    """Eager and SDPA bases give the same steered output."""
    if host.family != "transformers":
        raise NotApplicable("attention backends of diffusers are tested in tests/hosts")
    target = host.build()
    made = make(method, target, 2)
    inputs = host.inputs(target, 2, host.padded[0] if host.padded else None, 6)
    outs = []
    for name in ("eager", "sdpa"):
        try:
            target.set_attn_implementation(name)
        except ValueError:
            continue  # the library itself has no SDPA for soft-capping and learned sinks
        with steer(target, made):
            outs.append(host.run(target, inputs))
    for other in outs[1:]:
        assert _far(outs[0], other, valid_rows(inputs, other)) <= EXACT


@torch.no_grad()
def law_dispatch(method: MethodCase, host: HostCase) -> None:
    """accelerate's hooks before or after steering change nothing."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    target = host.build()
    made = make(method, target, 2)
    inputs = host.inputs(target, 2, None, 0)
    plain = host.run(target, inputs)
    with steer(target, made):
        expected = host.run(target, inputs)
    module = host.module(target)
    with steer(target, made) as run:
        attention = run.sites[0].module
        host.run(target, inputs)
    for m in (module, attention):
        add_hook_to_module(m, ModelHook())
    with steer(target, made):
        assert torch.equal(host.run(target, inputs), expected)
    assert torch.equal(host.run(target, inputs), plain)
    for m in (module, attention):
        remove_hook_from_module(m)
    with steer(target, made):
        for m in (module, attention):
            add_hook_to_module(m, ModelHook())
        assert torch.equal(host.run(target, inputs), expected)
    assert torch.equal(host.run(target, inputs), plain)


def law_round_trip(method: MethodCase, host: HostCase) -> None:
    """Save, load, same output."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        target = host.build()
        made = make(method, target, 2)
        loaded = Intervention.from_pretrained(made.save_pretrained(folder))
        assert loaded == made
        inputs = host.inputs(target, 2, None, 0)
        with steer(target, made):
            first = host.run(target, inputs)
        with steer(target, loaded):
            second = host.run(target, inputs)
        assert torch.equal(first, second)


def law_threads(method: MethodCase, host: HostCase) -> None:
    """Two threads with two models do not see each other; a third model stays unsteered."""
    targets = [host.build() for _ in range(2)]
    inputs = [host.inputs(targets[0], 2, None, seed) for seed in (0, 1)]
    made = make(method, targets[0], 2)
    with torch.no_grad():
        expected = []
        for i in range(2):
            with steer(targets[i], made):
                expected.append(host.run(targets[i], inputs[i]))
        plain = host.run(targets[0], inputs[0])
    barrier, got, errors = threading.Barrier(2), [None, None], []

    def work(i: int) -> None:
        try:
            with torch.no_grad(), steer(targets[i], made):
                barrier.wait(timeout=30)
                for _ in range(3):
                    got[i] = host.run(targets[i], inputs[i])
        except BaseException as error:  # reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors
    with torch.no_grad():
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
        assert torch.equal(host.run(targets[0], inputs[0]), plain)


@torch.no_grad()
def law_compile(method: MethodCase, host: HostCase) -> None:
    """A compiled model, compiled before or after steering, acts as the uncompiled one; never ignored."""
    if host.family == "pipeline":
        raise NotApplicable("the denoisers are compiled in tests/hosts")
    target = host.build()
    made = make(method, target, 2)
    inputs = host.inputs(target, 2, None, 0)
    with steer(target, made):
        expected = host.run(target, inputs)
    plain = host.run(target, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(target, backend="eager")
    assert _far(host.run(compiled, inputs), plain) <= EXACT * _scale(host, plain)
    with steer(compiled, made) as run:
        out = host.run(compiled, inputs)
        assert run.audit.fired(0)
    assert _far(out, expected) <= EXACT * _scale(host, expected)
    assert _far(host.run(compiled, inputs), plain) <= EXACT * _scale(host, plain)
    torch._dynamo.reset()


LAWS: dict[str, Callable[[MethodCase, HostCase], None]] = {
    name.removeprefix("law_"): value for name, value in list(globals().items()) if name.startswith("law_")
}


def check(law: str, method: MethodCase, host: HostCase) -> None:
    """Run one law by name."""
    LAWS[law](method, host)


class _Tap(Intervention):
    """Keeps each site's final head outputs; edits nothing."""

    linear = True

    def output(self, call: Any, out: Tensor) -> None:
        whole = _TAPPED.setdefault(call.site.path, out.new_zeros(out.shape[0], call.site.heads, *out.shape[2:]))
        # The first call only: later steps of a pipeline start from an edited latent.
        if (call.site.path, call.heads) not in _SEEN:
            _SEEN.add((call.site.path, call.heads))
            whole[:, list(call.heads)] = out.detach()


_TAPPED: dict[str, Tensor] = {}
_SEEN: set[tuple[str, tuple[int, ...]]] = set()


def _head_outputs(
    target: Any, host: HostCase, inputs: dict[str, Any], method: Intervention | None, reference: bool = False
) -> dict[str, Tensor]:
    from ..where import Where

    main = sites(target)[0].modality if host.family != "transformers" else "text"
    found = tuple(m for m in ("text", "vision", "image") if m == main) or (main,)
    tap = _Tap(where=Where(modalities=found))
    _TAPPED.clear()
    _SEEN.clear()
    with steer(target, *([] if method is None else [method]), tap, reference=reference):
        host.run(target, inputs)
    return dict(_TAPPED)


def _other_tokens(ids: Tensor, start: int) -> Tensor:
    other = ids.clone()
    # Token ids below 8 are special in the tiny models.
    other[:, start:] = (other[:, start:] - 8 + 5) % 24 + 8
    return other


def _same_as(target: nn.Module, plain: Tensor, changed: Tensor) -> Callable[[Tensor, Tensor], bool]:
    """Bit-equality, where the unsteered model has it: experts that batch tokens together round by their company.

    With such experts two unsteered outputs may still be equal by luck, so that proves nothing about the steered ones.
    """
    experts = any("experts" in name for name, _ in target.named_modules())
    if torch.equal(plain, changed) and not experts:
        return torch.equal
    assert _far(plain, changed) <= EXACT
    return lambda a, b: _far(a, b) <= EXACT


def _score(target: nn.Module, host: HostCase, run: Steering | None, inputs: dict[str, Any], extra: Tensor) -> Tensor:
    """Prefill the prompt, freeze, score the continuation over a copy of the cache; all logits."""
    out = target(**inputs, use_cache=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(extra)], dim=1)
    with contextlib.nullcontext() if run is None else run.freeze():
        more = target(input_ids=extra, attention_mask=mask, past_key_values=copy.deepcopy(out.past_key_values))
    return torch.cat([out.logits, more.logits], dim=1)


def _decode(
    target: nn.Module,
    host: HostCase,
    batch: int,
    chunks: tuple[int, ...] = (),
    steps: int = 4,
    run: Steering | None = None,
) -> Tensor:
    """Left-padded prefill (`chunks`: sizes of the later calls), then decode fixed tokens; all logits."""
    inputs = host.inputs(target, batch, "left" if "left" in host.padded else None, 8)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    n = ids.shape[1]
    extra = _other_tokens(ids, 0)[:, -steps:] if steps else ids[:, :0]
    ids, mask = torch.cat([ids, extra], dim=1), torch.cat([mask, torch.ones_like(extra)], dim=1)
    position = (mask.cumsum(dim=-1) - 1).clamp_min(0)
    edges = [0, *_chunk_edges(n, chunks), *range(n + 1, n + steps + 1)]
    cache, logits = None, []
    for at, stop in itertools.pairwise(edges):
        more = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs and at == 0 else {}
        with run.chunked_prefill(tokens=n) if run is not None and stop <= n else contextlib.nullcontext():
            out = target(
                input_ids=ids[:, at:stop],
                attention_mask=mask[:, :stop],
                position_ids=position[:, at:stop],
                past_key_values=cache,
                use_cache=True,
                **more,
            )
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def _chunk_edges(n: int, chunks: tuple[int, ...]) -> list[int]:
    """Ends of the prefill calls: the first takes what the later chunks (given from the end) leave."""
    ends = [n]
    for size in reversed(chunks):
        ends.append(ends[-1] - size)
    return [e for e in reversed(ends) if e > 0]


def _decode_rows(target: nn.Module, host: HostCase, batch: int, steps: int = 4) -> Tensor:
    mask = host.inputs(target, batch, "left" if "left" in host.padded else None, 8)["attention_mask"].bool()
    return torch.cat([mask, torch.ones(batch, steps, dtype=torch.bool)], dim=1)


def _one_row(name: str, value: Any, b: int, valid: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    row = value[b : b + 1]
    return row[:, valid] if row.ndim == 2 and row.shape[1] == valid.shape[0] and not name.startswith("decoder") else row


def _generation(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k != "position_ids"}


def _prompt_bound(made: Intervention) -> bool:
    """Without a cache the prompt's end is not known, so generated tokens would count as prompt."""
    return hasattr(made, "scale_position")


def _to(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    cast = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return {k: {a: cast(b) for a, b in v.items()} if isinstance(v, dict) else cast(v) for k, v in inputs.items()}
