"""The inputs and the prediction of a denoiser call, and how its guidance rows are told apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .account import Samples
from .errors import UnsupportedHost
from .parameters import PerSample

# Arguments whose first dimension is the batch; everything else is passed on whole (position ids, rotary tables).
BATCHED = frozenset(
    {
        "sample", "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "attention_mask",
        "pooled_projections", "guidance", "added_cond_kwargs", "class_labels", "timestep_cond", "encoder_hidden_states_t5",
        "text_embedding_mask", "text_embedding_mask_t5", "image_meta_size", "style", "encoder_hidden_states_image",
        "encoder_hidden_states_mask", "down_block_additional_residuals", "mid_block_additional_residual",
        "down_intrablock_additional_residuals", "block_controlnet_hidden_states", "controlnet_block_samples",
        "controlnet_single_block_samples", "text_embeds", "time_ids", "image_embeds", "prompt_embeds", "cross_attention_kwargs",
        "joint_attention_kwargs", "ip_adapter_masks", "ip_hidden_states", "ip_adapter_image_embeds", "resolution", "aspect_ratio",
        "audio_hidden_states", "audio_encoder_hidden_states", "original_size", "target_size", "crop_coords", "image_latents",
        "image_embeddings", "fps", "global_hidden_states", "id_cond", "id_vit_hidden", "inpaint_latents", "control_latents",
        "text_encoder_layers", "controlnet_cond", "video_coords",
    }
)  # fmt: skip
UNBATCHED = frozenset(
    {
        "img_ids", "txt_ids", "image_rotary_emb", "rotary_embedding", "freqs_cis", "rope_interpolation_scale", "return_dict",
        "indices_grid", "visual_rope_pos", "text_rope_pos",
    }
)  # fmt: skip


@dataclass(frozen=True)
class BranchInputs:
    """Arguments of one denoiser forward, by name.

    Attributes:
        values: name -> argument. layout: names of the equal parts of the batch, in order.
        batch: rows in all. timestep: of this call, as the scheduler counts.
        memory: a dictionary that lives through one sampling run.
        loop: the sampling loop and its latent, where the host provides "latent" (see `Intervention.needs`).
        latent: what the model is asked on, where that is another latent than the loop's.
        prompts: of how many prompts the rows of each part are images, where that is known.
        step, steps: which step of the schedule this is, from 0, and how many there are, where that is known.
    """

    values: dict[str, Any]
    layout: tuple[str, ...]
    batch: int
    timestep: float | None
    memory: dict[Any, Any]
    loop: Any = None
    latent: Tensor | None = None
    prompts: int | None = None
    step: int | None = None
    steps: int | None = None

    @property
    def samples(self) -> Samples:
        """Which prompt, and which image, each row belongs to; the same in each part."""
        return samples_of(len(self.layout), self.batch, self.prompts)

    def each(self, value: Any, like: Tensor) -> Any:
        """A parameter as it enters the maths: a number as it is, one value per sample as a tensor [b, 1, ...] in fp32 or better.

        Args:
            like: a tensor [b, ...] with the rows of this call.
        """
        if not isinstance(value, PerSample):
            return value
        found = value.tensor(self.samples, len(like), torch.promote_types(like.dtype, torch.float32), like.device)
        return found.view(-1, *[1] * (like.ndim - 1))

    def acting(self, method: Any, like: Tensor) -> Tensor | None:
        """bool [b, 1, ...]: the rows of samples that a method does not leave alone; None: all."""
        found = None
        for value in method.restricting:
            on = value.acts(self.samples, len(like), like.device)[:, 0, 0].view(-1, *[1] * (like.ndim - 1))
            found = on if found is None else found & on
        return found

    def part(self, name: str) -> slice:
        """The rows of the last part called `name`."""
        at = len(self.layout) - 1 - self.layout[::-1].index(name)
        size = self.batch // len(self.layout)
        return slice(at * size, (at + 1) * size)

    def only(self, name: str) -> BranchInputs:
        """The same call for the rows of one part."""
        if self.layout == (name,):
            return self
        rows = self.part(name)
        values = {key: self._cut(key, value, rows) for key, value in self.values.items()}
        return replace(self, values=values, layout=(name,), batch=rows.stop - rows.start)

    def with_again(self, name: str, called: str, changes: dict[str, Tensor]) -> BranchInputs:
        """The same call with the rows of one part once more behind all others, as a part of another name.

        Args:
            name: of the part. called: name of the new one. changes: arguments of the new rows, [b, ...], that differ.
        """
        rows = self.part(name)
        values = {
            key: torch.cat([value, changes[key]]) if key in changes else self._again(key, value, rows)
            for key, value in self.values.items()
        }
        batch = self.batch + rows.stop - rows.start
        return replace(self, values=values, layout=(*self.layout, called), batch=batch)

    def _again(self, key: str, value: Any, rows: slice) -> Any:
        """`value` with its part for `rows` once more at the end; as it is where it has no rows."""
        if isinstance(value, Tensor):
            alone = self.batch == 1 and key in BATCHED and value.ndim > 0 and value.shape[0] == 1
            part = value[:] if alone else self._cut(key, value, rows)
            return value if part is value else torch.cat([value, part])
        if isinstance(value, dict):
            return {k: self._again(_key(key, k), v, rows) for k, v in value.items()}
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return type(value)(self._again(key, v, rows) for v in value)
        return value

    def _cut(self, key: str, value: Any, rows: slice) -> Any:
        if isinstance(value, Tensor):
            if value.ndim == 0 or key in UNBATCHED or value.shape[0] in (0, 1) or value.shape[0] % self.batch:
                return value
            # Frames may be folded into the rows of a sample (AnimateDiff's prompts).
            each = value.shape[0] // self.batch
            if key not in BATCHED:
                if each > 1:
                    return value
                raise UnsupportedHost(
                    f"the denoiser argument {key!r} has {self.batch} rows like the batch, and whether it is batched is not "
                    "known. Please report the model type."
                )
            return value[rows.start * each : rows.stop * each]
        if isinstance(value, dict):
            return {k: self._cut(_key(key, k), v, rows) for k, v in value.items()}
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return type(value)(self._cut(key, v, rows) for v in value)
        return value


def _key(outer: str, inner: str) -> str:
    """The name by which an entry of a nested argument is known."""
    return inner if outer not in UNBATCHED and inner in BATCHED | UNBATCHED else outer


def samples_of(parts: int, batch: int, prompts: int | None) -> Samples:
    """The samples of a denoiser's rows: equal parts, each of which has the images of the first prompt, then of the next."""
    rows = batch // parts
    of_row = {rows: [*range(rows)] * parts}
    if prompts and rows % prompts == 0:
        of_row = {prompts: [r // (rows // prompts) for r in range(rows)] * parts} | of_row
    return Samples(of_row)


class Prediction:
    """What a denoiser returned: a tuple, an output object with `sample`, or the tensor itself.

    Attributes:
        wrapped: in the form in which the model returns it, terms included. raw: the tensor that the model itself gave.
        shift: the sum of the terms that were added to every part of the rows, [b, ...]; None where there are none.
    """

    def __init__(self, wrapped: Any, raw: Tensor | None = None, shift: Tensor | None = None):
        self.wrapped, self.shift = wrapped, shift
        self.raw = self.sample if raw is None else raw
        if not isinstance(self.raw, Tensor):
            raise UnsupportedHost(
                "the denoiser returns a list of samples; guidance is defined on one tensor with rows."
            )

    @property
    def sample(self) -> Tensor:
        """The predicted tensor, rows first."""
        if isinstance(self.wrapped, Tensor):
            return self.wrapped
        return self.wrapped[0] if isinstance(self.wrapped, (tuple, list)) else self.wrapped.sample

    def with_sample(self, sample: Tensor, shift: Tensor | None = None) -> Prediction:
        """The same form around another tensor."""
        if isinstance(self.wrapped, Tensor):
            return Prediction(sample, self.raw, shift)
        if isinstance(self.wrapped, (tuple, list)):
            return Prediction(type(self.wrapped)((sample, *self.wrapped[1:])), self.raw, shift)
        return Prediction(type(self.wrapped)(**{**self.wrapped, "sample": sample}), self.raw, shift)


def add_to_rows(prediction: Prediction, term: Tensor, parts: int) -> Prediction:
    """Add `term` [b, ...] to each of the `parts` equal parts of the rows.

    With weights that sum to one, as in classifier-free guidance at any scale, each row then carries the term into
    the combination exactly once, whatever the scale, the solver and the prediction type.
    """
    shift = term if prediction.shift is None else prediction.shift + term
    return prediction.with_sample(prediction.sample + torch.cat([term] * parts), shift)
