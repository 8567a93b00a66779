"""Patterns of an unedited run under an edit: in one pass and token by token, against Llama written out over given maps."""

from __future__ import annotations

import pytest
import torch

from attnsteer import FreezeMaps, HeadGate, capture, steer
from attnsteer.analysis import freeze_report, generate_frozen, shifted
from attnsteer.errors import CompositionError, SelectionError, UnsupportedHost
from attnsteer.search.screen import measured
from attnsteer.testing import tiny_transformers
from tests.reference import patching
from tests.search.common import random_choices


@torch.no_grad()
def test_generation_is_one_pass_over_the_maps_of_the_unedited_run() -> None:
    model, eager = tiny_transformers("llama"), tiny_transformers("llama", attn_implementation="eager")
    draw = torch.Generator().manual_seed(1)
    vector = 3 * torch.randn(model.config.hidden_size, generator=draw)
    ids = torch.randint(4, 99, (1, 9), generator=draw)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    edit = lambda m: shifted(m.model.layers[0], vector)  # noqa: E731
    made = generate_frozen(model, {"input_ids": ids}, edit, **options)
    found = torch.stack(made.logits, dim=1)[0]
    text = made.sequences[:, :-1]
    maps = eager(input_ids=text, output_attentions=True).attentions
    want = patching.frozen_llama(eager, text, list(maps), {0: vector})[0, 8:]
    assert (found - want).abs().max() <= 1e-5
    # Nothing stays on the model, and what is frozen differs from what is not.
    assert torch.equal(model(input_ids=text).logits, tiny_transformers("llama")(input_ids=text).logits)
    with edit(model):
        assert (model(input_ids=text).logits[0, 8:] - want).abs().max() > 1e-3
    # A padded batch is each row alone.
    both = {"input_ids": torch.cat([torch.nn.functional.pad(ids[:, 2:], (2, 0)), ids])}
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    both["attention_mask"][0, :2] = 0
    batched = generate_frozen(model, both, edit, **options)
    assert (torch.stack(batched.logits, dim=1)[1] - found).abs().max() <= 1e-5
    # Without a cache, the clean run over all tokens in front, it is the same.
    with capture(model, what=("q", "k")) as clean:
        model(input_ids=text)
    with shifted(model.model.layers[0], vector), steer(model, FreezeMaps(clean, new_tokens="paired")):
        again = model(input_ids=text, use_cache=False).logits[0, 8:]
    assert (again - want).abs().max() <= 1e-5


@torch.no_grad()
def test_a_report_is_three_runs() -> None:
    model, samples = tiny_transformers("llama"), random_choices(6, lengths=(8, 10))
    gate = HeadGate({(0, 0): -1.0, (0, 1): 3.0, (1, 2): 0.0})
    report = freeze_report(model, gate, samples)
    assert torch.equal(report.plain, measured(model, None, samples, "choice"))
    assert (report.edited - measured(model, gate, samples, "choice")).abs().max() <= 1e-6
    assert (report.frozen - report.edited).abs().max() > 1e-4
    # Nothing edited in front of the last layer's map: all of it goes through values.
    last = freeze_report(model, HeadGate({(2, 0): 4.0}), samples)
    assert (last.frozen - last.edited).abs().max() <= 1e-6
    shift = freeze_report(
        model, lambda m: shifted(m.model.layers[0], torch.full((m.config.hidden_size,), 0.3)), samples
    )
    assert (shift.edited - shift.plain).abs().max() > 1e-3
    share = shift.value_share()
    assert share.value != share.value or share.low <= share.value <= share.high
    assert "share through values" in str(shift)


@torch.no_grad()
def test_what_is_refused() -> None:
    model, samples = tiny_transformers("llama"), random_choices(2, lengths=(8,))
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(UnsupportedHost, match=r"num_beams=\.\.\.\): the unedited run follows token by token"):
        generate_frozen(model, {"input_ids": ids}, HeadGate({(0, 0): 2.0}), num_beams=2)
    with pytest.raises(SelectionError, match="give an intervention, or a function"):
        freeze_report(model, 3, samples)
    with capture(model, what=("q", "k")) as clean:
        model(input_ids=ids)
    frozen = FreezeMaps(clean, new_tokens="paired", same_tokens=False)
    with pytest.raises(SelectionError, match="no row of token 4"), steer(model, frozen, control=True):
        model.generate(input_ids=ids, max_new_tokens=3)
    from tests.methods.test_injection import HeadShift

    with pytest.raises(CompositionError, match="its edit would be lost"):
        freeze_report(model, HeadShift(), samples)
    with (
        pytest.raises(SelectionError, match=r"shifted: a vector \[3\]"),
        shifted(model.model.layers[0], torch.zeros(3)),
    ):
        model(input_ids=ids)
