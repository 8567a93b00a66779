"""A fingerprint of everything that steering may touch, to prove that nothing is left behind."""

from __future__ import annotations

from typing import Any

from torch import nn


def fingerprint(target: Any) -> dict[str, Any]:
    """Hooks, instance attributes, processors, configs and library registries of a model or pipeline.

    Equal before and after when a steering has undone all of its changes; the values are ids and names only.
    """
    modules = {"": target} if isinstance(target, nn.Module) else _parts(target)
    mark: dict[str, Any] = {"registries": _registries()}
    if not isinstance(target, nn.Module):
        mark["pipeline"] = {k: id(v) for k, v in vars(target).items() if callable(v)}
        mark["scheduler"] = {k: id(v) for k, v in vars(getattr(target, "scheduler", target)).items() if callable(v)}
    for part, model in modules.items():
        for name, module in model.named_modules():
            mark[f"{part}:{name}"] = _of(module)
    return mark


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
_SEPARATE = {"_parameters", "_buffers", "_modules", *_HOOKS}


def _parts(pipeline: Any) -> dict[str, nn.Module]:
    return {k: v for k, v in vars(pipeline).items() if isinstance(v, nn.Module)}


def _of(module: nn.Module) -> tuple[Any, ...]:
    """Hooks, callable attributes, names of ours, processor, children, and the name of the attention implementation."""
    held, own = vars(module), []
    for k, v in held.items():
        if k not in _SEPARATE and callable(v):
            own.append((k, id(v)))
    hooks = [(h, *map(id, held[h].values())) for h in _HOOKS if held.get(h)]
    config = getattr(module, "config", None)
    return (
        hooks,
        sorted(own),
        sorted(k for k in held if "attnsteer" in k),
        id(getattr(module, "processor", None)),
        [(k, id(v)) for k, v in module._modules.items()],
        getattr(config, "_attn_implementation_internal", None),
    )


def _registries() -> dict[str, Any]:
    import sys

    found: dict[str, Any] = {}
    models = sys.modules.get("transformers.modeling_utils")
    masks = sys.modules.get("transformers.masking_utils")
    if models is not None:
        found["attention"] = sorted((k, id(v)) for k, v in models.ALL_ATTENTION_FUNCTIONS.items())
    if masks is not None:
        found["masks"] = sorted((k, id(v)) for k, v in masks.ALL_MASK_ATTENTION_FUNCTIONS.items())
    functional = sys.modules["torch.nn.functional"]
    found["sdpa"] = id(functional.scaled_dot_product_attention)
    return found
