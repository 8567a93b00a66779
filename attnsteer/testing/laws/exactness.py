"""The fast path is the definition: against the explicit map, in half precision, and on each attention backend."""

from __future__ import annotations

import torch

from ..cases import NotApplicable
from .bench import WHOLE, Bench, attached, own_target, to_dtype
from .compare import EXACT, HALF, close, moved, require, scale, valid_rows
from .decoding import decode
from .head_outputs import head_outputs


def reference(bench: Bench) -> None:
    """The identities give what the explicit map gives."""
    bench.need_action()
    made = bench.make(4)
    for padding in (None, *bench.host.padded):
        inputs = bench.inputs(4, padding, 2)
        with attached(bench.target, made):
            fast = bench.whole(bench.target, inputs)
        with attached(bench.target, made, reference=True):
            slow = bench.whole(bench.target, inputs)
        tolerance = EXACT * scale(bench.host, slow)
        close(
            fast, slow, tolerance, f"output and output by the explicit map, padding {padding}", valid_rows(inputs, fast)
        )
    if bench.host.decoder:
        inputs = bench.inputs(4, "left" if "left" in bench.host.padded else None, 8)
        with attached(bench.target, made) as run:
            fast = decode(bench.target, inputs, (5, 2), run=run)
        with attached(bench.target, made, reference=True) as run:
            slow = decode(bench.target, inputs, (5, 2), run=run)
        close(fast, slow, EXACT, "the same after a prefill in three chunks", valid_rows(inputs, fast))


def dtype(bench: Bench) -> None:
    """In bf16, head outputs at the steered site stay close to the explicit map's, whose statistics are fp32."""
    if bench.host.family == "pipeline":
        raise NotApplicable("pipelines run in float32 here; their denoisers have this law")
    if bench.case.whole_model:
        raise NotApplicable(WHOLE)
    bench.need_prefill()
    target = own_target(bench.host).to(torch.bfloat16)
    made = bench.make(2)
    inputs = to_dtype(bench.inputs(2, None, 5), torch.bfloat16)
    with attached(target, made) as run:
        site = run.sites[0].path
    plain = head_outputs(target, bench.host, inputs)[site]
    fast = head_outputs(target, bench.host, inputs, made)[site]
    slow = head_outputs(target, bench.host, inputs, made, reference=True)[site]
    require(fast.dtype == torch.bfloat16, f"head outputs in bf16 became {fast.dtype}")
    close(
        fast, slow, HALF * float(plain.float().abs().max()), f"head outputs in bf16 and by the explicit map at {site}"
    )
    moved(fast, plain, f"head outputs in bf16 at {site}")


def backends(bench: Bench) -> None:
    """Eager and SDPA bases give the same steered output."""
    if bench.host.family != "transformers":
        raise NotApplicable("only transformers models have their attention backend switched here")
    bench.need_action()
    made, target = bench.make(2), own_target(bench.host)
    inputs = bench.inputs(2, bench.host.padded[0] if bench.host.padded else None, 6)
    outs = {}
    for name in ("eager", "sdpa"):
        try:
            target.set_attn_implementation(name)
        except ValueError:
            continue  # the library itself has no SDPA for soft-capping and learned sinks
        with attached(target, made):
            outs[name] = bench.run(target, inputs)
    if len(outs) == 2:
        close(outs["eager"], outs["sdpa"], EXACT, "output with eager and with SDPA", valid_rows(inputs, outs["sdpa"]))
