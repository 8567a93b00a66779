"""In a worker: each attention layer's own implementation runs, and the rows of steered requests are edited in its output.

vLLM runs attention in an operator that its compiler does not look into, and that asks the layer for its implementation each time.
So it is enough to give that object a class of ours, which derives from its own: everything else of vLLM sees what it saw.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import kernels
from ...attention_map import FEW_ROWS
from ...audit import is_set
from ...batches import check_stateless
from ...engine import SiteRuntime
from ...errors import UnsupportedHost
from ..exact import check_exact
from .limits import check_engine, check_layers, check_version
from .menu import Menu, site_path
from .paged import Decoding, Layout, PagedAttention, PagedForms, Together, TogetherForms, cpu_layout, takes_split
from .rows import Armed, Batch, Ledger, Plan, Tracked, follow

# Rows by which a long prompt's edit is known to have changed something.
LOOKED_AT = 64


class Step:
    """One call of a layer's attention.

    Args:
        alone: whether every row of it is edited. run: the layer's own kernel.

    Attributes:
        together: the edits of decode rows, done at the end. whole: (packed rows, all of their heads) of rows that are done.
        ran: whether the layer's own kernel did.
    """

    def __init__(
        self, impl: Any, query: Tensor, cache: Tensor, metadata: Any, output: Tensor, alone: bool, layout: Layout,
        run: Callable[[], Any],
    ):  # fmt: skip
        self.impl, self.query, self.cache, self.metadata, self.output = impl, query, cache, metadata, output
        self.alone, self._run, self.ran = alone, run, False
        self.together = Together(query, cache, layout, impl.scale, window_of(impl))
        self.whole: list[tuple[Tensor | slice, Tensor]] = []

    def own(self) -> None:
        """Let the layer's own kernel fill the output, once."""
        if not self.ran:
            self.ran = True
            self._run()


class Layer:
    """The seam at one layer.

    Args:
        name: of the layer in vLLM. number: in the model. ledger: of the worker.
    """

    def __init__(self, name: str, number: int, ledger: Ledger):
        self.name, self.number, self.ledger = name, number, ledger
        self.path = site_path(number)
        self.layout: Layout | None = None
        self.exact = False

    def edit(
        self,
        impl: Any,
        layer: Any,
        query: Tensor,
        cache: Tensor,
        metadata: Any,
        output: Tensor,
        plan: Plan,
        run: Callable[[], Any],
    ) -> None:
        """Fill `output` [tokens, H, d] with the layer's own result, the rows of a plan edited.

        Args:
            run: the layer's own kernel, which fills `output`. It does not run in a step all of whose rows are edited: what edits
                them computes them whole.
        """
        if self.layout is None:
            self.layout = layout_of(impl, layer, cache)
        acting = [(batch, *self._acting(batch)) for batch in plan.batches]
        alone = plan.rows == metadata.num_actual_tokens and all(active for *_, active in acting)
        step = Step(impl, query, cache, metadata, output, alone, self.layout, run)
        for batch, runtime, active in acting:
            if active:
                self._edit(step, batch, runtime, active)
        if not alone:
            step.own()
        for rows, new in step.whole:
            output[rows] = new
        # What was edited in part would have had the kernel run.
        for rows, heads, new in step.together.run(whole=not step.ran):
            output[(rows[:, None], torch.tensor(heads)) if len(heads) < output.shape[1] else (rows,)] = new

    def _acting(self, batch: Batch) -> tuple[Any, tuple[int, ...]]:
        """(what acts on a batch here, which of it does in this phase)."""
        runtime = batch.runtimes.get(self.path)
        return runtime, () if runtime is None else runtime.active(batch.phase, None, None)

    def _edit(self, step: Step, batch: Batch, runtime: SiteRuntime, active: tuple[int, ...]) -> None:
        impl, cache, metadata, output = step.impl, step.cache, step.metadata, step.output
        B, n = batch.batch, batch.new
        heads = lambda t: t[batch.rows].view(B, n, impl.num_heads, -1).transpose(1, 2)  # noqa: E731
        window = window_of(impl)
        softcap, sinks = impl.logits_soft_cap or None, getattr(impl, "sinks", None)
        mask, causal = batch.mask(window)
        att = PagedAttention(
            heads(step.query), impl.num_kv_heads, batch.length, lambda: read(self.layout, cache, metadata, batch, window),
            impl.scale, mask, causal, softcap, sinks,
        )  # fmt: skip
        reads = runtime.reads_map(active)
        if not self.exact and reads:
            step.own()
            check_exact(runtime.site, att, lambda index: heads(output).index_select(2, index))
            self.exact = True
        # A long prompt, of which torch's kernel gives all heads and the log-sum-exp at once.
        plain = step.alone and cache.dtype == torch.float32 and cache.device.type == "cpu" and reads
        instead = plain and B == 1 and n > FEW_ROWS and flash(att)
        made: list[Tensor] = []

        def base() -> Tensor:
            if not made and instead:
                made.append(kernels.attend(att))
            elif not made:
                step.own()
                # A copy: what is edited is written where it stands.
                made.append(heads(output).clone())
            return made[0]

        forms = None
        if n == 1 and takes_split(cache, self.layout, softcap, sinks):
            first = (batch.lengths - window).clamp_min(0) if window else torch.zeros_like(batch.lengths)
            table = metadata.block_table.index_select(0, batch.index)
            rows = Decoding(att.q[:, :, 0], cache, self.layout, table, batch.lengths, first, batch.pads, impl.scale)
            forms = PagedForms(rows, base)
            if apart(runtime, active):
                requests = [p.request for p in batch.pieces]
                forms = TogetherForms(step.together, rows, batch.packed, base, requests, len(runtime.partition(active)))
        flags = [self.ledger.run.audit.record(runtime.entries[i][0].index, self.path).flags_in for i in active]
        for own in flags:
            own[batch.phase].last = None
        states = batch.states
        call = batch.call(runtime, batch.length, states)
        out = runtime(att, base, call, active, partial(flash, att) if instead else None, sdpa=instead, forms=forms)
        if batch.pieces[0].request.choice.row_local:
            check_stateless(runtime, states)
        if instead:
            request = batch.pieces[0].request
            request.edits += not (made and out is made[0])  # type: ignore[attr-defined]
            told = [own[batch.phase].last for own in flags] if request.changed is not True else []  # type: ignore[attr-defined]
            if any(bool(is_set(flag)) for flag in told if flag is not None):
                request.changed = True  # type: ignore[attr-defined]
            step.whole.append((batch.rows, out.transpose(1, 2).reshape(n, *output.shape[1:])))
            return
        if isinstance(forms, TogetherForms) and forms.taken:
            for piece in batch.pieces:
                piece.request.edits += 1  # type: ignore[attr-defined]
            if forms.whole:
                return
        elif made and out is made[0]:
            return
        self._note(batch, out, base)
        new = out.transpose(1, 2).reshape(B * n, *output.shape[1:]).to(output.dtype)
        if isinstance(batch.rows, slice):
            output[batch.rows] = new
        elif batch.real is None:
            output.index_copy_(0, batch.rows, new)
        else:
            own, packed = batch.real
            output.index_copy_(0, packed, new.index_select(0, own))

    @staticmethod
    def _note(batch: Batch, out: Tensor, base: Callable[[], Tensor]) -> None:
        """Count the edit for each request, and look whether it has changed something until it is known to have."""
        requests = [p.request for p in batch.pieces]
        for request in requests:
            request.edits += 1  # type: ignore[attr-defined]
        if all(isinstance(r, Tracked) and r.changed is True for r in requests):
            return
        rows = slice(-LOOKED_AT, None)
        moved = (out[:, :, rows] != base()[:, :, rows]).flatten(1).any(dim=1)
        for request, own in zip(requests, moved.tolist() if moved.device.type == "cpu" else moved, strict=True):
            if request.changed is not True:  # type: ignore[attr-defined]
                request.changed = request.changed | own  # type: ignore[attr-defined]


def read(layout: Layout, cache: Tensor, metadata: Any, batch: Batch, window: int) -> tuple[Tensor, Tensor]:
    """k and v [B, Hkv, m, d] of a batch, padded on the left with some of its own."""
    size = cache.shape[2]
    many = -(-batch.length // size)
    table = metadata.block_table.index_select(0, batch.index)[:, :many].long()
    found = []
    for b, piece in enumerate(batch.pieces):
        own = table[b, : -(-piece.length // size)]
        found.append([t[:, : piece.length] for t in layout.read(cache, own)])
    out = []
    for pairs in zip(*found, strict=True):
        rows = [torch.nn.functional.pad(t, (0, 0, batch.length - t.shape[1], 0)) for t in pairs]
        whole = torch.stack(rows) if len(rows) > 1 else rows[0][None]
        # Blocks that a window has left behind hold anything; they are masked.
        out.append(whole.nan_to_num() if window else whole)
    return out[0], out[1]


def layout_of(impl: Any, layer: Any, cache: Tensor) -> Layout:
    """How a layer's cache is read."""
    if "CPU" not in _own_class(impl).__name__:
        return Layout()
    return cpu_layout(layer.isa, cache.dtype, cache.shape[2], cache.shape[3] // 2, impl.kv_cache_dtype)


def window_of(impl: Any) -> int:
    """How many keys a row of a layer sees; 0 for all."""
    window = impl.sliding_window
    if window is None:
        return 0
    if isinstance(window, int):
        return max(0, window)
    return max(0, window[0] + 1)


def flash(att: Any) -> bool:
    """Whether torch's flash kernel of CPU gives output and log-sum-exp of a call."""
    return att.softcap is None and att.sinks is None and kernels.lse_source(att) == "cpu-flash"


def apart(runtime: SiteRuntime, active: tuple[int, ...]) -> bool:
    """Whether each head has one method at most, which weighs keys and does nothing else: then edits do not build on each other."""
    groups = runtime.partition(active)
    return all(len(bounds) == 1 and bounds[0].doors == {"weights"} for _, bounds in groups) and not runtime.late


def _own_class(impl: Any) -> type:
    return next(c for c in type(impl).__mro__ if not getattr(c, "_attnsteer", False))


def steered_class(base: type, seam: Layer) -> type:
    """A class of an implementation that edits after it has run; it is an instance of what it was."""

    def forward(
        self: Any,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *scales: Any,
        **other: Any,
    ) -> Any:
        run = partial(base.forward, self, layer, query, key, value, kv_cache, attn_metadata, output, *scales, **other)
        plan = getattr(attn_metadata, "attnsteer", None)
        if plan is None:
            return run()
        if any(s is not None for s in (*scales, *other.values())):
            raise UnsupportedHost(f"{seam.name}: this layer quantises its output, which is no number to edit any more.")
        seam.edit(self, layer, query, kv_cache, attn_metadata, output, plan, run)
        return output

    return type(f"Steered{base.__name__}", (base,), {"forward": forward, "_attnsteer": True, "__module__": __name__})


def attach(worker: Any, settings: dict[str, Any]) -> Ledger:
    """Arm a worker that has loaded its model.

    Raises:
        UnsupportedHost: something of this engine cannot be steered exactly.
    """
    from vllm import __version__ as version
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.models.utils import extract_layer_index

    from .admission import facts_of

    config, runner = worker.vllm_config, worker.model_runner
    check_version(version, bool(settings.get("untested_version")))
    check_engine(config)
    menu = Menu(settings, facts_of(config))
    context = config.compilation_config.static_forward_context
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    layers = check_layers(config, context, extract_layer_index, size)
    ledger = Ledger(Armed(menu), worker.device, rank, size)
    seams = []
    for number, (name, layer) in layers.items():
        seam = Layer(name, number, ledger)
        layer.impl.__class__ = steered_class(type(layer.impl), seam)
        seams.append((seam, layer))
    follow(runner, ledger)
    inner = runner.initialize_kv_cache

    def initialize_kv_cache(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        for seam, layer in seams:
            self_check(seam, layer)
        return result

    runner.initialize_kv_cache = initialize_kv_cache
    worker.attnsteer_ledger = ledger
    return ledger


def self_check(seam: Layer, layer: Any) -> None:
    """One block written and read, and a steered row against the slow form, on a scratch cache (CPU; elsewhere the first call does).

    Raises:
        UnsupportedHost: this version keeps its cache, or computes its attention, otherwise than is known here.
    """
    impl, cache = layer.impl, layer.kv_cache
    base = _own_class(impl)
    if "CPU" not in base.__name__ or cache.numel() == 0:
        return
    from .check import cpu_call

    seam.layout = layout_of(impl, layer, cache)
    cpu_call(seam, impl, layer, base, cache)


def status(worker: Any) -> dict[str, Any]:
    """What a worker says of itself (for `collective_rpc`)."""
    ledger = getattr(worker, "attnsteer_ledger", None)
    if ledger is None:
        return {"armed": False}
    steered = sum(r is not None for r in ledger.requests.values())
    return {
        "armed": True,
        "steps": ledger.steps,
        "steered now": steered,
        "finished": ledger.finished,
        "changed nothing": ledger.silent,
        "audit": ledger.run.audit.to_dict(),
    }
