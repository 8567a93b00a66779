"""Random weights with which attention matters.

Logits have a standard deviation near 1.5 (maps far from uniform), value and output projections keep the scale of the
residual stream, biases and norm gains are not trivial.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

LOGIT_STD = 1.5

# Parameters that form q and k in these families; a fused qkv matrix is scaled whole (v is then a bit large).
_QK = re.compile(
    r"(?:^|\.)(?:q_proj|k_proj|query|key|to_q|to_k|add_q_proj|add_k_proj|linear_q|linear_k"
    r"|qkv|qkv_proj|query_key_value|c_attn|in_proj|SelfAttention\.[qk]|EncDecAttention\.[qk])(?:\.weight|_weight)$"
)
_QK_NORM = re.compile(r"(?:^|\.)(?:q_norm|k_norm|norm_q|norm_k|norm_added_q|norm_added_k)\.weight$")


def randomize_(model: nn.Module, seed: int, logit_std: float = LOGIT_STD, embedding_std: float = 1.0) -> nn.Module:
    """Redraws every parameter in place, in the order of `named_parameters`, from a private generator.

    Matrices get std 1/sqrt(fan-in); those forming q and k get sqrt(logit_std) more each, so that q.k/sqrt(d)
    has a std near `logit_std` on normalised inputs. Gains keep their initial value plus noise of std 0.1;
    biases are that noise.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    # Conv1D of GPT-2 and the experts of GPT-OSS multiply from the right: fan-in is the second to last axis.
    transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        with torch.no_grad():
            if id(parameter) in embeddings or re.search(r"position_embeddings?$|class_embedding$|cls_token$", name):
                value = noise if "position" in name else noise * embedding_std
            elif name.endswith("sinks"):
                value = noise
            elif _QK_NORM.search(name):
                # normalised q and k have unit entries: the gains alone set the std of the logits
                value = math.sqrt(logit_std) + 0.1 * noise
                if float(parameter.float().abs().max()) == 0.0:  # gains stored as an offset from one (Gemma)
                    value = value - 1.0
            elif name.endswith("bias"):
                value = 0.1 * noise
            elif parameter.ndim < 2:
                value = parameter.float() + 0.1 * noise
            else:
                experts = parameter.ndim == 3 and name.endswith("_proj")
                fan_in = parameter.shape[-2] if experts or id(parameter) in transposed else parameter[0].numel()
                gain = math.sqrt(logit_std) if _QK.search(name) else 1.0
                value = noise * (gain / math.sqrt(fan_in))
            parameter.copy_(value)
    return model
