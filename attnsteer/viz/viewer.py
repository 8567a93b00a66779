"""`view`: what a capture took, as one page that opens in a browser and loads nothing from anywhere.

All heads at a glance (layers downwards), one of them large, the tokens or the picture that it looks at, before and after a method,
readings of heads, and queries and keys in one plane. Maps are kept as squares of their roots in eight bits: an entry p is shown as
(round(255 sqrt(p)) / 255)^2, off by at most 0.004. Of maps that are too many for a page, each row keeps its strongest keys.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..captured import Captured
from ..errors import SelectionError, SerializationError, brief, listing
from ..heads import checked_path
from ..parameters import whole
from .axes import Axis, Fold, axes, check, first_sample, shown_tokens, token_texts, whole_pair
from .page import page, picture_uri
from .projection import joint_projection

# Entries that a page holds whole; beyond that so many of each row's strongest are kept, at least LEAST of a row.
WHOLE, KEPT, LEAST = 24_000_000, 9_000_000, 4
# Cells of a head's small picture; denoising steps of a page; points of a projection.
SMALL, STEPS, POINTS = 28, 4, 256
DIGITS = 5


def view(
    captured: Captured,
    path: str | Path,
    *,
    after: Captured | None = None,
    labels: tuple[str, str] = ("before", "after"),
    sample: int | None = None,
    tokens: Sequence[str] | None = None,
    tokenizer: Any = None,
    image: Any = None,
    image_tokens: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    step: int | None = None,
    branch: str | None = None,
    profile: Any = None,
    title: str = "Attention",
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write a page of what `capture(..., what="map")` took; with "q" and "k" as well, it has their joint projection.

    Args:
        captured: the maps. path: of the page. after: the same sites and rows with a method. labels: of the two.
        sample: a batch row; by default the first that has rows.
        tokens: the texts of its tokens, of a denoiser those of the prompt; or a `tokenizer` for the capture's ids.
        image: the picture that the model sees or made (as in `contact_sheet`, or a path), or a pair, before and after.
        image_tokens: (start, stop) of the image among a language model's tokens. grid: its (height, width) in tokens, where
            it is no square.
        step, branch: of a denoiser; by default up to four steps, evenly spaced, and the conditional branch.
        profile: a `HeadTable` of `head_profile`, whose columns colour the heads. title: of the page. facts: lines below it.

    Returns:
        the path.

    Raises:
        SelectionError: nothing captured, no "map", two captures that do not fit, a grid that is not known, or other tokens.
        SerializationError: the page cannot be written.
    """
    content = collect(
        captured,
        after=after,
        labels=labels,
        sample=sample,
        tokens=tokens,
        tokenizer=tokenizer,
        image=image,
        image_tokens=image_tokens,
        grid=grid,
        step=step,
        branch=branch,
        profile=profile,
        title=title,
        facts=facts,
    )
    path = checked_path("view", path)
    if path.is_dir():
        raise SelectionError(f"view: {path} is a folder; give the path of a page, such as {path / 'page.html'}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.html(), encoding="utf-8")
    except OSError as error:
        raise SerializationError(f"view: {path} cannot be written ({error}).") from error
    return path


@dataclass
class Content:
    """Of a page: `data` for its script, `first` and `later` the bytes of small and large maps by element id."""

    data: dict[str, Any]
    first: dict[str, bytes] = field(default_factory=dict)
    later: dict[str, bytes] = field(default_factory=dict)

    def html(self) -> str:
        """The page."""
        return page("view", self.data, title=self.data["title"], first=self.first, later=self.later)


def collect(
    captured: Captured,
    *,
    after: Captured | None = None,
    labels: tuple[str, str] = ("before", "after"),
    sample: int | None = None,
    tokens: Any = None,
    tokenizer: Any = None,
    image: Any = None,
    image_tokens: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    step: int | None = None,
    branch: str | None = None,
    profile: Any = None,
    title: str = "Attention",
    facts: Mapping[str, str] | None = None,
) -> Content:
    """What `view` writes; see there."""
    arms = [captured] if after is None else [captured, after]
    for arm in arms:
        check(arm, "view")
    branch = _branch(captured) if branch is None else branch
    arms = [_only(arm, branch) for arm in arms]
    captured, after = arms[0], arms[1] if after is not None else None
    sample = first_sample(captured) if sample is None else sample
    frames = _frames(captured, step)
    sites = captured.sites
    if after is not None and after.sites != sites:
        raise SelectionError(
            f"before has the sites {listing(sites, 4)}, after has {listing(after.sites, 4)}; capture the same ones."
        )
    folds: dict[str, Fold | None] = {}

    def taken(arm: Captured, site: str, frame: int | None, what: str = "map") -> Tensor:
        return arm.get(site, what, step=frame, sample=sample).detach().float().cpu()

    def maps(arm: Captured, site: str, frame: int | None) -> Tensor:
        whole = taken(arm, site, frame)
        return whole if folds.get(site) is None or whole.shape[2] != widths[site] else folds[site].maps(whole)

    widths: dict[str, int] = {}
    found, every, total = [], {}, 0
    for site in sites:
        take = captured.of(site, step=frames[0])[0]
        first = taken(captured, site, frames[0])
        width = widths[site] = first.shape[2]
        rows = _rows(captured, site, sample, frames[0])
        if take.segments or take.kind == "cross":
            texts = [] if tokens is None else token_texts(tokens)
            pair = axes(take, rows, width, (), texts, image_tokens, grid)
            folds[site] = Fold.of(take, rows, width, len(texts))
            if folds[site] is not None:
                pair, first = folds[site].sides(pair), folds[site].maps(first)
        else:
            texts = shown_tokens(captured, sample, width, tokens, tokenizer)
            if image_tokens is not None:
                _check_range(image_tokens, width)
            pair = axes(take, rows, width, texts, (), image_tokens, grid)
        for axis in pair:
            every.setdefault(axis, len(every))
        found.append((site, take, tuple(first.shape), pair))
        total += first.numel() * len(arms) * len(frames)
    if image is not None and not any(a.grid for a in every):
        raise SelectionError(
            "how the image's tokens lie in it is not known: give image_tokens=(start, stop), and grid=(height, width) where they "
            "are no square."
        )
    rows_of_all = sum(s[0] * s[1] for _, _, s, _ in found) * len(arms) * len(frames)
    keep = None if total <= WHOLE else max(LEAST, KEPT // rows_of_all)
    if facts is not None and not isinstance(facts, Mapping):
        raise SelectionError(f"facts={brief(facts)}: give a mapping of names to texts.")
    content = Content({})
    several = len({t.layer for _, t, _, _ in found}) < len(found)
    planes = {"q", "k"} <= set(captured.what)
    listed, readings, kept, projected = [], _Readings(len(arms), len(found)), [], {}
    starts: list[tuple[Tensor, int]] = []
    # Maps with entries that are no numbers, of each arm.
    odd = [0] * len(arms)
    for s, (site, take, shape, pair) in enumerate(found):
        small = (min(SMALL, shape[1]), min(SMALL, shape[2]))
        listed.append(
            {
                "path": site,
                "label": f"{take.layer} {take.kind}" if several else str(take.layer),
                "layer": take.layer,
                "kind": take.kind,
                "heads": list(take.heads),
                "rows": every[pair[0]],
                "keys": every[pair[1]],
                "small": small,
            }
        )
        for f, frame in enumerate(frames):
            both = []
            for a, arm in enumerate(arms):
                got = maps(arm, site, frame)
                odd[a] += int((~got.isfinite()).flatten(1).any(dim=1).sum())
                got = got.nan_to_num(0.0, 0.0, 0.0)
                if tuple(got.shape) != shape or arm.of(site)[0].heads != take.heads:
                    raise SelectionError(
                        f"{site}: before has {shape[0]} heads of {shape[1]} rows and {shape[2]} keys, after has "
                        f"{tuple(got.shape)}; capture both over the same tokens and heads."
                    )
                both.append(got)
            _small(content, both, small, f)
            for a, got in enumerate(both):
                if keep is not None and keep < shape[2]:
                    raw, share = strongest(got, keep)
                    kept.append(share)
                else:
                    raw = bytes_of(got)
                content.later[f"m-{a}-{f}-{s}"] = zlib.compress(raw, 6 if keep is None else 4)
                readings.add(a, s, got, pair, take.segments is None and take.kind == "self")
                if a == 0:
                    starts.append((_striking(got, pair, take), s))
            if len(both) == 2:
                readings.changed(s, both)
        if planes:
            for f, frame in enumerate(frames):
                for a, arm in enumerate(arms):
                    points = [taken(arm, site, frame, what) for what in ("q", "k")]
                    if folds.get(site) is not None:
                        points = [
                            t[:, list(i)] for t, i in zip(points, (folds[site].rows, folds[site].keys), strict=True)
                        ]
                    # What is not finite has no place in a plane.
                    if all(bool(t.isfinite().all()) for t in points):
                        content.later[f"p-{a}-{f}-{s}"], projected[f"{a}-{f}-{s}"] = _plane(*points)
    pictures = () if image is None else image if isinstance(image, (list, tuple)) else (image,)
    content.data = {
        "title": str(title),
        "facts": [[str(k), str(v)] for k, v in (facts or {}).items()] + _oddities(odd, labels),
        "arms": [str(x) for x in labels[: len(arms)]] if after is not None else [""],
        "frames": ["" if f is None else f"step {f}" for f in frames],
        "axes": [a.to_dict() for a in every],
        "sites": listed,
        "images": [picture_uri(_picture(p)) for p in pictures],
        "kept": None if not kept else {"keys": keep, "share": round(sum(kept) / len(kept), 4)},
        "readings": [*readings.columns(), *_columns(profile, found)],
        "planes": projected,
        "start": _start(starts, readings if after is not None else None, [t.kind for _, t, _, _ in found]),
    }
    return content


def _oddities(odd: Sequence[int], labels: Sequence[str]) -> list[list[str]]:
    """Facts for a page: how many maps have entries that are no numbers."""
    named = ", ".join(f"{n} {labels[a]}" if len(odd) > 1 else str(n) for a, n in enumerate(odd) if n)
    return [["not finite", f"maps with entries that are NaN or infinite: {named}; shown as 0"]] if named else []


def _check_range(given: tuple[int, int], width: int) -> None:
    start, stop = whole_pair(given, "image_tokens", "(start, stop)")
    if not 0 <= start < stop <= width:
        raise SelectionError(
            f"image_tokens={(start, stop)}: this sequence has {width} tokens; give (start, stop) in it."
        )


def _rows(captured: Captured, site: str, sample: int, step: int | None) -> list[int]:
    return captured.rows(site, sample=sample, step=step).tolist()


def _branch(captured: Captured) -> str | None:
    """The pass itself where there are weak ones beside it; of passes with names, the conditional one."""
    branches = list(dict.fromkeys(t.branch for t in captured.takes))
    return None if None in branches else "cond" if "cond" in branches else branches[0]


def _only(captured: Captured, branch: str | None) -> Captured:
    found = Captured(captured.what, captured.folder)
    found.ids, found.takes = captured.ids, [t for t in captured.takes if t.branch == branch]
    if not found.takes:
        known = listing(dict.fromkeys(t.branch for t in captured.takes))
        raise SelectionError(f"branch {branch!r} was not captured; there are {known}.")
    return found


def _frames(captured: Captured, step: int | None) -> list[int | None]:
    """The steps of a page: the first, the last, and some between."""
    steps = sorted({t.step for t in captured.takes if t.step is not None})
    if step is not None:
        if step not in steps:
            raise SelectionError(f"step {step} was not captured; there are {listing(steps) or 'no steps'}.")
        return [step]
    if not steps:
        return [None]
    count = min(STEPS, len(steps))
    at = [round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)]
    return [steps[i] for i in dict.fromkeys(at)]


def _striking(maps: Tensor, pair: tuple[Axis, Axis], take: Any) -> Tensor:
    """How much there is to see in each head's map [H, n, m]: the page begins with the largest."""
    rows, keys = pair
    if rows.grid is not None and take.kind != "self":
        # Words over a picture: how unlike the places are, in the words' keys.
        start, h, w = rows.grid
        over = maps[:, start : start + h * w]
        words = [j for j, t in enumerate(keys.words) if any(c.isalpha() for c in t) and t[:1] not in "<[+"]
        over = over[..., words] if words else over
        return (over.std(dim=1) * over.amax(dim=1)).amax(dim=-1)
    last = maps[:, -1] if keys.grid is None else maps[:, -1, keys.grid[0] : keys.grid[0] + keys.grid[1] * keys.grid[2]]
    if keys.grid is not None:
        return last.sum(dim=-1) * last.amax(dim=-1)
    # The largest entry of some rows, away from the first key, the row's own and the one before.
    at = torch.linspace(0, maps.shape[1] - 1, min(maps.shape[1], 64)).round().long()
    away, index = maps[:, at].clone(), torch.arange(len(at))
    away[..., 0] = 0
    for back in (0, 1):
        own = torch.tensor(rows.numbers)[at] - back
        there = (own >= 0) & (own < maps.shape[2])
        away[:, index[there], own[there]] = 0
    return away.amax(dim=-1).mean(dim=-1)


def _start(found: Sequence[tuple[Tensor, int]], readings: Any, kinds: Sequence[str]) -> list[int]:
    """(site, head) that a page begins with: of what moved the most, or the most striking; words over a picture before all."""
    crossing = "cross" in kinds
    best, top = [0, 0], -1.0
    for score, site in found:
        if crossing and kinds[site] != "cross":
            continue
        if readings is not None:
            score = torch.stack(readings.found["change"][0][site]).mean(dim=0)
        if float(score.max()) > top:
            top, best = float(score.max()), [site, int(score.argmax())]
    return best


def bytes_of(maps: Tensor) -> bytes:
    """Probabilities as round(255 sqrt(p))."""
    return _eight_bits(maps).numpy().tobytes()


def strongest(maps: Tensor, keep: int) -> tuple[bytes, float]:
    """(maps [H, n, m] as `bytes_of` gives them with all but the `keep` largest entries of each row at zero, the share kept)."""
    values, index = maps.topk(keep, dim=-1)
    found = torch.zeros(maps.shape, dtype=torch.uint8).scatter_(-1, index, _eight_bits(values))
    return found.numpy().tobytes(), float(values.sum() / maps.sum().clamp_min(1e-9))


def _eight_bits(maps: Tensor) -> Tensor:
    return (maps.clamp(0, 1).sqrt() * 255).round().to(torch.uint8)


def _small(content: Content, both: list[Tensor], size: tuple[int, int], frame: int) -> None:
    """Add the small pictures of a site's heads: the largest entry of each cell, on one scale for both arms of a head."""
    pooled = [torch.nn.functional.adaptive_max_pool2d(m[:, None], size)[:, 0] for m in both]
    top = torch.stack([p.flatten(1).quantile(0.985, dim=1) for p in pooled]).amax(dim=0).clamp_min(1e-6)
    for a, p in enumerate(pooled):
        name = f"t-{a}-{frame}"
        content.first[name] = content.first.get(name, b"") + bytes_of(p / top[:, None, None])


def _plane(q: Tensor, k: Tensor) -> tuple[bytes, dict[str, Any]]:
    """Points of a site's heads as pairs of bytes, queries then keys; and which they are."""
    chosen = [_spread(t.shape[1]) for t in (q, k)]
    found = joint_projection(q[:, chosen[0]], k[:, chosen[1]])
    points = torch.cat([found.queries, found.keys], dim=1)
    reach = points.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-9)
    data = ((points / reach * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy().tobytes()
    about = torch.stack([found.factor, found.correlation, found.explained], dim=1)
    return data, {
        "queries": chosen[0].tolist(),
        "keys": chosen[1].tolist(),
        "about": [[_short(v) for v in row] for row in about.tolist()],
    }


def _spread(count: int) -> Tensor:
    """At most `POINTS` evenly spaced places."""
    return torch.linspace(0, count - 1, min(count, POINTS)).round().long()


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


class _Readings:
    """What the maps themselves say of each head, mean over the rows that see two keys or more."""

    about = {  # noqa: RUF012
        "change": "mean total variation distance of the rows, before and after, 0 to 1",
        "entropy": "row entropy, nats",
        "first": "mass on the first token",
        "self": "mass on the token itself",
        "previous": "mass on the token before",
        "image": "mass on the image",
        "text": "mass on the text",
    }

    def __init__(self, arms: int, sites: int):
        self.found: dict[str, list[list[list[Tensor]]]] = {
            name: [[[] for _ in range(sites)] for _ in range(arms)] for name in self.about
        }

    def add(self, arm: int, site: int, maps: Tensor, pair: tuple[Axis, Axis], line: bool) -> None:
        """One frame of a site, [H, n, m]; line: its rows and keys are tokens of one text."""
        rows, keys = pair
        seen = (maps.amax(dim=0) > 0).sum(dim=-1) >= 2
        seen = seen if bool(seen.any()) else torch.ones_like(seen)
        # Sums over keys come first: maps of long texts are not copied.
        mean = lambda by_row: by_row[:, seen].mean(dim=-1)  # noqa: E731
        put = lambda name, value: self.found[name][arm][site].append(mean(value))  # noqa: E731
        put("entropy", torch.special.entr(maps).sum(dim=-1))
        places = [] if keys.grid is None else list(range(keys.grid[0], keys.grid[0] + keys.grid[1] * keys.grid[2]))
        if places and len(places) < len(keys.numbers):
            put("image", maps[..., places].sum(dim=-1))
            rest = [i for i in range(len(keys.numbers)) if i not in set(places)]
            put("text", maps[..., rest].sum(dim=-1))
        if line:
            numbers = torch.tensor(rows.numbers)
            put("first", maps[..., 0])
            put("self", self._at(maps, numbers))
            put("previous", self._at(maps, numbers - 1))

    @staticmethod
    def _at(maps: Tensor, keys: Tensor) -> Tensor:
        index = keys.clamp_min(0).expand(len(maps), -1)[..., None]
        return maps.gather(2, index)[..., 0] * (keys >= 0)

    def changed(self, site: int, both: list[Tensor]) -> None:
        """The distance of two arms."""
        far = (both[0] - both[1]).abs().sum(dim=-1).mean(dim=-1) / 2
        for arm in self.found["change"]:
            arm[site].append(far)

    def columns(self) -> list[dict[str, Any]]:
        """JSON-able: {"name", "about", "values": [arm][site][head]}, None where there is no value."""
        out = []
        for name, arms in self.found.items():
            if any(parts for arm in arms for parts in arm):
                values = [
                    [None if not p else [_short(v) for v in torch.stack(p).mean(dim=0).tolist()] for p in arm]
                    for arm in arms
                ]
                out.append({"name": name, "about": self.about[name], "group": "these maps", "values": values})
        return out


def _columns(profile: Any, found: Sequence[tuple[str, Any, Any, Any]]) -> list[dict[str, Any]]:
    """The readings of a `HeadTable`, or of its rows in JSON, of the self-attention sites by layer and head."""
    if profile is None:
        return []
    if not isinstance(profile, Mapping) and callable(getattr(profile, "rows", None)):
        rows, about = profile.rows(), {n: c.about for n, c in profile.columns.items()}
    else:
        rows, about = (profile.get(n) if isinstance(profile, Mapping) else None for n in ("heads", "readings"))
        if (
            not isinstance(rows, list)
            or not isinstance(about, Mapping)
            or not all(isinstance(r, Mapping) for r in rows)
        ):
            raise SelectionError('profile: give a HeadTable, or what its save("profile.json") wrote.')
    by_head = {(whole(r.get("layer")), whole(r.get("head"))): r for r in rows}
    out = []
    for name, text in about.items():
        column = {"name": str(name), "about": str(text), "group": "head_profile"}
        for key, source in (("values", name), ("chance", f"{name} (chance)")):
            table = []
            for _, take, _, _ in found:
                own = [by_head.get((take.layer, h), {}).get(source) for h in take.heads]
                known = [_short(float(v)) if isinstance(v, (int, float)) else None for v in own]
                table.append(known if take.kind != "cross" and any(v is not None for v in known) else None)
            if any(table):
                column[key] = [table] if key == "values" else table
        if "values" in column:
            out.append(column)
    if not out:
        raise SelectionError("profile: none of its heads is one of this capture's layers and heads.")
    return out


def _picture(image: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    from .sheet import as_image

    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                return opened.convert("RGB")
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise SelectionError(f"the image {image} cannot be read ({error}).") from error
    return as_image(image)
