"""Tokenizers of the embedded models: one token for each word of the shapes world."""

from __future__ import annotations

import functools
from typing import Any

from .shapes.language import SPECIAL, WORDS

TEXT_LENGTH = 32


@functools.cache
def _ids() -> dict[str, int]:
    return {word: i for i, word in enumerate([*SPECIAL, *WORDS])}


def encode(text: str) -> list[int]:
    """Token ids of a text of the shapes world, with <s> first; the same as `word_tokenizer` gives, without its cost."""
    ids = _ids()
    return [ids["<s>"], *(ids[word] for word in text.split())]


def word_tokenizer() -> Any:
    """The tokenizer of the language and vision-language models: words split at white space, <s> first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = _ids()
    inner = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def clip_tokenizer() -> Any:
    """The tokenizer of the diffusion models' text encoder: CLIP's, with merges that make one token of each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    # The trainer numbers letters that end a word in the order of a hash table, another one in each process, and breaks ties
    # by number; named here, they have their numbers before.
    words = [w for w in WORDS if w.islower() or not w.isalpha()]
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz.,", *"".join(words)})
    inner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(f"{c}</w>" for c in letters)],
        initial_alphabet=letters,
        show_progress=False,
    )
    inner.train_from_iterator(words, trainer)
    import json

    bpe = json.loads(inner.to_str())["model"]
    merges = [tuple(m) for m in bpe["merges"]]
    return CLIPTokenizer(
        vocab=bpe["vocab"],
        merges=merges,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=TEXT_LENGTH,
    )
