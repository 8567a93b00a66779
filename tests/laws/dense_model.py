"""A transformers model whose attention is the slow dense definition, with maps edited by the reference functions.

Nothing of attnsteer is used here: an attention function of our own is registered with the library, builds the
whole map from the model's arguments, hands it to the reference of a method, and multiplies it by V. Modules that
call `F.scaled_dot_product_attention` themselves find it in that name's place for the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from tests.reference import llm_methods
from tests.reference.dense import dense_map, dense_out, dense_scores

NAME = "tests_dense_reference"


@dataclass
class Sequence:
    """What the test knows of the tokens: validity over all slots so far, prompt length, scoring or not."""

    valid: Tensor
    past: int = 0
    prompt: int = 0
    decoding: bool = False
    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    # Whether each row of the running call sees each slot, [B, n, T].
    visible: Tensor | None = None

    def first(self) -> Tensor:
        return self.valid.int().argmax(dim=-1)

    def marked(self, length: int) -> Tensor:
        """Slots of the spans (counted from the first valid token), [B, length]."""
        mask = torch.zeros(self.valid.shape[0], length, dtype=torch.bool)
        for b, ranges in enumerate(self.spans):
            for start, stop in ranges:
                mask[b, int(self.first()[b]) + start : int(self.first()[b]) + stop] = True
        return mask


Edit = Callable[[Tensor, Sequence, dict[str, Any]], Tensor]


class Dense:
    """The reference side: per module name, (heads, map edit) or (gates)."""

    def __init__(self, model: nn.Module, edits: dict[str, tuple[list[int], Edit]], gates: dict[str, dict[int, float]]):
        self.names = {id(m): n for n, m in model.named_modules()}
        self.edits, self.gates = edits, gates
        self.sequence: Sequence | None = None
        self.memory: dict[str, dict[str, Any]] = {}
        self.applied = 0
        self.running: nn.Module | None = None

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        scale = options.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if mask is not None:
            mask = mask[..., : k.shape[2]]
        bias = options.get("position_bias")
        bias = None if bias is None else bias[..., : k.shape[2]]
        z = dense_scores(q, k, scale, mask=mask, softcap=options.get("softcap"), bias=bias)
        A = dense_map(z, options.get("s_aux"))
        name = self.names[id(module)]
        if name in self.edits:
            heads, edit = self.edits[name]
            A = A.clone()
            A[:, heads] = self._absolute(edit, A[:, heads], torch.isfinite(z[:, 0]), name)
            self.applied += 1
        out = dense_out(A, v)
        for head, gate in self.gates.get(name, {}).items():
            out[:, head] = llm_methods.headgate(out[:, head : head + 1], torch.tensor([gate]))[:, 0]
            self.applied += 1
        return out.to(v.dtype).transpose(1, 2).contiguous(), A

    def sdpa(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """In place of torch's function, for the module that is running."""
        if is_causal:
            attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return self.attention(self.running, q, k, v, attn_mask, scaling=scale)[0].transpose(1, 2)

    def _absolute(self, edit: Edit, A: Tensor, visible: Tensor, name: str) -> Tensor:
        """Run an edit in absolute key slots: a window cache hands out only its last ones."""
        sequence = self.sequence
        length = sequence.past + A.shape[2]
        full = A.new_zeros(*A.shape[:3], length)
        full[..., length - A.shape[3] :] = A
        sequence.visible = visible.new_zeros(len(A), A.shape[2], length)
        sequence.visible[..., length - A.shape[3] :] = visible
        return edit(full, sequence, self.memory.setdefault(name, {}))[..., length - A.shape[3] :]


def _calls_sdpa(module: nn.Module) -> bool:
    return "scaled_dot_product_attention" in getattr(getattr(type(module).forward, "__code__", None), "co_names", ())


@contextlib.contextmanager
def dense_model(model: nn.Module, dense: Dense, configs: list[Any]) -> Iterator[Dense]:
    """Switch the given configs, or the modules that call SDPA themselves, to the dense attention for the block."""
    direct = [m for m in model.modules() if _calls_sdpa(m)]
    configs = [] if direct else configs
    before = [c._attn_implementation_internal for c in configs]
    AttentionInterface.register(NAME, dense.attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    for config in configs:
        config._attn_implementation_internal = NAME
    hooks = [m.register_forward_pre_hook(lambda module, args: setattr(dense, "running", module)) for m in direct]
    original = F.scaled_dot_product_attention
    if direct:
        F.scaled_dot_product_attention = dense.sdpa
    try:
        yield dense
    finally:
        F.scaled_dot_product_attention = original
        for hook in hooks:
            hook.remove()
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)


def act_edit(mode: str = "frozen", **options: Any) -> Edit:
    """ACT over the calls of one sequence: prefill chunks, then decode rows in `mode`."""

    def edit(A: Tensor, seq: Sequence, memory: dict[str, Any]) -> Tensor:
        n, m = A.shape[2:]
        rows, keys = seq.valid[:, m - n : m], seq.valid[:, :m]
        if not seq.decoding:
            new, memory["S"], memory["stats"] = llm_methods.act(
                A,
                row_valid=rows,
                key_valid=keys,
                first=seq.first(),
                q_start=seq.past,
                stats=memory.get("stats"),
                visible=seq.visible,
                **options,
            )
            return new
        state = memory["S"] if mode == "frozen" else memory["stats"]
        new, _, stats = llm_methods.act_decode(
            A,
            state,
            mode,
            row_valid=rows,
            key_valid=keys,
            first=seq.first(),
            q_start=seq.past,
            visible=seq.visible,
            **options,
        )
        memory["stats"] = stats
        return new

    return edit


def zerotuning_edit(gamma: float) -> Edit:
    return lambda A, seq, memory: llm_methods.zerotuning(A, gamma, seq.first())


def spotlight_edit(target: float, pooled: bool = False) -> Edit:
    def edit(A: Tensor, seq: Sequence, memory: dict[str, Any]) -> Tensor:
        n, m = A.shape[2:]
        return llm_methods.spotlight(A, target, seq.marked(m), pooled, row_valid=seq.valid[:, m - n : m])

    return edit


def instaboost_edit(factor: float) -> Edit:
    return lambda A, seq, memory: llm_methods.instaboost(A, factor, seq.marked(A.shape[3]))


def pasta_edit(alpha: float, scale_position: str = "exclude") -> Edit:
    def edit(A: Tensor, seq: Sequence, memory: dict[str, Any]) -> Tensor:
        m = A.shape[3]
        prompt = (torch.arange(m) < seq.prompt).expand(A.shape[0], -1)
        return llm_methods.pasta(A, alpha, seq.marked(m), prompt, scale_position)

    return edit
