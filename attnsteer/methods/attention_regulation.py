"""AttentionRegulation: adds to the scores of target words what a short optimisation at each site finds, without the denoiser.

Zhang et al., "Enhancing Semantic Fidelity in Text-to-Image Synthesis: Attention Regulation in Diffusion Models" (ECCV 2024,
arXiv 2403.06381), section 4; official code YaNgZhAnG-V5/attention_regulation at b66d9db, which descends a penalty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall, Reweight
from ..errors import NotFinite, SelectionError, UnsupportedHost
from ..intervention import Intervention
from ..maps.phrases import Prompt, checked, fits, per_prompt
from ..parameters import flag, integer, is_all, number, parsed
from ..registry import register_method
from ..site import Site
from ..where import Where
from .bases.latent_loss import at, calls

# The five sites with 16 x 16 maps of Stable Diffusion 1 and 2 at 512 pixels.
PUBLISHED = r"(.*\.)?(down_blocks\.2|up_blocks\.1)\..*attn2"


@register_method
@dataclass(frozen=True)
class AttentionRegulation(Intervention):
    """S'_target = S_target + D, with D = sum over centres c of G_c w_c that lessens, at this site alone, the loss
    mean (q90(P) - 0.9)^2 + 80 mean (mean P - theta / T)^2 + 0.09 mean w^2 over heads and the T target tokens.

    P are the targets' columns of softmax(S + D), q90 and mean run over image positions, theta = min(1, 0.2 T). G_c are Gaussian
    bumps on a grid. The first and the first padding token keep the mass that they had, so rows sum to more than 1.

    Args:
        words: words or phrases of the prompt (each of their tokens is a target), or one list per prompt; ("cat", 2) is the second
            "cat", (5, 6) a range of token positions.
        until: steps from which on nothing is done: a number of steps, or a fraction (25 of 50).
        strength: factor on D (1 in the paper); 0 is off. iterations, rate: of the descent, for each head by itself.
        momentum: share of the step before in D. decay: D falls by this factor with every step.
        keep: whether the first and the first padding token keep their mass; needs the prompt as a text.
        seed: of the weights that each descent begins with (uniform, 0 to 1): the same for all samples.

    The default sites are the published ones of Stable Diffusion 1 and 2. Maps below 16 x 16, which the official code does not take,
    have bumps of width 1. The published rate multiplies rounding: in single precision a sample in a batch may differ from the
    same sample alone by a hundredth of the latent. D is a constant for methods that take gradients. Joint attention is not
    supported: what its image keys would do to the loss nobody has looked at.
    """

    words: Any = parsed(lambda words: checked("words", words), "words of the prompt, or one list of them per prompt")
    until: float = parsed(calls, "number of steps, or fraction (float) from 0 to 1", 0.5)
    strength: float = number(1.0, low=0, per_sample=True)
    iterations: int = integer(20, low=1, kw_only=True)
    rate: float = number(100.0, above=0, kw_only=True)
    momentum: float = number(0.25, low=0, high=1, kw_only=True)
    decay: float = number(0.99, low=0, high=1, kw_only=True)
    keep: bool = flag(True, kw_only=True)
    seed: int = integer(0, low=0, kw_only=True)

    kinds = ("cross",)
    needs = ("steps", "grid", "prompt")
    # The best of its iterations is that of all heads together.
    whole_heads = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.where.branches is not None:
            raise SelectionError(f"AttentionRegulation edits the conditional branch; leave out {self.where}.")

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        found = {m[2] for m in (re.fullmatch(PUBLISHED, s.name) for s in sites) if m is not None}
        if len(found) == 2:
            return Where(modules=PUBLISHED, kinds=("cross",))
        raise SelectionError(
            "AttentionRegulation needs where= on this model: its sites are known for Stable Diffusion 1 and 2 only. Give e.g. "
            'Where(layers=[...], kinds="cross"), layers with maps of about 16 x 16; attnsteer.sites(pipe) lists them.'
        )

    def phrases(self) -> list[list[Any]]:
        """Per prompt, or one list for all."""
        return per_prompt(self.words)

    def prepare(self, prompt: Prompt) -> None:
        """Check what can be checked once the prompt is known."""
        terms = prompt.terms(self.phrases())
        for sample, content in zip(terms, prompt.content(), strict=True) if self.keep else ():
            kept = {0, content[-1] + 1 if content else 1}
            twice = sorted(kept & {token for _, own in sample for token in own})
            if twice:
                raise SelectionError(
                    f"AttentionRegulation: token {twice[0]} keeps the mass that it has (keep=True), so it cannot be a target. Give "
                    "words of the prompt, or keep=False."
                )

    def bias(self, call: AttnCall) -> Tensor | None:
        call.state.pop("gain", None)
        self._fit(call)
        if is_all(self.strength, 0.0) or not self._acts(call):
            return None
        rows = self._rows(call)
        if not rows:
            return None
        S = call.map.scores().detach()
        fits(call.prompt, S.shape[-1])
        targets = self._spread(
            # A token of two phrases is one target.
            [list(dict.fromkeys(t for _, own in terms for t in own)) for terms in call.prompt.terms(self.phrases())],
            rows,
        )
        most = max(map(max, targets))
        if most >= S.shape[-1]:
            raise SelectionError(f"token position {most}: the denoiser sees {S.shape[-1]} text keys.")
        fields, first = [], []
        for row, tokens in zip(rows, targets, strict=True):
            best, start = self._descended(call, S[row], tokens)
            fields.append(best)
            first.append(start)
        strength = call.listed(self.strength)
        term, gain = torch.zeros_like(S), S.new_ones(S.shape[:3])
        for i, (row, before) in enumerate(zip(rows, self._before(call, rows, fields) or first, strict=True)):
            if not strength[row]:
                continue
            D = self.momentum * before + (1 - self.momentum) * fields[i]
            D = strength[row] * self.decay**call.step * D
            term[row][..., targets[i]] = D.to(term.dtype)
            # Of sum over keys of e^(S + D), over that of e^S.
            P = (S[row][..., targets[i]] - S[row].logsumexp(dim=-1, keepdim=True)).exp()
            gain[row] = 1 + (P * torch.expm1(D.to(P.dtype))).sum(dim=-1)
        if self.keep:
            call.state["gain"] = gain
        return term

    def weights(self, call: AttnCall) -> Reweight | None:
        gain = call.state.get("gain")
        if gain is None:
            return None
        rows, (B, _, _, m) = self._rows(call), call.map.shape
        content = self._spread([(tokens[-1] + 1 if tokens else 1) for tokens in call.prompt.content()], rows)
        keys = torch.zeros(B, 1, m, dtype=torch.bool, device=gain.device)
        for row, end in zip(rows, content, strict=True):
            keys[row, :, 0] = True
            keys[row, :, min(end, m - 1)] = True
        return Reweight(((keys, gain),), normalise=False)

    def _acts(self, call: AttnCall) -> bool:
        if call.step is None or (isinstance(self.until, float) and call.steps is None):
            raise UnsupportedHost(
                f"{call.site.path}: at which of how many steps this is, is not known; steer the pipeline, or give "
                "until as a number."
            )
        return call.step < at(self.until, call.steps or 0)

    def _rows(self, call: AttnCall) -> list[int]:
        """The batch rows of the conditional branch."""
        if call.branch_rows is None:
            raise UnsupportedHost(
                f"{call.site.path}: which rows of the batch are conditional is not known here. Steer the pipeline rather than its "
                'model, or enter run.branches("uncond", "cond") around the calls.'
            )
        return [] if "cond" not in call.branch_rows else call.branch_rows["cond"].nonzero()[:, 0].tolist()

    @staticmethod
    def _fit(call: AttnCall) -> None:
        """What is remembered gets as many rows as this call has; those behind the conditional ones are empty."""
        B = call.shape[0]
        for name, kept in call.state.items():
            if isinstance(kept, Tensor) and len(kept) != B:
                call.state[name] = torch.cat([kept[:B], kept.new_zeros(max(0, B - len(kept)), *kept.shape[1:])])

    @staticmethod
    def _spread(values: list[Any], rows: list[int]) -> list[Any]:
        """One entry for each row, of one for each prompt: each prompt has its images in a row."""
        if len(rows) % len(values):
            raise SelectionError(f"{len(values)} prompts do not divide the {len(rows)} samples of this call.")
        return [value for value in values for _ in range(len(rows) // len(values))]

    def _descended(self, call: AttnCall, S: Tensor, targets: list[int]) -> tuple[Tensor, Tensor]:
        """(the best D, the D of the first weights) of one sample, [H, n, T] each; S [H, n, M]."""
        bumps = centred_bumps(call.grid).to(S)
        start = self.start(call, len(bumps), len(targets)).to(S)
        with torch.inference_mode(False):
            best, loss = descended(S.clone(), targets, bumps.clone(), start.clone(), self.iterations, self.rate)
        if not bool(loss.isfinite()):
            raise NotFinite(
                f"AttentionRegulation: the loss at {call.site.path} is not finite at step {call.step} of {call.steps}; its scores "
                "are not, or rate is too large.",
                index=call.step,
            )
        return best, torch.einsum("cn,hct->hnt", bumps, start)

    def start(self, call: AttnCall, centres: int, targets: int) -> Tensor:
        """The weights that a descent begins with, [H, C, T]."""
        # A seed for each step and site; the same numbers on every device.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + call.step) * 4096 + call.site.layer)
        return torch.rand(len(call.heads), centres, targets, generator=generator)

    def _before(self, call: AttnCall, rows: list[int], fields: list[Tensor]) -> list[Tensor] | None:
        """D of the step before, by row of the conditional branch; None in the first step. Remembers that of now.

        Conditional rows stand first, so that a pass of other rows (a weak one, guidance switched off) finds its own.
        """
        # A weak pass has a memory of its own.
        name, state = call.branch or "strong", call.state
        B, T = call.map.shape[0], max(D.shape[-1] for D in fields)
        now = fields[0].new_zeros(B, *fields[0].shape[:2], T)
        for i, D in enumerate(fields):
            now[i, :, :, : D.shape[-1]] = D
        if state.get(f"{name} step") not in (None, call.step):
            state[f"{name} before"] = state[f"{name} now"]
        state[f"{name} step"], state[f"{name} now"] = call.step, now
        before = state.get(f"{name} before")
        return None if before is None else [before[i][..., : D.shape[-1]] for i, D in enumerate(fields)]


def centred_bumps(grid: tuple[int, int]) -> Tensor:
    """Gaussian bumps [C, h * w], two widths apart in both directions; their width is a sixteenth of the shorter side."""
    width = max(1, min(grid) // 16)
    line = lambda n, c: torch.exp(-((torch.arange(n, dtype=torch.float64) - c) ** 2) / (2 * width**2))  # noqa: E731
    centres = [(y, x) for x in range(2 * width, grid[1], 2 * width) for y in range(2 * width, grid[0], 2 * width)]
    return torch.stack([torch.outer(line(grid[0], y), line(grid[1], x)).flatten() for y, x in centres])


def descended(
    S: Tensor, targets: list[int], bumps: Tensor, weights: Tensor, iterations: int, rate: float
) -> tuple[Tensor, Tensor]:
    """(D [H, n, T] with the least loss, that loss), over all heads together.

    Args:
        S: scores [H, n, M]. bumps: [C, n]. weights: [H, C, T], moved against the gradient of each head's loss.
    """
    T = len(targets)
    theta = min(1.0, 0.2 * T)
    own = S[..., targets]
    others = S.index_fill(-1, torch.tensor(targets, device=S.device), -torch.inf).logsumexp(dim=-1, keepdim=True)
    best, least = torch.zeros_like(own), S.new_full((), torch.inf)
    for _ in range(iterations):
        with torch.enable_grad():
            weights = weights.detach().requires_grad_(True)
            D = torch.einsum("cn,hct->hnt", bumps, weights)
            P = torch.softmax(torch.cat([own + D, others], dim=-1), dim=-1)[..., :T]
            high = (torch.quantile(P, 0.9, dim=1) - 0.9).square().mean(dim=-1)
            share = (P.mean(dim=1) - theta / T).square().mean(dim=-1)
            each = high + 80.0 * share + 0.09 * weights.square().mean(dim=(1, 2))
            (gradient,) = torch.autograd.grad(each.sum(), weights)
        loss = each.detach().mean()
        better = loss < least
        best, least = torch.where(better, D.detach(), best), torch.where(better, loss, least)
        weights = weights - rate * gradient
    return best, least
