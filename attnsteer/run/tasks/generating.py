"""Texts that a model writes: greedy unless the recipe says otherwise."""

from __future__ import annotations

import zlib
from typing import Any

from ..loaded import Loaded
from . import Request
from .prompts import beginnings, encode


def generate(loaded: Loaded, request: Request) -> tuple[list[dict[str, Any]], list[int]]:
    """`generated` and `finished` (whether the model ended by itself) of each sample, and the tokens written for each."""
    import torch

    batch = encode(loaded, request)
    options = {"do_sample": False, **request.decoding}
    # Fixed by seed and batch, whatever was drawn before.
    seed = zlib.crc32(f"{request.seed} {request.samples[0]['id']}".encode())
    devices = [loaded.device] if torch.device(loaded.device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        batch = _over_beginnings(loaded, request, batch) if request.shared_prefix else batch
        out = loaded.target.generate(**batch, **{"pad_token_id": loaded.tokenizer.pad_token_id, **options})
    new = out[:, batch["input_ids"].shape[1] :]
    ends = _ends(loaded)
    rows, written = [], []
    for ids in new.tolist():
        stop = next((i for i, token in enumerate(ids) if token in ends), None)
        own = ids if stop is None else ids[:stop]
        written.append(len(own) + (stop is not None))
        text = loaded.tokenizer.decode(own, skip_special_tokens=True)
        rows.append({"generated": text.strip(), "finished": stop is not None})
    return rows, written


def _over_beginnings(loaded: Loaded, request: Request, batch: Any) -> Any:
    """The batch over a cache of what its prompts begin with; as it is where no two begin alike."""
    from ...evals.beginnings import laid_out

    contexts, shared = beginnings(loaded, request, batch)
    if shared is None:
        return batch
    laid = laid_out(loaded.target, contexts, shared, request.run)
    return {"input_ids": laid.ids, "attention_mask": laid.valid.long(), "past_key_values": laid.cache}


def _ends(loaded: Loaded) -> set[int]:
    """The tokens that end a text."""
    config = loaded.target.generation_config
    found = config.eos_token_id if config.eos_token_id is not None else []
    return set(found if isinstance(found, list) else [found])
