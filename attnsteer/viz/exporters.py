"""A capture in the forms that other viewers take: bertviz and circuitsvis. Neither is needed, nor imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..captured import Captured
from ..errors import SelectionError, listing
from .axes import check, first_sample, shown_tokens


def to_bertviz(
    captured: Captured, *, sample: int | None = None, tokens: Sequence[str] | None = None, tokenizer: Any = None
) -> dict[str, Any]:
    """Keyword arguments of bertviz' `head_view` and `model_view`.

        head_view(**to_bertviz(seen, tokenizer=tokenizer), html_action="return")

    They take `attention`, a list over layers of [1, heads, n, n], and `tokens`, n strings; layers are stacked, so all have as
    many heads (jessevig/bertviz at 0fe6892: head_view.py, model_view.py, format_attention in util.py). Their pages load scripts
    from a network.

    Args:
        captured: of self-attention, with "map" and all rows of the sample. sample: a batch row; the first that has rows by default.
        tokens: the texts of the tokens; otherwise from `tokenizer` and the capture's ids, or numbers.

    Raises:
        SelectionError: cross-attention, rows that are missing, steps or branches, layers with unlike heads, or other tokens.
    """
    maps, words = _square_maps(captured, sample, tokens, tokenizer)
    return {"attention": [m[None] for m in maps], "tokens": words}


def to_circuitsvis(
    captured: Captured,
    site: str | int | None = None,
    *,
    sample: int | None = None,
    tokens: Sequence[str] | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Keyword arguments of circuitsvis' `attention.attention_heads`.

        attention_heads(**to_circuitsvis(seen, 3, tokenizer=tokenizer))

    It takes `attention` [heads, destination, source], `tokens`, `attention_head_names` and `mask_upper_tri`, which hides what a
    causal row does not see (TransformerLensOrg/CircuitsVis at f8c1c81: python/circuitsvis/attention.py).

    Args:
        site: a path or layer; all layers, head by head, without it. Others: see `to_bertviz`.

    Raises:
        SelectionError: see `to_bertviz`.
    """
    maps, words = _square_maps(captured, sample, tokens, tokenizer, site)
    takes = [captured.of(s)[0] for s in (captured.sites if site is None else [captured.of(site)[0].site])]
    names = [f"L{t.layer}H{h}" for t in takes for h in t.heads]
    attention = torch.cat(maps)
    causal = not bool(torch.triu(attention, diagonal=1).any())
    return {
        "attention": attention,
        "tokens": words,
        "attention_head_names": names,
        "mask_upper_tri": causal,
        "min_value": 0.0,
        "max_value": 1.0,
    }


def _square_maps(
    captured: Captured, sample: int | None, tokens: Any, tokenizer: Any, site: Any = None
) -> tuple[list[Tensor], list[str]]:
    check(captured, "the other viewers")
    sites = captured.sites if site is None else (captured.of(site)[0].site,)
    sample = first_sample(captured) if sample is None else sample
    maps = []
    for path in sites:
        take = captured.of(path)[0]
        if take.kind != "self":
            raise SelectionError(
                f"{path} is {take.kind}-attention; these viewers show tokens over the same tokens. Capture Where(kinds='self')."
            )
        found = captured.get(path, "map", sample=sample).detach().float().cpu()
        if found.shape[1] != found.shape[2]:
            raise SelectionError(
                f"{path} was captured in {found.shape[1]} rows of {found.shape[2]} tokens; these viewers need all of them: "
                "capture(model, rows=None) around one forward."
            )
        maps.append(found)
    shapes = {m.shape for m in maps}
    if len(shapes) > 1:
        raise SelectionError(
            f"the layers of this capture have maps of shapes {listing(sorted(map(tuple, shapes)))}; these viewers stack layers. "
            "Capture sites of one shape, or name one site."
        )
    return maps, shown_tokens(captured, sample, maps[0].shape[-1], tokens, tokenizer)
