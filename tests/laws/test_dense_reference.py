"""Built-in language methods on real model code against the dense reference: prefill, chunks, decoding, padding.

Every logit of every valid row must agree to 1e-5 in fp32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import ACT, PASTA, HeadGate, HeadSet, InstABoost, SpotLight, Where, ZeroTuning, sites, steer
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.laws.dense_model import (
    Dense,
    Sequence,
    act_edit,
    dense_model,
    instaboost_edit,
    pasta_edit,
    spotlight_edit,
    zerotuning_edit,
)

TOLERANCE = 1e-5
DECODERS = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "falcon", "llava"]
OTHERS = ["bert", "bart", "t5"]
SPAN = [(1, 3), (4, 5)]

CASES: dict[str, tuple[Any, Any]] = {
    "act": (lambda heads, spans, where: ACT(heads, 0.4, 0.12, where=where), act_edit(beta=0.4, threshold=0.12)),
    "act-alpha": (
        lambda heads, spans, where: ACT(heads, 0.3, alpha=1.2, min_rows=2, where=where),
        act_edit(beta=0.3, alpha=1.2, min_rows=2),
    ),
    "act-running": (
        lambda heads, spans, where: ACT(heads, 0.4, 0.12, decode="running", where=where),
        act_edit("running", beta=0.4, threshold=0.12),
    ),
    "act-prefill": (
        lambda heads, spans, where: ACT(heads, 0.4, 0.12, decode="prefill_only", where=where),
        act_edit("prefill_only", beta=0.4, threshold=0.12),
    ),
    "zerotuning": (lambda heads, spans, where: ZeroTuning(heads, 2.5, where=where), zerotuning_edit(2.5)),
    "spotlight": (
        lambda heads, spans, where: SpotLight(spans, 0.4, where=where & Where(heads=heads)),
        spotlight_edit(0.4),
    ),
    "spotlight-pooled": (
        lambda heads, spans, where: SpotLight(spans, 0.6, pooled=True, where=where & Where(heads=heads)),
        spotlight_edit(0.6, pooled=True),
    ),
    "pasta": (lambda heads, spans, where: PASTA(spans, heads, 0.05, where=where), pasta_edit(0.05)),
    "pasta-include": (
        lambda heads, spans, where: PASTA(spans, heads, 0.2, "include", where=where),
        pasta_edit(0.2, "include"),
    ),
    "instaboost": (
        lambda heads, spans, where: InstABoost(spans, 4.0, where=where & Where(heads=heads)),
        instaboost_edit(4.0),
    ),
    "headgate": (lambda heads, spans, where: HeadGate({p: 0.25 + p[1] for p in heads}, where=where), None),
}


class Setup:
    """One model, one selection, and both sides of a comparison."""

    def __init__(self, name: str, case: str):
        self.name = name
        self.model = tiny_transformers(name)
        build, edit = CASES[case]
        every = [s for s in sites(self.model) if s.modality == "text"]
        causal_only = case.startswith("act")
        where = Where(kinds="self")
        if causal_only and name in OTHERS:
            where = Where(kinds="self", modules=r"(.*\.)?decoder\..*")
        if case == "headgate":
            where = Where()
        pool = [s for s, _ in where.resolve(every, ("text",))]
        layers = sorted({s.layer for s in pool})[-2:]
        self.heads = HeadSet({layer: [0, 2] if i else [1] for i, layer in enumerate(layers)})
        chosen = [s for s in pool if s.layer in self.heads.layers]
        self.method = lambda batch: build(self.heads, [SPAN] * batch, where)
        self.edits = {} if edit is None else {s.name: (list(self.heads[s.layer]), edit) for s in chosen}
        self.gates = {} if edit else {s.name: {h: 0.25 + h for h in self.heads[s.layer]} for s in chosen}
        self.configs = list({id(s.module.config): s.module.config for s in every}.values())

    def dense(self) -> Any:
        return dense_model(self.model, Dense(self.model, self.edits, self.gates), self.configs)


def compare(ours: Tensor, theirs: Tensor, valid: Tensor) -> float:
    assert torch.isfinite(ours[valid]).all()
    return float((ours - theirs)[valid].abs().max())


def final(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


# Another method in the form of PASTA: a few models tell all.
FEW = {"instaboost": ("llama", "gpt_oss", "llava", "t5")}
PAIRS = [(name, case) for name in DECODERS + OTHERS for case in CASES if name in FEW.get(case, (name,))]


def skip_unless_defined(name: str, case: str) -> None:
    if name == "bert" and case.startswith("act"):
        pytest.skip("ACT is defined on causal self-attention")


@pytest.mark.parametrize(("name", "case"), PAIRS)
@torch.no_grad()
def test_prefill(name: str, case: str) -> None:
    skip_unless_defined(name, case)
    setup = Setup(name, case)
    for batch, padding in ((1, None), (4, "left"), (4, "right")):
        inputs = tiny_transformers_inputs(name, setup.model, batch=batch, length=12, padding=padding, seed=batch)
        valid = inputs["attention_mask"].bool()
        plain = final(setup.model(**inputs))
        with steer(setup.model, setup.method(batch)):
            ours = final(setup.model(**inputs))
        decoder = valid if "decoder_input_ids" not in inputs else torch.ones_like(inputs["decoder_input_ids"]).bool()
        with setup.dense() as dense:
            theirs = _encdec(setup, dense, inputs, valid, decoder) if name in ("bart", "t5") else None
            if theirs is None:
                dense.sequence = Sequence(valid, prompt=valid.shape[1], spans=[SPAN] * batch)
                theirs = final(setup.model(**inputs))
            assert dense.applied
        assert compare(ours, theirs, decoder) <= TOLERANCE, (batch, padding)
        assert compare(plain, theirs, decoder) > 100 * TOLERANCE, (
            "the edit does nothing here; the test would be vacuous"
        )


def _encdec(setup: Setup, dense: Dense, inputs: dict[str, Tensor], valid: Tensor, decoder: Tensor) -> Tensor:
    """Encoder and decoder see different tokens, so the reference runs them one after the other."""
    spans = [SPAN] * valid.shape[0]
    dense.sequence = Sequence(valid, prompt=valid.shape[1], spans=spans)
    encoded = setup.model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    dense.sequence = Sequence(decoder, prompt=decoder.shape[1], spans=spans)
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    return setup.model(encoder_outputs=encoded, **rest).logits


CHUNKS = [(0, 7), (7, 10), (10, 12)]


def drive(
    model: nn.Module, inputs: dict[str, Tensor], chunks: list[tuple[int, int]], extra: Tensor, before: Any
) -> Tensor:
    """Prefill in chunks, then decode the given tokens one by one; all logits in order, [B, T, V]."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    offset = ids.shape[1] - 12  # image tokens, where there are any, belong to the first chunk
    pieces = [(0 if i == 0 else a + offset, b + offset, False) for i, (a, b) in enumerate(chunks)]
    pieces += [(ids.shape[1] + t, ids.shape[1] + t + 1, True) for t in range(extra.shape[1])]
    ids = torch.cat([ids, extra], dim=1)
    mask = torch.cat([mask, torch.ones_like(extra)], dim=1)
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, out = None, []
    for start, stop, decoding in pieces:
        before(mask[:, :stop].bool(), start, stop, decoding)
        more = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs and start == 0 else {}
        result = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=position[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            **more,
        )
        cache = result.past_key_values
        out.append(result.logits)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(("name", "case"), [pair for pair in PAIRS if pair[0] in DECODERS])
@pytest.mark.parametrize("chunks", [[(0, 12)], CHUNKS], ids=["whole", "chunked"])
@torch.no_grad()
def test_cached_decoding(name: str, chunks: list[tuple[int, int]], case: str) -> None:
    setup = Setup(name, case)
    inputs = tiny_transformers_inputs(name, setup.model, batch=3, length=12, padding="left", seed=5)
    extra = torch.randint(4, 40, (3, 4), generator=torch.Generator().manual_seed(1))
    spans = [SPAN] * 3
    with steer(setup.model, setup.method(3)) as run:
        ours = drive(setup.model, inputs, chunks, extra, lambda *_: None)
    assert all(run.audit.fired(b.index) for b in run.bounds)
    with setup.dense() as dense:
        length = inputs["input_ids"].shape[1]

        def before(valid: Tensor, start: int, stop: int, decoding: bool) -> None:
            # PASTA's prompt grows with the chunks and then stands still.
            dense.sequence = Sequence(valid, start, min(stop, length), decoding, spans)

        theirs = drive(setup.model, inputs, chunks, extra, before)
    valid = torch.cat([inputs["attention_mask"], torch.ones_like(extra)], dim=1).bool()
    assert compare(ours, theirs, valid) <= TOLERANCE
