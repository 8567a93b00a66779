"""A vision-language model with dense attention and the reference forms of VAR and VHR; nothing of attnsteer is used here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from tests.reference import lvlm_methods
from tests.reference.dense import dense_map, dense_out, dense_scores

NAME = "tests_dense_vision"


class DenseVision:
    """Dense attention in the language model's layers, with a map edit and a gate on the head outputs.

    Attributes:
        image, valid: bool [b, T0] of the prompt's slots. now: slots in the cache before the running call.
        edit: (layer, map over all slots so far, hidden states entering the layer) -> map. gate: (layer, head outputs) -> same.
        rescore: (layer, scores over all slots so far) -> scores; beside it, no window may cut the cache.
        last: head outputs [B, H, d] at each sample's last valid row of the latest call, by layer.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList):
        self.model, self.layers = model, layers
        self.numbers = {id(m): i for i, layer in enumerate(layers) for m in layer.modules()}
        self.configs = {id(m.config): m.config for layer in layers for m in layer.modules() if hasattr(m, "config")}
        self.image = self.valid = None
        self.edit: Callable[[int, Tensor, Tensor], Tensor] = lambda layer, A, x: A
        self.gate: Callable[[int, Tensor], Tensor] = lambda layer, out: out
        self.rescore: Callable[[int, Tensor], Tensor] = lambda layer, z: z
        self.last: dict[int, Tensor] = {}
        self.hidden: Tensor | None = None
        self.now = 0

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        layer = self.numbers[id(module)]
        scale = options.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        mask = None if mask is None else mask[..., : k.shape[2]]
        A = dense_map(self.rescore(layer, dense_scores(q, k, scale, mask=mask, softcap=options.get("softcap"))))
        # A window cache hands out its last slots only; edits are written for all of them.
        length = self.now + A.shape[2]
        full = A.new_zeros(*A.shape[:3], length)
        full[..., length - A.shape[3] :] = A
        A = self.edit(layer, full, self.hidden)[..., length - A.shape[3] :]
        out = self.gate(layer, dense_out(A, v))
        self.last[layer] = torch.stack([out[b, :, i] for b, i in enumerate(self._last_rows(out))])
        return out.to(v.dtype).transpose(1, 2).contiguous(), A

    def _last_rows(self, out: Tensor) -> list[int]:
        n = out.shape[2]
        if self.valid is None or self.now + n > self.valid.shape[1]:
            return [n - 1] * out.shape[0]
        rows = self.valid[:, self.now : self.now + n].repeat_interleave(out.shape[0] // len(self.valid), dim=0)
        return [int(r.nonzero()[-1]) if r.any() else n - 1 for r in rows]

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """The model runs on dense attention in this block."""
        stack = next(m for m in self.model.modules() if getattr(m, "layers", None) is self.layers)
        before = {i: c._attn_implementation_internal for i, c in self.configs.items()}
        hooks = [stack.register_forward_pre_hook(self._count, with_kwargs=True)]
        hooks += [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.layers]
        AttentionInterface.register(NAME, self.attention)
        AttentionMaskInterface.register(NAME, eager_mask)
        for config in self.configs.values():
            config._attn_implementation_internal = NAME
        try:
            yield
        finally:
            for i, config in self.configs.items():
                config._attn_implementation_internal = before[i]
            for hook in hooks:
                hook.remove()
            AttentionInterface._global_mapping.pop(NAME)
            AttentionMaskInterface._global_mapping.pop(NAME)

    def _count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self.now = 0 if cache is None else cache.get_seq_length()

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.hidden = args[0] if args else kwargs["hidden_states"]


def with_var(
    dense: DenseVision, layers: list[int], dims: tuple[int, ...], tau: float, acting: str = "all", **options: Any
) -> dict[str, int]:
    """Give `dense` VAR's map edit; returns the counts of edited and left rows, which grow as it runs."""
    found: dict[int, Tensor] = {}
    counts = {"edited": 0, "left": 0}

    def edit(layer: int, A: Tensor, x: Tensor) -> Tensor:
        if layer not in layers:
            return A
        (batch, _, n, m), past, prompt = A.shape, dense.now, dense.image.shape[1]
        times = batch // len(dense.image)
        image = torch.zeros(batch, m, dtype=torch.bool)
        image[:, :prompt] = dense.image.repeat_interleave(times, dim=0)[:, :m]
        valid = torch.ones(batch, m, dtype=torch.bool)
        valid[:, :prompt] = dense.valid.repeat_interleave(times, dim=0)[:, :m]
        new = lvlm_methods.sinks(x, dims, tau)
        old = found[layer][:, :past] if past else new[:, :0]
        # Beams of one sample share their prompt, so its sinks need no reordering.
        found[layer] = torch.cat([old, new], dim=1)
        S = found[layer].clone()
        S[:, prompt:] = False
        behind = image.cumsum(dim=1) > 0
        rows = (behind & ~image & valid)[:, past : past + n]
        S = S & valid
        if acting != "all":
            S = S & image if acting == "visual" else lvlm_methods.placebo(S, image, seed=7)
        return lvlm_methods.var(A, S, image, rows, counts=counts, **options)

    dense.edit = edit
    return counts


def with_vhr(
    dense: DenseVision,
    layers: list[int],
    alpha: float,
    chosen: dict[int, Tensor],
    rows: str = "all",
    text: bool = False,
) -> None:
    """Give `dense` VHR's gates for the layers in `chosen`, from the call that ends the prompt on.

    text: the image-free prompt is running, whose every call is whole and padded on the right.
    """

    def gate(layer: int, out: Tensor) -> Tensor:
        if layer not in chosen:
            return out
        batch, _, n, _ = out.shape
        if not text and dense.now + n < dense.valid.shape[1]:
            return out
        keep = chosen[layer].repeat_interleave(batch // len(chosen[layer]), dim=0)
        new = out.clone()
        last = [0] * batch
        if rows == "last" and (text or dense.now < dense.valid.shape[1]):
            last = dense._last_rows(out)
        for b in range(batch):
            for h in range(out.shape[1]):
                if keep[b, h]:
                    new[b, h, last[b] :] = alpha * out[b, h, last[b] :]
        return new

    dense.gate = gate


def choose_vhr(
    dense: DenseVision,
    run: Callable[[], Any],
    run_text: Callable[[int], Any],
    layers: list[int],
    alpha: float,
    rows: str = "all",
    outliers: bool = True,
    both: bool = True,
) -> dict[int, Tensor]:
    """VHR's heads by layer: whole passes of both prompts for each layer in turn, with the gates of the layers before it.

    run: the prompts with their images. run_text: (sample) the prompt of one sample without its images, without padding.
    """
    chosen: dict[int, Tensor] = {}
    valid = dense.valid
    for layer in layers:
        with_vhr(dense, layers, alpha, chosen, rows)
        run()
        seen, free = dense.last[layer], []
        for b in range(len(valid)):
            own = {at: keep[b : b + 1] for at, keep in chosen.items()} if both else {}
            with_vhr(dense, layers, alpha, own, rows, text=True)
            dense.valid = None
            run_text(b)
            dense.valid = valid
            free.append(dense.last[layer])
        chosen[layer] = lvlm_methods.vhr_heads(lvlm_methods.vhd(seen, torch.cat(free), outliers))
    return chosen
