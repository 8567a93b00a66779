"""Where the words of a prompt are among the text keys of a ComfyUI conditioning, from what its CLIP object tokenizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...errors import SelectionError
from ...maps.phrases import Prompt, Segment

# Ends of a chunk's text: what follows is padding.
ENDS = ("<|endoftext|>", "</s>", "<pad>")
STARTS = ("<|startoftext|>",)


def prompt_of(clip: Any, text: str) -> Prompt:
    """The prompt `text`, as its chunks lie one after the other in the conditioning.

    Args:
        clip: the program's CLIP object; `tokenize` gives {encoder: chunks of (token, weight)}, its tokenizer `untokenize`s.

    Raises:
        SelectionError: its tokenizer does not say what its tokens stand for.
    """
    chunks = clip.tokenize(text)
    # The two encoders of SDXL have the same vocabulary, and their channels lie side by side. Flux reads its long one.
    name = next((n for n in ("l", "t5xxl") if n in chunks and not (n == "l" and "t5xxl" in chunks)), next(iter(chunks)))
    inner = getattr(clip.tokenizer, f"clip_{name}", getattr(clip.tokenizer, name, clip.tokenizer))
    untokenize = getattr(inner, "untokenize", None)
    if untokenize is None:
        raise SelectionError(
            f"the tokenizer {type(inner).__name__} does not say what its tokens are; boxes need one that does."
        )
    return Prompt(((segment(chunks[name], untokenize),),))


def segment(chunks: Sequence[Sequence[Any]], untokenize: Callable[[Sequence[Any]], Any]) -> Segment:
    """All chunks as one row of keys, with the text that their tokens spell."""
    text, offsets, special = "", [], []
    for chunk in chunks:
        ended = False
        for i, word in enumerate(_strings(untokenize(list(chunk)))):
            start = (i == 0 and word in STARTS) or word in STARTS
            ended = ended or word in ENDS
            if start or ended or not word:
                offsets.append((len(text), len(text)))
                special.append(True)
                continue
            # CLIP marks where a word ends, sentencepiece where it begins.
            begins, ends = word.startswith("\u2581"), word.endswith("</w>")
            plain = word.removesuffix("</w>").removeprefix("\u2581")
            text += " " if begins and text else ""
            offsets.append((len(text), len(text) + len(plain)))
            special.append(False)
            text += plain + (" " if ends else "")
    return Segment(text, 0, len(offsets), tuple(offsets), tuple(special))


def _strings(pairs: Any) -> list[str]:
    """The string of each token; "" for an embedding of its own (textual inversion)."""
    return [p[1] if isinstance(p[1], str) else "" for p in pairs]
