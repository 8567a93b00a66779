"""PAI, PAINT, HGAI, AD-HH, SPIN, highlights and the knock-out on real model code against dense loops, to 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import ADHH, HGAI, PAI, PAINT, SPIN, Intervention, VisualHighlight, VisualKnockout, Where, steer
from attnsteer.errors import SelectionError
from attnsteer.methods.paint import select_patches
from tests.laws.test_vision_reference import LAYERS, TOLERANCE, Setup, _no_grad, check_forward, check_generation, far  # noqa: F401
from tests.reference import lvlm_rows

WHERE = Where(layers=LAYERS)
BLOCKS = [("last", "image"), ("generated", "image"), ("question", "image"), ("generated", "question")]
LOCAL, SUMMARY = [[0, 3, 5], [1, 2], [4, 6]], [[2, 3], [], [0, 4]]


class Roles:
    """Who is who among the rows and keys of the running call of a dense model."""

    def __init__(self, setup: Setup, dense: Any, z: Tensor):
        batch, _, n, m = z.shape
        prompt = dense.image.shape[1]
        times = batch // len(dense.image)
        image, valid = torch.zeros(batch, m, dtype=torch.bool), torch.ones(batch, m, dtype=torch.bool)
        image[:, :prompt] = dense.image.repeat_interleave(times, dim=0)[:, :m]
        valid[:, :prompt] = dense.valid.repeat_interleave(times, dim=0)[:, :m]
        whole = dense.valid.repeat_interleave(times, dim=0)
        ends = [int(row.nonzero()[-1]) for row in whole]
        first = [int(row.nonzero()[0]) if row.any() else None for row in dense.image.repeat_interleave(times, dim=0)]
        final = [int(row.nonzero()[-1]) if row.any() else None for row in dense.image.repeat_interleave(times, dim=0)]
        self.parts = [
            [_part(j, prompt, bool(image[b, j]), bool(valid[b, j]), ends[b], first[b]) for j in range(m)]
            for b in range(batch)
        ]
        now = dense.now
        self.V = image
        self.T = torch.tensor(
            [[f is not None and bool(valid[b, j]) and j > f for j in range(m)] for b, f in enumerate(final)]
        )
        self.rows = torch.tensor(
            [[self.parts[b][now + i] in ("last", "generated") for i in range(n)] for b in range(batch)]
        )
        self.shown = torch.tensor(
            [[self.parts[b][now + i] in ("image", "generated") for i in range(n)] for b in range(batch)]
        )
        self.row_parts = [parts[now : now + n] for parts in self.parts]

    def chosen(self, numbers: list[list[int]]) -> Tensor:
        out, times = torch.zeros_like(self.V), len(self.V) // len(numbers)
        for b, row in enumerate(self.V):
            at = row.nonzero()[:, 0].tolist()
            for k in numbers[b // times]:
                if k < len(at):
                    out[b, at[k]] = True
        return out


def _part(j: int, prompt: int, image: bool, valid: bool, end: int, first: int | None) -> str:
    if not valid or first is None:
        return ""
    if j >= prompt:
        return "generated"
    if image:
        return "image"
    return "last" if j == end else "before" if j < first else "question"


def rescored(reference: Callable[..., Tensor]) -> Callable[[Setup, Any], None]:
    def put(setup: Setup, dense: Any) -> None:
        dense.rescore = lambda layer, z: reference(z, Roles(setup, dense, z)).to(z.dtype)

    return put


def put_adhh(setup: Setup, dense: Any) -> None:
    setup.counts = {"edited": 0, "left": 0}

    def edit(layer: int, A: Tensor, x: Tensor) -> Tensor:
        roles = Roles(setup, dense, A)
        return lvlm_rows.adhh(A, roles.T, roles.rows, 0.25, setup.counts)

    dense.edit = edit


def put_spin(by: str) -> Callable[[Setup, Any], None]:
    def put(setup: Setup, dense: Any) -> None:
        found: dict[str, Any] = {}

        def rescore(layer: int, z: Tensor) -> Tensor:
            found["z"], found["roles"] = z, Roles(setup, dense, z)
            return z

        def gate(layer: int, out: Tensor) -> Tensor:
            z, roles = found["z"].double(), found["roles"]
            values = z.softmax(-1) if by == "attention" else z
            score = values.masked_fill(~roles.V[:, None, None] | z.isneginf() | (z < -1e30), 0.0).sum(-1)
            return lvlm_rows.spin(out, score, roles.rows, 0.5, 0.1)

        dense.rescore, dense.gate = rescore, gate

    return put


CASES: dict[str, tuple[Callable[[int], Intervention], Callable[[Setup, Any], None]]] = {
    "PAI": (lambda n: PAI(0.6, where=WHERE), rescored(lambda z, r: lvlm_rows.pai(z, r.V, r.rows, 0.6))),
    "HGAI": (lambda n: HGAI(0.8, where=WHERE), rescored(lambda z, r: lvlm_rows.hgai(z, r.V, r.rows, 0.8))),
    "PAINT": (
        lambda n: PAINT(LOCAL[:n], SUMMARY[:n], 0.9, 1.4, where=WHERE),
        rescored(
            lambda z, r: lvlm_rows.paint(
                z, r.chosen(LOCAL[: r.samples]), r.chosen(SUMMARY[: r.samples]), r.rows, 0.9, 1.4
            )
        ),
    ),
    "highlight": (
        lambda n: VisualHighlight(1.8, where=WHERE),
        rescored(lambda z, r: lvlm_rows.highlight(z, r.V, r.shown, 1.8)),
    ),
    "knockout": (
        lambda n: VisualKnockout(BLOCKS, where=WHERE),
        rescored(lambda z, r: lvlm_rows.knockout(z, r.row_parts, r.parts, BLOCKS)),
    ),
    "ADHH": (lambda n: ADHH(threshold=0.25, where=WHERE), put_adhh),
    "SPIN": (lambda n: SPIN(0.5, 0.1, where=WHERE), put_spin("scores")),
    "SPIN-attention": (lambda n: SPIN(0.5, 0.1, by="attention", where=WHERE), put_spin("attention")),
}


def maker(name: str, setup: Setup) -> Callable[[Any], Intervention]:
    make, put = CASES[name]
    count = len(setup.image)
    Roles.samples = count

    def made(dense: Any) -> Intervention:
        put(setup, dense)
        return make(count)

    return made


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_prefill(name: str, padding: str) -> None:
    """Images in different places of a batch."""
    setup = Setup("llava", "places", padding)
    check_forward(setup, maker(name, setup), moved=10 * TOLERANCE)
    if name == "ADHH":
        assert min(setup.counts.values()) > 0


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("name", CASES)
def test_decoding(name: str, family: str) -> None:
    """Several images; each generated token is such a row, and what was generated is text behind the image."""
    setup = Setup(family, "several")
    check_generation(setup, maker(name, setup), {}, {})


@pytest.mark.parametrize("name", CASES)
def test_chunks_and_beams(name: str) -> None:
    setup = Setup("llava", "several")
    with steer(setup.model, maker(name, setup)(setup.dense())):
        whole, chunked = setup.generate(), setup.generate(prefill_chunk_size=9)
        assert torch.equal(whole.sequences, chunked.sequences)
        assert far(torch.stack(whole.logits), torch.stack(chunked.logits)) <= TOLERANCE
    beams = {"num_beams": 3, "output_scores": True}
    dense = setup.dense()
    with dense.on():
        method = maker(name, setup)(dense)
        theirs = setup.generate(**beams)
    with steer(setup.model, method):
        ours = setup.generate(**beams)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert far(ours.sequences_scores, theirs.sequences_scores) <= TOLERANCE


def test_one_head_of_hgai_is_pai() -> None:
    setup = Setup("llava", "several")
    where = Where(layers=[1], heads={1: [2]})
    with steer(setup.model, HGAI(0.7, where=where)):
        one = setup.generate().logits
    with steer(setup.model, PAI(0.7, where=where)):
        other = setup.generate().logits
    assert far(torch.stack(one), torch.stack(other)) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_a_sample_without_an_image_is_left_alone(name: str) -> None:
    setup = Setup("llava", "several")
    setup.inputs, setup.image = _beside_text(setup)
    plain = setup.model(**setup.inputs).logits
    method = PAINT([LOCAL[0], []], [SUMMARY[0], []], where=WHERE) if name == "PAINT" else CASES[name][0](2)
    with steer(setup.model, method):
        steered = setup.model(**setup.inputs).logits
    assert torch.equal(steered[1], plain[1]) and not torch.equal(steered[0], plain[0])


def _beside_text(setup: Setup) -> tuple[dict[str, Tensor], Tensor]:
    """The first sample, and a text of its length."""
    inputs, image = setup.inputs, setup.image
    size = int(image[0].sum())
    ids = inputs["input_ids"][:1].repeat(2, 1)
    ids[1] = torch.where(image[0], 7, ids[1])
    per_image = 16
    pixels = inputs["pixel_values"][: size // per_image]
    return (
        {"input_ids": ids, "attention_mask": inputs["attention_mask"][:1].repeat(2, 1), "pixel_values": pixels},
        torch.stack([image[0], torch.zeros_like(image[0])]),
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PAINT([[0]], [[0], [1]]), "local has 1 samples and summary 2"),
        (lambda: PAINT([0, 1], [[0]]), "one list of patch numbers per sample"),
        (lambda: PAINT([[-1]], [[]]), "one list of patch numbers per sample"),
        (lambda: PAI(-0.1), "number"),
        (lambda: SPIN(0.0), "number"),
        (lambda: VisualHighlight(-1.0), "number"),
        (lambda: ADHH(threshold=0), "number"),
        (lambda: VisualKnockout([("last", "picture")]), "there is no part 'picture'"),
        (lambda: VisualKnockout([("last", "last")]), "a row always keeps itself"),
        (lambda: VisualKnockout("image"), r"give pairs \(rows, keys\)"),
    ],
)
def test_wrong_values(make: Callable[[], Intervention], text: str) -> None:
    with pytest.raises(SelectionError, match=text):
        make()


def test_what_a_call_refuses() -> None:
    setup = Setup("llava", "several")
    far_off = pytest.raises(SelectionError, match=r"patch 99 of sample 1 does not exist; its image has 16 tokens")
    with steer(setup.model, PAINT([[0], [99]], [[], []], where=WHERE), control=True), far_off:
        setup.model(**setup.inputs)
    with pytest.raises(SelectionError, match="give the hallucination heads"):
        steer(setup.model, ADHH())
    text = {"input_ids": torch.full((1, 6), 7)}
    for method in (PAI(where=WHERE), ADHH(where=WHERE), VisualHighlight(2.0, where=WHERE), VisualKnockout(where=WHERE)):
        with steer(setup.model, method, control=True), pytest.raises(SelectionError, match="there is no image"):
            setup.model(**text)


@pytest.mark.parametrize("step", ["all", "once"])
def test_the_highlight_of_the_released_code(step: str) -> None:
    """Its own lines (jing-bi/visual-head at 843e00a, `modify` and `att_mask_image_center` of llava/model/forward.py), on scores
    before the mask: the outer product of the image mask with itself in a prompt, the image mask padded by zeros for one row."""
    setup = Setup("llava", "places", "left")
    value, scores = 1.7, {}

    def released(z: Tensor, image: Tensor, causal: Tensor) -> Tensor:
        mask = image.float()
        if z.size(-2) == 1:
            if step == "once":
                return z
            mask = torch.nn.functional.pad(mask, (0, z.size(-1) - mask.size(-1)), "constant", 0)
            mask = mask.unsqueeze(1).unsqueeze(2)
        else:
            mask = mask.unsqueeze(2)
            mask = (mask * mask.transpose(1, 2)).unsqueeze(1)
            mask[causal != 0] = 0
        return z * torch.where(mask != 0, value, 1.0)

    def make(dense: Any) -> Intervention:
        def rescore(layer: int, z: Tensor) -> Tensor:
            times = len(z) // len(dense.image)
            hidden = (z < -1e30).any(dim=1, keepdim=True)
            scores[z.size(-2) == 1] = True
            return torch.where(
                hidden, z, released(z.masked_fill(hidden, 0.0), dense.image.repeat_interleave(times, 0), hidden)
            )

        dense.rescore = rescore
        return VisualHighlight(value, step=step, where=WHERE)

    check_generation(setup, make, {}, {})
    assert set(scores) == {False, True}


def test_the_authors_rule_for_patches() -> None:
    """PAINT's own lines (hasanar1f/PAINT): the top quarter of the first layer; the outliers of the last but one above
    Q3 + 1.5 IQR; local ones that are summary too are dropped."""
    first = torch.tensor([[9.0, 8, 7, 1, 2, 3, 4, 5]])
    late = torch.tensor([[1.0, 50, 1, 2, 2, 3, 3, 60]])
    assert select_patches(first, late) == ([[0]], [[1, 7]])
    assert select_patches(first, torch.ones(1, 8), 0.5) == ([[0, 1, 2, 7]], [[]])
    with pytest.raises(SelectionError, match="ratio"):
        select_patches(first, late, 0.0)
    with pytest.raises(SelectionError, match="class token"):
        select_patches(first, late[:, :4])
