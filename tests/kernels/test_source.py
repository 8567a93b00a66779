"""Where the log-sum-exp comes from, and that torch still has it: a renamed operator fails here, not at a user's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnsteer import kernels
from tests.kernels.common import OUTPUT, close, problem, truth

# Private operators: name, arguments that we pass, and the first two things returned.
OPERATORS = {
    "_scaled_dot_product_flash_attention_for_cpu": (
        "query key value dropout_p is_causal attn_mask scale",
        "output logsumexp",
    ),
    "_scaled_dot_product_flash_attention": (
        "query key value dropout_p is_causal return_debug_mask scale",
        "output logsumexp",
    ),
    "_scaled_dot_product_efficient_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal scale",
        "output log_sumexp",
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_what_they_were(name: str) -> None:
    assert hasattr(torch.ops.aten, name), f"torch {torch.__version__} has no aten::{name}: `attend_lse` needs another"
    schema = getattr(torch.ops.aten, name).default._schema
    arguments, returns = OPERATORS[name]
    assert [a.name for a in schema.arguments] == arguments.split()
    assert [r.name for r in schema.returns[:2]] == returns.split()
    assert all(str(r.type) == "Tensor" for r in schema.returns[:2])


def test_cpu_uses_the_fused_kernel() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for mask in ("none", "causal", "left padding", "float min", "left padding, causal flag"):
            for bias in (None, (1, 4)):
                assert kernels.lse_source(problem(mask, dtype=dtype, bias=bias)) == "cpu-flash"


@pytest.mark.parametrize("quirk", [{"softcap": 5.0}, {"sinks": True}, {"dv": 4}, {"n": 0}])
def test_blockwise_where_no_kernel_fits(quirk: dict) -> None:
    assert kernels.lse_source(problem(**quirk)) == "blockwise"


def test_blockwise_where_a_gradient_is_asked() -> None:
    att = problem("causal")
    att.q.requires_grad_()
    assert kernels.lse_source(att) == "blockwise"
    with torch.no_grad():
        assert kernels.lse_source(att) == "cpu-flash"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float -inf"])
def test_output_is_that_of_sdpa_bit_for_bit(mask: str, dtype: torch.dtype) -> None:
    """One call gives the model's own output and the log-sum-exp."""
    att = problem(mask, n=70, m=70, d=32, dtype=dtype)
    own = F.scaled_dot_product_attention(
        att.q, att.k, att.v, attn_mask=att.mask, is_causal=att.causal, scale=att.scale, enable_gqa=True
    )
    assert torch.equal(kernels.attend_lse(att)[0], own)
    assert torch.equal(kernels.attend(att), own)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for mask in ("none", "causal", "left padding", "float min", "keys"):
            for bias in (None, (1, 1), (1, 4)):
                att = problem(mask, n=70, m=70, d=32, dtype=dtype, bias=bias)
                there = {name: getattr(att, name) for name in ("q", "k", "v", "mask", "key_bias")}
                there = att.replace(**{name: None if t is None else t.cuda() for name, t in there.items()})
                plain = bias is None and att.mask is None and dtype != torch.float32
                assert kernels.lse_source(there) == ("cuda-flash" if plain else "cuda-efficient")
                t, keys = truth(att), torch.rand(2, 4, 70) < 0.3
                out, lse = kernels.attend_lse(there)
                close(out.cpu(), t.out, 2 * max(OUTPUT[dtype], 1e-3))
                close(lse.cpu(), t.lse, 1e-3)
                close(kernels.mass(there, lse, keys.cuda()).cpu(), (t.A * keys[:, :, None]).sum(-1), 1e-3)
