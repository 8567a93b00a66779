"""One prepared script for a GPU that is lent for a few minutes: is everything right there, and what does it cost?

    python -m benchmarks.gpu                  # at most 8 minutes; writes benchmarks/results/gpu-<name>.json after each part
    python -m benchmarks.gpu --cpu            # tiny shapes on the CPU: whether the script itself runs
    python -m benchmarks.gpu --part kernels   # one part

Parts, in order of value: kernels and methods against references in fp32, bf16 and fp16; compiled decoding, with CUDA graphs; time
and memory of prefill and decode at 1k, 8k and 32k tokens, with the operators that are dispatched and the waits for the device;
steps of a UNet and of a DiT. A part that fails says so in the record, and the next one runs. The status is 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnsteer import (
    ACT,
    PAG,
    PASTA,
    SEG,
    HeadGate,
    Intervention,
    SoftPAG,
    SpotLight,
    Where,
    ZeroTuning,
    kernels,
    steer,
)
from attnsteer.kernels import Attention
from benchmarks.measure import ROOT, machine
from benchmarks.models import LlamaShape, UNetShape, llama, prompt, unet

BUDGET = 8 * 60
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest value of the reference. Half precision: the kernel rounds probabilities and output.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Of a whole model, whose layers add up what each rounds.
MODEL_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}


class Bench:
    """Where it runs, how large, and until when."""

    def __init__(self, device: str, budget: float):
        self.device, self.tiny = torch.device(device), device == "cpu"
        self.start, self.budget = time.perf_counter(), budget
        self.wrong: list[str] = []

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.budget - (time.perf_counter() - self.start)

    def judge(
        self, name: str, found: Tensor, wanted: Tensor, limit: float, moved: Tensor | None = None
    ) -> dict[str, Any]:
        """A comparison as a record; `moved`: what it would be without the edit, from which the result must differ."""
        wanted, found = wanted.double(), found.double()
        scale = wanted.abs().amax().clamp_min(1e-9)
        error = float((found - wanted).abs().amax() / scale)
        record: dict[str, Any] = {"what": name, "error": error, "limit": limit, "right": error <= limit}
        if moved is not None:
            record["moved"] = float((moved.double() - wanted).abs().amax() / scale)
            record["right"] = record["right"] and record["moved"] > limit
        if not record["right"]:
            self.wrong.append(name)
        return record

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def times(self, arms: dict[str, Callable[[], Any]], rounds: int = 9) -> dict[str, float]:
        """Median milliseconds of each arm, in turns."""
        rounds = 2 if self.tiny else rounds
        for arm in arms.values():
            for _ in range(1 if self.tiny else 3):
                arm()
        found: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, arm in arms.items():
                self.sync()
                begin = time.perf_counter()
                arm()
                self.sync()
                found[name].append(1e3 * (time.perf_counter() - begin))
        return {name: round(statistics.median(t), 4) for name, t in found.items()}

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes that the device holds at most during a call, above what it held before; 0 where nobody counts."""
        if self.device.type != "cuda":
            call()
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.sync()
        return torch.cuda.max_memory_allocated() - before


class _Counted(TorchDispatchMode):
    """Counts dispatched operators, and those that read a value back."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        self.operators += 1
        self.reads += any(read in name for read in ("_local_scalar_dense", "is_nonzero", "nonzero", "to_cpu"))
        return function(*args, **(kwargs or {}))


def counted(bench: Bench, call: Callable[[], Any]) -> dict[str, int]:
    """Operators of a call, values read back, and waits for the device that CUDA itself reports."""
    with _Counted() as counts:
        call()
    waits = 0
    if bench.device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchroniz" in str(w.message) for w in caught)
    return {"operators": counts.operators, "reads": counts.reads, "waits": waits}


# Kernels: each pure function against the whole map in fp64.


def kernel_part(bench: Bench) -> list[dict[str, Any]]:
    """Every kernel, form of mask and dtype."""
    n, B, H, Hkv, d = (24, 2, 4, 2, 16) if bench.tiny else (384, 2, 8, 2, 64)
    found = []
    for dtype in DTYPES:
        for name, att in _problems(bench, dtype, n, B, H, Hkv, d):
            found += _kernel_checks(bench, f"{name}, {str(dtype)[6:]}", att)
    return found


def _problems(
    bench: Bench, dtype: torch.dtype, n: int, B: int, H: int, Hkv: int, d: int
) -> Iterator[tuple[str, Attention]]:
    draw = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(bench.device, dtype)

    q, k, v = random(B, H, n, d), random(B, Hkv, n, d), random(B, Hkv, n, d)
    lower = torch.ones(n, n, dtype=torch.bool, device=bench.device).tril()
    padded = (
        lower[None, None]
        & (torch.arange(n, device=bench.device) >= torch.tensor([[0], [n // 4]]).to(bench.device))[:, None, None]
    )
    seen = padded.clone()
    additive = torch.zeros(seen.shape, dtype=dtype, device=bench.device).masked_fill(~seen, torch.finfo(dtype).min)
    scale = d**-0.5
    yield "causal", Attention(q, k, v, scale, causal=True)
    yield "both ways", Attention(q, k, v, scale)
    yield "bool mask", Attention(q, k, v, scale, mask=padded)
    yield "float mask", Attention(q, k, v, scale, mask=additive)
    bias = torch.linspace(-2, 2, n, device=bench.device)[None, None]
    yield "key bias, causal", Attention(q, k, v, scale, causal=True, key_bias=bias)
    yield "soft cap", Attention(q, k, v, scale, causal=True, softcap=5.0)
    yield "learned sinks", Attention(q, k, v, scale, causal=True, sinks=random(H))
    yield "one row", Attention(q[:, :, -1:], k, v, scale)
    yield "odd keys", Attention(q[:, :, :7], k[:, :, : n - 3], v[:, :, : n - 3], scale, mask=padded[:, :, -7:, : n - 3])


def _kernel_checks(bench: Bench, name: str, att: Attention) -> Iterator[dict[str, Any]]:
    limit = LIMITS[att.q.dtype]
    wide = att.replace(q=att.q.double(), k=att.k.double(), v=att.v.double())
    wide = wide.replace(sinks=None if att.sinks is None else att.sinks.double())
    A = kernels.dense(wide)
    values = wide.expanded_values()
    keys = (torch.arange(att.shape[3], device=bench.device) % 5 == 1)[None, None]
    inside = A * keys[:, :, None]
    out, lse = kernels.attend_lse(att)
    yield bench.judge(f"attend_lse, {name}", out, A @ values, limit)
    # What a row is that sees no key is left to torch there.
    seen = A.sum(dim=-1, keepdim=True) > 0
    yield bench.judge(f"attend, {name}", kernels.attend(att) * seen, A @ values, limit)
    mass, part = kernels.partial(att, lse, keys)
    yield bench.judge(f"mass, {name}", mass, inside.sum(dim=-1), limit)
    yield bench.judge(f"partial, {name}", part, inside @ values, limit)
    yield bench.judge(f"leftover, {name}", kernels.leftover(att, lse, keys, mass), (A - inside).sum(dim=-1), limit)
    yield bench.judge(f"column_mass, {name}", kernels.column_mass(att, lse), A.sum(dim=2), 10 * limit)
    yield bench.judge(
        f"rows, {name}", kernels.rows(att, lse, torch.tensor([0], device=bench.device)), A[:, :, :1], limit
    )
    yield bench.judge(f"entropy, {name}", kernels.entropy(att, lse), torch.special.entr(A).sum(dim=-1), 10 * limit)
    weighted = torch.where(keys[:, :, None], 0.2, 1.0) * A
    rest = weighted.sum(dim=-1, keepdim=True) + (0.0 if att.sinks is None else (1 - A.sum(dim=-1, keepdim=True)))
    wanted = (weighted / rest.clamp_min(1e-30)) @ values
    one = torch.tensor(0.2, device=bench.device)
    new = kernels.reweight(att, out, lse, [(keys, one, mass, part)], 1.0, True)
    yield bench.judge(f"reweight, {name}", new, wanted, limit)


# Methods: a model of real proportions, every dtype, against the same method from the explicit map.


def shape_of(bench: Bench, layers: int = 4) -> LlamaShape:
    """The language model."""
    if bench.tiny:
        return LlamaShape(hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=96, layers=2, vocab=64)
    return LlamaShape(layers=layers)


def methods_of(shape: LlamaShape, batch: int = 1) -> dict[str, Intervention]:
    """The methods on language models, acting."""
    some = {layer: list(range(0, shape.heads, 4)) for layer in range(shape.layers)}
    spans = [[(8, 40)]] * batch
    return {
        "HeadGate": HeadGate({(layer, 0): 0.0 for layer in range(shape.layers)}),
        "ZeroTuning": ZeroTuning(some, gamma=2.0),
        "PASTA": PASTA(spans, some, alpha=0.1),
        "SpotLight": SpotLight(spans, 0.4),
        "ACT on a quarter": ACT(some, 0.4, 0.02),
        "ACT": ACT(beta=0.4, threshold=0.02),
    }


@functools.lru_cache(maxsize=1)
def model_of(shape: LlamaShape, context: int, device: torch.device) -> nn.Module:
    """One model at a time stays on the device."""
    return llama(shape, context).to(device)


def logits(model: nn.Module, ids: Tensor, steps: int = 4) -> Tensor:
    """Logits of a prompt and of a few tokens behind it, the same ones in every arm."""
    found = model(ids, use_cache=True)
    out, cache = [found.logits.float()], found.past_key_values
    for token in range(3, 3 + steps):
        step = torch.full((len(ids), 1), token, device=ids.device)
        out.append(model(step, past_key_values=cache).logits.float())
    return torch.cat(out, dim=1)


def method_part(bench: Bench) -> list[dict[str, Any]]:
    """Prefill and decode of every method against `reference=True` in fp32."""
    shape, tokens, found = shape_of(bench, layers=2), 64 if bench.tiny else 512, []
    ids = prompt(shape, tokens, 4, batch=2).to(bench.device)
    model = model_of(shape, tokens, bench.device)
    plain, wanted = logits(model.float(), ids), {}
    for name, method in methods_of(shape, 2).items():
        with steer(model, method, reference=True, control=True):
            wanted[name] = logits(model, ids)
    for dtype in DTYPES:
        model.to(dtype)
        # What the model itself loses in this dtype is not the method's.
        lost = float((logits(model, ids) - plain).abs().amax() / plain.abs().amax())
        for name, method in methods_of(shape, 2).items():
            with steer(model, method, control=True):
                own = logits(model, ids)
            limit = max(MODEL_LIMITS[dtype], 4 * lost)
            # Whether it acts is seen where rounding does not hide it.
            moved = plain if dtype == torch.float32 else None
            found.append(bench.judge(f"{name}, {str(dtype)[6:]}", own, wanted[name], limit, moved))
    model.float()
    return found


def denoiser_part(bench: Bench) -> list[dict[str, Any]]:
    """Guidance on a tiny pipeline of each kind: on the device as on the CPU, to what the two round apart without it."""
    from attnsteer.testing import tiny_call, tiny_pipeline

    found = []
    for kind in ("sd", "sd3") if bench.tiny else ("sd", "sdxl", "sd3", "flux"):
        # Guidance is distilled there; the true one has two passes.
        more = {"true_cfg_scale": 4.0} if kind == "flux" else {}
        pipe = tiny_pipeline(kind)
        site = next(s for s in pipe_sites(pipe) if s.kind in ("self", "joint"))
        where = Where(modules=re.escape(site.name))
        for method in (PAG(2.0, where=where), SoftPAG(2.0, 0.5, where=where), SEG(2.0, 1.0, where=where)):
            results = []
            for device in ("cpu", bench.device):
                pipe.to(device)
                with steer(pipe, method) if results is not None else contextlib.nullcontext():
                    results.append(pipe(**tiny_call(kind, steps=2, **more))[0])
                plain = pipe(**tiny_call(kind, steps=2, **more))[0]
            tensors = [torch.as_tensor(r).cpu() for r in (*results, plain)]
            name = f"{type(method).__name__} on {kind}"
            found.append(bench.judge(name, tensors[1], tensors[0], 5e-3, tensors[2]))
    return found


def pipe_sites(pipe: Any) -> Any:
    """The sites of a pipeline."""
    from attnsteer import sites

    return sites(pipe)


# Compiled decoding.


def compiled_part(bench: Bench) -> list[dict[str, Any]]:
    """Static cache, `fullgraph=True`: graphs, equality with uncompiled calls, and time of a step."""
    from torch._dynamo.utils import counters
    from transformers import StaticCache

    shape, tokens, found = shape_of(bench), 32 if bench.tiny else 1024, []
    ids = prompt(shape, tokens, 4).to(bench.device)
    model = model_of(shape, tokens, bench.device).to(torch.float32 if bench.tiny else torch.bfloat16)
    options = {"backend": "eager"} if bench.tiny else {"mode": "reduce-overhead"}
    names = ("HeadGate", "ACT") if bench.tiny else ("HeadGate", "ZeroTuning", "PASTA", "SpotLight", "ACT")
    base: float | None = None
    for name in (None, *names):
        if bench.left < 60:
            found.append({"what": f"compiled {name}", "skipped": "no time left"})
            continue
        torch._dynamo.reset()
        counters.clear()
        cache = StaticCache(model.config, max_cache_len=2 * tokens)
        step = torch.full((1, 1), 5, device=bench.device)
        around = steer(model, methods_of(shape)[name], control=True) if name else contextlib.nullcontext()
        with around:
            model(ids, past_key_values=cache)
            eager = model(step, past_key_values=cache).logits.float()
            cache.reset()
            model(ids, past_key_values=cache)
            compiled = torch.compile(model, fullgraph=True, **options)
            own = compiled(step, past_key_values=cache).logits.float().clone()
            record = bench.judge(f"compiled {name}", own, eager, MODEL_LIMITS[model.dtype])
            record |= bench.times({"step": lambda: compiled(step, past_key_values=cache)}, rounds=15)  # noqa: B023
        base = record["step"] if name is None else base
        record["ratio"] = round(record["step"] / base, 4)
        record["graphs"] = counters["stats"].get("unique_graphs")
        record["cudagraph_skips"] = counters["inductor"].get("cudagraph_skips", 0)
        found.append(record)
    model.float()
    return found


# Time and memory of language models.


def cost_part(bench: Bench) -> list[dict[str, Any]]:
    """Prefill and one decode step, steered over unsteered, in bf16."""
    found = []
    for tokens in (64,) if bench.tiny else (1024, 8192, 32768):
        shape = shape_of(bench, layers=2 if tokens > 8192 else 4)
        model = model_of(shape, tokens, bench.device).to(torch.bfloat16)
        ids = prompt(shape, tokens, 12).to(bench.device)
        for name, method in methods_of(shape).items():
            if bench.left < 30 + tokens / 1024:
                found.append({"what": f"{name}, {tokens} tokens", "skipped": "no time left"})
                continue
            found.append(_cost(bench, f"{name}, {tokens} tokens", model, method, ids))
    return found


def _cost(bench: Bench, what: str, model: nn.Module, method: Intervention, ids: Tensor) -> dict[str, Any]:
    run = contextlib.ExitStack()
    step = torch.full((1, 1), 5, device=ids.device)

    def prefill() -> Any:
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def both(steered: bool) -> dict[str, Any]:
        with steer(model, method, control=True) if steered else contextlib.nullcontext():
            cache = prefill()
            record = {"memory": bench.peak(prefill)}
            times = bench.times({"prefill": prefill}, rounds=5)
            times |= bench.times({"step": lambda: model(step, past_key_values=cache)}, rounds=15)
            counts = {
                "in a prefill": counted(bench, prefill),
                "in a step": counted(bench, lambda: model(step, past_key_values=cache)),
            }
        return record | times | counts

    with run:
        plain, steered = both(False), both(True)
    ratios = {key: round(steered[key] / plain[key], 4) for key in ("prefill", "step", "memory") if plain[key]}
    waits = {key: steered[key]["waits"] - plain[key]["waits"] for key in ("in a prefill", "in a step")}
    return {"what": what, "ratios": ratios, "waits_more": waits, "unsteered": plain, "steered": steered}


# Denoisers.


def step_part(bench: Bench) -> list[dict[str, Any]]:
    """One denoising step with classifier-free guidance, of a UNet of SD 1.5's shape and of a DiT; heads gated, compiled whole."""
    found = []
    for name, model, inputs in _denoisers(bench):
        if bench.left < 45:
            found.append({"what": name, "skipped": "no time left"})
            continue
        sites = [s for s in pipe_sites(model) if s.kind in ("self", "joint")]
        gate = HeadGate({(sites[-1].layer, 0): 0.0}, where=Where(modules=re.escape(sites[-1].name)))

        def call(run: Any, model: nn.Module = model, inputs: dict[str, Any] = inputs) -> Tensor:
            return run(**inputs, return_dict=False)[0]

        plain = call(model)
        with steer(model, gate, control=True):
            gated = call(model)
            times = bench.times({"gated": functools.partial(call, model)})
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager" if bench.tiny else "inductor")
            record = bench.judge(f"{name}, gated and compiled", call(compiled), gated, MODEL_LIMITS[plain.dtype], plain)
            times |= bench.times({"gated, compiled": functools.partial(call, compiled)})
        times |= bench.times({"unsteered": functools.partial(call, model)})
        found.append(record | {"milliseconds": times, "ratio": round(times["gated"] / times["unsteered"], 4)})
    return found


def _denoisers(bench: Bench) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    from attnsteer.testing import tiny_denoiser, tiny_denoiser_inputs

    if bench.tiny:
        for kind in ("sd", "sd3"):
            model = tiny_denoiser(kind)
            yield kind, model, tiny_denoiser_inputs(kind, model)
        return
    dtype, draw = torch.bfloat16, torch.Generator().manual_seed(0)
    model = unet(UNetShape()).to(bench.device, dtype)
    random = lambda *size: torch.randn(*size, generator=draw).to(bench.device, dtype)  # noqa: E731
    yield (
        "UNet",
        model,
        {
            "sample": random(2, 4, 64, 64),
            "timestep": torch.tensor(500, device=bench.device),
            "encoder_hidden_states": random(2, 77, 768),
        },
    )
    del model
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=64, num_layers=8, num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048,
    ).eval().requires_grad_(False).to(bench.device, dtype)  # fmt: skip
    yield (
        "DiT",
        model,
        {
            "hidden_states": random(2, 16, 64, 64),
            "timestep": torch.tensor([500.0, 500.0], device=bench.device),
            "encoder_hidden_states": random(2, 154, 4096),
            "pooled_projections": random(2, 2048),
        },
    )


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "kernels": kernel_part,
    "methods": method_part,
    "denoisers": denoiser_part,
    "compiled": compiled_part,
    "cost": cost_part,
    "steps": step_part,
}


def main(words: list[str] | None = None) -> int:
    """Run the parts, write the record after each; the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, to try the script itself")
    parser.add_argument(
        "--part", action="append", choices=list(PARTS), help="a part; repeat for several (default: all)"
    )
    parser.add_argument(
        "--json", metavar="PATH", help="where to write (default: benchmarks/results/gpu-<name>.json; --cpu: nowhere)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds in all (default: {BUDGET})")
    options = parser.parse_args(words)
    if not options.cpu and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --cpu tries the script on the CPU.")
    bench = Bench("cpu" if options.cpu else "cuda", options.budget)
    name = "cpu" if options.cpu else torch.cuda.get_device_name()
    path = Path(options.json) if options.json else None
    if path is None and not options.cpu:
        path = ROOT / "benchmarks" / "results" / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    record: dict[str, Any] = {
        "device": name,
        "cuda": torch.version.cuda,
        **machine(torch.get_num_threads()),
        "parts": {},
    }
    for part in options.part or PARTS:
        begin = time.perf_counter()
        own: dict[str, Any] = {}
        record["parts"][part] = own
        try:
            if bench.left < 30:
                own["skipped"] = "no time left"
            else:
                with torch.no_grad():
                    own["results"] = PARTS[part](bench)
        except Exception as error:  # the next part says something of its own
            own["error"] = f"{type(error).__name__}: {error}"
            own["trace"] = traceback.format_exc()[-2000:]
            bench.wrong.append(part)
        own["seconds"] = round(time.perf_counter() - begin, 1)
        record["wrong"] = bench.wrong
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        said = own.get("error") or own.get("skipped") or f"{len(own['results'])} results"
        print(f"{part}: {said}, {own['seconds']} s", flush=True)
    print("wrong: " + (", ".join(bench.wrong) or "nothing"))
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
