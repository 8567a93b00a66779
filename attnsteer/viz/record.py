"""Attention maps for pictures and measurements, read by recorders: interventions that edit nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost, listing
from ..heads import HeadSet
from ..intervention import Intervention
from ..steering import steer
from ..tokens import Tokens, char_offsets
from ..where import Where

Box = tuple[float, float, float, float]
# Rows of a map that are built at once.
CHUNK = 256


@dataclass(frozen=True)
class WordRecorder(Intervention):
    """Reads the last row of each call of a language model: the attention with which the next token is chosen.

    Give it last to `steer`: it sees the map with the edits of the methods before it (of those that edit the map; a method
    that edits head outputs leaves the map as it was).

    Attributes:
        seen: site path -> one [B, H, m] per call, the selected heads' rows. tokens: roles of the prompt's
            tokens, in a list of one.
    """

    heads: HeadSet | None = None
    seen: dict[str, list[Tensor]] = field(default_factory=dict, kw_only=True, compare=False, repr=False)
    tokens: list[Tokens] = field(default_factory=list, kw_only=True, compare=False, repr=False)

    kinds = ("self",)
    needs = ("tokens",)
    observes = True

    observes = True

    def weights(self, call: AttnCall) -> None:
        n = call.map.shape[2]
        row = call.map.rows(torch.tensor([n - 1], device=call.map.att.q.device))[:, :, 0]
        rows = self.seen.setdefault(call.site.path, [])
        rows.append(row.detach().float().cpu())
        if not self.tokens:
            self.tokens.append(call.tokens)


@dataclass(frozen=True)
class PhraseRecorder(Intervention):
    """Reads how much the image rows of a denoiser attend to some text tokens, in the conditional rows of the strong pass.

    Args:
        keys: positions of the text tokens in the prompt's sequence (of the text part of a joint sequence).

    Attributes:
        records: one `PhraseMap` per attention call.
    """

    keys: tuple[int, ...] = ()
    where: Where = field(default_factory=lambda: Where(branches="cond"), kw_only=True)
    records: list[PhraseMap] = field(default_factory=list, kw_only=True, compare=False, repr=False)

    kinds = ("cross", "joint")
    needs = ("segments", "grid", "steps")
    observes = True

    observes = True

    def __post_init__(self) -> None:
        wrong = [k for k in self.keys if isinstance(k, bool) or not isinstance(k, int) or k < 0]
        if not self.keys or wrong:
            raise SelectionError(f"PhraseRecorder(keys={self.keys!r}): give the positions of at least one text token.")
        # The rows of a guided batch are told apart only where a selection asks for it.
        object.__setattr__(self, "where", self.where & Where(branches="cond"))

    def weights(self, call: AttnCall) -> None:
        if call.branch is not None:
            # A weak pass of guidance.
            return
        if call.branch_rows is None:
            raise UnsupportedHost(
                f"{call.site.path}: which rows of the batch are conditional is not known. Steer the pipeline rather than its "
                'model, or enter run.branches("uncond", "cond") around the calls.'
            )
        rows = call.branch_rows.get("cond")
        if rows is None or not bool(rows.any()):
            return
        new = PhraseMap(call.site.path, call.site.layer, call.site.kind, call.step, call.heads, self._maps(call)[rows])
        last = self.records[-1] if self.records else None
        # Heads that other methods treat differently come one group after the other.
        if last is not None and (last.site, last.step) == (new.site, new.step) and not {*last.heads} & {*new.heads}:
            new = PhraseMap.joined(self.records.pop(), new)
        self.records.append(new)

    def _maps(self, call: AttnCall) -> Tensor:
        """[B, K, h, w], mean over the selected heads."""
        image, first, count = _image_and_text(call)
        if max(self.keys) >= count:
            raise SelectionError(
                f"{call.site.path}: text token {max(self.keys)} was asked for, the prompt has {count} tokens there."
            )
        if not call.gives("grid"):
            raise UnsupportedHost(
                f"{call.site.path}: how its {image.stop - image.start} image rows lie in a grid is not known."
            )
        keys = torch.tensor([first + k for k in self.keys], device=call.k.device)
        parts = []
        for start in range(image.start, image.stop, CHUNK):
            index = torch.arange(start, min(start + CHUNK, image.stop), device=call.k.device)
            parts.append(call.map.rows(index)[..., keys].mean(dim=1))
        rows = torch.cat(parts, dim=1).detach().float().cpu()
        return rows.transpose(1, 2).unflatten(-1, call.grid)


def _image_and_text(call: AttnCall) -> tuple[slice, int, int]:
    """(image rows, first text key, number of text keys)."""
    if call.site.kind == "cross":
        return slice(0, call.map.shape[2]), 0, call.map.shape[3]
    if not {"image", "text"} <= set(call.segments):
        raise UnsupportedHost(f"{call.site.path}: which rows are image and which are text is not known for this model.")
    text = call.segments["text"]
    return call.segments["image"], text.start, text.stop - text.start


@dataclass(frozen=True)
class PhraseMap:
    """One attention call: maps [B, K, h, w] of B images and K text tokens, mean over heads, at a site and step."""

    site: str
    layer: int
    kind: str
    step: int
    heads: tuple[int, ...]
    maps: Tensor

    @staticmethod
    def joined(a: PhraseMap, b: PhraseMap) -> PhraseMap:
        """Two groups of heads of one call."""
        n, m = len(a.heads), len(b.heads)
        return replace(a, heads=a.heads + b.heads, maps=(a.maps * n + b.maps * m) / (n + m))


@dataclass(frozen=True)
class PhraseMaps:
    """What `phrase_maps` recorded.

    Attributes:
        words: name -> places among the recorded tokens. records: one per site and step. images: what the pipeline made.
    """

    words: dict[str, tuple[int, ...]]
    records: tuple[PhraseMap, ...]
    images: list[Any]

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the recorded sites, in the model's order."""
        return tuple(dict.fromkeys(r.site for r in self.records))

    @property
    def steps(self) -> tuple[int, ...]:
        """The recorded steps."""
        return tuple(sorted({r.step for r in self.records}))

    def mean(
        self,
        sites: Iterable[str] | None = None,
        steps: Iterable[int] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Maps [B, W, h, w] of the words (mean over each one's tokens), averaged over sites and steps.

        Args:
            sites, steps: the ones to average over; all by default. size: (h, w) to bring the maps to, the finest by default.

        Raises:
            SelectionError: nothing was recorded there.
        """
        sites = set(self.sites if sites is None else sites)
        steps = set(self.steps if steps is None else steps)
        chosen = [r for r in self.records if r.site in sites and r.step in steps]
        if not chosen:
            raise SelectionError(
                f"no maps of sites {listing(sorted(sites), 4)} at steps {listing(sorted(steps), 4)}; there are sites "
                f"{listing(self.sites, 4)} and steps {listing(self.steps, 4)}."
            )
        size = max(tuple(r.maps.shape[-2:]) for r in chosen) if size is None else size
        total = sum(
            torch.nn.functional.interpolate(r.maps, size=size, mode="bilinear", align_corners=False)
            if tuple(r.maps.shape[-2:]) != tuple(size)
            else r.maps
            for r in chosen
        )
        return torch.stack([total[:, list(at)].mean(dim=1) for at in self.words.values()], dim=1) / len(chosen)

    def ratios(self, boxes: Mapping[str, Box]) -> dict[str, dict[tuple[str, int], float]]:
        """`box_ratio` of each word at each site and step, mean over images: where the maps mean something."""
        unknown = [w for w in boxes if w not in self.words]
        if unknown or not boxes:
            raise SelectionError(f"there are no maps of {unknown or 'no box'}; recorded words: {listing(self.words)}.")
        table: dict[str, dict[tuple[str, int], list[Tensor]]] = {w: {} for w in boxes}
        for record in self.records:
            for word, box in boxes.items():
                maps = record.maps[:, list(self.words[word])].mean(dim=1)
                table[word].setdefault((record.site, record.step), []).append(box_ratio(maps, box))
        return {w: {k: float(torch.cat(v).mean()) for k, v in rows.items()} for w, rows in table.items()}


def phrase_maps(
    pipe: Any,
    prompt: str,
    words: Sequence[str] | Mapping[str, Sequence[int]],
    *interventions: Intervention,
    where: Where | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> PhraseMaps:
    """Run a pipeline and record how much the image attends to words of the prompt, per site and step.

    Args:
        prompt: passed to the pipeline as `prompt`. words: parts of the prompt to find (their first occurrence), or
            `{name: [token position, ...]}`.
        interventions: methods to apply; the maps are read after their edits.
        where: sites, heads and steps to record; all cross and joint attention by default.
        tokenizer: finds the words; `pipe.tokenizer` by default. options: further arguments of the pipeline's call.

    Raises:
        SelectionError: a word that is not in the prompt, or a token beyond its end.
        UnsupportedHost: no cross or joint attention, or a pipeline whose rows or grid are not known.
    """
    tokenizer = getattr(pipe, "tokenizer", None) if tokenizer is None else tokenizer
    places = _word_tokens(prompt, words, tokenizer)
    keys = tuple(sorted({k for at in places.values() for k in at}))
    recorder = PhraseRecorder(keys, where=Where() if where is None else where)
    with steer(pipe, *interventions, recorder):
        output = pipe(prompt=prompt, **options)
    images = output[0] if isinstance(output, tuple) else output.images
    found = {name: tuple(keys.index(k) for k in at) for name, at in places.items()}
    return PhraseMaps(found, tuple(recorder.records), list(images))


def box_ratio(maps: Tensor, box: Box) -> Tensor:
    """Share of a map's mass inside a box over the box's share of the area: 1 means that the map ignores the box.

    Args:
        maps: [..., h, w], not negative. box: (x0, y0, x1, y1) in fractions of the image; a cell that the box covers in part
            counts in part.

    Raises:
        SelectionError: a box outside the image, or without area.
    """
    x0, y0, x1, y1 = (float(v) for v in box)
    if not (0.0 <= x0 < x1 <= 1.0 and 0.0 <= y0 < y1 <= 1.0):
        raise SelectionError(f"box {tuple(box)}: give (x0, y0, x1, y1) in fractions of the image, 0 <= x0 < x1 <= 1.")
    h, w = maps.shape[-2:]
    cover = _cover(h, y0, y1)[:, None] * _cover(w, x0, x1)[None]
    cover = cover.to(maps.dtype).to(maps.device)
    return (maps * cover).sum(dim=(-2, -1)) / maps.sum(dim=(-2, -1)).clamp_min(1e-37) / ((x1 - x0) * (y1 - y0))


def _cover(cells: int, start: float, stop: float) -> Tensor:
    """How much of each of `cells` equal parts of 0 to 1 lies between start and stop, [cells]."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    return ((edges[1:].clamp_max(stop) - edges[:-1].clamp_min(start)).clamp_min(0.0) * cells).float()


def _word_tokens(
    prompt: str, words: Sequence[str] | Mapping[str, Sequence[int]], tokenizer: Any
) -> dict[str, tuple[int, ...]]:
    if isinstance(words, Mapping):
        found = {str(name): tuple(at) for name, at in words.items()}
        if not found or not all(found.values()):
            raise SelectionError(f"phrase_maps got words={words!r}; give at least one token for each.")
        return found
    if isinstance(words, str) or not words:
        raise SelectionError(f"phrase_maps got words={words!r}; give a list of words, or {{name: [token, ...]}}.")
    if tokenizer is None:
        raise SelectionError("phrase_maps: the pipeline has no tokenizer; give tokenizer=, or {name: [token, ...]}.")
    every, own = tokenizer(prompt)["input_ids"], tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # A word is looked for in the prompt's own tokens: "<|startoftext|>" has a star in it.
    first = next((i for i in range(len(every)) if own and every[i : i + len(own)] == own), None)
    first, ids = (0, torch.tensor([every])) if first is None else (first, torch.tensor([own]))
    tokens = Tokens(batch=1, length=ids.shape[1], ids=ids)
    found = {w: tokens.spans([[_spelled(w, ids, tokenizer)]], tokenizer)[0][0] for w in words}
    return {w: tuple(range(first + start, first + stop)) for w, (start, stop) in found.items()}


def _spelled(word: str, ids: Tensor, tokenizer: Any) -> str:
    """The word as the tokenizer's text has it: some write everything in small letters."""
    return word if word in tokenizer.decode(ids[0].tolist()) else word.lower()


@dataclass(frozen=True)
class WordMaps:
    """What `word_maps` recorded.

    Attributes:
        words: the generated words, or tokens. maps: [W, h, w], attention to each image token, mean over the chosen heads
            and over a word's tokens; a map's sum is the share of the attention that went to the image.
        ids: the generated token ids.
    """

    words: list[str]
    maps: Tensor
    ids: list[int]


@torch.no_grad()
def word_maps(
    model: Any,
    inputs: Mapping[str, Any],
    *interventions: Intervention,
    heads: HeadSet | None = None,
    where: Where | None = None,
    continuation: Sequence[int] | None = None,
    tokenizer: Any = None,
    image: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    **generate: Any,
) -> WordMaps:
    """Let a vision-language model generate, and record the attention over the image with which each word was chosen.

    Args:
        inputs: keyword arguments of `model.generate` for one sample. interventions: methods to apply; the maps are read
            after their edits.
        heads: the heads to average; all that `where` selects by default.
        continuation: token ids to generate, whatever the model would say: the same words before and after a steering.
        tokenizer: joins tokens to words; without it every token is a word of its own.
        image: (start, stop) of the image's tokens; by default the image tokens that the model's config marks.
        grid: (height, width) of the image in tokens; by default a square. generate: options of `model.generate`.

    Raises:
        SelectionError: several samples, no image token, several images, or tokens that are no grid of that size.
    """
    if len(inputs["input_ids"]) != 1:
        raise SelectionError(f"word_maps got {len(inputs['input_ids'])} samples; give one.")
    recorder = WordRecorder(heads, where=Where() if where is None else where)
    options = {"do_sample": False, **generate}
    if continuation is not None:
        forced = [int(t) for t in continuation]
        options |= {"max_new_tokens": len(forced), "logits_processor": [_Forced(forced, inputs["input_ids"].shape[1])]}
    with steer(model, *interventions, recorder):
        output = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    ids = output[0, length:].tolist()
    start, stop = _image_span(recorder.tokens[0]) if image is None else image
    h, w = _square(stop - start) if grid is None else grid
    if h * w != stop - start:
        raise SelectionError(
            f"grid {(h, w)} has {h * w} cells, the image has {stop - start} tokens; give its (height, width)."
        )
    steps = [torch.cat([_call(rows, i, len(ids)) for rows in recorder.seen.values()], dim=1) for i in range(len(ids))]
    maps = torch.stack([row[0, :, start:stop].mean(dim=0) for row in steps]).unflatten(-1, (h, w))
    if tokenizer is None:
        return WordMaps([str(i) for i in ids], maps, ids)
    groups = _words(ids, tokenizer)
    return WordMaps([t for t, _ in groups], torch.stack([maps[list(at)].mean(dim=0) for _, at in groups]), ids)


class _Forced:
    """A logits processor that leaves one token possible at each place."""

    def __init__(self, ids: list[int], start: int):
        self.ids, self.start = ids, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -math.inf)
        forced[:, self.ids[input_ids.shape[1] - self.start]] = 0.0
        return forced


def _call(rows: list[Tensor], i: int, calls: int) -> Tensor:
    """The heads' rows of call `i` at one site: several head groups report one after the other."""
    groups, left = divmod(len(rows), calls)
    if left:
        raise SelectionError(
            f"{len(rows)} rows were recorded for {calls} tokens; generate without beams or assistants."
        )
    return torch.cat(rows[i * groups : (i + 1) * groups], dim=1)


def _image_span(tokens: Tokens | None) -> tuple[int, int]:
    marked = None if tokens is None or tokens.image is None else tokens.image[0].nonzero().flatten().tolist()
    if not marked:
        raise SelectionError("which tokens are the image's is not known, or there is none; give image=(start, stop).")
    start, stop = marked[0], marked[-1] + 1
    if len(marked) != stop - start:
        raise SelectionError("the image's tokens are not one range (several images?); give image=(start, stop).")
    return start, stop


def _square(count: int) -> tuple[int, int]:
    side = math.isqrt(count)
    if side * side != count:
        raise SelectionError(f"{count} image tokens are no square; give grid=(height, width).")
    return side, side


def _words(ids: list[int], tokenizer: Any) -> list[tuple[str, tuple[int, ...]]]:
    """(word, its tokens), by white space."""
    offsets, text = char_offsets(ids, tokenizer)
    found = []
    for match in re.finditer(r"\S+", text):
        at = tuple(i for i, (a, b) in enumerate(offsets) if a < match.end() and b > match.start())
        if at:
            found.append((match[0], at))
    return found
