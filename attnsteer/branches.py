"""The inputs and the prediction of a denoiser call, and how its guidance rows are told apart."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .account import Samples
from .errors import ContractError, UnsupportedHost, brief, did_you_mean, listing
from .parameters import PerSample

# What is known of arguments: the first dimension is the batch, or they are passed on whole (position ids, rotary tables). It
# saves a pass: how any other argument is cut is found out by one (`BranchInputs.doubts`).
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
        cuts: how arguments that no table has are cut into rows, as a pass has shown.
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
    cuts: dict[str, str] = field(default_factory=dict)
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
        """The rows of the last part called `name`.

        Raises:
            ContractError: there is none.
        """
        if name not in self.layout:
            parts = listing(map(repr, self.layout))
            raise ContractError(
                f"inputs has no part {brief(name)}; this call has {parts}.{did_you_mean(name, self.layout)}"
            )
        at = len(self.layout) - 1 - self.layout[::-1].index(name)
        size = self.batch // len(self.layout)
        return slice(at * size, (at + 1) * size)

    def only(self, name: str) -> BranchInputs:
        """The same call for the rows of one part.

        Raises:
            UnsupportedHost: how an argument is cut is not known, and no pass of the whole call has settled it.
        """
        if self.layout == (name,):
            return self
        doubts = self.doubts()
        if doubts:
            raise UnsupportedHost(
                f"the denoiser argument {next(iter(doubts))!r} has rows like the batch, and whether it is batched is not known. "
                "Ask for the prediction of all rows first, forward(inputs), by which it is found out."
            )
        return self.cut(name, {})

    def cut(self, name: str, how: Mapping[str, str]) -> BranchInputs:
        """The same call for the rows of one part, with `how` arguments are cut where the tables do not say: see `doubts`."""
        rows = self.part(name)
        new = replace(self, cuts={**self.cuts, **how})
        values = {key: new._cut(key, value, rows) for key, value in self.values.items()}
        return replace(self, values=values, layout=(name,), batch=rows.stop - rows.start)

    def doubts(self) -> dict[str, list[str]]:
        """Arguments of which it is not known how they are cut: name -> the ways, the likeliest first.

        The ways are "rows" (along the first axis), "second" (along the second) and "whole".
        """
        found: dict[str, list[str]] = {}

        def look(key: str, value: Any) -> None:
            if isinstance(value, dict):
                for k, v in value.items():
                    look(_key(key, k), v)
            elif isinstance(value, (list, tuple)) and not self._by_row(key, value):
                for v in value:
                    look(key, v)
            elif isinstance(value, Tensor) and key not in self.cuts and key not in BATCHED | UNBATCHED:
                ways = []
                if value.ndim and value.shape[0] and value.shape[0] % self.batch == 0:
                    ways = ["rows", "whole"] if value.shape[0] == self.batch else ["whole", "rows"]
                if value.ndim > 2 and value.shape[1] == self.batch:
                    ways = ["second", "whole", *ways[:1]] if value.shape[0] != self.batch else [*ways, "second"]
                if ways and self.batch > 1:
                    found[key] = list(dict.fromkeys([*found.get(key, ()), *ways]))

        for key, value in self.values.items():
            look(key, value)
        return found

    def _by_row(self, key: str, value: Any) -> bool:
        """Whether a list has an entry for each row."""
        if (
            key in UNBATCHED
            or not isinstance(value, (list, tuple))
            or len(value) != self.batch
            or not isinstance(value[0], Tensor)
        ):
            return False
        listed = any(isinstance(self.values.get(name), list) for name in ("sample", "hidden_states", "x"))
        return listed or any(not v.ndim or v.shape[0] % self.batch for v in value if isinstance(v, Tensor))

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
            how = self.cuts.get(key)
            if how == "second":
                return value[:, rows]
            if value.ndim == 0 or key in UNBATCHED or how == "whole" or value.shape[0] in (0, 1):
                return value
            if value.shape[0] % self.batch:
                return value
            # Frames may be folded into the rows of a sample (AnimateDiff's prompts).
            each = value.shape[0] // self.batch
            return value[rows.start * each : rows.stop * each]
        if isinstance(value, dict):
            return {k: self._cut(_key(key, k), v, rows) for k, v in value.items()}
        if self._by_row(key, value):
            return type(value)(value[rows])
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
    """What a denoiser returned, as one tensor with rows first.

    A model may return a tensor, or any container of them (tuples, lists, output classes). Where it predicts several things
    (video and audio), or a list with an entry for each row, they are rows of one tensor [b, N], one after the other, so that what
    a method adds reaches all of them.

    Attributes:
        sample: the predicted tensor, rows first. raw: the one that the model itself gave.
        shift: the sum of the terms that were added to every part of the rows, [b, ...]; None where there are none.
    """

    def __init__(self, wrapped: Any, rows: int | None = None):
        """
        Args:
            wrapped: in the form in which the model returns it. rows: of the call; None: not known, then there is one tensor.

        Raises:
            UnsupportedHost: it holds a tensor that is no prediction with these rows.
        """
        self._form = _Form(wrapped, rows)
        self.sample: Tensor = self._form.read()
        self.raw, self.shift = self.sample, None

    @property
    def wrapped(self) -> Any:
        """In the form in which the model returns it, terms included."""
        return self._form.wrapped if self.sample is self.raw else self._form.write(self.sample)

    def with_sample(self, sample: Tensor, shift: Tensor | None = None) -> Prediction:
        """The same form around another tensor."""
        new = object.__new__(Prediction)
        new._form, new.sample, new.raw, new.shift = self._form, sample, self.raw, shift
        return new

    def rows(self, rows: slice) -> Prediction:
        """Some rows of it."""
        new = self.with_sample(self.sample[rows], None if self.shift is None else self.shift[rows])
        new.raw = self.raw[rows]
        return new


class _Form:
    """Where the predicted tensors are in what a model returned."""

    def __init__(self, wrapped: Any, rows: int | None):
        self.wrapped = wrapped
        leaves, self._spec = tree_flatten(wrapped)
        if not any(isinstance(leaf, Tensor) for leaf in leaves) and isinstance(
            getattr(wrapped, "sample", None), Tensor
        ):
            # An output class that torch does not know.
            leaves, self._spec = [wrapped.sample], None
        self._leaves = leaves
        self._places = [i for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.is_floating_point()]
        found = [leaves[i] for i in self._places]
        if not found:
            raise UnsupportedHost("the denoiser returns no tensor of numbers, on which guidance is defined.")
        self._alone = len(found) == 1 and not (_listed(wrapped) and found[0].shape[:1] != (rows,))
        # An entry for each row, as in models that take images of different sizes.
        self._each = not self._alone and rows is not None and len(found) == rows and _listed(wrapped)
        if self._each and len({v.shape for v in found}) > 1:
            raise UnsupportedHost(
                "the denoiser returns a list of samples of different sizes; guidance is defined on rows of one size."
            )
        odd = [tuple(v.shape) for v in found if rows is None or not v.ndim or v.shape[0] != rows]
        if not self._alone and not self._each and odd:
            raise UnsupportedHost(
                f"the denoiser returns several tensors, and {odd[0]} is no prediction for its {rows} rows; guidance is defined "
                "on predictions only."
            )

    def read(self) -> Tensor:
        found = [self._leaves[i] for i in self._places]
        if self._alone:
            return found[0]
        if self._each:
            return torch.stack([v.flatten() for v in found])
        dtype = functools.reduce(torch.promote_types, (v.dtype for v in found))
        return torch.cat([v.flatten(1).to(dtype) for v in found], dim=1)

    def write(self, sample: Tensor) -> Any:
        leaves, start = list(self._leaves), 0
        for row, place in enumerate(self._places):
            old = leaves[place]
            if self._alone:
                leaves[place] = sample
            elif self._each:
                leaves[place] = sample[row].view(old.shape).to(old.dtype)
            else:
                size = old[0].numel()
                leaves[place] = sample[:, start : start + size].reshape(-1, *old.shape[1:]).to(old.dtype)
                start += size
        if self._spec is None:
            return type(self.wrapped)(**{**self.wrapped, "sample": leaves[0]})
        return tree_unflatten(leaves, self._spec)


def _listed(wrapped: Any) -> bool:
    """Whether the prediction is a list."""
    first = wrapped
    while isinstance(first, tuple) and first:
        first = first[0]
    first = getattr(first, "sample", first) if not isinstance(first, (list, Tensor)) else first
    return isinstance(first, list)


def add_to_rows(prediction: Prediction, term: Tensor, parts: int) -> Prediction:
    """Add `term` [b, ...] to each of the `parts` equal parts of the rows.

    With weights that sum to one, as in classifier-free guidance at any scale, each row then carries the term into
    the combination exactly once, whatever the scale, the solver and the prediction type.
    """
    shift = term if prediction.shift is None else prediction.shift + term
    return prediction.with_sample(prediction.sample + torch.cat([term] * parts), shift)
