"""The eager dense reference of ACT: every head's full map, edited column by column; nothing of attnsteer is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "benchmarks_"
_USED: list[str] = []


@dataclass
class DenseACT:
    """ACT for one unpadded prompt without a cache behind it, as an attention function of transformers.

    The map is made as the library's eager attention makes it, which is what a published fork does. `lean` works in place
    instead, as well as a dense reference can: two maps at its peak. The edit is in place, one head at a time, in both.

    Attributes:
        heads: layer -> heads. beta, threshold: as in `attnsteer.ACT`. counts: sinks found, per edited head and call.
    """

    heads: dict[int, list[int]]
    beta: float
    threshold: float
    lean: bool = False
    counts: list[int] = field(default_factory=list)

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        n, groups = q.shape[2], q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        if self.lean:
            z = torch.matmul(q, k.transpose(-1, -2)).mul_(scaling)
            z.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu_(1), -torch.inf)
            A = torch.softmax(z, dim=-1)
        else:
            z = torch.matmul(q, k.transpose(2, 3)) * scaling
            z = z + mask
            A = torch.softmax(z, dim=-1, dtype=torch.float32).to(q.dtype)
        del z
        for head in self.heads.get(module.layer_idx, ()):
            for one in A[:, head]:
                self._edit(one)
        return torch.matmul(A, v).transpose(1, 2).contiguous(), None

    def _edit(self, A: Tensor) -> None:
        """One map [n, n], in place."""
        n = A.shape[0]
        mean = A.sum(dim=0) / torch.arange(n, 0, -1)
        sinks = mean > self.threshold
        sinks[0] = False
        at = sinks.nonzero()[:, 0]
        self.counts.append(len(at))
        inside = A[:, at]
        mass = inside.sum(dim=-1)
        rest = A.masked_fill(sinks, 0.0).sum(dim=-1)
        keep = rest <= 1e-6
        grow = torch.where(keep, 1.0, 1.0 + (1.0 - self.beta) * mass / rest.clamp_min(1e-6))
        A.mul_(grow[:, None])
        A[:, at] = torch.where(keep[:, None], inside, self.beta * inside)


def no_attention(module: nn.Module, q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """The queries in place of the attention's output: what is left to time is the rest of the model."""
    return q.transpose(1, 2).contiguous(), None


def use(model: nn.Module, function: Callable[..., Any], masks: str = "sdpa") -> nn.Module:
    """Switch a model to an attention function of ours; `forget` takes its name out again.

    Args:
        masks: the library's attention whose mask it sees: "sdpa" (none for a plain prompt) or "eager" (all of it).
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    name = f"{PREFIX}{len(_USED)}"
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks])
    _USED.append(name)
    model.set_attn_implementation(name)
    return model


def forget() -> None:
    """Unregister what `use` registered."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    while _USED:
        name = _USED.pop()
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
