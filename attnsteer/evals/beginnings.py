"""What several prompts begin with (few-shot examples, an image that several questions are asked about), read once.

A batch goes on behind it: its cache has a row for each beginning, which is repeated for every prompt that begins so. Between a
beginning and a rest that is shorter than others stands padding.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..account import Beginnings as Rows
from ..errors import SelectionError, UnsupportedHost, listing
from ..hosts.transformers.image_tokens import FAMILIES, family_of, placeholders
from ..intervention import Intervention

WHOLE = "Read every prompt whole (prefix: off)."


@dataclass(frozen=True)
class Beginnings:
    """The distinct beginnings of the prompts of a batch.

    Attributes:
        ids: their token ids, each a list, none of them empty. of: for each prompt, which of them it begins with.
        inputs: what else the model's forward takes for them, with a row (or, by token, a row padded on the left) for each.
    """

    ids: Sequence[Sequence[int]]
    of: Sequence[int]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def text(cls, contexts: Sequence[Sequence[int]], tokens: int) -> Beginnings:
        """The first `tokens` tokens of all prompts.

        Raises:
            SelectionError: the prompts do not begin with so many tokens alike, and go on behind them.
        """
        if not 0 < tokens <= common_prefix(contexts):
            raise SelectionError(
                f"shared={tokens}: the contexts begin with {common_prefix(contexts)} tokens alike, each with one more behind them."
            )
        return cls([contexts[0][:tokens]], [0] * len(contexts))

    @property
    def first(self) -> list[int]:
        """Of each beginning, the first prompt that has it."""
        return [self.of.index(i) for i in range(len(self.ids))]


@dataclass(frozen=True)
class Laid:
    """Prompts laid out as one batch, padded on the left, or between their beginnings and their rests.

    Attributes:
        ids: int [B, T]. valid: bool [B, T], False for padding. cached: how many of the T slots are in the cache already.
        cache: the keys and values of these; None where there are none.
        ahead: int [B, 1], how far the positions of what follows are ahead of the number of tokens before; 0 for most models.
    """

    ids: Tensor
    valid: Tensor
    cached: int = 0
    cache: Any = None
    ahead: Tensor | None = None


def common_prefix(contexts: Sequence[Sequence[int]]) -> int:
    """How many tokens all contexts begin with, less what leaves none of them empty; 0 for a single one."""
    if len(contexts) < 2:
        return 0
    return _alike(contexts)


def _alike(contexts: Sequence[Sequence[int]]) -> int:
    first, most = contexts[0], min(len(c) for c in contexts) - 1
    return next((i for i in range(most) if any(c[i] != first[i] for c in contexts)), most)


def why_whole(method: Intervention) -> str | None:
    """Why prompts are to be read whole under a method: what it does to their beginning may depend on what follows; or None."""
    if type(method).around is not Intervention.around or not method.prefix_local or method.where.rows is not None:
        return f"{type(method).__name__} may act on the beginning of a prompt by what follows it, so that it cannot be shared"
    if hasattr(method, "spans"):
        return (
            f"{type(method).__name__} marks spans, which may lie in the beginning of one prompt and the rest of another"
        )
    return None


def laid_out(model: Any, contexts: Sequence[Sequence[int]], shared: Beginnings | None = None, run: Any = None) -> Laid:
    """A batch of prompts, of which what they begin with has been read.

    Args:
        model: a model of transformers, steered or not. run: its `Steering`.
        contexts: token ids, none of them empty, each with one more than its beginning at least. shared: what they begin with.

    Raises:
        UnsupportedHost: the model's cache is not one that padding can stand in.
        SelectionError: a method of `run` does not allow it.
    """
    device = next(model.parameters()).device
    begun = [0] * len(contexts) if shared is None else [len(shared.ids[i]) for i in shared.of]
    rest = [c[n:] for c, n in zip(contexts, begun, strict=True)]
    ids, valid = left_padded(rest, [c[0] for c in rest], device)
    if shared is None:
        return Laid(ids, valid)
    for bound in () if run is None else run.bounds:
        if reason := why_whole(bound.method):
            raise SelectionError(f"{reason}; read every prompt whole.")
    first, of = shared.first, torch.tensor(shared.of, device=device)
    # Padding has an id of its own prompt: that of an image would ask for one, and one of no prompt could be penalised.
    fill = [rest[i][0] for i in first]
    before, seen = left_padded(shared.ids, fill, device)
    whole = torch.cat([seen[of], valid], dim=1)
    cache, ahead = _read(model, shared, before, seen, whole, run, len(contexts))
    cache.batch_select_indices(of)
    own = torch.where(seen[of], before[of], ids.new_tensor([c[0] for c in rest])[:, None])
    ids = torch.cat([own, ids], dim=1)
    return Laid(ids, whole, before.shape[1], cache, None if ahead is None else _rows_of(model, ahead, of))


def _read(
    model: Any, shared: Beginnings, ids: Tensor, seen: Tensor, whole: Tensor, run: Any, prompts: int
) -> tuple[Any, Tensor | None]:
    """(the cache of the beginnings, how far positions are ahead of the number of tokens behind each, [G, 1], or None)."""
    takes = arguments(model)
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    if not bool(seen.all()):
        options["attention_mask"] = seen.long()
        if "position_ids" in takes and not _keepers(model):
            options["position_ids"] = positions(seen)
    scope: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if run is not None:
        scope = run.chunked_prefill(whole.shape[1], samples=Rows({prompts: shared.first}))
    with scope:
        cache = getattr(model(input_ids=ids, use_cache=True, **shared.inputs, **options), "past_key_values", None)
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])} or {type(cache).__name__}
    if kinds != {"DynamicLayer"} or (not bool(whole.all()) and "position_ids" not in takes):
        # A window and a bias by distance count the padding between the beginning and the rest; a recurrent state meets it.
        raise UnsupportedHost(
            f"{type(model).__name__}: a beginning is shared by prompts of any length where the cache is of plain layers and the "
            f"forward takes position_ids; this one has {listing(sorted(kinds))}. {WHOLE}"
        )
    return cache, next((m.rope_deltas for m in _keepers(model)), None)


def _keepers(model: Any) -> list[Any]:
    """The modules that keep how far the positions of a prompt with images are ahead (types with several axes of positions)."""
    return [m for m in model.modules() if hasattr(m, "rope_deltas")]


def _rows_of(model: Any, ahead: Tensor, of: Tensor) -> Tensor:
    """`ahead` of each prompt; what the model keeps of it for what follows is put in the same rows."""
    own = ahead[of]
    for module in _keepers(model):
        module.rope_deltas = own
    return own


def arguments(model: Any) -> set[str]:
    """Names of the arguments of the model's forward; those of the model inside where it is wrapped (peft)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(type(inner).forward).parameters)


def positions(valid: Tensor) -> Tensor:
    """int [B, T]: the number of each token among those that are no padding."""
    return valid.cumsum(-1).sub(1).clamp_min(0)


def left_padded(rows: Sequence[Sequence[int]], fill: Sequence[int], device: Any) -> tuple[Tensor, Tensor]:
    """(ids, validity) [B, n] of rows of ids, filled up on the left, each with its own id."""
    width = max(len(r) for r in rows)
    ids = torch.tensor([[f] * (width - len(r)) + list(r) for r, f in zip(rows, fill, strict=True)], device=device)
    lengths = torch.tensor([len(r) for r in rows], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def image_beginnings(model: Any, inputs: Mapping[str, Tensor], run: Any = None) -> Beginnings | None:
    """What the prompts of a vision-language model begin with: all up to the end of their images, and what prompts about the same
    images go on with alike. Prompts for which a method has other values do not share. None where no two prompts do.

    Args:
        inputs: the processor's output for the batch. run: the `Steering` of the model.

    Raises:
        UnsupportedHost: a type of model whose images are not known to be read without what follows, or inputs of which it is not
            known what belongs to which prompt.
    """
    family, known = _family(model), ("input_ids", "attention_mask")
    mask = inputs["attention_mask"].bool()
    contexts = [row[own].tolist() for row, own in zip(inputs["input_ids"], mask, strict=True)]
    ends = [
        _end(placeholders(family, model.config, row[own])) for row, own in zip(inputs["input_ids"], mask, strict=True)
    ]
    if not all(0 < end < len(c) for end, c in zip(ends, contexts, strict=True)):
        return None
    by_token = {k: v for k, v in inputs.items() if k not in known and v.shape == mask.shape}
    images = _by_prompt({k: v for k, v in inputs.items() if k not in known and k not in by_token}, len(mask))
    own = [(contexts[i][: ends[i]], _of_sample(run, i)) for i in range(len(mask))]
    groups: list[list[int]] = []
    for i in range(len(mask)):
        alike = (g for g in groups if own[g[0]] == own[i] and _equal(images[g[0]], images[i]))
        group = next(alike, None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    if len(groups) == len(mask):
        return None
    of = {i: number for number, g in enumerate(groups) for i in g}
    # Of a prompt that is the only one about its images, all but the last token.
    begun = [contexts[g[0]][: _alike([contexts[i] for i in g])] for g in groups]
    found = {name: torch.cat([images[g[0]][name] for g in groups]) for name in images[0]}
    width = max(map(len, begun))
    for name, value in by_token.items():
        if any(bool(value[i][mask[i]][len(begun[of[i]]) :].any()) for i in of):
            raise UnsupportedHost(f"{type(model).__name__}: {name} marks tokens behind the images. {WHOLE}")
        parts = [value[g[0]][mask[g[0]]][: len(b)] for g, b in zip(groups, begun, strict=True)]
        found[name] = torch.stack([torch.nn.functional.pad(part, (width - len(part), 0)) for part in parts])
    return Beginnings(begun, [of[i] for i in range(len(mask))], found)


def _family(model: Any) -> Any:
    found = family_of(getattr(model, "config", None))
    if found is None or found.refused or found.roles or not found.text_alone:
        # Other types may look at an image with the question in mind, or let it see what follows.
        known = [name for name, f in FAMILIES.items() if not f.refused and not f.roles and f.text_alone]
        raise UnsupportedHost(
            f"{type(model).__name__} is not one of the types whose images are known to be read without the question: "
            f"{listing(known)}. {WHOLE}"
        )
    return found


def _end(marks: Tensor) -> int:
    """How many tokens there are up to the last one that is marked."""
    return int(marks.nonzero()[-1]) + 1 if bool(marks.any()) else 0


def _of_sample(run: Any, sample: int) -> list[Any]:
    """The methods of a steering as they are for one sample."""
    return [] if run is None else [b.method.of_sample(lambda name, count: sample) for b in run.bounds]


def _by_prompt(inputs: Mapping[str, Tensor], prompts: int) -> list[dict[str, Tensor]]:
    """What belongs to each prompt, one image each."""
    found: list[dict[str, Tensor]] = [{} for _ in range(prompts)]
    grid = inputs.get("image_grid_thw")
    for name, value in inputs.items():
        # Patches of all images in a row, or an entry for each.
        sizes = grid.prod(dim=-1).tolist() if name == "pixel_values" and grid is not None else [1] * len(value)
        if len(sizes) != prompts or sum(sizes) != len(value):
            raise UnsupportedHost(f"{name} {list(value.shape)} is not one image for each of {prompts} prompts. {WHOLE}")
        for own, part in zip(found, value.split(sizes), strict=True):
            own[name] = part
    return found


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())
