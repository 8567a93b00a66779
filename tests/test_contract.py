"""What a method may not return: every wrong answer raises before an output leaves the model, naming method, door and site."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import Intervention, Where, ZeroTuning, steer
from attnsteer.call import FEW_ROWS, AttnCall, BlockBias, KeyBias, MergedTokens, Reweight, Share
from attnsteer.errors import ContractError, RegistrationError, UnsupportedHost
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from attnsteer.testing.fingerprint import fingerprint

SITE = "model.layers.1.self_attn"
DOORS = ("inputs", "bias", "weights", "output")
PHASES = ("prefill", "decode")
Answer = Callable[..., Any]


@dataclass(frozen=True)
class Wrong(Intervention):
    """Gives a wrong answer at one door, in one phase; in the other the right one `right`, or none."""

    door: str
    answer: Answer
    phase: str = "prefill"
    right: Answer | None = None

    def doors(self) -> set[str]:
        return {self.door}

    def _answer(self, call: AttnCall, *args: Any) -> Any:
        if call.phase == self.phase:
            return self.answer(call, *args)
        return None if self.right is None else self.right(call, *args)

    def inputs(self, call: AttnCall) -> Any:
        return self._answer(call)

    def bias(self, call: AttnCall) -> Any:
        return self._answer(call)

    def weights(self, call: AttnCall) -> Any:
        return self._answer(call)

    def output(self, call: AttnCall, out: Tensor) -> Any:
        return self._answer(call, out)


def keys(call: AttnCall) -> Tensor:
    """A right key set, [1, 1, m]."""
    return (call.keys.slot < 2)[None, None]


def weight(value: Any) -> Answer:
    return lambda call: Reweight(((keys(call), value(call) if callable(value) else value),))


def rest(value: Any) -> Answer:
    return lambda call: Reweight(((keys(call), 1.0),), rest=value)


def key_set(make: Answer) -> Answer:
    return lambda call: Reweight(((make(call), 2.0),))


def with_value(tensor: Tensor, value: float) -> Tensor:
    new = tensor.flatten().clone()
    new[0] = value
    return new.view(tensor.shape)


def doubled(tensor: Tensor) -> None:
    """Changes it where it stands, and gives nothing back."""
    tensor.mul_(2.0)


def shown_all(mask: Tensor) -> None:
    mask.fill_(True)


def in_place(call: AttnCall, name: str) -> None:
    doubled(getattr(call, name))


def doubled_below(tensor: Tensor) -> None:
    """The same through another view of the memory, which counts no version."""
    if not tensor.is_inference():
        doubled(tensor.data)
    else:
        tensor.numpy()[...] *= 2.0


def edited(call: AttnCall, name: str, change: Callable[[Tensor], Any]) -> Any:
    return tuple(change(getattr(call, n)) if n == name else getattr(call, n) for n in "qkv")


NAN, INF = float("nan"), float("inf")
INPUTS: dict[str, tuple[Answer, str]] = {
    "a tensor": (lambda c: c.q, "return a tuple"),
    "two": (lambda c: (c.q, c.k), "return a tuple"),
    "a dict": (lambda c: {"q": c.q}, "a dict"),
    "None inside": (lambda c: (c.q, None, c.v), "k is a NoneType"),
    "q shape": (lambda c: edited(c, "q", lambda t: t[:, :, :1].expand(-1, -1, 99, -1)), "q has shape"),
    "k short": (lambda c: edited(c, "k", lambda t: t[:, :, 1:]), "k has shape"),
    "v heads": (lambda c: edited(c, "v", lambda t: t.repeat_interleave(2, dim=1)), "v has shape"),
    "q dtype": (lambda c: edited(c, "q", Tensor.double), "q has .* dtype torch.float64"),
    "v device": (lambda c: edited(c, "v", lambda t: t.to("meta")), "v is on meta"),
    "k sparse": (lambda c: edited(c, "k", Tensor.to_sparse), "k: stored as torch.sparse"),
    "q NaN": (lambda c: edited(c, "q", lambda t: with_value(t, NAN)), "q has NaN"),
    "k infinite": (lambda c: edited(c, "k", lambda t: with_value(t, INF)), "k has NaN or infinite"),
    "q in place": (lambda c: in_place(c, "q"), "changed q in place"),
    "k in place": (lambda c: (c.q, c.k.mul_(2.0), c.v), "changed k in place"),
    "v in place": (lambda c: in_place(c, "v"), "changed v in place"),
    "q below": (lambda c: doubled_below(c.q), "changed q in place"),
    "k below": (lambda c: doubled_below(c.k), "changed k in place"),
}
BIAS: dict[str, tuple[Answer, str]] = {
    "a number": (lambda c: 1.0, "returned a float"),
    "a list": (lambda c: [1.0], "returned a list"),
    "KeyBias of a number": (lambda c: KeyBias(1.0), "returned a float"),
    "KeyBias [m]": (lambda c: KeyBias(torch.zeros(c.keys.size)), "the bias has shape"),
    "KeyBias [B, m]": (lambda c: KeyBias(torch.zeros(len(c.q), c.keys.size)), "the bias has shape"),
    "KeyBias of rows": (lambda c: KeyBias(torch.zeros(1, 1, c.rows.size, c.keys.size)), "the bias has shape"),
    "KeyBias of other heads": (lambda c: KeyBias(torch.zeros(1, 3, c.keys.size)), "the bias has shape"),
    "matrix [n, m]": (lambda c: torch.zeros(c.rows.size, c.keys.size), "the bias has shape"),
    "matrix of fewer keys": (lambda c: torch.zeros(1, 1, 1, c.keys.size - 1), "the bias has shape"),
    "integers": (lambda c: KeyBias(torch.zeros(1, 1, c.keys.size, dtype=torch.long)), "dtype torch.int64"),
    "booleans": (lambda c: torch.ones(1, 1, 1, c.keys.size, dtype=torch.bool), "dtype torch.bool"),
    "device": (lambda c: KeyBias(torch.zeros(1, 1, c.keys.size, device="meta")), "on meta"),
    "sparse": (lambda c: KeyBias(torch.zeros(1, 1, c.keys.size).to_sparse()), "the bias: stored as torch.sparse"),
    "NaN": (lambda c: KeyBias(torch.full((1, 1, c.keys.size), NAN)), "NaN or plus infinity"),
    "plus infinity": (lambda c: torch.full((1, 1, 1, c.keys.size), INF), "NaN or plus infinity"),
    "q in place": (lambda c: in_place(c, "q"), "changed q in place"),
    "out in place": (lambda c: doubled(c.map.out), "changed an answer of call.map in place"),
    "out below": (lambda c: doubled_below(c.map.out), "changed an answer of call.map in place"),
    "keys beyond float32": (lambda c: KeyBias(keys(c).double() * 1e300), "plus infinity in torch.float32"),
    "beyond float32": (lambda c: keys(c)[:, :, None].double() * 1e300, "plus infinity in torch.float32"),
}
WEIGHTS: dict[str, tuple[Answer, str]] = {
    "a tensor": (lambda c: keys(c), "return a Reweight"),
    "a tuple": (lambda c: ((keys(c), 2.0),), "return a Reweight"),
    "a group of three": (lambda c: Reweight(((keys(c), 2.0, 1.0),)), "group 0 is a tuple"),
    "no pairs": (lambda c: Reweight((keys(c),)), "group 0 is a tensor"),
    "keys are numbers": (key_set(lambda c: keys(c).float()), "expected a bool tensor"),
    "keys are indices": (key_set(lambda c: torch.tensor([0, 1])), "expected a bool tensor"),
    "keys are a list": (key_set(lambda c: [0, 1]), "the keys of group 0 are a list"),
    "keys [B, m]": (key_set(lambda c: keys(c)[0].expand(len(c.q), -1)), r"keys\[:, None\]"),
    "keys [m]": (key_set(lambda c: keys(c)[0, 0]), "the keys of group 0 have shape"),
    "keys of another batch": (key_set(lambda c: keys(c).expand(len(c.q) + 1, -1, -1)), "have shape"),
    "keys of other heads": (key_set(lambda c: keys(c).expand(-1, 3, -1)), "have shape"),
    "keys too short": (key_set(lambda c: keys(c)[..., :-1]), "have shape"),
    "keys of rows": (key_set(lambda c: keys(c)[:, :, None].expand(-1, -1, c.rows.size, -1)), "have shape"),
    "keys elsewhere": (key_set(lambda c: keys(c).to("meta")), "on meta"),
    "overlap": (lambda c: Reweight(((keys(c), 2.0), (keys(c), 3.0))), "overlap"),
    "overlap of a head": (
        lambda c: Reweight(((keys(c), 2.0), (keys(c) & (torch.arange(c.q.shape[1]) == 1)[None, :, None], 3.0))),
        "overlap",
    ),
    "overlap by an equal empty weight": (lambda c: Reweight(((keys(c), 1.0), (keys(c), 1.0))), "overlap"),
    "weight NaN": (weight(NAN), "the weight of group 0 has NaN"),
    "weight infinite": (weight(INF), "the weight of group 0 has NaN or infinite"),
    "weight negative": (weight(-0.5), "negative values .*-0.5"),
    "weight boolean": (weight(True), "the weight of group 0 is a bool"),
    "weight of 1329 bits": (weight(10**400), "the weight of group 0 is an integer of 1329 bits"),
    "weight sparse": (weight(torch.ones(1).to_sparse()), "the weight of group 0: stored as torch.sparse"),
    "keys sparse": (key_set(lambda c: keys(c).to_sparse()), "the keys of group 0: stored as torch.sparse"),
    "weight missing": (weight(None), "the weight of group 0 is a NoneType"),
    "weight integers": (weight(torch.tensor(2)), "dtype torch.int64"),
    "weight [n, 1]": (weight(lambda c: torch.ones(99, 1)), "the weight of group 0 has shape"),
    "weight of four dimensions": (weight(lambda c: torch.ones(1, 1, 1, 1)), "has shape"),
    "weight of keys": (weight(lambda c: torch.ones(c.keys.size + 5)), "has shape"),
    "one weight NaN": (weight(lambda c: with_value(torch.ones(c.q.shape[:3]), NAN)), "has NaN"),
    "one weight negative": (weight(lambda c: with_value(torch.ones(c.q.shape[:3]), -1.0)), "negative"),
    "weight elsewhere": (weight(torch.ones(1, device="meta")), "on meta"),
    "one number elsewhere": (weight(torch.ones((), device="meta")), "on meta"),
    "no groups": (lambda c: Reweight(None), "the groups are a NoneType"),
    "groups used up": (lambda c: Reweight(pair for pair in [(keys(c), 2.0)]), "the groups are a generator"),
    "normalise is a word": (lambda c: Reweight(((keys(c), 2.0),), normalise="no"), "normalise is a str"),
    "positive is a word": (lambda c: Reweight(((keys(c), 2.0),), positive="no"), "positive is a str"),
    "grows is a number": (lambda c: Reweight(((keys(c), 2.0),), grows=1), "grows is a int"),
    "scale_sinks is missing": (lambda c: Share(keys(c), torch.sqrt, None), "scale_sinks is a NoneType"),
    "weight beyond float32": (weight(torch.tensor(1e300, dtype=torch.float64)), "infinite values in torch.float32"),
    "rest beyond float32": (rest(torch.tensor(1e300, dtype=torch.float64)), "infinite values in torch.float32"),
    "rest NaN": (rest(NAN), "the weight of the rest has NaN"),
    "rest negative": (rest(-1.0), "the weight of the rest has negative"),
    "rest missing": (rest(None), "the weight of the rest is a NoneType"),
    "k in place": (lambda c: in_place(c, "k"), "changed k in place"),
    "mask in place": (lambda c: shown_all(c.map.att.mask), "changed call.map.att.mask in place"),
    "a share in place": (lambda c: Share(keys(c), lambda share: share.mul_(0.5)), "the new share is written into"),
}
OUTPUT: dict[str, tuple[Answer, str]] = {
    "a number": (lambda c, out: 2.0, "returned a float"),
    "a tuple": (lambda c, out: (out,), "returned a tuple"),
    "integers": (lambda c, out: out.long(), "of torch.int64"),
    "booleans": (lambda c, out: out > 0, "of torch.bool"),
    "merged heads": (lambda c, out: out.transpose(1, 2).flatten(2), "returned shape"),
    "rows lost": (lambda c, out: out[:, :, :0], "returned shape"),
    "one head": (lambda c, out: out[:, :1], "returned shape"),
    "one sample": (lambda c, out: out[:1].repeat(3, 1, 1, 1), "returned shape"),
    "sparse": (lambda c, out: out.to_sparse(), "stored as torch.sparse"),
    "less precise": (lambda c, out: out.half(), "returned dtype torch.float16; expected torch.float32"),
    "more precise": (lambda c, out: out.double(), "returned dtype torch.float64; expected torch.float32"),
    "device": (lambda c, out: out.to("meta"), "on meta"),
    "NaN": (lambda c, out: with_value(out, NAN), "NaN or infinite"),
    "infinite": (lambda c, out: with_value(out, INF), "NaN or infinite"),
    "beyond float32": (lambda c, out: out.double() + 1e300, "(infinite values in|dtype) torch.float"),
    "mul_ and nothing": (lambda c, out: doubled(out), "changed out in place"),
    "mul_ and out": (lambda c, out: out.mul_(2.0), "changed out in place"),
    "zeroed": (lambda c, out: out.zero_(), "changed out in place"),
    "out below": (lambda c, out: doubled_below(out), "changed out in place"),
    "q in place": (lambda c, out: in_place(c, "q"), "changed q in place"),
    "v in place and a new out": (lambda c, out: out + c.v.mul_(2.0).sum(), "changed v in place"),
}
TABLES = {"inputs": INPUTS, "bias": BIAS, "weights": WEIGHTS, "output": OUTPUT}
CASES = [(door, name) for door in DOORS for name in TABLES[door]]
RIGHT: dict[str, Answer] = {
    "inputs": lambda c: (c.q * 2.0, c.k, c.v),
    "bias": lambda c: KeyBias(keys(c).float()),
    "weights": weight(2.0),
    "output": lambda c, out: out * 2.0,
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_transformers("llama")


def refused(model: nn.Module, method: Intervention, words: str, phase: str = "prefill", **options: Any) -> None:
    """The call of this phase raises, no output of it leaves the model, and the model is as before."""
    inputs = tiny_transformers_inputs("llama", model, batch=2, length=9, padding="left")
    plain, before, given = model(**inputs).logits, fingerprint(model), []
    hook = model.register_forward_hook(lambda module, args, output: given.append(output))
    door = method.door
    try:
        with pytest.raises(ContractError) as caught, steer(model, method, **options):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
    finally:
        hook.remove()
    assert re.search(rf"^Wrong\.{door} at {re.escape(SITE)}: .*{words}", str(caught.value)), caught.value
    assert len(given) == PHASES.index(phase)
    assert fingerprint(model) == before and torch.equal(model(**inputs).logits, plain)


def merged(call: AttnCall, **changes: Any) -> MergedTokens:
    """Each token a group of its own."""
    B, n = len(call.q), call.rows.size
    right = {"q": call.q, "k": call.k, "v": call.v, "group": torch.arange(n).repeat(B, 1), "size": torch.ones(B, n)}
    return MergedTokens(**{**right, **changes})


def blocks(call: AttnCall, **changes: Any) -> BlockBias:
    """All keys in one block that all rows keep."""
    block, keep = torch.zeros(1, call.keys.size, dtype=torch.long), torch.ones(1, 1, call.rows.size, 1) > 0
    return BlockBias(**{"block": block, "keep": keep, "there": keep, **changes})


GROUPS: dict[str, tuple[str, Answer, str]] = {
    "groups elsewhere": ("inputs", lambda c: merged(c, group=merged(c).group.to("meta")), "the groups is on meta"),
    "a group too many": ("inputs", lambda c: merged(c, group=merged(c).group + 1), "in no one of the 9 groups"),
    "sizes are a list": ("inputs", lambda c: merged(c, size=[1.0] * 9), "the sizes are a list"),
    "sizes are integers": (
        "inputs",
        lambda c: merged(c, size=torch.ones(2, 9).long()),
        "the sizes are a tensor .*int64",
    ),
    "sizes elsewhere": ("inputs", lambda c: merged(c, size=torch.ones(2, 9).to("meta")), "the sizes is on meta"),
    "sizes of one sample": ("inputs", lambda c: merged(c, size=torch.ones(1, 9)), "the sizes are a tensor .1, 9."),
    "a size is infinite": ("inputs", lambda c: merged(c, size=torch.full((2, 9), INF)), "some sizes are"),
    "a size is zero": ("inputs", lambda c: merged(c, size=torch.zeros(2, 9)), "some sizes are zero"),
    "block -2": ("bias", lambda c: blocks(c, block=blocks(c).block - 2), "a key is in block -2; 1 blocks"),
    "block 1 of 1": ("bias", lambda c: blocks(c, block=blocks(c).block + 1), "a key is in block 1; 1 blocks"),
    "there is a list": ("bias", lambda c: blocks(c, there=[True]), "which blocks hold something is a list"),
    "there are numbers": ("bias", lambda c: blocks(c, there=torch.ones(1, 1, 9, 1)), "hold something is a tensor"),
    "there of other rows": ("bias", lambda c: blocks(c, there=torch.ones(3, 1) > 0), "broadcasts to .1, 1, 9, 1."),
    "there elsewhere": ("bias", lambda c: blocks(c, there=blocks(c).keep.to("meta")), "hold something is on meta"),
}


@pytest.mark.parametrize("name", GROUPS)
@torch.no_grad()
def test_wrong_groups_and_blocks(model: nn.Module, name: str) -> None:
    door, answer, words = GROUPS[name]
    refused(model, Wrong(door, answer, where=Where(layers=[1])), words)


@torch.no_grad()
def test_a_share_that_raises_says_where(model: nn.Module) -> None:
    inputs = tiny_transformers_inputs("llama", model, batch=2, length=9)
    method = Wrong("weights", lambda c: Share(keys(c), lambda share: share / {}["no"]), where=Where(layers=[1]))
    with pytest.raises(KeyError) as caught, steer(model, method):
        model(**inputs)
    assert caught.value.__notes__ == [f"attnsteer: raised in the share of Wrong.weights at {SITE}."]


@pytest.mark.long
@torch.no_grad()
def test_what_needs_no_values_is_looked_at_in_compiled_code_too() -> None:
    """Of these, the first were taken in silence; a compiler's own error would name no method."""
    model = tiny_transformers("llama", num_hidden_layers=1)
    inputs = tiny_transformers_inputs("llama", model, batch=2, length=9)
    cases = [("bias", "matrix [n, m]"), ("bias", "integers"), ("weights", "keys [B, m]"), ("output", "more precise")]
    for door, name in cases:
        answer, words = TABLES[door][name]
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(ContractError, match=rf"^Wrong\.{door} at .*{words}"), steer(model, Wrong(door, answer)):
            compiled(**inputs)
    torch._dynamo.reset()


@pytest.mark.parametrize("heads", [None, [0, 3]], ids=["all heads", "two heads"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("door", "name"), CASES)
def test_a_wrong_answer_to_the_prompt(model: nn.Module, door: str, name: str, mode: Any, heads: Any) -> None:
    answer, words = TABLES[door][name]
    with mode():
        refused(model, Wrong(door, answer, where=Where(layers=[1], heads=heads)), words)


@pytest.mark.parametrize("after", ["nothing", "a right answer"])
@pytest.mark.parametrize(("door", "name"), CASES)
@torch.no_grad()
def test_a_wrong_answer_that_is_the_first_in_decoding(model: nn.Module, door: str, name: str, after: str) -> None:
    answer, words = TABLES[door][name]
    right = RIGHT[door] if after == "a right answer" else None
    refused(model, Wrong(door, answer, "decode", right, where=Where(layers=[1])), words, "decode")


@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_a_wrong_answer_is_noticed_in_a_reference_run_too(model: nn.Module, door: str) -> None:
    for answer, words in TABLES[door].values():
        refused(model, Wrong(door, answer, where=Where(layers=[1])), words, reference=True)


@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_every_head_group_is_looked_at(model: nn.Module, door: str) -> None:
    """Another method divides the heads; the answer for the second group is wrong only."""
    answer, words = next(iter(TABLES[door].values()))
    right = RIGHT[door]
    method = Wrong(door, lambda c, *a: (right if 0 in c.heads else answer)(c, *a), where=Where(layers=[1]))
    inputs = tiny_transformers_inputs("llama", model, batch=2, length=9)
    for other in (ZeroTuning({1: [0]}, 2.0), ZeroTuning({1: [3]}, 2.0)):
        with pytest.raises(ContractError, match=rf"Wrong\.{door} at .*{words}"), steer(model, method, other):
            model(**inputs)


@torch.no_grad()
def test_an_output_is_looked_at_in_the_dtype_of_the_model(model: nn.Module) -> None:
    """Finite as it is returned, infinite in half precision."""
    half, inputs = tiny_transformers("llama").half(), tiny_transformers_inputs("llama", model, batch=2, length=9)
    wrong = Wrong("output", lambda c, out: (out.abs() + 1) * 1e5, where=Where(layers=[1]))
    with (
        pytest.raises(ContractError, match=r"^Wrong\.output at .*infinite values"),
        steer(half, wrong),
    ):
        half(**inputs)
    with steer(model, wrong):
        assert bool(model(**inputs).logits.isfinite().all())


@pytest.mark.parametrize("heads", [None, [0, 3]], ids=["all heads", "two heads"])
@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_weights_that_overflow_the_dtype_of_the_model_are_refused(reference: bool, heads: Any) -> None:
    """Finite as they are returned, infinite in the half-precision outputs that they make; in each call that is looked at."""
    half = tiny_transformers("llama").half()
    inputs = tiny_transformers_inputs("llama", half, batch=2, length=9)
    where = Where(layers=[1], heads=heads)
    much = Wrong("weights", lambda c: Reweight(((keys(c), 1e30),), normalise=False), where=where)
    right = Wrong("weights", RIGHT["weights"], where=where)
    for methods in ((much,), (right, much)):
        with steer(half, *methods, reference=reference, control=True):
            for _ in range(2):
                with pytest.raises(ContractError, match=r"^Wrong\.weights at .*infinite outputs in torch.float16"):
                    half(**inputs)
    # What renormalising makes of it is finite, at once or by the method behind.
    for methods in ((Wrong("weights", lambda c: Reweight(((keys(c), 1e30),)), where=where),), (much, right)):
        with steer(half, *methods, reference=reference, control=True):
            assert bool(half(**inputs).logits.isfinite().all())


@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_an_exception_of_a_method_says_where(model: nn.Module, door: str) -> None:
    def fails(call: AttnCall, *args: Any) -> None:
        raise ZeroDivisionError("its own")

    inputs = tiny_transformers_inputs("llama", model, batch=2, length=9)
    with pytest.raises(ZeroDivisionError, match="its own") as caught, steer(model, Wrong(door, fails)):
        model(**inputs)
    assert caught.value.__notes__ == [f"attnsteer: raised in Wrong.{door} at model.layers.0.self_attn."]


@pytest.mark.parametrize(
    ("door", "function"),
    [
        ("output", lambda self, call: None),
        ("weights", lambda call: None),
        ("bias", lambda self, call, *, more: None),
        ("inputs", lambda self, call, out: None),
        ("around", lambda self, forward, inputs: None),
    ],
)
def test_a_door_with_other_parameters_is_refused_when_its_class_is_made(door: str, function: Answer) -> None:
    with pytest.raises(RegistrationError, match=rf"Bad\.{door}\(.* is called as {door}\("):
        type("Bad", (Intervention,), {door: function})
    type("Good", (Intervention,), {door: lambda self, *args, **more: None})


@pytest.mark.parametrize("name", ["new", "weights", "around", "to_dict", "selection"])
def test_a_field_with_the_name_of_a_function_is_refused_when_its_class_is_made(name: str) -> None:
    with pytest.raises(RegistrationError, match=rf"Bad\.{name}: a method has a function {name}\(\) already"):
        type("Bad", (Intervention,), {"__annotations__": {name: "float"}, name: 1.0})


def test_a_need_that_is_misspelt_gets_a_suggestion(model: nn.Module) -> None:
    def needing(*names: str) -> Intervention:
        doors = {"needs": names, "weights": lambda self, call: None}
        return dataclass(frozen=True)(type("Needy", (Intervention,), doors))()

    with pytest.raises(UnsupportedHost) as caught:
        steer(model, needing("token"))
    assert str(caught.value) == (
        "Needy needs token, which a call of a LlamaForCausalLM does not give; it gives bases, image_free, images, layers, "
        "requests, residual, tokens. Did you mean 'tokens'?"
    )
    with pytest.raises(UnsupportedHost, match=r"needs grid, which .* residual, tokens\.$"):
        steer(model, needing("grid"))
    with pytest.raises(
        RegistrationError, match=r'Needy.needs is .tokens.; give a tuple of names, e.g. needs = \("tokens",\)'
    ):
        type("Needy", (Intervention,), {"needs": "tokens"})


@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_right_answers_pass(model: nn.Module, door: str) -> None:
    """The check refuses nothing that is right: the same answers, in both phases."""
    inputs = tiny_transformers_inputs("llama", model, batch=2, length=9, padding="left")
    wide = {
        "inputs": lambda c: [c.q, c.k * 2.0, c.v],
        "bias": lambda c: torch.where(keys(c)[:, :, None], -torch.inf, 0.0),
        "weights": lambda c: Reweight(
            [(keys(c).expand(2, c.q.shape[1], -1), torch.rand(c.rows.size)), (~keys(c), torch.rand(2, 1, 1))], 0, False
        ),
        "output": lambda c, out: (out.double() * 2.0).to(out.dtype),
    }
    for answer in (RIGHT[door], wide[door]):
        for phase in PHASES:
            with steer(model, Wrong(door, answer, phase, where=Where(layers=[1]))) as run:
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
            phases = run.audit.record(0, SITE).to_dict()["phases"]
            assert phases[phase]["changed"] == phases[phase]["edits"] == (1 if phase == "prefill" else 2)


@torch.no_grad()
def test_a_module_that_is_no_library_s_is_checked_alike() -> None:
    class Attention(nn.Module):
        num_heads = 2

        def forward(self, x: Tensor) -> Tensor:
            q, n = x.unflatten(-1, (2, -1)).transpose(1, 2), x.shape[1]
            mask = torch.ones(n, n, dtype=torch.bool).tril()
            out = torch.nn.functional.scaled_dot_product_attention(q, q + 1, q - 1, attn_mask=mask)
            return out.transpose(1, 2).flatten(2)

    module, x = Attention(), torch.randn(2, 9, 8)
    plain = module(x)
    for door, name in CASES:
        answer, words = TABLES[door][name]
        expected = rf"^Wrong\.{door} at Attention: .*{words}"
        with pytest.raises(ContractError, match=expected), steer(module, Wrong(door, answer)):
            module(x.clone())
    assert torch.equal(module(x), plain)


@dataclass(frozen=True)
class Careless(Intervention):
    """Changes what the map has answered, which the edit itself, others and the audit are worked out from."""

    answer: Answer

    def weights(self, call: AttnCall) -> Reweight:
        kept = keys(call)
        doubled(self.answer(call.map, kept))
        return Reweight(((kept, 2.0),))


ANSWERS: dict[str, Answer] = {
    "mass": lambda view, keys: view.partial(keys)[0],
    "partial output": lambda view, keys: view.partial(keys)[1],
    "out": lambda view, keys: view.out,
    "map": lambda view, keys: view.dense(),
    "lse": lambda view, keys: view.lse,
}


@pytest.mark.parametrize("behind", ["nothing", "another method"])
@pytest.mark.parametrize("rows", [9, 3])
@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_answer_of_the_map_that_is_changed_in_place(
    model: nn.Module, mode: Any, name: str, rows: int, behind: str
) -> None:
    """Of the model's own map, and of the one that an earlier method left: it raises, or does nothing at all."""
    with mode():
        changed_answer(model, name, rows, behind)


def changed_answer(model: nn.Module, name: str, rows: int, behind: str) -> None:
    inputs = tiny_transformers_inputs("llama", model, batch=2, length=rows)
    where = Where(layers=[1], heads=[0, 3])
    # By row, so that it is not among the scores.
    twice = Wrong("weights", lambda c: Reweight(((keys(c), torch.full((c.rows.size,), 2.0)),)), where=where)
    before, method = [twice] if behind == "another method" else [], Careless(ANSWERS[name], where=where)
    if before and rows > FEW_ROWS and name in ("mass", "partial output"):
        # Put together anew at each question.
        with steer(model, *before, Wrong("weights", RIGHT["weights"], where=where)):
            expected = model(**inputs).logits
        with steer(model, *before, method):
            assert torch.equal(model(**inputs).logits, expected)
        return
    words = r"^Careless\.weights at .*changed an answer of call\.map in place"
    with pytest.raises(ContractError, match=words), steer(model, *before, method):
        model(**inputs)


@torch.no_grad()
def test_a_key_set_that_is_changed_between_questions_is_another_one(model: nn.Module) -> None:
    inputs = tiny_transformers_inputs("llama", model, batch=2, length=9)
    seen = []

    @dataclass(frozen=True)
    class Growing(Intervention):
        observes = True

        def weights(self, call: AttnCall) -> None:
            own = keys(call).clone()
            first = call.map.mass(own)
            own |= True
            seen.append((first, call.map.mass(own), call.map.total()))

    with steer(model, Growing(where=Where(layers=[1]))):
        model(**inputs)
    ((first, whole, total),) = seen
    assert float((whole - total).abs().max()) <= 1e-6 and float((whole - first).max()) > 0.1


class KeepsState(Intervention):
    """Keeps a value of its test in the state."""

    kept: Any = None
    kinds = ("self",)

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        call.state["x"] = type(self).kept
        return out * 1.5


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.zeros(1, 3), torch.zeros(()), [1, 2], object(), {}], ids=list("abcde"))
def test_a_state_that_cannot_follow_its_sequence_is_refused(value: Any) -> None:
    model = tiny_transformers("llama")
    KeepsState.kept = value
    with (
        pytest.raises(ContractError, match=r"KeepsState.output at model.layers.*state\['x'\]"),
        steer(model, KeepsState(where=Where(layers=[1]))),
    ):
        model(torch.arange(4, 18).reshape(2, 7))


@dataclass(frozen=True)
class TurnsTheAccount(Intervention):
    """Changes what all methods and layers of a forward read."""

    change: Answer

    kinds = ("self",)
    needs = ("tokens", "residual")

    def weights(self, call: AttnCall) -> Reweight:
        self.change(call)
        return Reweight(((call.first_key(), 2.0),))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda c: c.key_index().zero_(), "call.keys"),
        (lambda c: c.keys.slot.add_(1), "call.keys"),
        (lambda c: c.first_key().logical_not_(), "call.keys"),
        (lambda c: c.prompt_keys().logical_not_(), "call.keys"),
        (lambda c: c.rows.last.logical_not_(), "call.rows"),
        (lambda c: c.prompt_end.logical_not_(), "call.rows"),
        (lambda c: c.tokens.valid.logical_not_(), "call.tokens"),
        (lambda c: c.residual.zero_(), "call.residual"),
    ],
)
def test_an_account_that_is_changed_in_place_is_refused(change: Answer, name: str, mode: Any) -> None:
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model, batch=2, length=7, padding="left")
    words = rf"TurnsTheAccount.weights at model.layers.0.*changed .*{name}"
    with (
        mode(),
        pytest.raises(ContractError, match=words),
        steer(model, TurnsTheAccount(change, where=Where(layers=[0]))),
    ):
        model(**inputs)
