"""Texts and images of samples as the inputs of a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from ...errors import RecipeError
from ..loaded import Loaded
from . import Request


def continuations(tokenizer: Any, prompt: str, choices: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt, and what each choice adds to it. A blank stands between the two unless the prompt ends with
    white space, and belongs to the choice, as in lm-evaluation-harness.

    Raises:
        RecipeError: a choice has no tokens.
    """
    text = prompt.rstrip()
    between = prompt[len(text) :] or " "
    start = tokenizer(text).input_ids
    found = []
    for choice in choices:
        whole = tokenizer(text + between + choice).input_ids
        # A tokenizer may join what stands left and right of the seam; the choice is then encoded alone.
        joined = whole[: len(start)] != start
        own = tokenizer(choice, add_special_tokens=False).input_ids if joined else whole[len(start) :]
        if not own:
            raise RecipeError(f"data: the choice {choice!r} after {prompt[-40:]!r} has no tokens; it cannot be scored.")
        found.append(own)
    return start, found


def encode(loaded: Loaded, request: Request, strip: bool = False) -> Any:
    """The inputs of a batch, padded on the left, on the model's device.

    Args:
        strip: leave out white space at the end of the prompts, which then belongs to what follows.
    """
    texts = [s["prompt"].rstrip() if strip else s["prompt"] for s in request.samples]
    if loaded.kind == "lm":
        batch = loaded.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    else:
        images = [request.data.image(s) for s in request.samples]
        written = [with_image(loaded, t) for t in texts]
        special = not all(loaded.tokenizer.bos_token and t.startswith(loaded.tokenizer.bos_token) for t in written)
        batch = loaded.processor(
            images=images, text=written, padding=True, return_tensors="pt", add_special_tokens=special
        )
        if loaded.dtype is not None:
            return batch.to(loaded.device, loaded.dtype)
    return batch.to(loaded.device)


def beginnings(loaded: Loaded, request: Request, batch: Any) -> tuple[list[list[int]], Any]:
    """(token ids of each prompt, what they begin with: `attnsteer.evals.beginnings.Beginnings`, or None where no two begin alike).

    Args:
        batch: what `encode` gave for the request.
    """
    from ...evals.beginnings import Beginnings, common_prefix, image_beginnings

    mask = batch["attention_mask"].bool()
    contexts = [ids[own].tolist() for ids, own in zip(batch["input_ids"], mask, strict=True)]
    if loaded.kind == "vlm":
        return contexts, image_beginnings(loaded.target, batch, request.run)
    alike = common_prefix(contexts)
    return contexts, Beginnings.text(contexts, alike) if alike else None


def positions(model: Any, mask: Any) -> dict[str, Any]:
    """`position_ids` of prompts padded on the left, where the model's forward takes them: one with learned positions counts
    padding otherwise. Nothing where none is padded. `generate` does so by itself, and models of pictures have their own.

    Args:
        mask: of attention [B, n].
    """
    takes = "position_ids" in inspect.signature(type(model).forward).parameters
    if not takes or bool(mask.all()):
        return {}
    return {"position_ids": mask.cumsum(-1).sub(1).clamp_min(0)}


def with_image(loaded: Loaded, text: str) -> str:
    """A prompt about one image: as it is where it says itself where the image is, or where the processor puts it in front (those
    whose images are queries, such as InstructBLIP's); else by the processor's chat template; else after the image."""
    token = str(getattr(loaded.processor, "image_token", "<image>"))
    if token in text or getattr(loaded.processor, "num_query_tokens", None) is not None:
        return text
    if getattr(loaded.processor, "chat_template", None):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        return loaded.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return f"{token} {text}"
