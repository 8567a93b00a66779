"""SoftPAG: interpolates the maps of chosen heads towards the identity in a weak branch.

"Fine-Grained Perturbation Guidance via Attention Head Selection" (NeurIPS 2025, arXiv 2506.10978), section 3;
official code cvlab-kaist/HeadHunter at 3828d1c. There the identity of joint attention spans text and image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..call import AttnCall
from ..errors import UnsupportedHost
from ..heads import HeadSet, head_set
from ..parameters import PerSample, choice, number
from ..registry import register_method
from .bases.weak_branch import WeakBranch

JOINT = ("joint_identity", "ii_identity", "ii_identity_renorm", "image_rows_identity")
TARGETS = ("identity", "uniform", "mean_query", "zero")


@register_method
@dataclass(frozen=True)
class SoftPAG(WeakBranch):
    """Weak branch with A <- (1 - u) A + u I in the chosen heads, that is O' = (1 - u) O + u V.

    Args:
        scale: guidance scale s (the paper's w).
        strength: u in 0 to 1; 1 is hard PAG restricted to heads, 0 changes nothing.
        heads: the heads to perturb; None: all that `where` selects.
        joint: what identity means where text and image share a sequence. "joint_identity": every row keeps only
            itself (official code). "image_rows_identity": image rows only. "ii_identity": image rows see themselves
            and the text, by softmax (diffusers' SD3 PAG). "ii_identity_renorm": their text mass stays as it was.
        target: "identity", or "uniform" (the mean value of the whole sequence), "mean_query" (SoftSEG; image rows),
            "zero" (head off).
    """

    strength: float = number(1.0, low=0, high=1, per_sample=True, learnable=True)
    joint: str = choice("joint_identity", JOINT)
    heads: HeadSet | None = head_set(kw_only=True)
    target: str = choice("identity", TARGETS, kw_only=True)

    linear = True

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        if self.strength == 0.0:
            return None
        target = getattr(self, f"_{self.target}")(call, out)
        if self.strength == 1.0:
            return target
        if not isinstance(self.strength, PerSample):
            return torch.lerp(out, target, self.strength)
        # In the dtype of statistics, as for one number: a rounded strength would be another one.
        wide = torch.promote_types(out.dtype, torch.float32)
        out, target = out.to(wide), target.to(wide)
        return torch.lerp(out, target, call.each(self.strength, out)[..., None])

    def _zero(self, call: AttnCall, out: Tensor) -> Tensor:
        return torch.zeros_like(out)

    def _uniform(self, call: AttnCall, out: Tensor) -> Tensor:
        return call.values.mean(dim=2, keepdim=True).expand_as(out)

    def _mean_query(self, call: AttnCall, out: Tensor) -> Tensor:
        return mean_query(call, out)

    def _identity(self, call: AttnCall, out: Tensor) -> Tensor:
        own = call.own_keys
        if own is None:
            raise UnsupportedHost(
                f"{call.site.path} has {call.q.shape[2]} rows and {call.k.shape[2]} keys: identity attention is not defined."
            )
        if call.site.kind != "joint" or self.joint == "joint_identity":
            return call.values[:, :, own]
        image, text = image_text(call)
        new = out.clone()
        new[:, :, image] = {
            "image_rows_identity": lambda: call.values[:, :, image],
            "ii_identity": lambda: _self_and_text(call, image, text),
            "ii_identity_renorm": lambda: _text_kept(call, image, text),
        }[self.joint]().to(out.dtype)
        return new


def image_text(call: AttnCall) -> tuple[slice, slice]:
    """The image and text slices of a joint sequence."""
    if not {"image", "text"} <= set(call.segments):
        raise UnsupportedHost(
            f"{call.site.path}: which rows are image and which are text is not known for this model; use "
            'joint="joint_identity", which does not need it.'
        )
    return call.segments["image"], call.segments["text"]


def mean_query(call: AttnCall, out: Tensor) -> Tensor:
    """Every image row attends with the mean image query: one row of attention, broadcast."""
    image = image_text(call)[0] if call.site.kind == "joint" else slice(0, call.q.shape[2])
    mean = call.q[:, :, image].mean(dim=2, keepdim=True)
    att = call.map.att
    if att.mask is not None and att.mask4().shape[2] > 1:
        raise UnsupportedHost(f"{call.site.path}: a mask that differs between rows has no mean-query form.")
    row = kernels.attend(att.select(None).replace(q=mean, causal=False))
    new = out.clone()
    new[:, :, image] = row.to(out.dtype)
    return new


def _self_and_text(call: AttnCall, image: slice, text: slice) -> Tensor:
    """Image rows: softmax over their own logit and those of the text keys, [B, H, Ni, d]."""
    att = call.map.att.select(None)
    q, k = att.q[:, :, image], att.k
    k = k if att.groups == 1 else k.repeat_interleave(att.groups, dim=1)
    own = (q * k[:, :, image]).sum(dim=-1, keepdim=True).to(att.stat_dtype) * att.scale
    others = att.scores(image, text)
    p = torch.softmax(torch.cat([own, others], dim=-1), dim=-1)
    values = call.values.to(p.dtype)
    return p[..., :1] * values[:, :, image] + torch.matmul(p[..., 1:], values[:, :, text])


def _text_kept(call: AttnCall, image: slice, text: slice) -> Tensor:
    """Image rows: their text mass as it was, their image mass on themselves, [B, H, Ni, d]."""
    keys = torch.zeros(1, 1, call.k.shape[2], dtype=torch.bool, device=call.k.device)
    keys[..., text] = True
    mass, part = call.map.partial(keys)
    return part[:, :, image] + (1.0 - mass[:, :, image])[..., None] * call.values[:, :, image]
