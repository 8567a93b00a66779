"""Tensor parallelism, DistributedDataParallel and FSDP2 under steering: two processes on CPU equal one."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import (
    ACT,
    PASTA,
    VHR,
    HeadGate,
    HeadSet,
    Intervention,
    SpotLight,
    Where,
    ZeroTuning,
    sites,
    steer,
)
from attnsteer.call import AttnCall, Reweight
from attnsteer.errors import CompositionError, ContractError, NothingChanged, UnsupportedHost
from attnsteer.testing import Setting, tiny_transformers, tiny_transformers_inputs
from tests.laws.cases import METHODS, SPAN, VISION
from tests.processes import start, work

BATCH, TOLERANCE = 2, 1e-5
# Process 0 holds heads 0 and 1 of each layer, process 1 heads 2 and 3.
SPANS = [SPAN] * BATCH


def at(heads: dict[int, list[int]]) -> Where:
    return Where(heads=HeadSet(heads))


MORE = {
    "ACT on all heads": lambda: [ACT(None, 0.3, 0.12, where=Where(layers=[0, 1, 2]))],
    "ACT on heads of one process": lambda: [ACT({1: [3]}, 0.2, 0.05)],
    "SpotLight, pooled": lambda: [SpotLight(SPANS, 0.6, pooled=True)],
    "SpotLight, pooled, some heads of each": lambda: [SpotLight(SPANS, 0.6, pooled=True, where=at({0: [0, 1, 3]}))],
    "SpotLight, pooled, heads of one process": lambda: [SpotLight(SPANS, 0.6, pooled=True, where=at({1: [2, 3]}))],
    "values for each sample": lambda: [SpotLight(SPANS, [0.6, None], pooled=True), HeadGate({(0, 2): [-1.0, 0.5]})],
    "heads for each sample": lambda: [ZeroTuning([{1: [0, 1]}, {1: [3]}], [4.0, 0.3])],
    "two methods": lambda: [PASTA(SPANS, {0: [1, 2]}, 0.1), HeadGate({(0, 2): -1.0, (2, 0): 0.5})],
}


@dataclass(frozen=True)
class Median(Intervention):
    """Scales the attention to the first token in the heads that have more of it than the median head."""

    whole_heads = True

    def weights(self, call: AttnCall) -> Reweight:
        mass = call.map.mass(call.first_key())
        return Reweight(((call.first_key(), torch.where(mass > mass.median(dim=1, keepdim=True).values, 2.0, 1.0)),))


@dataclass(frozen=True)
class Undeclared(Intervention):
    """Reduces over heads without saying so."""

    def weights(self, call: AttnCall) -> Reweight:
        return Reweight(((call.first_key(), call.over_heads(call.map.mass(call.first_key()))),))


# The models of one process, and how they are sharded.


def rank() -> int:
    return torch.distributed.get_rank()


def folder() -> Path:
    return Path(sys.argv[3])


@functools.cache
def whole(name: str) -> nn.Module:
    return tiny_transformers(name)


@functools.cache
def sharded(name: str) -> nn.Module:
    """The model as `from_pretrained` shards it."""
    from transformers.distributed import DistributedConfig

    path = folder() / name
    if rank() == 0:
        whole(name).save_pretrained(path)
    torch.distributed.barrier()
    config = DistributedConfig(tp_size=2, tp_plan="auto")
    model = type(whole(name)).from_pretrained(path, distributed_config=config).eval()
    model.generation_config = whole(name).generation_config
    return model


def parallelized(model: nn.Module, order: list[int]) -> nn.Module:
    """A Llama model sharded by torch over the processes in this order."""
    from torch.distributed.tensor import parallel

    mesh = torch.distributed.DeviceMesh("cpu", order)
    names = {"q_proj": parallel.ColwiseParallel, "k_proj": parallel.ColwiseParallel, "v_proj": parallel.ColwiseParallel}
    plan = {f"model.layers.*.self_attn.{n}": style() for n, style in names.items()}
    plan["model.layers.*.self_attn.o_proj"] = parallel.RowwiseParallel()
    return parallel.parallelize_module(model, mesh, plan)


def inputs(name: str, seed: int = 0, padding: str | None = "left") -> dict[str, Tensor]:
    return tiny_transformers_inputs(name, whole(name), batch=BATCH, padding=padding, seed=seed)


def setting(name: str) -> Setting:
    return Setting(name, tuple(s for s in sites(whole(name)) if s.modality == "text"), BATCH)


def same(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    error = float((a - b).abs().max())
    assert error <= tolerance * max(1.0, float(b.abs().max())), error


@torch.no_grad()
def equal(name: str, methods: list[Intervention], model: nn.Module | None = None) -> None:
    """Logits and generated tokens of a sharded model, steered, are those of the whole one; and steering shows."""
    got, given = [], inputs(name)
    options = {"max_new_tokens": 5, "do_sample": False}
    for target in (whole(name), model or sharded(name)):
        with steer(target, *methods):
            got.append((target(**given).logits, target.generate(**given, **options)))
    (logits, tokens), (part, drawn) = got
    valid = given["attention_mask"].bool()
    same(part[valid], logits[valid])
    assert torch.equal(drawn, tokens)
    assert float((logits - whole(name)(**given).logits)[valid].abs().max()) > 1e-3


def law(name: str, case: Any) -> None:
    equal(name, [case.acting(setting(name))])


# Tensor parallelism: what is refused.


@torch.no_grad()
def refused(name: str, method: Intervention, words: str, kind: type[Exception] = UnsupportedHost) -> None:
    """In every process, also in one without a selected head, so that none waits for the others."""
    with pytest.raises(kind, match=words), steer(sharded(name), method):
        sharded(name)(**inputs(name))


def learned_is_refused() -> None:
    """In every process; without a gradient its numbers are used as they are."""
    made = ZeroTuning({1: [3]}, torch.tensor([4.0, 0.5], requires_grad=True))
    words = r"gamma needs a gradient.* 2 of 4 heads"
    with pytest.raises(UnsupportedHost, match=words), steer(sharded("llama"), made):
        sharded("llama")(**inputs("llama"))
    equal("llama", [made])


@torch.no_grad()
def sharded_while_steered() -> None:
    model = tiny_transformers("llama")
    with pytest.raises(UnsupportedHost, match="after it is loaded and sharded"), steer(model, ZeroTuning(None, 5.0)):
        parallelized(model, [0, 1])(**inputs("llama"))


@torch.no_grad()
def another_order() -> None:
    model = parallelized(tiny_transformers("llama"), [1, 0])
    with pytest.raises(UnsupportedHost, match="of ascending ranks"), steer(model, ZeroTuning(None, 5.0)):
        model(**inputs("llama"))


@torch.no_grad()
def nothing_changed_here() -> None:
    """What the heads of another process did is not known, so that nothing changed here is a warning, and no error."""
    model, given = sharded("llama"), inputs("llama")
    gates = HeadGate({(1, 0): 1.0, (1, 3): 0.5})
    with pytest.warns(NothingChanged) if rank() == 0 else nullcontext(), steer(model, gates):
        model(**given)


# Gradients.


def gradients(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    model.zero_grad()
    logits = model(**given).logits
    logits.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n.removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, grad in expected.items():
        error = float((got[name] - grad).abs().max() / grad.abs().max())
        assert error <= TOLERANCE, (name, error)


def checkpointing(target: Any, what: str, *args: Any) -> None:
    """Switch checkpointing, by the name that the installed transformers has: newer ones warn of the other."""
    old = getattr(target, f"gradient_checkpointing_{what}")
    getattr(target, f"activation_checkpointing_{what}", old)(*args)


def tensor_parallel_gradients(methods: Callable[[], list[Intervention]], checkpointed: bool = False) -> None:
    given = inputs("llama", padding=None)
    if checkpointed:
        checkpointing(sharded("llama").train(), "enable", {"use_reentrant": False})
    plain = gradients(whole("llama"), given)
    with steer(whole("llama"), *methods()):
        expected = gradients(whole("llama"), given)
    with steer(sharded("llama"), *methods()):
        same_gradients(gradients(sharded("llama"), given), expected)
    if checkpointed:
        checkpointing(sharded("llama").eval(), "disable")
    assert any(float((expected[n] - plain[n]).abs().max()) > 1e-4 for n in plain)


TRAINED = [SpotLight(SPANS, 0.6, pooled=True, where=Where(layers=[0, 2])), ZeroTuning({1: [1, 3]}, 5.0)]


@functools.cache
def expected_gradients() -> dict[str, Tensor]:
    """Those of one process: the mean over the batches of both."""
    model = tiny_transformers("llama")
    with steer(model, *TRAINED):
        parts = [gradients(model, inputs("llama", seed, None)) for seed in (0, 1)]
    return {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}


@contextmanager
def wrapped(wrap: Callable[[nn.Module], nn.Module], first: str) -> Iterator[nn.Module]:
    """A model that is wrapped before or after it is steered."""
    model = tiny_transformers("llama")
    if first == "wrap":
        outer = wrap(model)
        with steer(model, *TRAINED):
            yield outer
    else:
        with steer(model, *TRAINED):
            yield wrap(model)


def data_parallel(wrap: Callable[[nn.Module], nn.Module], first: str) -> None:
    """Each process has its own batch; the gradients are those of both, and the model is plain again afterwards."""
    given = inputs("llama", rank(), None)
    with wrapped(wrap, first) as model:
        same_gradients(gradients(model, given), expected_gradients())
        # A second step finds what the first one did.
        same_gradients(gradients(model, given), expected_gradients())
    with torch.no_grad():
        same(model(**given).logits, whole("llama")(**given).logits)


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp_of_attention(model: nn.Module) -> nn.Module:
    """The attention modules themselves get another class; the model's own kernel is looked up beside the class they had."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer.self_attn)
    fully_shard(model).set_attn_implementation("eager")
    return model


def steered_wrapper() -> None:
    outer = ddp(tiny_transformers("llama"))
    with steer(outer, *TRAINED):
        same_gradients(gradients(outer, inputs("llama", rank(), None)), expected_gradients())


CHECKS: dict[str, Callable[[], None]] = {
    **{f"llama: {c.name}": functools.partial(law, "llama", c) for c in METHODS},
    **{f"llama: {name}": lambda make=make: equal("llama", make()) for name, make in MORE.items()},
    "llava: VAR": functools.partial(law, "llava", VISION[0]),
    "sharded by torch": lambda: equal("llama", MORE["two methods"](), parallelized(tiny_transformers("llama"), [0, 1])),
    "processes in another order are refused": another_order,
    "nothing changed in this process": nothing_changed_here,
    "VHR is refused": lambda: refused("llava", VHR(1.7, where=at({1: [0]})), "VHR at .* 2 of 4 heads"),
    "whole_heads is refused": lambda: refused("llama", Median(where=at({1: [0, 1]})), "Median at .* 2 of 4 heads"),
    "an undeclared reduction is refused": lambda: refused("llama", Undeclared(), "pools_heads", ContractError),
    "a strength that needs a gradient is refused": learned_is_refused,
    "sharded while it is steered": sharded_while_steered,
    "gradients: ZeroTuning": lambda: tensor_parallel_gradients(lambda: [ZeroTuning(None, 5.0)]),
    "gradients: SpotLight, pooled": lambda: tensor_parallel_gradients(MORE["SpotLight, pooled"]),
    "gradients, checkpointed": lambda: tensor_parallel_gradients(MORE["SpotLight, pooled"], checkpointed=True),
    "DDP, steered before": lambda: data_parallel(ddp, "steer"),
    "DDP, steered after": lambda: data_parallel(ddp, "wrap"),
    "FSDP2, steered before": lambda: data_parallel(fsdp, "steer"),
    "FSDP2, steered after": lambda: data_parallel(fsdp, "wrap"),
    "FSDP2 of the attention, steered before": lambda: data_parallel(fsdp_of_attention, "steer"),
    "FSDP2 of the attention, steered after": lambda: data_parallel(fsdp_of_attention, "wrap"),
    "DDP itself is steered": steered_wrapper,
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return start("tests.hosts.transformers.test_distributed", 2, tmp_path_factory.mktemp("distributed"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, said: dict[str, list[str]]) -> None:
    assert said[name] == ["", ""], "\n".join(said[name])


# One process.


def test_a_pool_is_not_divided_by_another_method() -> None:
    model = tiny_transformers("llama")
    pooled = SpotLight(SPANS, 0.6, pooled=True, where=Where(layers=[1]))
    with pytest.raises(CompositionError, match="compares all of its heads"):
        steer(model, pooled, ZeroTuning({1: [0]}, 3.0))
    # Each row's own share has no part in that, nor has a gate behind the map, nor another layer.
    steer(model, pooled.new(pooled=False), ZeroTuning({1: [0]}, 3.0))._detach()
    steer(model, pooled, HeadGate({(1, 0): 0.5}))._detach()
    steer(model, pooled, ZeroTuning({2: [0]}, 3.0))._detach()


@dataclass(frozen=True)
class Pooled(Intervention):
    """Weighs the first token by a statistic of the map over the heads."""

    how: str = "sum"

    pools_heads = True

    def weights(self, call: AttnCall) -> Reweight:
        first = call.first_key()
        mass = call.map.mass(first)
        expected = mass.sum(dim=1, keepdim=True) / (mass.shape[1] if self.how == "mean" else 1)
        got = call.over_heads(mass, self.how)
        assert torch.allclose(got, expected)
        return Reweight(((first, got),))


@torch.no_grad()
@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [1, 2]])
@pytest.mark.parametrize("how", ["sum", "mean"])
def test_whole_heads_are_reduced_here(how: str, heads: list[int]) -> None:
    model = tiny_transformers("llama")
    with steer(model, Pooled(how, where=at({1: heads}))):
        model(**tiny_transformers_inputs("llama", model))


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "words"), [(Pooled("median"), "'median'.*'sum' and 'mean'"), (Undeclared(), "pools_heads = True")]
)
def test_a_reduction_that_cannot_be(method: Intervention, words: str) -> None:
    model = tiny_transformers("llama")
    with pytest.raises(ContractError, match=words), steer(model, method):
        model(**tiny_transformers_inputs("llama", model))


def replicate(model: nn.Module) -> list[nn.Module]:
    """What torch.nn.parallel.replicate does first, which needs two CUDA devices."""
    return [module._replicate_for_data_parallel() for module in model.modules()]


@torch.no_grad()
def test_replicas_of_data_parallel_are_refused() -> None:
    """They share the layers on their original, and would run it."""
    model = tiny_transformers("llama")
    with steer(model, ZeroTuning({1: [0]}, 5.0)):
        model(**tiny_transformers_inputs("llama", model))
        with pytest.raises(UnsupportedHost, match="DataParallel"):
            replicate(model)
        # A copy is a plain model.
        assert len(replicate(copy.deepcopy(model))) == len(list(model.modules()))
    assert len(replicate(model)) == len(list(model.modules()))


@torch.no_grad()
@pytest.mark.parametrize("first", ["steer", "dispatch"])
def test_layers_that_are_kept_on_disk(first: str, tmp_path: Path) -> None:
    """accelerate's hooks load the weights of each layer for its forward."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    plain, model = tiny_transformers("llama"), tiny_transformers("llama")
    given = tiny_transformers_inputs("llama", model)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    methods = [ACT({1: [0, 3]}, 0.2, 0.05), SpotLight(SPANS, 0.6, pooled=True, where=Where(layers=[2]))]

    def dispatch() -> None:
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        assert all(p.is_meta for p in model.model.layers[1].parameters())

    with steer(plain, *methods):
        expected = plain(**given).logits
    if first == "dispatch":
        dispatch()
    with steer(model, *methods):
        if first == "steer":
            dispatch()
        assert torch.equal(model(**given).logits, expected)
    assert torch.equal(model(**given).logits, plain(**given).logits)
    remove_hook_from_submodules(model)


if __name__ == "__main__":
    work(CHECKS)
