"""A small vision transformer whose attention names F.scaled_dot_product_attention in every spelling."""

from __future__ import annotations

import torch
import torch as pytorch
import torch.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as renamed

DIM, HEADS, TOKENS = 32, 4, 10


class Attention(nn.Module):
    """As timm's, with `import torch.nn.functional as F`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, _ = x.shape
        return self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByFunctional(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByNn(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByTorch(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByOtherTorch(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(pytorch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByName(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(scaled_dot_product_attention(q, k, v, mask))


class ByOtherName(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(renamed(q, k, v, mask))


class ByLocalName(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        attend = F.scaled_dot_product_attention
        return self.join(attend(*self.split(x), mask))


class BySuper(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = super().split(x)
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByOwnImport(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        import torch.nn.functional as inside

        q, k, v = self.split(x)
        return self.join(inside.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByOwnImportOfTheName(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        from torch.nn.functional import scaled_dot_product_attention as inside

        q, k, v = self.split(x)
        return self.join(inside(q, k, v, attn_mask=mask))


def _closed(module: object, function: object) -> tuple[type[Attention], type[Attention]]:
    class ByClosedModule(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.split(x)
            return self.join(module.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    class ByClosedName(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = super().split(x)
            return self.join(function(q, k, v, attn_mask=mask))

    return ByClosedModule, ByClosedName


ByClosedModule, ByClosedName = _closed(F, renamed)


class Inherited(Attention):
    pass


SPELLINGS = (
    Attention, ByFunctional, ByNn, ByTorch, ByOtherTorch, ByName, ByOtherName, ByLocalName, BySuper, ByOwnImport,
    ByOwnImportOfTheName, ByClosedModule, ByClosedName, Inherited,
)  # fmt: skip


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module]):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(DIM), attention(), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 48), nn.GELU(), nn.Linear(48, DIM))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(self, *attention: type[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(Block(a) for a in attention)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


def vit(*attention: type[nn.Module]) -> tuple[Vit, Tensor]:
    torch.manual_seed(0)
    return Vit(*(attention or (Attention, Attention))).eval(), torch.randn(3, TOKENS, DIM)
