"""The check of vLLM's CPU attention by behaviour: a small batch through a layer's own implementation, then through the seam."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ... import kernels
from ...choices import Choice
from ...errors import UnsupportedHost
from ...kernels import Attention
from ...registry import get_method
from .rows import Tracked


def cpu_call(seam: Any, impl: Any, layer: Any, base: type, cache: Tensor) -> None:
    """Write two requests into a scratch cache of a layer's shape and compare what comes out with softmax(q k^T) v.

    One has a prompt, the other decodes; both are steered by `ZeroTuning` with all heads.

    Raises:
        UnsupportedHost: they differ.
    """
    from vllm import _custom_ops as ops

    generator = torch.Generator().manual_seed(0)
    size, d, H, K = cache.shape[2], impl.head_size, impl.num_heads, impl.num_kv_heads
    random = lambda *shape: torch.randn(*shape, generator=generator).to(cache.dtype)  # noqa: E731
    new, lengths = [5, 1], [5, size + 3]
    scratch = torch.zeros(5, *cache.shape[1:], dtype=cache.dtype)
    table = torch.tensor([[1, 0], [3, 2]], dtype=torch.int32)
    keys, values = zip(*((random(m, K, d), random(m, K, d)) for m in lengths), strict=True)
    slots = torch.cat(
        [table[b].long()[torch.arange(m) // size] * size + torch.arange(m) % size for b, m in enumerate(lengths)]
    )
    impl_class, impl.__class__ = impl.__class__, base
    try:
        impl.do_kv_cache_update(layer, torch.cat(keys), torch.cat(values), scratch, slots)
        query, out = random(sum(new), H, d), torch.zeros(sum(new), H, d, dtype=cache.dtype)
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
        seen = torch.tensor(lengths, dtype=torch.int32)
        window = impl.sliding_window
        metadata = SimpleNamespace(
            num_actual_tokens=sum(new), query_start_loc=starts, seq_lens=seen, block_table=table, slot_mapping=slots,
            causal=True, dynamic_causal=None, max_query_len=max(new), max_seq_len=max(lengths), encoder_cache=None,
            scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
                num_reqs=2, num_heads=H, num_kv_heads=K, head_dim=d, seq_lens=seen, dtype=cache.dtype, query_start_loc=starts,
                causal=True, sliding_window_size=window, isa=layer.isa, enable_kv_split=False, dynamic_causal=None,
                kv_cache_dtype=impl.kv_cache_dtype,
            ),
        )  # fmt: skip
        impl.forward(layer, query, None, None, scratch, metadata, output=out)
    finally:
        impl.__class__ = impl_class
    plain = _slow(impl, query, keys, values, new, window)
    _compare(seam.name, "attention", torch.cat([kernels.attend(a)[0].transpose(0, 1) for a in plain]), out)
    ledger, gamma = seam.ledger, 0.3
    part = ledger.run.menu.part(0, get_method("ZeroTuning")(gamma=gamma))
    steered = out.clone()
    counted = {k: v for k, v in vars(ledger).items()}
    runtimes = ledger.run.runtimes[seam.path].checked.copy()
    ledger.requests = {
        name: Tracked(Choice((part,)), id=name, prompt=5, ids=lambda: [0] * (size + 3)) for name in ("first", "second")
    }
    audit, ledger.run.audit = ledger.run.audit, type(ledger.run.audit)(["check"])
    try:
        plan = ledger.plan([("first", 0, 0, 5, 0), ("second", 1, 5, 1, lengths[1] - 1)])
        seam.edit(impl, layer, query, scratch, metadata, steered, plan, lambda: None)
    finally:
        vars(ledger).update(counted)
        ledger.run.audit = audit
        ledger.run.runtimes[seam.path].checked = runtimes
    expected = []
    for att in plain:
        A = kernels.dense(att).clone()
        rest = 1.0 - A.sum(dim=-1, keepdim=True)
        A[..., 0] *= gamma
        A = A / (A.sum(dim=-1, keepdim=True) + rest)
        expected.append((A @ att.expanded_values().float())[0].transpose(0, 1))
    _compare(seam.name, "a steered row", torch.cat(expected), steered)


def _slow(impl: Any, query: Tensor, keys: Any, values: Any, new: list[int], window: int) -> list[Attention]:
    found, row = [], 0
    for k, v, n in zip(keys, values, new, strict=True):
        m = len(k)
        i, j = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
        mask = (j <= i) & (j > i - window) if window > 0 else j <= i
        heads = [t.transpose(0, 1)[None] for t in (query[row : row + n], k, v)]
        cap, sinks = impl.logits_soft_cap or None, getattr(impl, "sinks", None)
        found.append(Attention(*heads, impl.scale, mask=mask[None, None], softcap=cap, sinks=sinks))
        row += n
    return found


def _compare(name: str, what: str, wanted: Tensor, found: Tensor) -> None:
    limit = 1e-4 if found.dtype == torch.float32 else 5e-2
    error = (wanted.float() - found.float()).abs().max()
    if not bool(error <= limit * wanted.float().abs().max().clamp_min(1.0)):
        raise UnsupportedHost(
            f"{name}: {what} of a small batch differs by {float(error):.2g} from its definition; this version of vLLM computes or "
            "keeps something otherwise than attnsteer knows."
        )
