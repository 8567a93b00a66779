"""What the laws say about odd methods: nothing but "pass" or a right reason for right ones, the right hint for wrong ones."""

from __future__ import annotations

import re

import pytest

from attnsteer import Where
from attnsteer.testing import LAWS, MethodCase, check_laws

from .zoo import (
    BreaksCausality,
    EditsNothing,
    EntropyTemperature,
    ForgetsBatch,
    KeepsState,
    LastRow,
    LooksAhead,
    NeedsImages,
    OneKey,
    OneRow,
    OneSlot,
    OnlyBias,
    OnlyDecode,
    OnlyGenerated,
    OnlyInputs,
    OnlyOutput,
    OnlyValues,
    Paint,
    ReadsValid,
    RoundsAtZero,
    SlotZero,
    Stateful,
)

# Compilation meets the host rather than the method; test_laws.py has it.
# The laws of requests ask more of a method than these odd ones were written for.
REQUESTS = {
    "packed", "ways", "continuous", "guided", "crop", "moved_caches", "shared_model", "interrupted", "checkpointed", "inner",
    "beside",
}  # fmt: skip
QUICK = [law for law in LAWS if law not in {"compile", *REQUESTS}]
NO_REGISTRY = "is not registered|takes one value per sample|cannot split that"
ONE_FORWARD = "changes nothing in a forward over a prompt"
NO_ACTION = "edits nothing here"
NO_DECODER = r"no KV cache|no causal decoder"
NO_PADDING = "no padding on this host"
DIFFUSION = f"{NO_DECODER}|{NO_PADDING}|takes? no attention mask|only transformers models"


def case(method: type, strength: dict, rest: dict, **more: object) -> MethodCase:
    return MethodCase(method, lambda s: method(**strength), lambda s: method(**rest), **more)


GOOD = {
    "last row": (case(LastRow, {"t": 3.0}, {"t": 1.0}), "llama", ""),
    "last row on a window": (case(LastRow, {"t": 3.0}, {"t": 1.0}), "mistral", ""),
    "one key": (case(OneKey, {"weight": 8.0}, {"weight": 1.0}), "llama", ""),
    "one row": (case(OneRow, {"t": 3.0}, {"t": 1.0}), "llama", ""),
    "only decode": (case(OnlyDecode, {"weight": 8.0}, {"weight": 1.0}), "llama", ONE_FORWARD),
    "only generated rows": (case(OnlyGenerated, {"weight": 8.0}, {}), "llama", ONE_FORWARD),
    "only decode, no decoder": (
        case(OnlyDecode, {"weight": 8.0}, {"weight": 1.0}),
        "bert",
        f"{NO_ACTION}|{NO_DECODER}",
    ),
    "only output": (case(OnlyOutput, {"t": 3.0}, {"t": 1.0}), "llama", ""),
    "only output on a denoiser": (case(OnlyOutput, {"t": 3.0}, {"t": 1.0}), "sd", DIFFUSION),
    "only bias": (case(OnlyBias, {"b": 2.0}, {"b": 0.0}), "gemma2", ""),
    "only inputs": (case(OnlyInputs, {"t": 3.0}, {"t": 1.0}), "llama", ""),
    "only inputs on a denoiser": (case(OnlyInputs, {"t": 3.0}, {"t": 1.0}), "flux", DIFFUSION),
    "only values": (case(OnlyValues, {"t": 3.0}, {"t": 1.0}), "llama", r"Where\(rows=\.\.\.\) cannot split"),
    "looks ahead": (case(LooksAhead, {"t": 2.0}, {"t": 0.0}), "llama", ""),
    "stateful": (case(Stateful, {"t": 2.0}, {"t": 0.0}), "llama", ""),
    "needs images, on llama": (
        case(NeedsImages, {"weight": 5.0}, {}),
        "llama",
        "^needs images, which llama does not have$",
    ),
    "needs images": (case(NeedsImages, {"weight": 5.0}, {}), "llava", ""),
    "PAINT": (case(Paint, {"alpha": 2.0}, {}), "llava", ""),
    "entropy temperature": (case(EntropyTemperature, {"t": 1.0}, {}), "llama", ""),
    "entropy temperature on a learned sink": (case(EntropyTemperature, {"t": 1.0}, {}), "gpt_oss", ""),
    "zero only": (
        MethodCase(OnlyOutput, zero=lambda s: OnlyOutput(1.0)),
        "llama",
        "only the strength that changes nothing",
    ),
    "no zero": (MethodCase(OnlyOutput, lambda s: OnlyOutput(3.0)), "llama", "no strength that changes nothing"),
    "selected phase": (
        case(OnlyOutput, {"t": 3.0, "where": Where(phases="decode")}, {"where": Where(phases="decode")}),
        "llama",
        ONE_FORWARD,
    ),
    "selected rows": (
        case(OnlyOutput, {"t": 3.0, "where": Where(rows="last")}, {"where": Where(rows="last")}),
        "llama",
        "selects rows itself",
    ),
    "selected layer": (
        case(OneKey, {"weight": 8.0, "where": Where(layers=[0])}, {"where": Where(layers=[0])}),
        "llama",
        "",
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_right_method_passes_or_the_law_does_not_apply(name: str) -> None:
    case, host, reasons = GOOD[name]
    results = check_laws(case, host, QUICK)
    assert len(results) == len(QUICK)
    for result in results:
        assert result.outcome != "fail", str(result)
        if result.outcome == "not applicable":
            assert re.search(f"{NO_REGISTRY}|{reasons}" if reasons else NO_REGISTRY, result.message), str(result)
    if reasons not in ("^needs images, which llama does not have$",):
        assert any(r.outcome == "pass" for r in results)


WRONG = {
    "slot 0 for the first token": (case(SlotZero, {"weight": 8.0}, {}), "padding", "use call.key_index()"),
    "slot 5 for the sixth token": (case(OneSlot, {"t": 3.0}, {}), "padding", "use call.key_index()"),
    "state on the dataclass": (case(KeepsState, {"t": 2.0}, {}), "memory", "keep it in `call.state`"),
    "mean over samples": (case(ForgetsBatch, {"t": 0.7}, {}), "batch", "keep the batch axis"),
    "looks ahead silently": (case(BreaksCausality, {"t": 2.0}, {}), "causal", "declare `looks_ahead = True`"),
    "rounds at strength zero": (case(RoundsAtZero, {"t": 9.0}, {}), "identity", "return None"),
    "edits nothing": (case(EditsNothing, {}, {}), "effect", "`acting` builds a method that is too weak"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_method_fails_the_right_law_with_the_right_hint(name: str) -> None:
    case, law, hint = WRONG[name]
    [result] = check_laws(case, "llama", [law])
    assert result.outcome == "fail", str(result)
    assert f"law {law} does not hold for {case.name} on llama" in result.message
    assert hint in result.message
    if law not in ("effect",):
        assert re.search(r"differ by [\d.e+-]+, tolerance [\d.e+-]+", result.message)


def test_a_method_that_reads_validity_passes() -> None:
    results = check_laws(case(ReadsValid, {"weight": 8.0}, {}), "llama", QUICK)
    assert not [str(r) for r in results if r.outcome == "fail"]
