"""Odd methods as users write them, right ones and wrong ones: what the laws must say about each is in test_zoo.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsteer import Intervention
from attnsteer.call import AttnCall, KeyBias, Reweight


@dataclass(frozen=True)
class LastRow(Intervention):
    """Scales the head outputs of the last row of each call."""

    t: float = 1.0

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        return None if self.t == 1.0 else torch.cat([out[:, :, :-1], out[:, :, -1:] * self.t], dim=2)


@dataclass(frozen=True)
class OneKey(Intervention):
    """A weight on one key, renormalised."""

    weight: float = 1.0

    kinds = ("self",)
    needs = ("tokens",)

    def weights(self, call: AttnCall) -> Reweight | None:
        return None if self.weight == 1.0 else Reweight((((call.key_index() == 2)[:, None], self.weight),))


@dataclass(frozen=True)
class OneRow(Intervention):
    """Scales the head outputs of a single token of each sample, wherever in a call it is."""

    t: float = 1.0
    token: int = 5

    kinds = ("self",)
    needs = ("tokens",)

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        if self.t == 1.0:
            return None
        chosen = (call.rows.index == self.token) & call.rows.valid
        return torch.where(chosen[:, None, :, None], out * self.t, out)


@dataclass(frozen=True)
class OnlyDecode(Intervention):
    """A weight on the first token while tokens are generated; nothing in the prompt."""

    weight: float = 1.0

    kinds = ("self",)
    needs = ("tokens",)

    def weights(self, call: AttnCall) -> Reweight | None:
        if self.weight == 1.0 or call.phase == "prefill":
            return None
        return Reweight(((call.first_key(), self.weight),))


@dataclass(frozen=True)
class OnlyGenerated(Intervention):
    """A weight on the first token in the rows that generate; an edit of weight one in a prompt."""

    weight: float = 1.0

    kinds = ("self",)
    needs = ("tokens",)

    def weights(self, call: AttnCall) -> Reweight | None:
        if self.weight == 1.0:
            return None
        weight = torch.where(call.generates, self.weight, 1.0)
        return Reweight(((call.first_key(), weight[:, None]),))


@dataclass(frozen=True)
class OnlyOutput(Intervention):
    """Scales head outputs."""

    t: float = 1.0

    linear = True

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        return None if self.t == 1.0 else out * self.t


@dataclass(frozen=True)
class OnlyBias(Intervention):
    """Adds to the scores of all tokens after the third."""

    b: float = 0.0

    kinds = ("self",)
    needs = ("tokens",)

    def bias(self, call: AttnCall) -> KeyBias | None:
        return None if self.b == 0.0 else KeyBias((call.key_index() >= 3).float()[:, None] * self.b)


@dataclass(frozen=True)
class OnlyInputs(Intervention):
    """Scales queries: a temperature."""

    t: float = 1.0

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | None:
        return None if self.t == 1.0 else (call.q / self.t, call.k, call.v)


@dataclass(frozen=True)
class OnlyValues(Intervention):
    """Scales values, which no row selection can divide."""

    t: float = 1.0

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | None:
        return None if self.t == 1.0 else (call.q, call.k, call.v * self.t)


@dataclass(frozen=True)
class LooksAhead(Intervention):
    """Adds the mean head output of the prompt to every row; the mean stays as the prompt left it."""

    t: float = 0.0

    looks_ahead = True

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        if self.t == 0.0:
            return None
        if call.phase == "prefill" and not call.frozen:
            call.state["mean"] = prompt_mean(call, out)
        return out + self.t * call.state["mean"]


def prompt_mean(call: AttnCall, out: Tensor) -> Tensor:
    """Mean of the rows that are no padding, [B, H, 1, d]."""
    if call.row_valid is None:
        return out.mean(dim=2, keepdim=True)
    valid = call.row_valid[:, None, :, None]
    return (out * valid).sum(dim=2, keepdim=True) / valid.sum(dim=2, keepdim=True)


@dataclass(frozen=True)
class Stateful(Intervention):
    """Adds the first token's value, remembered from the first call, to every row."""

    t: float = 0.0

    kinds = ("self",)
    needs = ("tokens",)

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        if self.t == 0.0:
            return None
        if "value" not in call.state:
            first = call.first_key()[:, 0].to(call.v.dtype).expand(len(out), -1)
            value = torch.einsum("bm,bhmd->bhd", first, call.v)
            call.state["value"] = value.repeat_interleave(out.shape[1] // value.shape[1], dim=1)
        return out + self.t * call.state["value"][:, :, None]


@dataclass(frozen=True)
class NeedsImages(Intervention):
    """A weight on the image's keys."""

    weight: float = 1.0
    image: tuple[int, int] = (2, 18)

    kinds = ("self",)
    needs = ("tokens", "images")

    def keys(self, call: AttnCall) -> Tensor:
        """bool [B, 1, m]."""
        index = call.key_index()
        return ((index >= self.image[0]) & (index < self.image[1]))[:, None]

    def weights(self, call: AttnCall) -> Reweight | None:
        return None if self.weight == 1.0 else Reweight(((self.keys(call), self.weight),))


@dataclass(frozen=True)
class Paint(NeedsImages):
    """Adds alpha |l| to the scores l of the image's keys in the last row of each call."""

    alpha: float = 0.0

    def weights(self, call: AttnCall) -> None:
        return None

    def bias(self, call: AttnCall) -> Tensor | None:
        if self.alpha == 0.0:
            return None
        k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)
        scores = call.q[:, :, -1:].float() @ k.float().transpose(-1, -2) * call.q.shape[-1] ** -0.5
        last = torch.where(self.keys(call)[:, :, None], self.alpha * scores.abs(), 0.0)
        return torch.nn.functional.pad(last, (0, 0, call.q.shape[2] - 1, 0))


@dataclass(frozen=True)
class ReadsValid(Intervention):
    """A weight on all valid keys after the third, in valid rows."""

    weight: float = 1.0

    kinds = ("self",)
    needs = ("tokens",)

    def weights(self, call: AttnCall) -> Reweight | None:
        if self.weight == 1.0:
            return None
        keys = (call.key_index() >= 3) & call.key_valid
        return Reweight(((keys[:, None], torch.where(call.row_valid[:, None], self.weight, 1.0)),))


@dataclass(frozen=True)
class EntropyTemperature(Intervention):
    """A temperature per row, from the entropy of the row."""

    t: float = 0.0

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.t == 0.0:
            return None
        scale = 1.0 + self.t * call.map.entropy()
        return (call.q.float() * scale[..., None]).to(call.q.dtype), call.k, call.v


# ------------------------------------------------------------------------------------------------ wrong ones


@dataclass(frozen=True)
class SlotZero(Intervention):
    """Takes slot 0 for the first token."""

    weight: float = 1.0

    kinds = ("self",)
    needs = ("tokens",)

    def weights(self, call: AttnCall) -> Reweight:
        first = torch.arange(call.k.shape[2]) == 0
        return Reweight(((first[None, None], self.weight),))


@dataclass(frozen=True)
class OneSlot(Intervention):
    """Takes slots for tokens: with padding on the left it edits another token of each sample."""

    t: float = 1.0

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        return torch.where((call.row_position == 5)[:, None], out * self.t, out)


@dataclass(frozen=True)
class KeepsState(Intervention):
    """Keeps the first call's first output row on itself."""

    t: float = 0.0

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        if "kept" not in vars(self):
            object.__setattr__(self, "kept", out[:1, :, :1])
        return out + self.t * self.kept


@dataclass(frozen=True)
class ForgetsBatch(Intervention):
    """Pulls head outputs towards their mean over samples."""

    t: float = 0.0

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        return torch.lerp(out, out.mean(dim=0, keepdim=True), self.t)


@dataclass(frozen=True)
class BreaksCausality(Intervention):
    """Adds the mean over all rows of the call, and does not say that it looks ahead."""

    t: float = 0.0

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        return out + self.t * out.mean(dim=2, keepdim=True)


@dataclass(frozen=True)
class RoundsAtZero(Intervention):
    """Computes with the neutral value instead of leaving the output as it is."""

    t: float = 0.0

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        return (out * 3.0 + self.t) / 3.0


@dataclass(frozen=True)
class EditsNothing(Intervention):
    """Never returns an edit."""

    observes = True

    def output(self, call: AttnCall, out: Tensor) -> None:
        return None
