"""Is this machine fit? Versions, devices, which kernels run, and whether each log-sum-exp they give is right."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .kernels import Attention
from .versions import library_versions

# Import name -> (distribution, what it is for).
OPTIONAL = {
    "flash_attn": ("flash-attn", "a further attention kernel on CUDA"),
    "xformers": ("xformers", "memory-efficient processors of diffusers"),
    "peft": ("peft", "LoRA and other adapters"),
    "bitsandbytes": ("bitsandbytes", "quantised linear layers"),
    "timm": ("timm", "vision models for the generic host"),
    "matplotlib": ("matplotlib", "figures (extra viz)"),
    "datasets": ("datasets", "data sets (extra eval)"),
    "torchmetrics": ("torchmetrics", "metrics (extra eval)"),
    "lm_eval": ("lm-eval", "the language model evaluation harness (extra lm-eval)"),
    "pycocotools": ("pycocotools", "COCO annotations (extra coco)"),
    "torch_fidelity": ("torch-fidelity", "the Fréchet distance (extra fid)"),
    "trackio": ("trackio", "a log of runs (extra track)"),
}
# Largest accepted error of a sum that should be one. In half precision the kernel may round a probability or a key bias
# where our own sums do not (seen on CPU: 3e-5, and 7e-7 in fp32); a wrong log-sum-exp is off by tenths.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
# Enough keys that one of the three sets takes the fused path of large sets.
LENGTH, LARGE = 352, 288
B, H, KV, D = 2, 4, 2, 64
CASES = ("plain", "causal", "padded", "float mask", "key bias", "soft cap", "sinks")


@dataclass(frozen=True)
class Check:
    """One check of a kernel's log-sum-exp.

    Attributes:
        case: form of the attention. source: the kernel that gave the log-sum-exp. backend: what torch's SDPA would
            choose, "" where it cannot compute this form.
        error: largest distance of a row's masses over a partition of the keys from their true sum.
    """

    device: str
    dtype: str
    case: str
    source: str
    backend: str
    error: float
    tolerance: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance (not a number is not)."""
        return not self.problem and self.error <= self.tolerance


@dataclass(frozen=True)
class Feature:
    """One thing that a user may want to do: whether it works here, and why not, or what to mind."""

    name: str
    works: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """All that `attnsteer doctor` prints."""

    versions: dict[str, str]
    optional: dict[str, str | None]
    devices: dict[str, str]
    checks: tuple[Check, ...]
    features: tuple[Feature, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        checks = [{**asdict(c), "error": c.error if c.error == c.error else None, "ok": c.ok} for c in self.checks]
        return {
            "ok": self.ok,
            "versions": self.versions,
            "optional": self.optional,
            "devices": self.devices,
            "features": [asdict(f) for f in self.features],
            "checks": checks,
        }


def examine(devices: Sequence[str] | None = None) -> Report:
    """Run everything on the given devices (None: all that torch sees)."""
    found = available_devices()
    chosen = found if devices is None else {d: found[d] for d in devices}
    with _one_thread():
        checks = tuple(check for device in chosen for check in check_device(device))
    return Report(versions(), optional_packages(), chosen, checks, features())


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from further threads, and lose much where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def versions() -> dict[str, str]:
    """Versions of Python, this library and what it stands on."""
    return {"python": platform.python_version(), **library_versions()}


# What is done with a library: (its name, lowest accepted version, first one that is not, what it is for).
ACCEPTED = (
    ("torch", (2, 11), None, "everything"),
    ("transformers", (5, 17), (6,), "language and vision-language models"),
    ("diffusers", (0, 40), None, "pipelines and denoisers"),
)
# What an extra's packages give: (feature, import names, what brings them).
EXTRAS = (
    ("figures", ("matplotlib",), "viz"),
    ("data sets and metrics of others", ("datasets", "torchmetrics"), "eval"),
    ("lm-evaluation-harness", ("lm_eval",), "lm-eval"),
    ("COCO annotations", ("pycocotools",), "coco"),
    ("Fréchet distance", ("torch_fidelity",), "fid"),
    ("real language models (attnsteer zoo fetch)", ("gguf",), "zoo"),
    ("attnsteer serve", ("fastapi", "uvicorn"), "serve"),
)


def features() -> tuple[Feature, ...]:
    """What works here, by looking at versions, files and programs; nothing is imported, and nothing is fetched."""
    found = [_library(*row) for row in ACCEPTED]
    models = Path(__file__).parent / "zoo" / "models"
    names = sorted(p.name for p in models.glob("*") if any(p.rglob("*.safetensors")))
    found.append(
        Feature("embedded models", bool(names), ", ".join(names) or f"{models} holds none: install the package again")
    )
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++", "cl") if c and shutil.which(c)), None)
    hint = "torch.compile needs a C++ compiler on CPU: install g++ or clang"
    found.append(Feature("compiled models", compiler is not None, compiler or hint))
    several = torch.distributed.is_available()
    found.append(
        Feature("several processes", several, "torch.distributed" if several else "this torch was built without it")
    )
    for name, modules, extra in EXTRAS:
        absent = [m for m in modules if importlib.util.find_spec(m) is None]
        found.append(Feature(name, not absent, f"pip install 'attnsteer[{extra}]'" if absent else ", ".join(modules)))
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    found.append(_writable("cache of the hub", home))
    found.append(_writable("runs in this folder", Path.cwd()))
    return tuple(found)


def _library(name: str, low: tuple[int, ...], high: tuple[int, ...] | None, what: str) -> Feature:
    try:
        text = version(name)
    except PackageNotFoundError:
        return Feature(what, False, f"{name} is not installed")
    numbers = tuple(int(n) for n in re.findall(r"\d+", text)[:2])
    dots = lambda t: ".".join(map(str, t))  # noqa: E731
    wanted = f"{dots(low)} and newer" + (f", below {dots(high)}" if high else "")
    return Feature(what, numbers >= low and (high is None or numbers < high), f"{name} {text}; accepted: {wanted}")


def _writable(name: str, folder: Path) -> Feature:
    """Whether files can be made in a folder, or in the nearest one above it that exists."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            return Feature(name, True, str(folder))
    except OSError as error:
        return Feature(name, False, f"{folder}: {error.strerror or error}")


def optional_packages() -> dict[str, str | None]:
    """Import name -> version of each optional package, None where it is absent; none is imported."""
    return {name: _version(name, distribution) for name, (distribution, _) in OPTIONAL.items()}


def _version(name: str, distribution: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def available_devices() -> dict[str, str]:
    """Device -> description, the CPU first."""
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        found[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    if torch.xpu.is_available():
        found.update({f"xpu:{i}": torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())})
    return found


def check_device(device: str) -> Iterator[Check]:
    """One check for each dtype and form of attention."""
    for dtype in TOLERANCE:
        for case in CASES:
            yield check(device, dtype, case)


def check(device: str, dtype: torch.dtype, case: str) -> Check:
    """Masses over a partition of the keys, from one kernel's log-sum-exp, must add up to the whole row."""
    att = example(case, dtype, device)
    problem, error = "", float("nan")
    try:
        error = partition_error(att)
    except (RuntimeError, NotImplementedError) as failure:
        problem = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    return Check(
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        case=case,
        source=kernels.lse_source(att),
        backend=sdpa_backend(att),
        error=error,
        tolerance=TOLERANCE[dtype],
        problem=problem,
    )


def example(case: str, dtype: torch.dtype, device: str) -> Attention:
    """A grouped-query problem of the named form (see `CASES`), the same numbers on every device."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, LENGTH, D, generator=draw).to(device, dtype) for heads in (H, KV, KV))
    att = Attention(q, k, v, D**-0.5)
    if case == "plain":
        return att
    if case == "causal":
        return att.replace(causal=True)
    if case in ("padded", "float mask"):
        # Left padding of the second row: its first query rows see no key at all.
        valid = torch.arange(LENGTH) >= torch.tensor([[0], [5]])
        seen = (torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & valid[:, None])[:, None]
        if case == "padded":
            return att.replace(mask=seen.to(device))
        floats = torch.zeros((), dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return att.replace(mask=floats.to(device))
    if case == "key bias":
        return att.replace(causal=True, key_bias=torch.randn(B, 1, LENGTH, generator=draw).to(device))
    if case == "soft cap":
        return att.replace(causal=True, softcap=30.0)
    return att.replace(causal=True, sinks=torch.randn(H, generator=draw).to(device, dtype))


def partition_error(att: Attention) -> float:
    """max over rows of |sum of the masses of three disjoint key sets that cover all keys - sum of the row|."""
    _, lse = kernels.attend_lse(att)
    total = att.visible_total(lse)
    masses = sum((kernels.partial(att, lse, keys)[0] for keys in _partition(att)), torch.zeros_like(total))
    difference = (masses - total).abs()
    # A maximum would pass over some values that are not numbers.
    return float("nan") if bool(difference.isnan().any()) else float(difference.max())


def _partition(att: Attention) -> list[Tensor]:
    """A large range, scattered keys, and the rest; each [1, 1, m]."""
    position = torch.arange(att.shape[3], device=att.q.device)
    large = position < LARGE
    scattered = ~large & (position % 3 == 0)
    return [keys[None, None] for keys in (large, scattered, ~large & ~scattered)]


def sdpa_backend(att: Attention) -> str:
    """The backend that `F.scaled_dot_product_attention` chooses for this problem, "" where it has no such form."""
    if att.softcap is not None or att.sinks is not None or not hasattr(torch, "_fused_sdp_choice"):
        return ""
    from torch.nn.attention import SDPBackend

    try:
        choice = torch._fused_sdp_choice(
            att.q, att.k, att.v, att.mask4(), 0.0, att.causal, scale=att.scale, enable_gqa=att.groups > 1
        )
    except (RuntimeError, NotImplementedError):
        return ""
    return SDPBackend(choice).name.lower().removesuffix("_attention")
