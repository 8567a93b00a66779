"""`bake`: static gates of heads folded into the weights, so that the gated model runs without this library.

o_h <- g_h o_h before the output projection y = sum_h o_h W_O^h + b_O is W_O^h <- g_h W_O^h; the biases stay.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .analysis.projections import Linear, evaluating, first_tensor, look, module_of, output_projections, probe_inputs
from .errors import SelectionError, UnsupportedHost, brief
from .heads import HeadSet, at_head
from .intervention import Intervention
from .methods.headgate import HeadGate
from .parameters import PerSample
from .steering import find_host, steer, steered
from .where import Where

RECORD = "attnsteer_bake.json"
# Of the baked against the gated model, relative to the largest output.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def bake(
    model: nn.Module,
    gates: HeadGate | Mapping[tuple[int, int], float],
    *,
    inputs: Mapping[str, Any] | None = None,
    inplace: bool = False,
    save_to: str | Path | None = None,
) -> nn.Module:
    """Fold static gates of heads into the output projections.

    Which layer is the output projection of a site is found by one short forward, and the result is compared with
    `HeadGate` on it before it is given back.

    Args:
        model: a model of transformers, or any module whose attention is steered (see `attnsteer.sites`).
        gates: a `HeadGate`, or its `{(layer, head): gate}`.
        inputs: keyword arguments of the forward to look at; None: a few random tokens or pixels. Needed where the gated
            heads are not passed by these (the vision tower of a vision-language model).
        inplace: change the model itself; False: a copy, and the model stays as it is.
        save_to: also write a checkpoint there (`save_pretrained`), with `attnsteer_bake.json`, which says what was folded.

    Returns:
        The model with the gates in its weights: the same class and config, and no trace of this library.

    Raises:
        SelectionError: a method other than `HeadGate`, gates by sample, or a selection of phases, steps, branches or rows:
            these depend on the input; or heads that do not exist.
        UnsupportedHost: no linear layer takes these heads' outputs, its weight is quantised or shared with another layer, or
            the result is not the gated model's.
    """
    method = _static(gates)
    module = module_of(model)
    inputs = dict(probe_inputs(module) if inputs is None else inputs)
    if save_to is not None and not hasattr(module, "save_pretrained"):
        raise UnsupportedHost(
            f"{type(module).__name__} has no save_pretrained; leave save_to out and save its state_dict."
        )
    # `where` may name some of the gated heads.
    chosen = {s.path: (s, heads) for s, heads in method.selection().resolve(find_host(module).sites(), _main(module))}
    if inplace and steered(module):
        raise SelectionError("bake(inplace=True): the model is steered; remove the handle first, or bake a copy.")
    target = module if inplace else copy.deepcopy(module)
    with evaluating(target), steer(target, method, control=True):
        wanted = first_tensor(target(**inputs))
    seen = look(target, inputs, Where(modalities={s.modality for s, _ in chosen.values()}))
    plan: list[tuple[Linear, Tensor]] = []
    for path, (site, heads) in chosen.items():
        if path not in seen.sites:
            raise UnsupportedHost(
                f"{path} was not passed by the forward that was looked at; give inputs= with which it is computed."
            )
        width = seen.sites[path]["out"].shape[3]
        factors = torch.ones(site.heads, dtype=torch.float64)
        for head in range(site.heads) if heads is None else heads:
            factors[head] = _number(at_head(method.gates, site, head))
        if bool((factors == 1).all()):
            continue
        for layer in output_projections(target, seen, site):
            _check_weight(target, layer, seen.inputs[layer.name], path)
            plan.append((layer, factors.repeat_interleave(width)))
    before = [layer.module.weight.detach().clone() for layer, _ in plan] if inplace else []
    for layer, factors in plan:
        weight = layer.weight
        # In double precision, so that a half-precision weight is rounded once.
        weight.copy_((weight.double() * factors.to(weight.device)[:, None]).to(weight.dtype))
    with evaluating(target):
        found = first_tensor(target(**inputs))
    off = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1.0))
    if not off <= TOLERANCE.get(wanted.dtype, 1e-5):
        for (layer, _), weight in zip(plan, before, strict=False):
            layer.module.weight.copy_(weight)
        raise UnsupportedHost(
            f"the baked {type(module).__name__} differs from the gated one by {off:.1e} of its largest output: its head outputs "
            "enter more than the linear layers that were found. Use HeadGate."
        )
    if save_to is not None:
        target.save_pretrained(save_to)
        record = {
            "gates": [
                [*head, _number(gate)]
                for head, gate in sorted(method.gates.items())
                if head in method.selection().heads
            ],
            "folded_into": [layer.name for layer, _ in plan],
            "largest_difference": off,
        }
        (Path(save_to) / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


def _static(gates: Any) -> HeadGate:
    """The gates as a method without anything that the input decides."""
    if isinstance(gates, HeadSet):
        raise SelectionError("bake got a HeadSet, which has no gates; give {head: 0.0 for head in heads}.")
    if isinstance(gates, Intervention) and type(gates) is not HeadGate:
        raise SelectionError(
            f"bake got {type(gates).__name__}, whose edit depends on the input; only the static gates of HeadGate are a change "
            "of weights. Steer with it instead."
        )
    method = gates if isinstance(gates, HeadGate) else HeadGate(gates)
    many = [h for h, g in method.gates.items() if isinstance(g, PerSample) and g.count is not None]
    if many:
        raise SelectionError(
            f"bake: head {many[0]} has a gate for each sample; weights are the same for all. Give one."
        )
    timed = {n: getattr(method.where, n) for n in ("phases", "steps", "branches", "rows")}
    timed = {n: v for n, v in timed.items() if v is not None}
    if timed:
        raise SelectionError(
            f"bake: Where({', '.join(f'{n}={v!r}' for n, v in timed.items())}) depends on the input; weights act in every row "
            "and step. Leave it out, or steer with HeadGate."
        )
    return method


def _number(gate: Any) -> float:
    return float(gate.values[0] if isinstance(gate, PerSample) else gate)


def _main(module: nn.Module) -> tuple[str, ...]:
    host = find_host(module)
    host.sites()
    return host.main


def _check_weight(model: nn.Module, layer: Linear, calls: list[Tensor], path: str) -> None:
    weight = layer.module.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise UnsupportedHost(
            f"{layer.name} after {path} has weights {brief(getattr(weight, 'dtype', type(weight).__name__))} that no gate can be "
            "folded into (quantised); load the model in floating point."
        )
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(calls) > 1 or len(names) > 1:
        raise UnsupportedHost(
            f"{layer.name} after {path} is shared ({len(calls)} calls in one forward, names {brief(names)}): a gate folded into it "
            "would act elsewhere too. Use HeadGate."
        )
