"""The prompts of a pipeline call and where their tokens are among the text keys of its denoiser.

Read in the pipelines' own code (diffusers 0.42.1). A pipeline that is not listed here has unknown word positions: methods
that look words up refuse it, and take ranges of token positions instead.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...errors import SelectionError
from ...maps.phrases import Prompt, Segment
from ...tokens import char_offsets
from .pipelines import caller

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Pipeline class -> its text keys in order: (tokenizer; arguments that give its prompt, the first that is set counts; the
# argument that gives its length, where it is not the tokenizer's own).
CLIP = ("tokenizer", ("prompt",), None)
PARTS = (
    (re.compile(r"StableDiffusion3"), (CLIP, ("tokenizer_3", ("prompt_3", "prompt"), "max_sequence_length"))),
    (re.compile(r"Flux(?!2)"), (("tokenizer_2", ("prompt_2", "prompt"), "max_sequence_length"),)),
    (re.compile(r"StableDiffusion"), (CLIP,)),
)
# Arguments that stand in place of a text.
_ENCODED = re.compile(r"(pooled_)?prompt_(embeds|attention_mask)")


class Prompts:
    """Remembers what `encode_prompt` was asked for, once per call of the pipeline.

    Attributes:
        current: the prompts of this call, where somebody listens. count: how many there are; None: not known.
        negative: negative texts to encode beside them; None: none. encoded: (for the prompt, for the negative one) of each
            tensor that the encoder gave.
        listeners: called with them before the first step; they may refuse them.
    """

    def __init__(self, pipeline: DiffusionPipeline | None):
        self.pipeline = pipeline
        self.current = Prompt(unknown="encode_prompt was not called inside the steering context")
        self.count: int | None = None
        self.negative: Any = None
        self.encoded: list[tuple[Tensor, Tensor]] = []
        self.listeners: list[Callable[[Prompt], None]] = []
        self._fresh = True

    def restart(self) -> None:
        """A new call of the pipeline begins: its first prompt is the one that counts (a second is the negative one)."""
        self._fresh, self.count = True, None

    def check_inputs(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around `check_inputs`, which every call of a pipeline begins with."""
        self.restart()
        return inner(*args, **kwargs)

    def encode_prompt(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around `encode_prompt`."""
        if self._fresh:
            given = inspect.signature(inner).bind(*args, **kwargs)
            given.apply_defaults()
            self.count = _count(given.arguments)
            if self.listeners:
                self.current = _prompt(self.pipeline, given.arguments)
            for listen in self.listeners:
                listen(self.current)
            self._fresh = False
            if self.negative is not None:
                plain = inner(*args, **kwargs)
                self.encoded = _pairs(plain, inner(**_negative(given.arguments, self.negative, self.count)))
                return plain
        return inner(*args, **kwargs)


def _negative(given: dict[str, Any], texts: Any, count: int | None) -> dict[str, Any]:
    """The arguments of `encode_prompt` for the negative texts."""
    texts = [texts] * (count or 1) if isinstance(texts, str) else list(texts)
    if count is not None and len(texts) != count:
        raise SelectionError(f"{len(texts)} negative prompts for {count} prompts; give one for each, or one for all.")
    new = {name: None if _ENCODED.match(name) else value for name, value in given.items()}
    new |= {name: None for name in ("prompt_2", "prompt_3", "prompt_4") if name in given}
    if "do_classifier_free_guidance" in new:
        new["do_classifier_free_guidance"] = False
    return {**new, "prompt": texts}


def _pairs(plain: Any, negative: Any) -> list[tuple[Tensor, Tensor]]:
    found = zip(*(x if isinstance(x, tuple) else (x,) for x in (plain, negative)), strict=True)
    return [(a, b) for a, b in found if isinstance(a, Tensor) and isinstance(b, Tensor)]


def _count(given: dict[str, Any]) -> int | None:
    """How many prompts there are: texts, or rows of embeddings."""
    texts, embeds = given.get("prompt"), given.get("prompt_embeds")
    if isinstance(texts, str):
        return 1
    found = texts if isinstance(texts, (list, tuple)) else embeds
    return len(found) if isinstance(found, (list, tuple, Tensor)) else None


def _prompt(pipe: DiffusionPipeline | None, given: dict[str, Any]) -> Prompt:
    name = caller(pipe)
    parts = next((parts for pattern, parts in PARTS if pattern.match(name)), None)
    if parts is None:
        return Prompt(unknown=f"where {name or type(pipe).__name__} puts its tokens is not known")
    if given.get("prompt") is None or given.get("prompt_embeds") is not None:
        return Prompt(unknown="the pipeline was given embeddings")
    if "XL" in name and given.get("prompt_2") not in (None, given["prompt"]):
        return Prompt(unknown="prompt and prompt_2 differ, and their tokens share the same text keys")
    segments, start = [], 0
    for tokenizer, names, limit in parts:
        texts = next(given[n] for n in names if given.get(n) is not None)
        # The refiner of SDXL has the second one only.
        tokenizer = tokenizer if limit or getattr(pipe, tokenizer, None) is not None else "tokenizer_2"
        length = int(given[limit]) if limit else getattr(pipe, tokenizer).model_max_length
        read = _encode(pipe, tokenizer, [texts] if isinstance(texts, str) else list(texts), length)
        segments.append([Segment(text, start, length, *rest) for text, *rest in read])
        start += length
    return Prompt(tuple(zip(*segments, strict=True)))


def _encode(pipe: DiffusionPipeline | None, name: str, texts: list[str], length: int) -> list[tuple[Any, ...]]:
    """Per text (text, offsets, special)."""
    tokenizer, encoder = getattr(pipe, name, None), getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
    if tokenizer is None or encoder is None:
        # Stable Diffusion 3 without its T5: zeros stand there.
        return [(text,) for text in texts]
    convert = getattr(pipe, "maybe_convert_prompt", None)
    texts = texts if convert is None else [convert(text, tokenizer) for text in texts]
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_special_tokens_mask": True}
    found = []
    for text in texts:
        fast = bool(getattr(tokenizer, "is_fast", False))
        encoded = tokenizer(text, return_offsets_mapping=fast, **options)
        shown, offsets = text, encoded["offset_mapping"] if fast else None
        if offsets is None:
            offsets, shown = char_offsets(list(encoded["input_ids"]), tokenizer)
        special = tuple(bool(x) for x in encoded["special_tokens_mask"])
        found.append((shown, tuple((int(a), int(b)) for a, b in offsets), special))
    return found
