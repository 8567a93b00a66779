"""`Tokens`: spans by string and by range, padding, repeated samples, and what cannot be found."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsteer import SpotLight, Tokens, steer
from attnsteer.account import Samples
from attnsteer.errors import SelectionError
from attnsteer.testing import tiny_transformers
from attnsteer.tokens import char_offsets

TEXT = ["the quick brown fox jumps over the lazy dog", "a café keeps naïve foxes", "fox"]


def word_tokenizer() -> Any:
    """One token for each word; decoding puts one space between words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *dict.fromkeys(" ".join(TEXT).split())]
    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]")


def byte_tokenizer() -> Any:
    """Byte-level BPE with few merges: words fall into pieces, and letters with accents into bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("o", "x"), ("Ġ", "f"), ("Ġf", "ox"), ("q", "u")]
    vocabulary = ["<pad>", *letters, *(a + b for a, b in merges)]
    own = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>")


class SlowTokenizer:
    """What a tokenizer without offsets offers: decoding only. Tokens are the UTF-8 bytes."""

    pad_token_id = 256

    def __call__(self, text: str) -> Any:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


MAKERS = {"words": word_tokenizer, "bytes": byte_tokenizer, "slow": SlowTokenizer}


@pytest.fixture(params=MAKERS, scope="module")
def tokenizer(request: Any) -> Any:
    return MAKERS[request.param]()


def batch_of(tokenizer: Any, texts: list[str], side: str | None) -> Tokens:
    rows = [tokenizer(t)["input_ids"] for t in texts]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = length - len(row) if side == "left" else 0
        ids[b, at : at + len(row)] = torch.tensor(row)
        valid[b, at : at + len(row)] = True
    return Tokens(batch=len(rows), length=length, valid=valid, ids=ids)


def text_of(tokenizer: Any, tokens: Tokens, b: int, span: tuple[int, int]) -> str:
    """Ranges count from the first valid token."""
    return tokenizer.decode(tokens.ids[b][tokens.valid[b]][span[0] : span[1]].tolist()).strip()


# ------------------------------------------------------------------------------------------------ strings


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_string_is_found_whatever_the_padding(tokenizer: Any, side: str) -> None:
    tokens = batch_of(tokenizer, TEXT[:2], side)
    found = tokens.spans([["brown fox"], ["café", "naïve foxes"]], tokenizer)
    assert [text_of(tokenizer, tokens, 0, s) for s in found[0]] == ["brown fox"]
    assert [text_of(tokenizer, tokens, 1, s) for s in found[1]] == ["café", "naïve foxes"]
    assert found == batch_of(tokenizer, TEXT[:2], None).spans([["brown fox"], ["café", "naïve foxes"]], tokenizer)


def test_strings_for_all_samples_are_found_in_each(tokenizer: Any) -> None:
    tokens = batch_of(tokenizer, [TEXT[0], "lazy fox", "the fox over a dog"], "left")
    for form in ("fox", ["fox"], ("fox",)):
        found = tokens.spans(form, tokenizer)
        assert [[text_of(tokenizer, tokens, b, s) for s in row] for b, row in enumerate(found)] == [["fox"]] * 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_string_that_occurs_several_times_says_which(side: str) -> None:
    tokenizer = word_tokenizer()
    tokens = batch_of(tokenizer, [TEXT[0], "the fox"], side)
    with pytest.raises(SelectionError, match=r"'the' is 2 times in the text of sample 0: 'the quick.*\('the', 0\)"):
        tokens.spans("the", tokenizer)
    assert tokens.spans([[("the", 0)], ["the"]], tokenizer) == [[(0, 1)], [(0, 1)]]
    assert tokens.spans([[("the", 1)], ["fox"]], tokenizer) == [[(6, 7)], [(1, 2)]]
    assert tokens.spans([("the", "all")], tokenizer) == [[(0, 1), (6, 7)], [(0, 1)]]
    with pytest.raises(SelectionError, match=r"\('the', 1\) is not there: sample 1 has 'the' 1 times"):
        tokens.spans([("the", 1)], tokenizer)


@pytest.mark.parametrize("which", [0, 1, np.int64(1), "all"], ids=repr)
def test_every_form_of_spans_is_one_of_a_method_too(which: Any) -> None:
    """What the batch would understand is not refused when the method is made."""
    tokenizer = word_tokenizer()
    tokens = batch_of(tokenizer, [TEXT[0]], None)
    for spans in ([("the", which)], [("the", which), "fox"], ["fox", ("the", which)], [[("the", which)]]):
        assert tokens.spans(SpotLight(spans, 0.5).spans, tokenizer) == tokens.spans(spans, tokenizer)


@pytest.mark.parametrize(
    ("spans", "parts"),
    [
        ("the", None),
        ([("the", "all")], [(0, 1), (6, 7)]),
        ([("the", 0)], [(0, 1)]),
        ([["fox", ("the", "all")]], [(3, 4), (0, 1), (6, 7)]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("cut", [4, 5, 8])
def test_a_string_is_looked_for_again_where_more_of_a_prompt_comes_in(cut: int, spans: Any, parts: Any) -> None:
    """However a prompt is cut into calls; what is generated brings no further occurrence."""
    tokenizer = word_tokenizer()
    ids = batch_of(tokenizer, [TEXT[0]], None).ids
    first, whole = (Tokens(batch=1, length=n, ids=ids[:, :n], prompt=n) for n in (cut, ids.shape[1]))
    longer = Tokens(batch=1, length=ids.shape[1], ids=ids, prompt=cut)
    if cut < 7 or spans != "the":
        before = first.spans(spans, tokenizer)
        longer.keep_spans(first, cut)
        assert longer.spans(spans, tokenizer) == before and longer.resolved_spans
    whole.keep_spans(first, cut, prompt=True)
    if parts is None:
        with pytest.raises(SelectionError, match="2 times in the text"):
            whole.spans(spans, tokenizer)
    else:
        assert whole.spans(spans, tokenizer) == [parts]


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 0), (2, 1), (1, 1), (0, 0)])
def test_a_span_follows_its_words_where_padding_moves(first: int, then: int) -> None:
    """The masks of two calls over one cache may hide other tokens: indices count from the first that is not hidden now."""
    tokenizer = word_tokenizer()
    ids = batch_of(tokenizer, [TEXT[0]], None).ids
    hides = lambda count: torch.arange(ids.shape[1])[None] >= count if count else None  # noqa: E731
    before, after = (
        Tokens(batch=1, length=ids.shape[1], valid=hides(n), ids=ids, prompt=ids.shape[1]) for n in (first, then)
    )
    spans = [["fox"]]
    assert before.spans(spans, tokenizer) == [[(3 - first, 4 - first)]]
    after.keep_spans(before, before.length)
    assert bool(after.resolved_spans) == (first == then)
    assert after.spans(spans, tokenizer) == [[(3 - then, 4 - then)]]


def test_two_strings_of_one_sample_are_two_spans() -> None:
    """Not a string and which of its occurrences, which is a number or "all"."""
    tokenizer = word_tokenizer()
    tokens, method = batch_of(tokenizer, [TEXT[0]], None), SpotLight([["brown", "lazy dog"]], 0.5)
    for spans in ([["brown", "lazy dog"]], method.spans):
        assert tokens.spans(spans, tokenizer) == [[(2, 3), (7, 9)]]
    assert tokens.spans([["the quick", ("the", 1)]], tokenizer) == [[(0, 2), (6, 7)]]
    assert tokens.spans([[("the", np.int64(1))]], tokenizer) == [[(6, 7)]]
    for wrong in (-1, 0.5, True, None):
        with pytest.raises(SelectionError, match="start, stop"):
            tokens.spans([[("the", wrong)]], tokenizer)


def test_a_string_is_looked_for_in_the_prompt_only() -> None:
    """What was generated does not make a span ambiguous, and is not found either."""
    tokenizer = word_tokenizer()
    tokens = batch_of(tokenizer, [TEXT[0]], None)
    tokens.prompt = 4
    assert tokens.spans("the", tokenizer) == [[(0, 1)]]
    with pytest.raises(SelectionError, match="'lazy' is not in the text of sample 0: 'the quick brown fox'"):
        tokens.spans("lazy", tokenizer)


def test_a_part_of_a_token_takes_the_token() -> None:
    tokenizer = word_tokenizer()
    tokens = batch_of(tokenizer, [TEXT[0]], None)
    assert tokens.spans([["uick bro"]], tokenizer) == [[(1, 3)]]
    assert tokens.spans([["lazy", (0, 2), "the quick"]], tokenizer) == [[(7, 8), (0, 2), (0, 2)]]


@pytest.mark.parametrize("text", ["cat", "Fox", "the  quick", " ", "", "fox jumps over the lazy dogs"])
def test_a_string_that_is_not_in_the_text_is_an_error_that_shows_it(text: str) -> None:
    tokenizer = word_tokenizer()
    tokens = batch_of(tokenizer, [TEXT[0]], None)
    with pytest.raises(SelectionError, match="sample 0: 'the quick brown fox jumps") as caught:
        tokens.spans([[text]], tokenizer)
    assert repr(text) in str(caught.value)


def test_it_says_which_sample_lacks_the_string(tokenizer: Any) -> None:
    with pytest.raises(SelectionError, match="'dog' is not in the text of sample 1: 'fox'"):
        batch_of(tokenizer, [TEXT[0], "fox"], "left").spans("dog", tokenizer)


def test_strings_need_a_tokenizer_and_ids() -> None:
    tokens = batch_of(SlowTokenizer(), TEXT, None)
    with pytest.raises(SelectionError, match="give the method a tokenizer"):
        tokens.spans("fox")
    with pytest.raises(SelectionError, match="without input_ids"):
        Tokens(batch=1, length=4).spans("fox", SlowTokenizer())


@given(st.text(min_size=1, max_size=30).filter(lambda t: "�" not in t and t.isprintable()), st.data())
def test_every_substring_is_covered_byte_by_byte(text: str, data: Any) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    tokenizer, piece = SlowTokenizer(), text[start:stop]
    tokens = batch_of(tokenizer, [text], None)
    found = tokens.spans([[(piece, "all")]], tokenizer)[0]
    # Occurrences that overlap an earlier one are left out, as in re.finditer.
    places = [len(text[: m.start()].encode()) for m in re.finditer(re.escape(piece), text)]
    assert found == [(at, at + len(piece.encode())) for at in places]
    assert all(bytes(tokens.ids[0, first:last].tolist()) == piece.encode() for first, last in found)


def test_offsets_of_growing_prefixes_are_those_of_the_fast_tokenizer() -> None:
    tokenizer = byte_tokenizer()

    class Slow:
        decode = tokenizer.decode

    for text in TEXT:
        ids = tokenizer(text)["input_ids"]
        fast, whole = char_offsets(ids, tokenizer)
        slow, again = char_offsets(ids, Slow())
        assert whole == again == text and fast == slow


# ------------------------------------------------------------------------------------------------ ranges


def test_ranges_count_from_the_first_valid_token() -> None:
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    tokens = Tokens(batch=2, length=5, valid=valid)
    assert tokens.spans([[(0, 1), (1, 3)], [(4, 5)]]) == [[(0, 1), (1, 3)], [(4, 5)]]
    assert (
        tokens.first().tolist() == [2, 0] and tokens.count().tolist() == [3, 5] and tokens.count(3).tolist() == [1, 3]
    )
    assert Tokens(batch=2, length=5).first().tolist() == [0, 0] and Tokens(batch=2, length=5).count().tolist() == [5, 5]


def test_a_sample_may_have_no_span() -> None:
    assert Tokens(batch=2, length=5).spans([[], [(0, 1)]]) == [[], [(0, 1)]]


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[(0, 4)]], r"span \(0, 4\) of sample 0 ends after its 3 tokens"),
        ([[(2, 2)]], "0 <= start < stop"),
        ([[(2, 1)]], "0 <= start < stop"),
        ([[(-1, 2)]], "0 <= start < stop"),
        ([[(0.0, 1)]], "start, stop"),
        ([[(False, True)]], "start, stop"),
        ([[(0, 1, 2)]], "start, stop"),
        ([(0, 2)], "start, stop"),
        ([[0, 2]], "start, stop"),
        ([0, 2], "per sample"),
        ([], "per sample"),
        ({"a": (0, 1)}, "per sample"),
        ([[(0, 1)], [(0, 1)], [(0, 1)]], "spans has 3 samples, and this is a batch of 2 samples"),
    ],
)
def test_wrong_ranges_are_refused(spans: Any, words: str) -> None:
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    with pytest.raises(SelectionError, match=words):
        given = 1 if isinstance(spans, list) and len(spans) == 1 else 2
        Tokens(batch=given, length=5, valid=valid[:given]).spans(spans)


def test_repeated_samples_share_their_spans() -> None:
    spans = [[(0, 1)], [(3, 5)]]
    tokens = Tokens(batch=6, length=5, repeats=Samples.repeated(2, 6))
    assert tokens.spans(spans) == [[(0, 1)]] * 3 + [[(3, 5)]] * 3
    tokens.take(torch.tensor([5, 0]))
    assert tokens.spans(spans) == [[(3, 5)], [(0, 1)]] and tokens.samples.rows(2) == (1, 0)


def test_spans_of_some_samples_are_not_divided_among_others() -> None:
    with pytest.raises(SelectionError, match="spans has 2 samples, and this is a batch of 4 samples"):
        Tokens(batch=4, length=5).spans([[(0, 1)], [(3, 5)]])


def test_spans_are_found_once_and_again_when_the_batch_grows() -> None:
    class Counting(SlowTokenizer):
        calls = 0

        def decode(self, *args: Any, **kwargs: Any) -> str:
            Counting.calls += 1
            return super().decode(*args, **kwargs)

    tokenizer, spans = Counting(), [["fox"]]
    tokens = batch_of(tokenizer, ["a fox"], None)
    found, calls = tokens.spans(spans, tokenizer), Counting.calls
    assert tokens.spans(spans, tokenizer) is found and Counting.calls == calls
    grown = Tokens(
        batch=3, length=5, ids=tokens.ids.expand(3, -1), _resolved=tokens._resolved, repeats=Samples.repeated(1, 3)
    )
    assert grown.spans(spans, tokenizer) == found * 3


# ------------------------------------------------------------------------------------------------ in a model


@torch.no_grad()
def test_a_string_and_its_range_steer_alike_also_with_beams() -> None:
    model, tokenizer = tiny_transformers("llama"), word_tokenizer()
    tokenizer.padding_side = "left"
    inputs = tokenizer([TEXT[0], "the lazy fox jumps"], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)

    def generated(spans: Any) -> torch.Tensor:
        with steer(model, SpotLight(spans, 0.6, tokenizer=tokenizer)):
            return model.generate(
                **inputs,
                max_new_tokens=6,
                num_beams=3,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )

    by_string, by_range = generated("fox"), generated([[(3, 4)], [(2, 3)]])
    assert torch.equal(by_string.sequences, by_range.sequences)
    assert all(torch.equal(a, b) for a, b in zip(by_string.scores, by_range.scores, strict=True))
    assert not torch.equal(by_string.scores[0], generated("lazy").scores[0])
