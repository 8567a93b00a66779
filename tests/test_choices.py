"""What requests choose of a steering, and the edits of rows that chose differently as one."""

from __future__ import annotations

import copy

import pytest
import torch

from attnsteer import ACT, PASTA, HeadGate, SpotLight, Where, ZeroTuning, steer
from attnsteer.bound import Bound
from attnsteer.choices import Choice, Order, Part, joined
from attnsteer.edits import Reweight
from attnsteer.errors import SelectionError
from attnsteer.intervention import Intervention
from attnsteer.parameters import PerSample
from attnsteer.shared_rows import Rows, levels, together
from attnsteer.testing import tiny_transformers


def part(method: Intervention, index: int = 0) -> Part:
    return Part(Bound(index, method, method.selection(), frozenset(method.doors())), {"site": None})


def choice(*methods: Intervention) -> Choice:
    return Choice(tuple(part(m, i) for i, m in enumerate(methods)))


SPAN = [[(0, 2)]]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (ZeroTuning(gamma=2.0), ZeroTuning(gamma=2.0), True),
        (ZeroTuning(gamma=2.0), ZeroTuning(gamma=3.0), False),
        (ZeroTuning({0: [1]}, 2.0), ZeroTuning({0: [2]}, 2.0), False),
        (ZeroTuning(gamma=2.0), ZeroTuning(gamma=2.0, where=Where(phases="decode")), False),
        (PASTA(SPAN), PASTA(SPAN, scale_position="include"), False),
        (PASTA(SPAN), SpotLight(SPAN), False),
        (HeadGate({(0, 0): 0.5}), HeadGate({(0, 0): 0.25}), False),
    ],
)
def test_the_identity_of_a_choice_is_what_it_does(first: Intervention, second: Intervention, same: bool) -> None:
    a, b = choice(first).identity, choice(second).identity
    assert (a == b) == same and len(a) == 16
    assert Choice().identity == b""
    assert copy.deepcopy(choice(first)).identity == a


def test_forms_leave_out_what_may_differ_from_row_to_row() -> None:
    form = lambda method: part(method).form  # noqa: E731
    assert form(ZeroTuning(gamma=2.0)) == form(ZeroTuning(gamma=3.0)) != form(ZeroTuning({0: [1]}, 2.0))
    assert form(PASTA(SPAN, alpha=0.1)) == form(PASTA([[(3, 9), (10, 11)]], alpha=0.2))
    assert form(HeadGate({(0, 0): 0.5})) == form(HeadGate({(0, 0): 2.0})) != form(HeadGate({(0, 1): 0.5}))


def test_an_order_keeps_that_of_each_row() -> None:
    zero, gate, spot = ZeroTuning(gamma=2.0), HeadGate({(0, 0): 0.5}), SpotLight(SPAN)
    numbers = {"ZeroTuning": 0, "HeadGate": 1, "SpotLight": 2}
    of = lambda *methods: Choice(tuple(part(m, numbers[type(m).__name__]) for m in methods))  # noqa: E731
    order = Order()
    assert order.take(of(zero, gate)) and order.take(Choice()) and order.take(of(spot, gate))
    assert not order.take(of(gate, zero))
    # One intervention has one form in a batch.
    assert not order.take(of(ZeroTuning({0: [1]}, 2.0)))
    assert order.size == 3
    names = [next(iter(own.values())).bound.name for own in order.parts.values()]
    assert names.index("HeadGate") == 2 and not order.uniform


def test_methods_of_rows_are_joined() -> None:
    own = {0: part(PASTA([[(0, 2)]], alpha=0.1)), 2: part(PASTA([[(1, 3), (4, 5)]], alpha=0.2))}
    found = joined(own, 3).method
    assert isinstance(found, PASTA)
    assert found.spans == (((0, 2),), (), ((1, 3), (4, 5)))
    assert found.alpha == PerSample([0.1, 0.1, 0.2])
    gates = joined({0: part(HeadGate({(0, 0): 0.5})), 1: part(HeadGate({(0, 0): 2.0}))}, 2).method
    assert gates == HeadGate({(0, 0): [0.5, 2.0]})


def test_levels_are_of_rows_that_are_apart() -> None:
    bounds = [part(ZeroTuning(gamma=2.0), i).bound for i in range(3)]
    rows = {
        id(b): Rows.make(dict.fromkeys(own, i), 4, torch.device("cpu"))
        for i, (b, own) in enumerate(zip(bounds, ([0, 1], [2], [1, 3]), strict=True))
    }
    assert levels(bounds, rows) == [bounds[:2], bounds[2:]]


def test_edits_of_rows_apart_are_one() -> None:
    keys = torch.zeros(1, 1, 5, dtype=torch.bool)
    keys[..., 1] = True
    first, second = (Rows.make({i: i}, 3, torch.device("cpu")) for i in (0, 2))
    weight = torch.full((3, 1, 1), 7.0)
    made = together(
        [(first, Reweight(((keys, 2.0),), 0.5)), (second, Reweight(((~keys, weight), (keys, 0.0))))], torch.float32
    )
    (a, wa), (b, wb) = made.groups
    assert a[:, 0].tolist() == [keys[0, 0].tolist(), [False] * 5, (~keys[0, 0]).tolist()]
    assert b[:, 0].tolist() == [[False] * 5, [False] * 5, keys[0, 0].tolist()]
    assert wa.expand(3, 1, 1).flatten().tolist() == [2.0, 1.0, 7.0]
    assert wb.expand(3, 1, 1).flatten().tolist() == [1.0, 1.0, 0.0]
    assert made.rest.expand(3, 1, 1).flatten().tolist() == [0.5, 1.0, 1.0] and made.normalise


def test_a_method_for_one_sample() -> None:
    which = lambda name, count: 1  # noqa: E731
    assert ZeroTuning(gamma=[1.0, 2.0]).of_sample(which) == ZeroTuning(gamma=2.0)
    assert ZeroTuning(gamma=[1.0, None]).of_sample(which) is None
    assert ZeroTuning([{0: [1]}, {1: [0]}], 3.0).of_sample(which) == ZeroTuning({1: [0]}, 3.0)
    assert ZeroTuning([{0: [1]}, None], 3.0).of_sample(which) is None
    assert HeadGate({(0, 0): [0.5, None], (0, 1): 2.0}).of_sample(which) == HeadGate({(0, 1): 2.0})
    assert HeadGate({(0, 0): [0.5, None]}).of_sample(which) is None
    assert PASTA([[(0, 1)], [(2, 3)]], alpha=[0.1, 0.2]).of_sample(which) == PASTA([[(2, 3)]], alpha=0.2)
    whole = ACT(beta=0.3)
    assert whole.of_sample(which) is whole


def test_the_choice_of_a_request_is_checked_when_it_is_made() -> None:
    model = tiny_transformers("llama")
    with steer(model, SpotLight(SPAN, 0.2), ZeroTuning(gamma=2.0), ZeroTuning({0: [0]}, 3.0), control=True) as run:
        for values, message in (
            ({"gamma": 3.0}, "gamma is a parameter of ZeroTuning, ZeroTuning; say whose"),
            ({"ZeroTuning": {"gamma": 3.0}}, "Methods of one class need names"),
            ({"targett": 0.1}, "no parameter 'targett'.*Did you mean 'target'"),
            ({"target": 1.5}, "at least 0, below 1"),
        ):
            with pytest.raises(SelectionError, match=message):
                run.request(**values)
        assert run.request(target=0.5).parts[0].bound.method == SpotLight(SPAN, 0.5)
        assert run.request(spans=[(3, 4)]).parts[0].bound.method == SpotLight([[(3, 4)]], 0.2)
