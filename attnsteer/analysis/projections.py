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


@dataclass
class Norm:
    """A normalisation in front of a linear reading: y = gain * (x [- mean]) / scale + shift.

    Attributes:
        gain: [D]. shift: [D] or None. centred: whether the mean is taken off (LayerNorm).
    """

    name: str
    gain: Tensor
    shift: Tensor | None
    centred: bool
    eps: float

    def scale(self, x: Tensor) -> Tensor:
        """[..., 1] of rows x [..., D]: rms, or standard deviation."""
        x = x - x.mean(dim=-1, keepdim=True) if self.centred else x
        return (x.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt()

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Rows x [..., D] normalised by their own scale, or by a frozen one; then without the shift, so that parts add up."""
        y = (x - x.mean(dim=-1, keepdim=True) if self.centred else x) / (self.scale(x) if scale is None else scale)
        y = y * self.gain
        return y if self.shift is None or scale is not None else y + self.shift


def norm_before(model: nn.Module, entered: Tensor, passed: dict[str, tuple[Tensor, Tensor]]) -> Norm | None:
    """The norm whose output a layer takes; None where none of the model's gives it. What kind it is, its arithmetic tells.

    Args:
        entered: what the layer took, [.., D]. passed: module name -> (its input, its output).
    """
    modules = dict(model.named_modules())
    for name, (x, y) in passed.items():
        if y.shape != entered.shape or not torch.equal(y, entered) or x.shape != y.shape:
            continue
        module = modules[name]
        weight, shift = getattr(module, "weight", None), getattr(module, "bias", None)
        eps = next(
            (float(getattr(module, n)) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), 1e-6
        )
        if weight is None or weight.shape != x.shape[-1:]:
            continue
        for centred in (False, True):
            # Gemma keeps its gain as an offset from one.
            for gain in (weight.detach().float(), 1 + weight.detach().float()):
                norm = Norm(name, gain, None if shift is None else shift.detach().float(), centred, eps)
                if torch.allclose(norm(x.float()), y.float(), rtol=1e-3, atol=1e-3 * float(y.abs().max())):
                    return norm
    return None


@dataclass
class HeadWeights:
    """The weights of one site by head, as float32 copies; x_i W_Q^h is the query before rotation, o W_O^h what a head writes.

    Attributes:
        site: the `Site`. value, output: W_V [kv heads, D, dv], W_O [heads, dv, D]. value_bias: [kv heads, dv] or None.
        query, key: W_Q [heads, D, d], W_K [kv heads, D, d]; None where scores are not bilinear in the input (norms of q and k).
        norm: in front of q, k and v; None where the layer takes the residual as it is.
    """

    site: Site
    value: Tensor
    output: Tensor
    value_bias: Tensor | None
    query: Tensor | None
    key: Tensor | None
    norm: Norm | None
    # The norm behind the output projection, before the residual (Gemma 2, OLMo 2).
    post: Norm | None = None
    # [heads, d] and [kv heads, d], or None.
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None

    def kv(self, head: int) -> int:
        """The key and value head of a query head."""
        return head // (self.site.heads // self.value.shape[0])


@dataclass
class Readout:
    """How a model's residual becomes logits: final norm, and unembedding [D, V].

    Attributes:
        embedding: [V, D], scaled as the model scales it. tied: whether it is the unembedding's parameter.
    """

    norm: Norm | None
    unembedding: Tensor
    embedding: Tensor
    tied: bool


def unembedding_of(model: nn.Module) -> Tensor:
    """W_U [V, D] of a language model.

    Raises:
        UnsupportedHost: it has none, as a bare encoder or a backbone.
    """
    found = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(found, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise UnsupportedHost(
            f"{type(model).__name__} has no unembedding (get_output_embeddings() gives {type(found).__name__}), so heads have no "
            "words. Give the model with its language head, such as AutoModelForCausalLM; a quantised one in floating point."
        )
    return weight.detach()


@torch.no_grad()
def head_weights(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, where: Where | None = None
) -> tuple[dict[int, HeadWeights], Readout | None]:
    """Weights of all heads by layer, and the read-out, found in a forward of one token, at whose position nothing is rotated.

    Args:
        inputs: of a forward of one token; None: made. where: the sites.

    Raises:
        UnsupportedHost: a value or output projection is not found: something stands between, the layer is quantised, or adapted
            and not merged; or two sites share a layer.
    """
    passed: dict[str, tuple[Tensor, Tensor]] = {}

    def took(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                passed[name] = (args[0], output)

        return hook

    hooks = [
        m.register_forward_hook(took(n))
        for n, m in model.named_modules()
        if not isinstance(m, nn.Linear) and getattr(m, "weight", None) is not None and m.weight.ndim == 1
    ]
    try:
        seen = look(model, probe_inputs(model, 1) if inputs is None else inputs, where)
    finally:
        for hook in hooks:
            hook.remove()
    layers, found = linear_layers(model), {}
    for site in find_host(model).sites():
        if site.path not in seen.sites:
            continue
        if site.layer in found:
            raise UnsupportedHost(
                f"{found[site.layer].site.path} and {site.path} are both layer {site.layer}; give where=."
            )
        found[site.layer] = _weights_of(model, site, seen, layers, passed)
    if not found:
        raise UnsupportedHost(f"no site of {type(model).__name__} was passed by the forward; give inputs=.")
    return found, _readout(model, seen, passed)


def _weights_of(
    model: nn.Module, site: Site, seen: Seen, layers: dict[str, Linear], passed: dict[str, tuple[Tensor, Tensor]]
) -> HeadWeights:
    has = seen.sites[site.path]
    if has["q"].shape[2] != 1:
        raise UnsupportedHost(
            f"{site.path} has {has['q'].shape[2]} rows in the forward that weights are read from; give one token."
        )
    parts = {name: _slices(has[name], seen, layers) for name in ("q", "k", "v")}
    if parts["v"] is None:
        raise UnsupportedHost(
            f"no linear layer gives the values of {site.path} as they are (a norm or an adapter stands between, or the weights are "
            "quantised): merge adapters, or load the model in floating point."
        )
    projections = output_projections(model, seen, site)
    if len(projections) > 1:
        raise UnsupportedHost(
            f"{site.path} has several output projections ({[p.name for p in projections]}); merge adapters."
        )
    projection = projections[0]
    heads, width = site.heads, has["out"].shape[3]
    W_O = projection.weight.detach().float().unflatten(0, (heads, width))
    name, W_V, b_V = parts["v"]
    if W_V.shape[1] != W_O.shape[2]:
        raise UnsupportedHost(
            f"{name} makes the values of {site.path} from {W_V.shape[1]} channels that were compressed before, of {W_O.shape[2]} "
            "(multi-head latent attention), so that its heads have no one matrix of values; leave readings from weights out."
        )
    entered = seen.inputs[name][0]
    behind = {
        n: (x, y) for n, (x, y) in passed.items() if any(torch.equal(x, o) for o in seen.outputs[projection.name])
    }
    post = next((norm_before(model, y, {n: (x, y)}) for n, (x, y) in behind.items()), None)
    same = parts["q"] is not None and parts["k"] is not None and seen.inputs[parts["q"][0]][0].shape == entered.shape
    return HeadWeights(
        site,
        W_V,
        W_O,
        b_V,
        parts["q"][1] if same else None,
        parts["k"][1] if same else None,
        norm_before(model, entered, passed),
        post,
        parts["q"][2] if same else None,
        parts["k"][2] if same else None,
    )


def _slices(t: Tensor, seen: Seen, layers: dict[str, Linear]) -> tuple[str, Tensor, Tensor | None] | None:
    """(layer, weights [H, D, d], biases [H, d] or None) of the slices of one linear layer's output that t [1, H, 1, d] is
    made of."""
    H, d = t.shape[1], t.shape[3]
    wanted = t[0, :, 0]
    for name, outputs in seen.outputs.items():
        y = outputs[0].reshape(-1)
        if (
            len(outputs) > 1
            or outputs[0].shape[-1] != len(y)
            or len(y) < d
            or not layers[name].weight.is_floating_point()
        ):
            continue
        windows = y.unfold(0, d, d) if len(y) % d == 0 else y.unfold(0, d, 1)
        step = d if len(y) % d == 0 else 1
        equal = (windows[None] == wanted[:, None]).all(dim=-1)
        if not bool(equal.any(dim=-1).all()):
            continue
        starts = equal.int().argmax(dim=-1) * step
        columns = starts[:, None] + torch.arange(d, device=t.device)
        weight, bias = layers[name].weight.detach().float(), layers[name].bias
        W = weight[:, columns.flatten()].unflatten(1, (H, d)).transpose(0, 1).contiguous()
        return name, W, None if bias is None else bias.detach().float()[columns]
    return None


def _readout(model: nn.Module, seen: Seen, passed: dict[str, tuple[Tensor, Tensor]]) -> Readout | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if head is None or table is None or getattr(head, "weight", None) is None:
        return None
    name = next((n for n, layer in linear_layers(model).items() if layer.module is head), None)
    entered = seen.inputs[name][0] if name in seen.inputs else None
    norm = None if entered is None else norm_before(model, entered, passed)
    weight = head.weight.detach().float()
    embedding = table.weight.detach().float() * float(getattr(table, "embed_scale", 1.0))
    return Readout(norm, weight.T, embedding, head.weight is table.weight)
