"""What `capture` took: rows of maps, masses, head outputs, q, k and v, by attention call, row and token; and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import SelectionError, SerializationError, brief, did_you_mean, listing
from .heads import checked_path
from .kernels import Attention, dense
from .parameters import plain, whole
from .tokens import is_text, token_range

if TYPE_CHECKING:
    from .account import Track
    from .call import AttnCall

WHAT = ("map", "mass", "output", "q", "k", "v")
# Rows that are named by what they are.
ROLES = ("last", "prompt", "prompt_end", "generated")
# Those of them that no call of generated tokens alone has.
OF_PROMPTS = ("prompt", "prompt_end")
INDEX = "capture.json"
FORMAT, SCHEMA = "attnsteer.capture", 1
# Scores that are built at once.
TILE = 1 << 22
# What a token's number stays below: maps of one token by its number are as wide as the largest.
MOST_TOKENS = 1 << 24


# Rows.


def checked_rows(rows: Any) -> Any:
    """A choice of rows in the form that `chosen_rows` reads.

    Raises:
        SelectionError: it has none of the forms that `capture` names.
    """
    if rows is None or isinstance(rows, str):
        return rows
    if isinstance(rows, range):
        rows = list(rows)
    given = plain(rows)
    if isinstance(given, tuple) and len(given) == 2 and all(whole(i) is not None for i in given):
        return token_range(given)
    if isinstance(given, (list, tuple)) and given:
        numbers = [whole(i) for i in given]
        if all(i is not None and i >= 0 for i in numbers):
            return list(numbers)
        if all(isinstance(row, (list, tuple)) for row in given) and not all(is_text(row) for row in given):
            return [[item if is_text(item) else token_range(item) for item in row] for row in given]
    raise SelectionError(
        f"rows={brief(rows)}: give None (all), one of {ROLES} or a role of the host's rows, a tuple (start, stop), a list of token "
        "numbers, or for each sample a list of (start, stop) ranges or strings. Tokens count from the sample's first valid one."
    )


def needs_tokens(rows: Any) -> bool:
    """Whether a choice of rows is read in the tokens of the prompt."""
    return rows == "prompt_end" or _per_sample(rows)


def _per_sample(rows: Any) -> bool:
    return isinstance(rows, list) and isinstance(rows[0], list)


def chosen_rows(call: AttnCall, rows: Any, tokenizer: Any = None) -> Tensor:
    """bool [B or 1, n]: the rows of a call that a choice (see `checked_rows`) names; padding never is.

    Raises:
        SelectionError: the call has no rows of that role, or its tokens are not those of the choice.
    """
    track = call.rows
    if rows is None:
        return track.valid
    if rows == "last":
        return track.last
    if rows == "prompt":
        return track.prompt
    if rows == "prompt_end":
        return call.prompt_end
    if rows == "generated":
        return call.generates
    if isinstance(rows, str):
        if rows not in call.segments:
            known = [*ROLES, *sorted(call.segments)]
            raise SelectionError(
                f"rows={rows!r}: {call.site.path} has rows {listing(known)}.{did_you_mean(rows, known)}"
            )
        mask = torch.zeros_like(track.slot, dtype=torch.bool)
        mask[call.segments[rows]] = True
        return mask[None] & track.valid
    return _of_numbers(call, rows, track.index, tokenizer) & track.valid


def _of_numbers(call: AttnCall, rows: Any, index: Tensor, tokenizer: Any) -> Tensor:
    """bool [B or 1, size]: which of the token numbers `index` a choice that is no role names."""
    if isinstance(rows, tuple):
        return (index >= rows[0]) & (index < rows[1])
    if not _per_sample(rows):
        return torch.isin(index, torch.tensor(rows, device=index.device))
    found = call.tokens.spans(rows, tokenizer)
    index = index.expand(len(found), -1)
    mask = torch.zeros_like(index, dtype=torch.bool)
    for b, ranges in enumerate(found):
        for start, stop in ranges:
            mask[b] |= (index[b] >= start) & (index[b] < stop)
    return mask


def in_order(call: AttnCall, rows: Any, track: Track, there: Tensor, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(how many chosen rows of its sample come before each of a `track`, int [B, size]; how many there are so far, int [B]).

    Rows that are chosen by number count whether or not this call has them: chunks of a prompt have some each, and a cache with
    a window drops keys. Args: there: bool [B, size], those that are chosen here (see `chosen_rows`).
    """
    if isinstance(rows, str) and rows != "prompt":
        return there.long().cumsum(dim=1) - 1, there.sum(dim=1)
    index = track.index.expand(len(there), -1)
    ends = torch.where(track.prompt if rows == "prompt" else track.valid, index, -1).amax(dim=1) + 1
    number = torch.arange(max(int(ends.max()), 1), device=index.device)[None]
    every = number < ends[:, None]
    if rows != "prompt":
        every = every & _of_numbers(call, rows, number, tokenizer)
    return (every.long().cumsum(dim=1) - 1).gather(1, index.clamp(0, number.shape[1] - 1)), every.sum(dim=1)


def no_rows(call: AttnCall, rows: Any) -> bool:
    """Whether it is known without looking that a call has none of these rows."""
    return rows in OF_PROMPTS and call.phase == "decode" and not call.mixed


def places(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(place of each chosen row of bool [B, n], int [B, r]; which of them there are, bool [B, r]); r is the most of a sample."""
    count = chosen.sum(dim=1)
    most = int(count.max()) if len(count) else 0
    at = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    there = torch.arange(most, device=chosen.device)[None] < count[:, None]
    return torch.where(there, at, 0), there


def take_rows(att: Attention, at: Tensor) -> Attention:
    """The same computation for the rows `at` [B, r], which each sample has of its own."""
    B, H, n, m = att.shape
    mask = att.mask4()
    if mask is not None and mask.shape[2] > 1:
        mask = mask.expand(B, -1, -1, -1)
        mask = mask.gather(2, at[:, None, :, None].expand(B, mask.shape[1], at.shape[1], mask.shape[3]))
    if att.causal:
        seen = (torch.arange(m, device=at.device) <= at[..., None])[:, None]
        if mask is None:
            mask = seen
        else:
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
    return att.replace(q=picked(att.q, at), mask=mask, causal=False)


def picked(t: Tensor, at: Tensor) -> Tensor:
    """Rows `at` [B, r] of t [B, H, n, d]."""
    return t.gather(2, at[:, None, :, None].expand(t.shape[0], t.shape[1], at.shape[1], t.shape[3]))


def map_rows(call: AttnCall, at: Tensor) -> Tensor:
    """Rows `at` [B, r] of the map of a call, [B, H, r, m], differentiable; edits of methods before are in it."""
    view = call.map
    if view.before is None and not view.few:
        return dense(take_rows(view.att, at))
    if view.few:
        return picked(view.dense(), at)
    every, back = at.unique(return_inverse=True)
    return picked(view.rows(every), back)


def blocks(count: int, scores: int) -> list[slice]:
    """Row blocks of which each builds a bounded number of scores; `scores`: of one row, over batch and heads."""
    size = max(1, TILE // max(scores, 1))
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


# What was taken.


@dataclass
class Take:
    """One attention call of one site.

    Attributes:
        site, layer, kind: of the site. heads: those that were taken; kv_heads: the key heads that these read.
        groups: heads that read one key head. phase, step, branch: of the call.
        scale: the factor on q k^T; softcap: of the scores, or None.
        rows: int64 [B, r], the number of each row in its sequence, -1 where a sample has fewer. keys: int64 [B or 1, m] likewise
            of the keys, -1 for padding and unused slots; of "k" and "v", those that were taken. first: slot of the first key.
        segments: role -> (start, stop) of a denoiser's rows, as numbers ("image", "text"), or None. grid: (height, width) of its
            image rows, where that is known.
        tensors: by what was taken: "map" [B, H, r, m] and "mass" [B, H, r] in fp32, "output" [B, H, r, dv] and "q" [B, H, r, d],
            "k" and "v" [B, key heads, r, d] of the tokens of these rows (in cross-attention of all keys, [B, key heads, m, d]).
    """

    site: str
    layer: int
    kind: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    groups: int
    phase: str
    step: int | None
    branch: str | None
    scale: float
    softcap: float | None
    rows: Tensor
    keys: Tensor
    first: int
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    file: Path | None = field(default=None, repr=False)
    segments: dict[str, Sequence[int]] | None = None
    grid: Sequence[int] | None = None

    def tensor(self, what: str) -> Tensor:
        """What was taken, from memory or from its file.

        Raises:
            SelectionError: it was not taken.
        """
        if self.file is not None:
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(str(self.file), framework="pt") as file:
                    if what in file.keys():  # noqa: SIM118  no mapping
                        return file.get_tensor(what)
                    known = [k for k in file.keys() if k in WHAT]  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise SerializationError(f"{self.file} is not a whole file of a capture ({error}).") from error
        else:
            known = list(self.tensors)
            if what in self.tensors:
                return self.tensors[what]
        raise SelectionError(f"{what!r} was not taken at {self.site}; there is {listing(known)}.")

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return sum(t.numel() * t.element_size() for t in (self.rows, self.keys, *self.tensors.values()))

    def describe(self) -> dict[str, Any]:
        """All but the tensors, JSON-able."""
        names = (
            "site",
            "layer",
            "kind",
            "heads",
            "kv_heads",
            "groups",
            "phase",
            "step",
            "branch",
            "scale",
            "softcap",
            "first",
            "segments",
            "grid",
        )
        return {name: getattr(self, name) for name in names}

    def write(self, file: Path) -> None:
        """Put the tensors into a file, and out of memory."""
        from safetensors.torch import save_file

        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        save_file(tensors | {"rows": self.rows, "keys": self.keys}, str(file), metadata={"format": FORMAT})
        self.file, self.tensors = file, {}


class Captured:
    """What a `capture` took, in the order of the calls.

    Attributes:
        what: the names of what was taken. takes: one for each attention call of each site. folder: where they are, or None: in
            memory. ids: the token ids of each batch row without padding, where the host gives them; those of the longest call.
            open: whether calls are still being taken. mixed: whether the calls of a batch row are of several sequences (beams that
            moved, guidance, several prompts), so that they are not joined.
    """

    def __init__(self, what: Sequence[str], folder: Path | None = None):
        self.what = tuple(what)
        self.takes: list[Take] = []
        self.folder = folder
        self.ids: list[list[int]] | None = None
        # By site, where a model reads several texts (an encoder's and a decoder's).
        self.ids_of: dict[str, list[list[int]]] = {}
        self.mixed = False
        self.open = False

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the sites, in the order of their first calls."""
        return tuple(dict.fromkeys(t.site for t in self.takes))

    @property
    def bytes(self) -> int:
        """What is held in memory, in bytes."""
        return sum(t.bytes for t in self.takes)

    @property
    def samples(self) -> int:
        """Batch rows of the first take."""
        return len(self.takes[0].rows) if self.takes else 0

    def of(self, site: str | int | None = None, *, step: int | None = None, branch: str | None = None) -> list[Take]:
        """The takes of one site.

        Args:
            site: its path, or its layer where only one site of that layer was taken; None where only one site was taken.
            step, branch: of a denoiser, those alone.

        Raises:
            SelectionError: there are none, or several sites fit.
        """
        fits = [t for t in self.takes if site is None or t.site == site or (isinstance(site, int) and t.layer == site)]
        paths = list(dict.fromkeys(t.site for t in fits))
        if len(paths) != 1:
            known = listing(self.sites) or "none"
            many = "several sites" if paths else "no site"
            raise SelectionError(f"{many} of this capture fit {site!r}; give one of its paths: {known}.")
        found = [t for t in fits if step in (None, t.step) and branch in (None, t.branch)]
        if not found:
            raise SelectionError(
                f"{paths[0]} was not taken at step {step} of branch {branch}; there are steps "
                f"{listing(sorted({t.step for t in fits}, key=str))} and branches {listing({t.branch for t in fits})}."
            )
        return found

    def get(
        self,
        site: str | int | None = None,
        what: str | None = None,
        *,
        sample: int | None = None,
        step: int | None = None,
        branch: str | None = None,
    ) -> Tensor:
        """What was taken at one site, its calls (chunks of a prompt, decode steps) joined along the rows.

        Args:
            site, step, branch: see `of`; the calls of several denoising steps are several answers, so say which.
            what: one of the names that were taken; None where there is one.
            sample: a batch row: then rows are those of that sample by token number, ascending, and the columns of a map its
                tokens, without padding: [H, r, T]. None: all of the batch, [B, H, r, ...]; rows that a sample has not are zero,
                and the columns of a map are slots.

        Raises:
            SelectionError: it was not taken, or which of several is meant is not clear.
        """
        what = self._one(what)
        takes = self.of(site, step=step, branch=branch)
        if len({(t.step, t.branch) for t in takes}) > 1:
            raise SelectionError(
                f"{takes[0].site} was taken at several steps or branches; give step= and branch=, one of "
                f"{listing(sorted({(t.step, t.branch) for t in takes}, key=str))}."
            )
        self.check_joined(takes)
        if sample is not None:
            return self._of_sample(takes, what, sample)
        tensors = [t.tensor(what) for t in takes]
        if what == "map":
            width = max(t.first + x.shape[3] for t, x in zip(takes, tensors, strict=True))
            tensors = [
                torch.nn.functional.pad(x, (t.first, width - t.first - x.shape[3]))
                for t, x in zip(takes, tensors, strict=True)
            ]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=2)

    def rows(self, site: str | int | None = None, *, sample: int | None = None, step: int | None = None) -> Tensor:
        """The numbers of the rows that `get` gives: int64 [B, r], -1 where a sample has none; of one sample [r], ascending."""
        takes = self.of(site, step=step)
        self.check_joined(takes)
        if sample is None:
            return torch.cat([t.rows for t in takes], dim=1)
        return torch.tensor(sorted(_numbers(takes, sample)), dtype=torch.long)

    def check_joined(self, takes: Sequence[Take]) -> None:
        """Raise where several calls would be joined whose batch rows hold other sequences.

        Raises:
            SelectionError: they do.
        """
        if len(takes) > 1 and (self.mixed or len({len(t.rows) for t in takes}) > 1):
            raise SelectionError(
                f"{takes[0].site}: the {len(takes)} calls that were taken are not of one sequence in each batch row (beams that "
                "moved, guidance, several prompts or bases). Read each by itself (takes), capture one prompt at a time, or a "
                "forward over what `generate` returned."
            )

    def _one(self, what: str | None) -> str:
        if what is None and len(self.what) != 1:
            raise SelectionError(f"this capture has {listing(self.what)}; say which.")
        what = self.what[0] if what is None else what
        if what not in self.what:
            raise SelectionError(
                f"{what!r} was not taken; this capture has {listing(self.what)}.{did_you_mean(what, self.what)}"
            )
        return what

    @staticmethod
    def _of_sample(takes: Sequence[Take], what: str, sample: int) -> Tensor:
        if whole(sample) is None or not 0 <= sample < len(takes[0].rows):
            raise SelectionError(f"sample {brief(sample)}: this capture has {len(takes[0].rows)}, counted from 0.")
        if takes[0].kind == "cross" and what in ("k", "v"):
            keys = takes[-1].keys[-1 if len(takes[-1].keys) == 1 else sample]
            return takes[-1].tensor(what)[sample][:, (keys >= 0).to(takes[-1].tensor(what).device)]
        order = _numbers(takes, sample)
        if not order:
            raise SelectionError(f"{takes[0].site}: sample {sample} has none of the rows that were taken.")
        parts: dict[int, Tensor] = {}
        width = max(int(t.keys[0 if len(t.keys) == 1 else sample].max()) for t in takes) + 1
        for take in takes:
            own = [(number, at) for number, (which, at) in order.items() if which is take]
            if not own:
                continue
            rows = take.tensor(what)[sample]
            index = torch.tensor([at for _, at in own], device=rows.device)
            found = rows.index_select(1, index)
            if what == "map":
                keys = take.keys[0 if len(take.keys) == 1 else sample].to(found.device)
                by_token = found.new_zeros(*found.shape[:2], width)
                found = by_token.index_copy(2, keys[keys >= 0], found[..., keys >= 0])
            parts |= {number: found[:, i] for i, (number, _) in enumerate(own)}
        return torch.stack([parts[number] for number in sorted(parts)], dim=1)

    def save(self, folder: str | Path) -> Path:
        """Write one safetensors file for each take, and `capture.json`, into a new or empty folder.

        Raises:
            SerializationError: it is no path, or something is in it.
        """
        folder = new_folder("Captured.save", folder)
        for number, take in enumerate(self.takes):
            whole = {name: take.tensor(name) for name in self.what}
            Take(**{**vars(take), "tensors": whole, "file": None}).write(folder / file_name(number))
        self._index(folder)
        return folder

    def _index(self, folder: Path) -> None:
        record = {
            "format": FORMAT,
            "schema": SCHEMA,
            "what": self.what,
            "ids": self.ids,
            "ids_of": {site: ids for site, ids in self.ids_of.items() if ids != self.ids},
            "takes": [t.describe() for t in self.takes],
            **({"mixed": True} if self.mixed else {}),
        }
        (folder / INDEX).write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Captured:
        """Read what `save` wrote, or what a `capture(..., to=folder)` streamed; tensors are read when they are asked for.

        Raises:
            SerializationError: it is no such folder, or a file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        folder = checked_path("Captured.load", folder)
        try:
            record = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise SerializationError(f"Captured.load: {folder} has no readable {INDEX} ({error}).") from error
        if not isinstance(record, Mapping) or record.get("format") != FORMAT or record.get("schema") != SCHEMA:
            raise SerializationError(
                f"Captured.load: {folder / INDEX} is not one of this library's, of schema {SCHEMA}."
            )
        what, ids, entries = record.get("what"), record.get("ids"), record.get("takes")
        # A file from before has none.
        ids_of = record.get("ids_of", {})
        texts = isinstance(ids_of, dict) and all(
            t is None or (_lists(t) and all(map(_counts, t))) for t in (ids, *ids_of.values())
        )
        known = _texts(what) and what and set(what) <= set(WHAT) and len(set(what)) == len(what)
        if not known or not texts or not _entries(entries):
            raise SerializationError(f"Captured.load: {folder / INDEX} does not say what was taken, and where.")
        made = cls(what, folder)
        made.ids, made.ids_of, made.mixed = ids, ids_of, bool(record.get("mixed", False))
        for number, entry in enumerate(entries):
            file = folder / file_name(number)
            try:
                with safe_open(str(file), framework="pt") as opened:
                    rows, keys = opened.get_tensor("rows"), opened.get_tensor("keys")
                    shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in what}
                values = {**entry, "heads": tuple(entry["heads"]), "kv_heads": tuple(entry["kv_heads"])}
                take = Take(**values, rows=rows, keys=keys, file=file)
            except (SafetensorError, OSError, TypeError, KeyError) as error:
                raise SerializationError(
                    f"Captured.load: {file} is not a whole file of a capture ({error})."
                ) from error
            if not _fits(take, shapes):
                raise SerializationError(
                    f"Captured.load: {file} is not a whole file of a capture (its shapes do not fit)."
                )
            made.takes.append(take)
        return made

    def __repr__(self) -> str:
        where = f"{self.bytes / 2**20:.1f} MiB" if self.folder is None else str(self.folder)
        return f"<Captured {', '.join(self.what)}: {len(self.takes)} calls of {len(self.sites)} sites, {where}>"


def _numbers(takes: Sequence[Take], sample: int) -> dict[int, tuple[Take, int]]:
    """Number of a row of one sample -> (take, its place there); of a row that was computed again, the last."""
    found = {}
    for take in takes:
        for at, number in enumerate(take.rows[sample].tolist()):
            if number >= 0:
                found[number] = (take, at)
    return found


def _counts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(type(v) is int and 0 <= v < 2**31 for v in values)


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values)


def _lists(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, list) for v in values)


def _entries(values: Any) -> bool:
    """Whether each is what `Take.describe` gives, so that whoever reads the capture may rely on it."""
    count = lambda v, least=0: _counts([v]) and v >= least  # noqa: E731
    number = lambda v: type(v) in (int, float) and math.isfinite(v)  # noqa: E731
    checks = {
        "site": lambda v: isinstance(v, str),
        "layer": count,
        "kind": lambda v: isinstance(v, str),
        "heads": lambda v: _counts(v) and len(v) > 0,
        "kv_heads": lambda v: _counts(v) and len(v) > 0,
        "groups": lambda v: count(v, 1),
        "phase": lambda v: isinstance(v, str),
        "step": lambda v: v is None or count(v),
        "branch": lambda v: v is None or isinstance(v, str),
        "scale": number,
        "softcap": lambda v: v is None or number(v),
        "first": count,
        "segments": lambda v: (
            v is None or (isinstance(v, dict) and all(_counts(p) and len(p) == 2 for p in v.values()))
        ),
        "grid": lambda v: v is None or (_counts(v) and len(v) == 2),
    }
    return isinstance(values, list) and all(
        isinstance(e, dict) and set(e) == set(checks) and all(check(e[name]) for name, check in checks.items())
        for e in values
    )


def _fits(take: Take, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether rows, keys and tensors of one file are of the same batch, heads, rows and keys."""
    if take.rows.ndim != 2 or take.keys.ndim != 2 or {take.rows.dtype, take.keys.dtype} != {torch.int64}:
        return False
    (B, r), (b, m) = take.rows.shape, take.keys.shape
    wanted = {
        "map": (B, len(take.heads), r, m), "mass": (B, len(take.heads), r), "output": (B, len(take.heads), r, None),
        "q": (B, len(take.heads), r, None), "k": (B, len(take.kv_heads), None, None), "v": (B, len(take.kv_heads), None, None),
    }  # fmt: skip
    same = lambda shape, want: len(shape) == len(want) and all(w in (None, n) for n, w in zip(shape, want, strict=True))  # noqa: E731
    least, rows, keys = (
        min(_extreme(t, torch.min) for t in (take.rows, take.keys)), *(_extreme(t, torch.max) for t in (take.rows, take.keys)),
    )  # fmt: skip
    # -1 stands for padding; a row of a text's self-attention is a token, and that is a key too.
    if least < -1 or max(rows, keys) >= MOST_TOKENS or (take.kind == "self" and not take.segments and rows > keys):
        return False
    return B > 0 and b in (1, B) and all(same(shape, wanted[name]) for name, shape in shapes.items())


def _extreme(numbers: Tensor, of: Any) -> int:
    return int(of(numbers)) if numbers.numel() else -1


def file_name(number: int) -> str:
    """Of one take."""
    return f"{number:06d}.safetensors"


def new_folder(function: str, folder: str | Path) -> Path:
    """A folder with nothing in it, made where there is none."""
    folder = checked_path(function, folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SerializationError(f"{function}: {folder} is there already, and not an empty folder; give a new one.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
