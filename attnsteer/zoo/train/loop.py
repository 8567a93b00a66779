"""The training loop of the embedded models: warm-up, cosine decay, EMA, checkpoints that a killed run resumes from.

Every batch is drawn from the number of its step, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Plan:
    """How a stage is trained.

    Attributes:
        steps: optimiser steps. lr: peak learning rate. warmup: steps of linear warm-up.
        floor: last learning rate over the peak. decay: weight decay of matrices. ema: decay of the averaged weights.
        clip: largest gradient norm. every: seconds between checkpoints. seed: of the weights.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 200
    floor: float = 0.03
    decay: float = 0.01
    ema: float = 0.999
    clip: float = 1.0
    every: float = 150.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def shorten(plan: Plan, steps: int | None) -> Plan:
    """The plan, or one of so many steps."""
    return plan if steps is None else replace(plan, steps=steps, warmup=min(plan.warmup, steps))


@dataclass
class Curve:
    """Logged values by name, one entry per logged step, and the seconds spent so far, restarts included."""

    step: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, step: int, values: dict[str, float]) -> None:
        """Note the values of a step."""
        self.step.append(step)
        for name, value in values.items():
            self.values.setdefault(name, []).append(round(value, 5))


Loss = Callable[[nn.Module, int], tuple[Tensor, dict[str, float]]]


def fit(
    name: str,
    model: nn.Module,
    loss: Loss,
    plan: Plan,
    out: Path,
    *,
    device: str = "auto",
    preview: Callable[[nn.Module, int], None] | None = None,
    log_every: int = 25,
    compiled: Sequence[nn.Module] = (),
    precision: str = "bf16",
) -> Curve:
    """Train `model` in place; on return it holds the averaged weights.

    Args:
        name: of the stage, for the progress bar and its folder in `out`.
        loss: (model, step) -> (loss, values to log). Draws its batch from the step.
        preview: called with the averaged model at each checkpoint, to write a picture or a measure.
        compiled: modules whose forward is compiled. Pays where elementwise work dominates.
        precision: "bf16", or "no" for fp32, which is faster on CPUs without matrix units for bf16.

    Raises:
        FloatingPointError: the loss is not finite; the last checkpoint is from before.
    """
    from accelerate import Accelerator
    from tqdm import tqdm

    from .precision import attention_in_fp32

    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": plan.decay}, {"params": others, "weight_decay": 0.0}],
        lr=plan.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    named = [n for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    named += [n for n, p in model.named_parameters() if p.requires_grad and p.ndim <= 1]
    model.to(accelerator.device).train()
    tracked = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone().float() for n, p in tracked.items()}
    first, curve = _resume(folder / CHECKPOINT, model, ema, optimizer, named, accelerator.device)
    if accelerator.device.type == "cpu" and precision != "no":
        attention_in_fp32(model)
    for module in compiled:
        module.compile()
    optimizer = accelerator.prepare(optimizer)
    bar = tqdm(total=plan.steps, initial=first, desc=name, mininterval=10, smoothing=0.02)
    begun, saved = time.monotonic(), time.monotonic()
    spent = curve.seconds

    def checkpoint(step: int) -> None:
        curve.seconds = spent + time.monotonic() - begun
        _save(folder, step, tracked, ema, optimizer, named, curve, plan)
        if preview is not None:
            with _averaged(tracked, ema), torch.no_grad():
                model.eval()
                preview(model, step)
                model.train()

    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        with accelerator.autocast():
            value, logged = loss(model, step)
        if not torch.isfinite(value):
            raise FloatingPointError(f"{name}: the loss is {value.item()} at step {step}; last checkpoint in {folder}.")
        accelerator.backward(value)
        accelerator.clip_grad_norm_(tracked.values(), plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        # A young average would remember the first weights for too long.
        keep = min(plan.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), [p.detach().float() for p in tracked.values()], 1 - keep)
        bar.update()
        if step % log_every == 0 or step + 1 == plan.steps:
            curve.add(step, {"loss": value.item(), **logged})
            bar.set_postfix({k: f"{v:.3f}" for k, v in {"loss": value.item(), **logged}.items()}, refresh=False)
        if time.monotonic() - saved > plan.every:
            checkpoint(step + 1)
            saved = time.monotonic()
    bar.close()
    if first < plan.steps:
        checkpoint(plan.steps)
    with torch.no_grad():
        for n, p in tracked.items():
            p.copy_(ema[n])
    model.eval()
    return curve


class _averaged:
    """The model with its averaged weights, for the length of a block."""

    def __init__(self, tracked: dict[str, nn.Parameter], ema: dict[str, Tensor]):
        self.tracked, self.ema = tracked, ema

    def __enter__(self) -> None:
        self.kept = {n: p.detach().clone() for n, p in self.tracked.items()}
        with torch.no_grad():
            for n, p in self.tracked.items():
                p.copy_(self.ema[n])

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for n, p in self.tracked.items():
                p.copy_(self.kept[n])


def _save(
    folder: Path,
    step: int,
    tracked: dict[str, nn.Parameter],
    ema: dict[str, Tensor],
    optimizer: Any,
    named: list[str],
    curve: Curve,
    plan: Plan,
) -> None:
    tensors = {f"model.{n}": p.detach() for n, p in tracked.items()}
    tensors |= {f"ema.{n}": v for n, v in ema.items()}
    state = optimizer.state_dict()["state"]
    for i, n in enumerate(named):
        if i in state:
            tensors |= {f"{k}.{n}": state[i][k] for k in ("exp_avg", "exp_avg_sq")}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    record = {"step": str(step), "curve": json.dumps(asdict(curve)), "plan": json.dumps(asdict(plan))}
    # Written beside and then renamed: a kill or a full disk leaves the last checkpoint as it was.
    partial = folder / f"{CHECKPOINT}.partial"
    save_file(tensors, partial, metadata=record)
    os.replace(partial, folder / CHECKPOINT)
    draw(curve, folder / "loss.png", folder.name)


def _resume(
    path: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: Any, named: list[str], device: torch.device
) -> tuple[int, Curve]:
    if not path.exists():
        return 0, Curve()
    with safe_open(path, framework="pt", device=str(device)) as f:
        record, keys = f.metadata(), set(f.keys())
        own = dict(model.named_parameters())
        with torch.no_grad():
            for n in ema:
                own[n].copy_(f.get_tensor(f"model.{n}"))
                ema[n].copy_(f.get_tensor(f"ema.{n}"))
        step = int(record["step"])
        state = {
            i: {
                "step": torch.tensor(float(step)),
                **{k: f.get_tensor(f"{k}.{n}") for k in ("exp_avg", "exp_avg_sq")},
            }
            for i, n in enumerate(named)
            if f"exp_avg.{n}" in keys
        }
    saved = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    return step, Curve(**json.loads(record["curve"]))


def draw(curve: Curve, path: Path, title: str) -> None:
    """The logged values over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(curve.values)
    fig, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False, layout="constrained")
    for ax, name in zip(axes[0], names, strict=True):
        values = torch.tensor(curve.values[name])
        ax.plot(curve.step, values, lw=0.5, alpha=0.4)
        if len(values) > 10:
            width = max(1, len(values) // 30)
            smooth = nn.functional.avg_pool1d(values[None, None], width, 1)[0, 0]
            ax.plot(curve.step[width // 2 : width // 2 + len(smooth)], smooth, lw=1.5)
        ax.set(title=name, xlabel="step")
        if "loss" in name:
            ax.set_yscale("log")
    fig.suptitle(f"{title}, {curve.seconds / 60:.0f} minutes")
    fig.savefig(path, dpi=90)
    plt.close(fig)
