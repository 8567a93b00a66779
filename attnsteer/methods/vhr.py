"""VHR: multiplies the outputs of the heads that look at the image, chosen once by what removing the image changes.

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence" (ACL 2025, arXiv 2412.13949),
equations of section 3; the official code (jinghan1he/VHR) was not seen. Not stated in the text, so options here: which rows
of the prompt are scaled, and whether the image-free prompt is reinforced too. The image's tokens are dropped from that prompt,
and the standard deviation is that of a population (both unverified).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import UnsupportedHost
from ..intervention import Intervention
from ..parameters import choice, flag, integer, is_all, number
from ..registry import register_method
from ..site import Site
from ..tokens import Tokens
from ..where import Where
from ._images import check_some_image, image_tokens
from ._prompt import prompt_unseen

ROWS = ("all", "last")


@register_method
@dataclass(frozen=True)
class VHR(Intervention):
    """Vision-aware head reinforcement: o_h <- alpha o_h for the heads whose divergence is above the layer's median.

    VHD_h = || o_h(last prompt token) - o_h(the same without the image) ||_2, set to zero where both VHD_h and the squared
    norm of the image-free output exceed their mean plus one standard deviation over the layer's heads. Layer by layer, with the
    earlier layers' reinforcement in place in both prompts. Heads are chosen at the first step and stay for the sequence.

    Args:
        alpha: factor, finite; 1 changes nothing. The paper's range is 0.2 to 4, and 4 degenerates (Table 6).
        rows: the prompt rows that are scaled: "all" of the call that ends the prompt, or from its "last" token on.
        last: layers counted from the end that act besides the second one: 14 for LLaVA-1.5 and LLaVA-NeXT, 18
            for InstructBLIP (paper). With `where` given, that selects instead.
        outliers: whether the outlier rule is applied.
        reinforce_both: whether the chosen heads are scaled in the image-free prompt too.

    A sample without an image among others with one is left alone. The choice needs the whole prompt, so it looks ahead. In a
    chunked prefill the chunks before the last one are not scaled; declare the length with run.chunked_prefill(tokens=...)
    (`generate` does so by itself).

    Raises:
        SelectionError: a value out of range; no image in any prompt of a call.
    """

    alpha: float = number(2.0, per_sample=True, learnable=True)
    rows: str = choice("all", ROWS, kw_only=True)
    last: int = integer(14, low=1, kw_only=True)
    outliers: bool = flag(True, kw_only=True)
    reinforce_both: bool = flag(True, kw_only=True)

    kinds = ("self",)
    needs = ("tokens", "images", "image_free")
    looks_ahead = True
    whole_heads = True

    @property
    def prefix_local(self) -> bool:  # type: ignore[override]
        """The rows before the last one stay as they are."""
        return self.rows == "last"

    def check_tokens(self, tokens: Tokens) -> None:
        if is_all(self.alpha, 1.0):
            return
        check_some_image(tokens, "VHR")

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        layers = sorted({s.layer for s in sites if s.modality == "text" and s.kind == "self"})
        return Where(layers=sorted({*layers[1:2], *layers[-self.last :]}), kinds="self") if layers else None

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        if is_all(self.alpha, 1.0):
            return None
        factor = call.state.get("factor")
        if factor is not None:
            return out * factor
        if call.phase == "decode" or call.frozen:
            raise prompt_unseen(
                self,
                call,
                "heads, which are chosen at its last token, are not known",
                "If it comes in chunks, say how long it is: run.chunked_prefill(tokens=...).",
            )
        if call.tokens.more_to_come:
            return None
        at = _last_row(call, out)
        found: list[Tensor] = []
        # Without an image both prompts are the same, and what little differs is rounding.
        seeing = call.image_tokens().any(dim=-1)[:, None]

        def edit(vhd: Tensor, own: Tensor, last: Tensor) -> Tensor | None:
            found.append(above_median(vhd) & seeing)
            return self._for_rows(call, own, found[0], last) if self.reinforce_both else None

        self._beside(call, out, at, edit)
        call.state["factor"] = self._factor(call, out, found[0])
        return self._for_rows(call, out, found[0], at)

    def measured(self, call: AttnCall, out: Tensor) -> Tensor:
        """VHD [B, H] of this call, whose end is the prompt's; nothing is scaled."""
        image_tokens(call, "VHD")
        found: list[Tensor] = []
        self._beside(call, out, _last_row(call, out), lambda vhd, own, last: found.append(vhd))
        return found[0]

    def _beside(
        self, call: AttnCall, out: Tensor, at: Tensor, edit: Callable[[Tensor, Tensor, Tensor], Tensor | None]
    ) -> None:
        """Run the image-free prompt to this site; `edit` gets (VHD, its outputs of our heads, index of its last rows)."""
        seen = out[torch.arange(len(at), device=at.device), :, at]

        def compare(free: Tensor, last: Tensor) -> Tensor | None:
            own = free[:, list(call.heads)]
            rows = own[torch.arange(len(last), device=last.device), :, last]
            edited = edit(divergence(seen, rows, self.outliers), own, last)
            if edited is None:
                return None
            free = free.clone()
            free[:, list(call.heads)] = edited
            return free

        call.image_free(compare)

    def _for_rows(self, call: AttnCall, out: Tensor, chosen: Tensor, last: Tensor) -> Tensor:
        scaled = out * self._factor(call, out, chosen)
        if self.rows == "all":
            return scaled
        rows = torch.arange(out.shape[2], device=out.device) >= last[:, None]
        return torch.where(rows[:, None, :, None], scaled, out)

    def _factor(self, call: AttnCall, out: Tensor, chosen: Tensor) -> Tensor:
        """[B, H, 1, 1], in the dtype of `out`."""
        alpha = call.each(self.alpha)
        alpha = alpha[..., 0] if isinstance(alpha, Tensor) else alpha
        one = torch.ones((), dtype=out.dtype, device=out.device)
        return torch.where(chosen, alpha * one, one).to(out.dtype)[:, :, None, None]


def divergence(seen: Tensor, free: Tensor, outliers: bool = True) -> Tensor:
    """VHD [B, H] from head outputs with and without the image, each [B, H, d], in fp32 or better.

    `outliers`: zero for the heads whose divergence and image-free energy both exceed mean plus one standard deviation.
    """
    wide = torch.promote_types(seen.dtype, torch.float32)
    seen, free = seen.to(wide), free.to(wide)
    vhd, energy = (seen - free).norm(dim=-1), free.square().sum(dim=-1)
    if not outliers:
        return vhd
    return vhd.masked_fill(_far(vhd) & _far(energy), 0.0)


def above_median(scores: Tensor) -> Tensor:
    """bool [B, H]: the heads above their layer's median (the mean of the middle two)."""
    return scores > scores.quantile(0.5, dim=-1, keepdim=True)


def _far(x: Tensor) -> Tensor:
    return x > x.mean(dim=-1, keepdim=True) + x.std(dim=-1, correction=0, keepdim=True)


def _last_row(call: AttnCall, out: Tensor) -> Tensor:
    """Index [B] of each sample's last prompt row in this call."""
    if call.packed:
        raise UnsupportedHost(
            f"VHR at {call.site.path}: a batch row holds several sequences, and heads are chosen at the end of one. Put each "
            "sequence in a batch row of its own."
        )
    n = out.shape[2]
    valid = call.rows.prompt.expand(out.shape[0], -1)
    if not bool(valid.any(dim=-1).all()):
        raise UnsupportedHost(
            "VHR: the last token of a sample lies in an earlier chunk of the prompt. Pad on the left, or prefill at once."
        )
    return n - 1 - valid.flip(-1).to(torch.int8).argmax(dim=-1)
