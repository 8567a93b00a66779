"""Words over time and frequency: where in a sound a diffusion model's text conditioning looks, as heat maps of words.

Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention" (ACL 2023, arXiv 2210.04885), whose maps of
pictures these are, on latents of spectrograms: rows of cross- (or joint) attention over the text keys of a word, brought to the
finest grid and averaged over heads, sites and steps. The latent of a spectrogram is [time, frequency] (AudioLDM 2); a latent of
the waveform has time alone (Stable Audio), so that its maps have one bin of frequency.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..captured import blocks, map_rows
from ..errors import SelectionError, UnsupportedHost, brief, listing
from ..intervention import Intervention
from ..parameters import whole
from ..steering import steer
from ..tokens import char_offsets
from ..where import Where
from ._pictures import resized


class SoundMaps:
    """What `sound_maps` read: sums over heads by grid, so that memory does not grow with the steps.

    Attributes:
        words: in the order of the maps. calls: attention calls that were read.
    """

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.calls = 0
        self._sums: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def add(self, grid: tuple[int, int], found: Tensor, heads: int) -> None:
        """One call: `found` [B, W, time, frequency], summed over `heads` heads."""
        before, count = self._sums.get(grid, (0.0, 0))
        self._sums[grid] = (before + found, count + heads)
        self.calls += 1

    def maps(self, size: tuple[int, int] | None = None) -> Tensor:
        """fp32 [B, W, time, frequency], means over heads, sites and steps; `size`: (time, frequency), the finest by default.

        Raises:
            SelectionError: nothing was read.
        """
        if not self._sums:
            raise SelectionError("sound_maps: no attention to these words was seen; run the pipeline inside the block.")
        size = max(self._sums) if size is None else size
        total = sum(found if grid == size else resized(found, size) for grid, (found, _) in self._sums.items())
        return total / sum(count for _, count in self._sums.values())

    def over_time(self, word: str, sample: int = 0) -> Tensor:
        """fp32 [time]: of a word, mean over frequency.

        Raises:
            SelectionError: no such word.
        """
        if word not in self.words:
            raise SelectionError(f"there is no map of {word!r}; words are {listing(self.words)}.")
        return self.maps()[sample, self.words.index(word)].mean(dim=-1)

    def when(self, word: str, seconds: float, sample: int = 0) -> tuple[float, float]:
        """(start, stop) in seconds of the run of time cells round a word's largest one that have half of its value or more.

        Args:
            seconds: length of the sound.
        """
        line = self.over_time(word, sample)
        top = int(line.argmax())
        low = line < line[top] / 2
        start = max((t + 1 for t in range(top) if low[t]), default=0)
        stop = next((t for t in range(top, len(line)) if low[t]), len(line))
        return start * seconds / len(line), stop * seconds / len(line)


@contextlib.contextmanager
def sound_maps(
    target: Any,
    words: Any,
    *,
    prompt: str | None = None,
    tokenizer: Any = None,
    keys: int | None = None,
    where: Where | None = None,
) -> Iterator[SoundMaps]:
    """Read maps of words from all calls in the block; outputs stay as they are.

        with sound_maps(pipe, ["dog", "rain"], prompt=text, tokenizer=pipe.tokenizer_2) as heard:
            pipe(text)
        heard.maps()                # [B, 2, time, frequency]

    Args:
        target: an audio pipeline of diffusers, or its denoiser. words: in the prompt; or word -> its text keys, (start, stop) or a
            list of numbers.
        prompt, tokenizer: for words that are looked up: the tokenizer whose tokens the text keys are (the T5's of AudioLDM 2).
        keys: take only calls with so many text keys, where a denoiser has several texts; None: with words that are looked up, so
            many as the prompt has tokens or more.
        where: sites and steps; None: all cross- and joint attention.

    Raises:
        SelectionError: words that are not in the prompt, or text keys that a site does not have.
        UnsupportedHost: which rows of a guided batch are conditional is not known.
    """
    places = _places(words, prompt, tokenizer)
    heard = SoundMaps(list(places))
    where = Where() if where is None else where
    if getattr(target, "components", None) is not None:
        where = where & Where(branches="cond")
    least = max(max(at) for at in places.values()) + 1
    with steer(target, _Words(places, keys, least, heard, where=where)):
        yield heard


def _places(words: Any, prompt: str | None, tokenizer: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(words, Mapping):
        found = {str(word): _numbers(word, at) for word, at in words.items()}
    else:
        listed = [words] if isinstance(words, str) else list(words) if isinstance(words, (list, tuple)) else []
        if prompt is None or tokenizer is None:
            raise SelectionError(
                "sound_maps: words are looked up in prompt=... with tokenizer=...; or give word -> text keys."
            )
        ids = tokenizer(prompt)["input_ids"]
        offsets, text = char_offsets(ids, tokenizer)
        found = {}
        for word in listed:
            at = text.lower().find(str(word).lower())
            inside = (
                tuple(i for i, (a, b) in enumerate(offsets) if a < at + len(str(word)) and b > at) if at >= 0 else ()
            )
            if not inside:
                raise SelectionError(f"sound_maps: {word!r} is not in the prompt {brief(text)}.")
            found[str(word)] = inside
    if not found:
        raise SelectionError("sound_maps: give at least one word.")
    return found


def _numbers(word: Any, at: Any) -> tuple[int, ...]:
    given = list(range(*at)) if isinstance(at, tuple) and len(at) == 2 and all(whole(i) is not None for i in at) else at
    listed = [given] if whole(given) is not None else list(given) if isinstance(given, (list, tuple)) else []
    numbers = [whole(i) for i in listed]
    if not numbers or any(i is None or i < 0 for i in numbers):
        raise SelectionError(
            f"sound_maps: {word!r} has the text keys {brief(at)}; give (start, stop), or a list of numbers."
        )
    return tuple(numbers)


@dataclass(frozen=True)
class _Words(Intervention):
    """Reads the columns of words; edits nothing."""

    places: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    keys: int | None = None
    least: int = 1
    heard: Any = field(default=None, compare=False, repr=False)

    observes = True
    kinds = ("cross", "joint")
    needs = ("segments", "grid", "steps")

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Add the maps of one call, block by block of rows."""
        if call.branch is not None:
            # A weak pass of guidance.
            return
        B, H, n, m = call.map.shape
        rows, first, count = slice(0, n), 0, m
        if call.site.kind == "joint":
            if not {"image", "text"} <= set(call.segments):
                raise UnsupportedHost(f"{call.site.path}: which rows are sound and which are text is not known.")
            rows, text = call.segments["image"], call.segments["text"]
            first, count = text.start, text.stop - text.start
        if (self.keys is not None and count != self.keys) or (self.keys is None and count < self.least):
            # Another text of the denoiser's.
            return
        if count < self.least:
            raise SelectionError(f"{call.site.path} has {count} text keys, and a word is at {self.least - 1}.")
        chosen = torch.ones(B, dtype=torch.bool, device=call.map.device)
        if self.where.branches is not None:
            if call.branch_rows is None:
                raise UnsupportedHost(
                    f"{call.site.path}: which rows of the batch are conditional is not known. Read the denoiser of the pipeline "
                    'inside run.branches("uncond", "cond"), or turn guidance off.'
                )
            if "cond" not in call.branch_rows:
                return
            chosen = call.branch_rows["cond"].to(chosen.device)
        index = torch.arange(n, device=call.map.device)[rows]
        parts = []
        for block in blocks(len(index), B * H * m):
            A = map_rows(call, index[block].expand(B, -1))[chosen].float().sum(dim=1)
            parts.append(
                torch.stack([A[..., [first + j for j in at]].mean(dim=-1) for at in self.places.values()], dim=1)
            )
        found = torch.cat(parts, dim=2).cpu()
        grid = call.grid if call.gives("grid") else (found.shape[2], 1)
        self.heard.add(grid, found.unflatten(2, grid), H)
