"""Several methods on the same heads, against the explicit map in fp64, and every query of the map that they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnsteer import HeadGate, Intervention, Where, kernels, sites, steer
from attnsteer.attention_map import FEW_ROWS, AttentionMap, DenseMap, ReweightedMap
from attnsteer.call import AttnCall, KeyBias, Reweight
from attnsteer.head_group import SiteAttention
from attnsteer.kernels import Attention
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.kernels.common import error, mask_of, problem, truth
from tests.laws.dense_model import Dense, Sequence, dense_model
from tests.reference.dense import dense_out

# Of the answers, relative above one. An edit may give a row that kept nearly nothing its whole weight back, which magnifies
# what fp32 statistics have lost; fp64 shows that nothing but rounding is.
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}


# The map itself: reweightings of a random problem.


@dataclass
class Explicit:
    """The map in fp64, edited as the definition says."""

    A: Tensor
    sink: Tensor
    lse: Tensor
    before: Tensor | None = None

    def reweighted(self, edit: Reweight) -> Explicit:
        B, H, n, m = self.A.shape
        wide = lambda w: torch.as_tensor(w, dtype=torch.float64).expand(B, H, n)  # noqa: E731
        rest, same = wide(edit.rest), wide(edit.rest) == 1
        factor = rest[..., None].expand(B, H, n, m)
        for keys, w in edit.groups:
            factor = torch.where(keys.expand(B, H, m)[:, :, None], wide(w)[..., None], factor)
            same = same & (wide(w) == 1)
        new, norm = self.A * factor, torch.ones(B, H, n, dtype=torch.float64)
        if edit.normalise:
            total = new.sum(-1) + self.sink
            stays = same | (total <= 0)
            norm = torch.where(stays, norm, total)
            new = torch.where(stays[..., None], self.A, new / norm[..., None])
        return Explicit(new, self.sink / norm, self.lse + norm.log(), self.A)


def rows_of_weights(shape: tuple[int, int, int], form: int) -> Tensor | float:
    """Weights that broadcast to [B, H, n]: many differ by row, some are nought, some are one."""
    B, H, n = shape
    if form == 0:
        return float(3 * torch.rand(()))
    size = {1: (n,), 2: (B, 1, 1), 3: (B, H, n), 4: (1, H, n), 5: (B, 1, n)}[form]
    choice = torch.rand(size)
    return torch.where(choice < 0.2, 0.0, torch.where(choice < 0.4, 1.0, 3 * torch.rand(size)))


def random_edit(shape: tuple[int, int, int, int], groups: int, form: int, normalise: bool) -> Reweight:
    """Disjoint random key sets, overlapping with those of other edits."""
    B, H, n, m = shape
    lead = [(1, 1), (B, 1), (1, H), (B, H)][int(torch.randint(4, ()))]
    group_of = torch.randint(0, groups + 1, (*lead, m))
    if lead == (1, 1) and torch.rand(()) < 0.3:
        # A span, and a set that is empty.
        group_of = (torch.arange(m) < m // 2).int().expand(1, 1, m)
    keys = [group_of == g + 1 for g in range(groups)]
    return Reweight(
        tuple((k, rows_of_weights((B, H, n), (form + i) % 6)) for i, k in enumerate(keys)),
        rows_of_weights((B, H, n), (form + 3) % 6),
        normalise,
    )


PROBLEMS = st.fixed_dictionaries(
    {
        "mask": st.sampled_from(
            [
                "none",
                "causal",
                "bool",
                "left padding",
                "left padding, causal flag",
                "float min",
                "window",
                "keys",
                "stack",
            ]
        ),
        "heads": st.sampled_from([(4, 4), (4, 2), (4, 1)]),
        # Rows of a prompt, and few of them.
        "n": st.sampled_from([FEW_ROWS + 5, FEW_ROWS, 1]),
        "softcap": st.sampled_from([None, 3.0]),
        "sinks": st.booleans(),
        "bias": st.sampled_from([None, (1, 1), (2, 4)]),
        "seed": st.integers(0, 10_000),
    }
)
EDITS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), min_size=1, max_size=3)


def made(mask: str, heads: tuple[int, int], n: int, seed: int, dtype: torch.dtype, **options: Any) -> Attention:
    att = problem(mask, 2, *heads, n, n if n > FEW_ROWS else 9, 8, dtype=dtype, seed=seed, **options)
    if n <= FEW_ROWS and mask not in ("none", "bool", "float min", "keys", "stack"):
        # Steps of decoding are the last rows of what such a mask hides.
        cut, causal = mask_of(mask, 2, heads[0], 9, 9, dtype)
        full = torch.ones(1, 1, 9, 9, dtype=torch.bool) if cut is None else cut.expand(*cut.shape[:2], 9, 9)
        full = full & torch.ones(9, 9, dtype=torch.bool).tril() if causal else full
        att = att.replace(mask=full[:, :, -n:], causal=False)
    return att


def differences(lazy: AttentionMap, explicit: Explicit, att: Attention) -> dict[str, float]:
    """The error of each query of a map."""
    A, (B, H, n, m) = explicit.A, att.shape
    wide = lambda keys: keys.expand(B, H, m)[:, :, None]  # noqa: E731
    found = {
        "out": error(torch.where(blind(explicit, att), 0.0, lazy.out), dense_out(A, att.v)),
        "total": error(lazy.total(), A.sum(-1)),
        "sink_share": error(lazy.sink_share(), torch.where(explicit.lse.isneginf(), 0.0, explicit.sink)),
        "entropy": error(lazy.entropy(), torch.special.entr(A).sum(-1)),
        "columns": error(lazy.column_mass(), A.sum(2)),
    }
    if not isinstance(lazy, DenseMap):
        found["lse"] = error(lazy.lse, explicit.lse)
    weight, index = torch.rand(B, n).round(decimals=1), torch.randint(0, n, (2,))
    found["columns of rows"] = error(lazy.column_mass(weight), torch.einsum("bhnm,bn->bhm", A, weight.double()))
    found["rows"] = error(lazy.rows(index), A[:, :, index])
    for lead in ((1, 1), (B, 1), (B, H)):
        keys = torch.rand(*lead, m) < 0.4
        for name, chosen in ((f"some {lead}", keys), ("none", keys & False), ("all", keys | True)):
            found[f"mass {name}"] = error(lazy.mass(chosen), (A * wide(chosen)).sum(-1))
            found[f"outside {name}"] = error(lazy.outside(chosen), (A * ~wide(chosen)).sum(-1))
            mass, out = lazy.partial(chosen)
            found[f"partial mass {name}"] = error(mass, (A * wide(chosen)).sum(-1))
            found[f"partial {name}"] = error(out, dense_out(A * wide(chosen), att.v))
    if explicit.before is not None:
        moved = (A - explicit.before).abs()
        found["distance"] = error(lazy.distance(), 0.5 * moved.sum(-1))
        # What rounding moves is no change that can be asked for.
        if moved.max() > 1e-4 or moved.max() == 0:
            assert bool(lazy.changed()) == bool(moved.max() > 0)
    return found


def blind(explicit: Explicit, att: Attention) -> Tensor:
    """[B, H, n, 1]: rows that see no key, whose output is the kernel's own."""
    return explicit.lse.isneginf()[..., None]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@settings(max_examples=30)
@given(case=PROBLEMS, edits=EDITS)
def test_every_query_of_a_reweighted_map(dtype: torch.dtype, case: dict[str, Any], edits: list[Any]) -> None:
    """Reweightings compose into one, whose answers are those of the explicit map, step by step; so do those of the reference."""
    att = made(dtype=dtype, **case)
    t = truth(att)
    chain = [random_edit(att.shape, *e) for e in edits]
    explicit = Explicit(t.A, torch.where(t.lse.isneginf(), 0.0, t.sink), t.lse)
    reference: AttentionMap = DenseMap.of(att, AttentionMap(att).out)
    for i, edit in enumerate(chain):
        # Anew for each step: once a map was asked for whole, it answers from that.
        lazy = AttentionMap(att)
        for before in chain[: i + 1]:
            lazy = lazy.reweighted(before)
        reference, explicit = reference.reweighted(edit), explicit.reweighted(edit)
        for view in (lazy, reference):
            found = differences(view, explicit, att)
            if isinstance(view, ReweightedMap):
                assert view.path == ("rows" if case["n"] <= FEW_ROWS else "fused")
                assert view.path == "rows" or view.root._dense is None, "the map was built"
            found["dense"] = error(view.dense(), explicit.A)
            size = max(1.0, float(explicit.A.max()))
            wrong = {k: f"{v:.1e}" for k, v in found.items() if not v <= LIMIT[dtype] * size}
            assert not wrong, wrong


@pytest.mark.parametrize("n", [FEW_ROWS + 5, 1])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_weights_stay_as_they_are(sinks: bool, n: int) -> None:
    """Also behind an edit that does not renormalise: a neutral method changes nothing, bit for bit."""
    att = problem("left padding", n=n, m=9, sinks=sinks)
    keys = (torch.arange(9) % 2 == 0)[None, None]
    first = Reweight(((keys, 0.5),), 0.25, normalise=False)
    neutral = Reweight(((keys, 1.0),), torch.ones(2, 4, n))
    t = truth(att)
    for plain in (AttentionMap(att), DenseMap.of(att, AttentionMap(att).out)):
        once = plain.reweighted(first)
        twice = once.reweighted(neutral)
        assert torch.equal(twice.out, once.out) and torch.equal(twice.dense(), once.dense())
        assert not bool(twice.changed()) and not twice.distance().any()
        assert torch.equal(plain.reweighted(neutral).out, plain.out)
        gone = once.reweighted(Reweight((), 0.0))
        expected = Explicit(t.A, t.sink, t.lse).reweighted(first).reweighted(Reweight((), 0.0))
        assert error(gone.dense(), expected.A) <= 1e-5


@pytest.mark.parametrize("mask", ["none", "bool per head", "float -inf"])
@pytest.mark.parametrize("kv", [8, 4, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_few_rows_by_heads(n: int, kv: int, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a long cache rows that stay are the model's own bit for bit, and its kernel runs for heads that have such rows alone."""
    monkeypatch.setattr("attnsteer.attention_map.SHORT_CACHE", 0)
    att = problem(mask, H=8, Hkv=kv, n=n, m=40)
    keys, whole = (torch.arange(40) % 3 == 0)[None, None], kernels.attend(att)
    ran: list[slice] = []
    monkeypatch.setattr(Attention, "key_slice", spied(ran, Attention.key_slice))
    all_rows, none = torch.ones(2, 8, n, dtype=torch.bool), torch.zeros(2, 8, n, dtype=torch.bool)
    some, one = none.clone(), none.clone()
    some[:, 3], some[:, 6:], one[1, 5, -1] = True, True, True
    for moved, some_kernel in ((all_rows, False), (none, True), (some, True), (one, True), (~one, True)):
        ran.clear()
        asked = SiteAttention(att, lambda: pytest.fail("the whole kernel ran"), lambda: True)
        plain = AttentionMap(att, asked.out, asked.pair, whole=att, heads=8, part=asked.part)
        edit = Reweight(((keys, torch.where(moved, 3.0, 1.0)),))
        view = plain.reweighted(edit)
        t = truth(att)
        wanted = Explicit(t.A, t.sink, t.lse).reweighted(edit)
        assert error(view.out, dense_out(wanted.A, att.v)) <= 1e-5
        stays = (view.dense() == plain.dense()).all(-1)
        assert torch.equal(view.out[stays], whole[stays]) and bool((stays | moved).all())
        heads = {h for piece in ran for h in range(piece.start, piece.stop)}
        by_head = stays.transpose(0, 1).reshape(kv, -1).any(dim=1)
        assert heads == set(by_head.nonzero()[:, 0].tolist()) and bool(heads) == some_kernel


def spied(calls: list[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The method, whose arguments are kept."""

    def spy(self: Any, given: Any) -> Any:
        calls.append(given)
        return function(self, given)

    return spy


@pytest.mark.parametrize("n", [FEW_ROWS + 5, 2])
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    edits=EDITS,
    mask=st.sampled_from(["causal", "left padding", "none"]),
    sinks=st.booleans(),
)
def test_gradients_through_compositions(n: int, seed: int, edits: list[Any], mask: str, sinks: bool) -> None:
    """Of the output and of masses, in q, k, v and the weights themselves."""
    att = made(mask, (4, 2), n, seed, torch.float64, sinks=sinks)
    leaves = [t.clone().requires_grad_(True) for t in (att.q, att.k, att.v)]
    gains = [torch.rand(2, 4, n, dtype=torch.float64).requires_grad_(True) for _ in edits]
    att = att.replace(q=leaves[0], k=leaves[1], v=leaves[2])
    chain = [random_edit(att.shape, *e) for e in edits]
    chain = [Reweight(((e.groups[0][0], g + 0.1), *e.groups[1:]) if e.groups else (), e.rest if e.groups else g + 0.1,
                      e.normalise) for e, g in zip(chain, gains, strict=True)]  # fmt: skip
    probe, keys = torch.randn(2, 4, n, 8, dtype=torch.float64), torch.rand(1, 1, att.shape[3]) < 0.5

    def gradients(view: Any) -> list[Tensor]:
        for edit in chain:
            view = view.reweighted(edit)
        loss = (view.out * probe).sum() + (view.mass(keys) * probe[..., 0]).sum()
        return list(torch.autograd.grad(loss, [*leaves, *gains], allow_unused=True))

    t = truth(att)
    A, sink = t.A, t.sink
    for edit in chain:
        step = Explicit(A, sink, torch.zeros_like(sink)).reweighted(edit)
        A, sink = step.A, step.sink
    loss = (dense_out(A, att.v) * probe).sum() + ((A * keys[:, :, None]).sum(-1) * probe[..., 0]).sum()
    expected = torch.autograd.grad(loss, [*leaves, *gains], allow_unused=True)
    zero = lambda t, like: torch.zeros_like(like) if t is None else t  # noqa: E731
    for ours, theirs, leaf in zip(gradients(AttentionMap(att)), expected, [*leaves, *gains], strict=True):
        ours, theirs = zero(ours, leaf), zero(theirs, leaf)
        assert ours.isfinite().all()
        assert float((ours - theirs).abs().max()) <= 1e-8 * max(1.0, float(theirs.abs().max()))


# Models: methods on the same heads, in the prompt and in decoding.

PERIOD = 5


@dataclass(frozen=True)
class Scatter(Intervention):
    """Weights that differ by row and head for two random key sets; sets of different seeds overlap."""

    seed: int = 0
    normalise: bool = True

    def tables(self, heads: int) -> tuple[Tensor, Tensor]:
        """(set of each key [H, PERIOD], weight of each row and set [H, PERIOD, 3]), by index in the request."""
        generator = torch.Generator().manual_seed(self.seed)
        sets = torch.randint(0, 3, (heads, PERIOD), generator=generator)
        weights = 2 * torch.rand(heads, PERIOD, 3, generator=generator)
        return sets, weights.masked_fill(torch.rand(heads, PERIOD, 3, generator=generator) < 0.15, 0.0)

    def weights(self, call: AttnCall) -> Reweight:
        sets, weights = (t[list(call.heads)] for t in self.tables(call.site.heads))
        group = sets[:, call.keys.index % PERIOD].transpose(0, 1)  # [B or 1, H, m]
        weight = weights[:, call.rows.index % PERIOD].transpose(0, 1)  # [B or 1, H, n, 3]
        return Reweight(tuple((group == g, weight[..., g]) for g in (1, 2)), weight[..., 0], self.normalise)

    def edit(self, A: Tensor, sink: Tensor, seq: Sequence, heads: list[int], of: int) -> tuple[Tensor, Tensor]:
        """The same on the explicit map, whose keys are all slots so far."""
        n, m = A.shape[2:]
        sets, weights = (t[heads].double() for t in self.tables(of))
        index = (torch.arange(m) - seq.first()[:, None]) % PERIOD  # [B, m]
        group = sets[:, index].transpose(0, 1).long()
        weight = weights[:, index[:, m - n :]].transpose(0, 1)  # [B, H, n, 3]
        new = A * torch.stack([weight[..., g, None] * (group == g)[:, :, None] for g in range(3)]).sum(0)
        if not self.normalise:
            return new, sink
        total = new.sum(-1, keepdim=True) + sink
        return torch.where(total > 0, new / total, A), torch.where(total > 0, sink / total, sink)


@dataclass(frozen=True)
class Tilt(Intervention):
    """A bias on keys by their index."""

    slope: float = 0.3

    def bias(self, call: AttnCall) -> KeyBias:
        return KeyBias(self.slope * (call.keys.index % PERIOD)[:, None].float())


@dataclass(frozen=True)
class Sharpen(Intervention):
    """Scaled queries, and scaled values."""

    factor: float = 1.5

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor]:
        return call.q * self.factor, call.k, call.v * 0.5


@dataclass(frozen=True)
class ByEntropy(Intervention):
    """An output that reads the map that all others left: its entropy and its mass on the first key."""

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        return out * (1 + call.map.entropy() + call.map.mass(call.first_key()))[..., None]


FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss"]
CHAINS = {
    "two": ((0, True), (1, True)),
    "two, the first not renormalised": ((2, False), (3, True)),
    "two, none renormalised": ((4, False), (5, False)),
    "three": ((6, True), (7, True), (8, True)),
    "three, mixed": ((9, False), (10, True), (11, False)),
}
LENGTH, STEPS = 12, 3


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


class Case:
    """A model with left padding, teacher-forced: a prompt and some steps of decoding over the cache."""

    def __init__(self, name: str):
        self.name, self.model = name, tiny_transformers(name)
        inputs = tiny_transformers_inputs(name, self.model, batch=3, length=LENGTH, padding="left")
        self.ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :STEPS].flip(-1)], dim=1)
        self.valid = torch.cat([inputs["attention_mask"].bool(), torch.ones(3, STEPS, dtype=torch.bool)], dim=1)
        self.site = next(s for s in sites(self.model) if s.layer == 1)
        self.heads = [0, 2, 3]
        self.where = Where(layers=[1], heads=self.heads)

    def logits(self, told: Callable[[int, int], None] = lambda past, stop: None) -> Tensor:
        """Of all valid rows; `told` hears of each call before it."""
        found, cache, past = [], None, 0
        for stop in range(LENGTH, LENGTH + STEPS + 1):
            told(past, stop)
            done = self.model(
                self.ids[:, past:stop],
                attention_mask=self.valid[:, :stop].long(),
                past_key_values=cache,
                use_cache=True,
            )
            found.append(done.logits)
            cache, past = done.past_key_values, stop
        return torch.cat(found, dim=1)[self.valid]

    def steered(self, *methods: Intervention, **options: Any) -> Tensor:
        with steer(self.model, *methods, **options) as run:
            out = self.logits()
            record = run.audit.record(0, self.site.path)
            assert record.changed == record.calls == 1 + STEPS
            assert options or "dense" not in str(run.audit)
        return out

    def dense(self, change: Callable[[Tensor, Tensor, Sequence], tuple[Tensor, Tensor]]) -> Tensor:
        """With `change(A, sink's share)` of the steered heads' explicit map, in fp64."""

        def edit(A: Tensor, seq: Sequence, memory: dict[str, Any]) -> Tensor:
            wide = A.double()
            seen = wide.sum(-1, keepdim=True)
            sink = (1 - seen).clamp_min(0.0) if self.name == "gpt_oss" else torch.zeros_like(seen)
            return change(wide, torch.where(seen > 0, sink, 0.0), seq)[0].to(A.dtype)

        told = Dense(self.model, {self.site.name: (self.heads, edit)}, {})
        with dense_model(self.model, told, [self.model.config]) as told:

            def tell(past: int, stop: int) -> None:
                told.sequence = Sequence(self.valid[:, :stop], past=past, prompt=LENGTH, decoding=past > 0)

            out = self.logits(tell)
        assert told.applied == 1 + STEPS
        return out


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@torch.no_grad()
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_reweightings_of_the_same_heads(case: Case, chain: Any) -> None:
    """Grouped heads, left padding, windows, soft-capping and learned sinks; prompt and decoding."""
    methods = [Scatter(seed, normalise, where=case.where) for seed, normalise in chain]
    fast = case.steered(*methods)
    assert far(fast, case.steered(*methods, reference=True)) <= 1e-5

    def change(A: Tensor, sink: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        for method in methods:
            A, sink = method.edit(A, sink, seq, case.heads, case.site.heads)
        return A, sink

    assert far(fast, case.dense(change)) <= 1e-5
    assert far(fast, case.logits()) > 1e-3 and far(fast, case.steered(*methods[:-1])) > 1e-3
    if not any(normalise for _, normalise in chain):
        # Weights multiply. Renormalised, a row that would keep nothing stays, and then the order tells.
        assert far(fast, case.steered(*methods[::-1])) <= 1e-5


@torch.no_grad()
def test_all_doors_in_their_order(case: Case) -> None:
    """inputs, bias, weights twice, output last, in whatever order they are given; each sees what the one before left."""
    weights = [Scatter(20, True, where=case.where), Scatter(21, False, where=case.where)]
    others = [
        ByEntropy(where=case.where),
        Sharpen(where=case.where),
        Tilt(where=case.where),
        HeadGate({(1, 2): -0.5, (1, 3): 0.25}),
    ]
    fast = case.steered(*others[:3], *weights, others[3])
    assert far(fast, case.steered(*others[:3], *weights, others[3], reference=True)) <= 1e-5
    assert far(fast, case.steered(weights[0], *others, weights[1])) <= 1e-6
    for left_out in range(6):
        fewer = [m for i, m in enumerate([*others, *weights]) if i != left_out]
        assert far(fast, case.steered(*fewer)) > 1e-4, left_out


@torch.no_grad()
def test_a_bias_below_two_reweightings_against_the_explicit_map() -> None:
    case = Case("llama")
    weights = [Scatter(30, True, where=case.where), Scatter(31, True, where=case.where)]

    def change(A: Tensor, sink: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        index = (torch.arange(A.shape[3]) - seq.first()[:, None]) % PERIOD
        A = A * torch.exp(0.3 * index.double())[:, None, None]
        A = A / A.sum(-1, keepdim=True).clamp_min(1e-300)
        for method in weights:
            A, sink = method.edit(A, sink, seq, case.heads, case.site.heads)
        return A, sink

    ours = case.steered(weights[0], Tilt(0.3, where=case.where), weights[1])
    assert far(ours, case.dense(change)) <= 1e-5


@torch.no_grad()
def test_scaled_inputs_below_a_bias_and_two_reweightings_against_the_explicit_map() -> None:
    """Queries times 1.5 are the map to the power of 1.5; values times a half halve its output."""
    case = Case("llama")
    weights = [Scatter(40, False, where=case.where), Scatter(41, True, where=case.where)]

    def change(A: Tensor, sink: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        index = (torch.arange(A.shape[3]) - seq.first()[:, None]) % PERIOD
        A = A**1.5 * torch.exp(0.3 * index.double())[:, None, None]
        A = A / A.sum(-1, keepdim=True).clamp_min(1e-300)
        for method in weights:
            A, sink = method.edit(A, sink, seq, case.heads, case.site.heads)
        return 0.5 * A, sink

    methods = (*weights, Tilt(0.3, where=case.where), Sharpen(1.5, where=case.where))
    assert far(case.steered(*methods), case.dense(change)) <= 1e-5


def test_gradients_of_a_model_through_two_reweightings(case: Case) -> None:
    """As those of the reference run, which goes through the explicit map."""
    methods = [Scatter(50, True, where=case.where), Scatter(51, False, where=case.where)]
    found = []
    for reference in (False, True):
        case.model.zero_grad()
        with steer(case.model, *methods, reference=reference):
            out = case.model(case.ids, attention_mask=case.valid.long(), use_cache=False).logits[case.valid]
        out.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    for name, grad in found[1].items():
        assert far(found[0][name], grad) <= 1e-4 * max(1e-3, float(grad.abs().max())), name
