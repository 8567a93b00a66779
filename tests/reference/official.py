"""The arithmetic of authors' released code on one attention map, for the presets that are named after it.

Written anew from the code of the commit that each function names. Maps are those of one sample without padding, [H, n, m] in
double precision, heads of one layer; nothing is edited in place, and nothing here imports the library. What the code does by
mistake (see each function) is left out where no preset offers it. ACT's is :func:`.llm_methods.act_released`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["instaboost", "pasta", "spotlight", "var", "var_sinks"]


def var_sinks(x: Tensor, dims: tuple[int, ...], tau: float) -> list[int]:
    """Tokens of the prompt that are sinks of a layer; x [n, D] enters it (seilk/VisAttnSink, src/logic/logic.py at 98e62d6,
    `DimProspector.run_logic`; called for prompts only, src/model/llava.py)."""
    x = x.to(torch.float32)
    normed = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).abs()
    values = torch.stack([normed[:, d] for d in dims], dim=-1).max(dim=-1)[0]
    return torch.nonzero(values > tau)[:, 0].tolist()


def var(
    A: Tensor, sinks: list[int], image: list[int], prefill: bool, rho: float, summ: float, p: float
) -> tuple[Tensor, int]:
    """(edited map, number of edited rows): `HeadFork.run_logic`, then `VARProcessor.attn_redist`, of the same file.

    There the image is one block and an edited row of the prompt stands behind it. With several images, which the code does not
    know, it stands behind the first visual sink. A row without attention to the image's other tokens would be 0 / 0 there.
    """
    visual = [j for j in sinks if j in image]
    if not visual:
        return A, 0
    text = [j for j in sinks if j not in image]
    on_image = A[:, :, image]
    portion = A[:, :, visual].sum(dim=-1) / (on_image + 1e-6).sum(dim=-1)
    chosen = (portion <= rho) & (on_image.sum(dim=-1) >= summ)
    new, edited = A.clone(), 0
    for h, i in chosen.nonzero().tolist():
        if prefill and (i < visual[0] or i in image):
            continue
        row = A[h, i].clone()
        budget = (1 - p) * row[visual].sum() + (1 - p) * row[text].sum()
        ratios = row.clone()
        ratios[visual] = 0
        if float(ratios[image].sum()) == 0.0:
            continue
        row[text] *= p
        row[visual] *= p
        row[image] += budget * ratios[image] / ratios[image].sum()
        new[h, i] = row
        edited += 1
    return new, edited


def pasta(A: Tensor, ranges: list[tuple[int, int]], alpha: float, scale_position: str, prompt: int) -> Tensor:
    """`edit_multisection_attention` (QingruZhang/PASTA, pastalib/pasta.py at 56a9138): terms of the attention mask."""
    mask, constant = torch.zeros(A.shape[-1], dtype=A.dtype), math.log(alpha)
    for start, stop in ranges:
        if scale_position == "include":
            mask[start:stop] += constant
        else:
            mask[:start] += constant
            mask[stop:prompt] += constant
    if scale_position == "include":
        mask[:prompt] -= constant
    return torch.softmax(A.log() + mask, dim=-1)


def instaboost(A: Tensor, keys: Tensor, multiplier: float) -> Tensor:
    """`prompt_attention_ablation_hook` (BrachioLab/InstABoost, src/model_interaction_utils.py at 1df1b5d).

    A [B, H, n, m], rows that sum to what a learned sink leaves of them; keys [B, m] bool. The scaled row is brought back to the
    sum that it had, so that a learned sink keeps its share.
    """
    scaled = A * (1 + (multiplier - 1) * keys.to(A.dtype))[:, None, None]
    total = scaled.sum(dim=-1, keepdim=True)
    return scaled / total.where(total > 0, 1.0) * A.sum(dim=-1, keepdim=True)


def spotlight(A: Tensor, ranges: list[tuple[int, int]], target: float, floor: float = 0.0) -> Tensor:
    """`attention_bias_hook` (AgentToolkit/agent-lifecycle-toolkit, altk/spotlight_toolkit/spotlight/spotlight.py at 8f0ab75).

    floor: 1e-10 there, on every weight, so that keys of the future get some.
    """
    union = torch.zeros(A.shape[-1], dtype=A.dtype)
    for start, stop in ranges:
        union[start:stop] = 1.0
    proportion = float((A * union).sum() / A.sum())
    if proportion >= target:
        return A
    return torch.softmax((A + floor).log() + union * math.log(target / proportion), dim=-1)
