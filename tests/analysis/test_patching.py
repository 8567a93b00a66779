"""Direct and total effects of patched heads against hooks and equations; refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnsteer.analysis import Swap, patch_effects
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.testing import tiny_transformers
from tests.reference import patching


def swaps() -> list[Swap]:
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(4, 99, (n,), generator=draw).tolist()  # noqa: E731
    return [Swap(ids(n), ids(n), 5, (6, 7)) for n in (9, 9, 12)]


def outputs(model: nn.Module, prompt: list[int], layer: int, head: int) -> Tensor:
    own, kept = model.model.layers[layer].self_attn, []
    hook = own.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1]))
    model(input_ids=torch.tensor([prompt]), use_cache=False)
    hook.remove()
    return kept[0][head * own.head_dim : (head + 1) * own.head_dim]


@torch.no_grad()
def test_effects_are_those_of_hooks_and_equations() -> None:
    model, samples = tiny_transformers("llama"), swaps()
    tables = {norm: patch_effects(model, samples, norm=norm, total=norm == "frozen") for norm in ("frozen", "live")}
    m = lambda x: float(x[5] - x[[6, 7]].mean())  # noqa: E731
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        column = tables["frozen"].heads.index((layer, head))
        for i, s in enumerate(samples):
            ids = torch.tensor([s.prompt])
            new, old = outputs(model, s.donor, layer, head), outputs(model, s.prompt, layer, head)
            plain = m(model(input_ids=ids, use_cache=False).logits[0, -1])
            total = m(patching.with_patch(model, ids, layer, head, new)) - plain
            assert float(tables["frozen"].column("patch_total").top[i, column]) == pytest.approx(total, abs=1e-5)
            for norm, table in tables.items():
                want = m(patching.direct(model, ids, layer, head, new - old, live=norm == "live"))
                assert float(table.column("patch_direct").top[i, column]) == pytest.approx(want, abs=1e-5)
    indirect = tables["frozen"].column("patch_indirect").top
    assert float(indirect.abs().max()) > 1e-4
    assert tables["frozen"].intervals("patch_total")[1, 3].low <= tables["frozen"]["patch_total"][1, 3]


@torch.no_grad()
def test_in_front_of_nothing_total_is_direct_and_a_run_into_itself_nothing() -> None:
    model, samples = tiny_transformers("llama"), swaps()
    table = patch_effects(model, [Swap(s.prompt, s.prompt, s.target, s.foils) for s in samples])
    assert all(float(table.column(n).top.abs().max()) == 0.0 for n in ("patch_total", "patch_direct"))
    model.model.layers[-1].mlp.down_proj.weight.zero_()
    last = max(layer for layer, _ in table.heads)
    table = patch_effects(model, samples, norm="live")
    for head in range(4):
        assert table["patch_total"][last, head] == pytest.approx(table["patch_direct"][last, head], abs=1e-5)
    # All tokens patched: more passes, the direct part is the same.
    whole = patch_effects(model, samples, norm="live", rows=None)
    assert whole["patch_direct"] == pytest.approx(table["patch_direct"], abs=1e-6)
    assert whole["patch_total"][0, 0] != pytest.approx(table["patch_total"][0, 0], abs=1e-4)


def test_what_is_refused() -> None:
    model = tiny_transformers("llama")
    with pytest.raises(SelectionError, match="one token id that is none of the foils"):
        Swap([1, 2], [1, 2], 5, [5])
    with pytest.raises(SelectionError, match=r"Swap\(donor=\[\]\): give token ids"):
        Swap([1, 2], [], 5, [6])
    for given in ([], [{"prompt": [1]}]):
        with pytest.raises(SelectionError, match=r"give Swap\(\.\.\.\), one or more"):
            patch_effects(model, given)
    with pytest.raises(SelectionError, match="as long as their prompts"):
        patch_effects(model, [Swap([4, 5], [4, 5, 6], 7, [8])], rows=None)
    with pytest.raises(SelectionError, match="norm is one of"):
        patch_effects(model, swaps(), norm="none")
    with pytest.raises(UnsupportedHost, match="not its unembedding's reading of its final norm"):
        patch_effects(tiny_transformers("gemma2", final_logit_softcapping=0.5), swaps(), total=False)
