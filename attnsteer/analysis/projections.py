"""Where a head's output leaves its attention, and what its q, k and v are made of: found by looking at one forward.

Names and layouts of projections differ (fused, interleaved, transposed); what enters and leaves them does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..call import AttnCall
from ..errors import UnsupportedHost
from ..intervention import Intervention
from ..site import Site
from ..steering import find_host, steer
from ..where import Where

# Tokens of a probing text: enough that no two linear layers take the same input by chance.
LENGTH = 7


@dataclass(frozen=True)
class Looked(Intervention):
    """Keeps q, k, v and the heads' outputs of each site; edits nothing."""

    found: dict[str, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    observes = True

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Keep what the site has."""
        if len(call.heads) != call.site.heads:
            raise UnsupportedHost(
                f"{call.site.path} has {len(call.heads)} of {call.site.heads} heads here: weights of a model that is divided among "
                "processes are not read. Load it on one."
            )
        self.found[call.site.path] = {"q": call.q, "k": call.k, "v": call.v, "out": out}


@dataclass
class Linear:
    """A linear layer in one orientation: y = x W + b, `weight` [in, out] a view of the model's own parameter."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """[in, out]."""
        return self.module.weight.T if isinstance(self.module, nn.Linear) else self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """[out], or None."""
        return getattr(self.module, "bias", None)


@dataclass
class Seen:
    """One forward: what entered and left each linear layer, what each site had, and the model's first output."""

    sites: dict[str, dict[str, Tensor]]
    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]
    first: Tensor


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """The linear layers of a model by name: `nn.Linear`, and the transposed `Conv1D` of GPT-2."""
    return {
        name: Linear(name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) or (type(m).__name__ == "Conv1D" and getattr(m, "weight", nn.Module()).ndim == 2)
    }


def module_of(target: Any) -> nn.Module:
    """The module below a target that has one.

    Raises:
        UnsupportedHost: it has none, such as a diffusion pipeline; its denoiser has.
    """
    module = target if isinstance(target, nn.Module) else getattr(find_host(target), "model", None)
    if not isinstance(module, nn.Module):
        raise UnsupportedHost(
            f"{type(target).__name__} is no single module; give the part whose heads are meant, such as pipe.unet, with inputs=."
        )
    return getattr(module, "_orig_mod", module)


def probe_inputs(model: nn.Module, length: int = LENGTH) -> dict[str, Tensor]:
    """Arguments of a short forward of a transformers model: random tokens, or random pixels.

    Raises:
        UnsupportedHost: what the model takes is not known.
    """
    g, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    name = getattr(model, "main_input_name", None)
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    vocab = getattr(text, "vocab_size", None)
    if name == "input_ids" and vocab:
        ordinary = torch.tensor(sorted(set(range(vocab)) - _marked(config, text)))
        draw = lambda: ordinary[torch.randint(0, len(ordinary), (1, length), generator=g)].to(device)  # noqa: E731
        ids = {"input_ids": draw()}
        return ids | {"decoder_input_ids": draw()} if getattr(config, "is_encoder_decoder", False) else ids
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if name == "pixel_values" and size:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.randn(1, channels, height, width, generator=g)
        return {"pixel_values": pixels.to(device, next(model.parameters()).dtype)}
    raise UnsupportedHost(
        f"what {type(model).__name__} takes is not known; give inputs=, the keyword arguments of a short forward that passes "
        "through its attention."
    )


def _marked(*configs: Any) -> set[int]:
    """Tokens that stand for something else, such as images."""
    return {
        v
        for config in configs
        for name, v in vars(config).items()
        if name.endswith(("token_id", "token_index")) and isinstance(v, int)
    }


@torch.no_grad()
def look(model: nn.Module, inputs: Mapping[str, Any], where: Where | None = None) -> Seen:
    """One forward of `model(**inputs)`, with what passed through its sites and linear layers."""
    entered: dict[str, list[Tensor]] = {}
    left: dict[str, list[Tensor]] = {}

    def took(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                entered.setdefault(name, []).append(args[0])
                left.setdefault(name, []).append(output)

        return hook

    probe = Looked(where=Where() if where is None else where)
    hooks = [layer.module.register_forward_hook(took(name)) for name, layer in linear_layers(model).items()]
    try:
        with evaluating(model), steer(model, probe, control=True):
            first = first_tensor(model(**inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(probe.found, entered, left, first)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout; afterwards each part is in the mode in which it was."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def first_tensor(output: Any) -> Tensor:
    """The first floating tensor of a model's output: logits, or hidden states."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def output_projections(model: nn.Module, seen: Seen, site: Site) -> list[Linear]:
    """The linear layers that take a site's head outputs side by side, [.., H dv], head 0 first; mostly one.

    Raises:
        UnsupportedHost: there is none: something stands between, or the heads are in another order.
    """
    out = seen.sites[site.path]["out"]
    flat = out.transpose(1, 2).flatten(2).reshape(-1, out.shape[1] * out.shape[3])
    layers = linear_layers(model)
    found = []
    for name, tensors in seen.inputs.items():
        for x in tensors:
            if x.shape[-1] == flat.shape[1] and torch.equal(x.reshape(-1, x.shape[-1]), flat):
                found.append(layers[name])
                break
    if not found:
        raise UnsupportedHost(
            f"no linear layer takes the head outputs of {site.path} as they are (a norm, a gate or another order of heads stands "
            "between, or the layer is fused with its kernel), so they have no output projection to be read or folded into."
        )
    return found
