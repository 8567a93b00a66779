"""Prefix reuse: in a weak pass, blocks that run before the first edited site are replayed from the strong pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ...branches import BranchInputs, Prediction
from ...engine import Run


def modules_down_to(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules on the way to each edited site: these must run in the weak pass, all others may be replayed."""
    needed: dict[int, nn.Module] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts) + 1):
            module = model.get_submodule(".".join(parts[:i]))
            needed[id(module)] = module
    return list(needed.values())


class BlockOutput:
    """One block's output in the strong pass, with what shows whether it still holds."""

    def __init__(self, args: Any, kwargs: Any, output: Any):
        self.shapes = _shapes(args, kwargs)
        # Tensors of inference mode do not say whether they were changed in place since.
        self.output = _map(output, lambda t: t.clone() if t.is_inference() else t)
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [-1 if t.is_inference() else t._version for t in _leaves(self.output)]

    def holds(self, args: Any, kwargs: Any) -> bool:
        """Whether the output was not changed since, and this call is one for inputs of the same shapes."""
        return self._now() == self._versions and _shapes(args, kwargs) == self.shapes


class PrefixReuse:
    """Records block outputs of a strong pass and replays them in the weak pass, up to the first edited block.

    A block is an entry of a `ModuleList` beside the way to an edited site (or the UNet's mid block) whose output is a
    tensor or a tuple of tensors with the batch first. What precedes the first edit is the same computation on the
    conditional rows, so the replay is exact. Blocks may be compiled one by one (`compile_repeated_blocks`).

    Args:
        way: from `modules_down_to`; None: record and replay nothing. inputs: of the strong pass.
    """

    def __init__(self, run: Run, way: list[nn.Module] | None, inputs: BranchInputs):
        self.run, self.inputs = run, inputs
        self._blocks, self._stops = _blocks_and_stops(way or [])
        self._outputs: dict[int, BlockOutput | None] = {}
        self._recorded = False
        # Whether no edited block has run yet in the strong pass.
        self._before_edit = True

    def record(self, call: Callable[[BranchInputs], Prediction], inputs: BranchInputs) -> Prediction:
        """Run the strong pass and remember the outputs of the blocks before the first edited one."""
        if inputs is not self.inputs or self._recorded:
            return call(inputs)
        self._recorded = True
        layers = [(block, functools.partial(self._record, block)) for block in self._blocks]
        with layered([*layers, *((site, self._reach_edit) for site in self._stops)]):
            return call(inputs)

    def replay(self, call: Callable[[BranchInputs], Prediction], inputs: BranchInputs) -> Prediction:
        """Run the weak pass on the conditional rows, with the remembered outputs in place of the blocks that gave them."""
        rows = slice(None) if inputs.layout == self.inputs.layout else self.inputs.part(inputs.layout[0])
        found = [(block, self._outputs.get(id(block))) for block in self._blocks]
        with layered([(block, functools.partial(_replay, output, rows)) for block, output in found if output]):
            return call(inputs)

    def _record(self, block: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around a block in the strong pass."""
        output = inner(*args, **kwargs)
        if self.run.branch is not None:
            # A weak pass of another method, inside this strong one.
            return output
        if id(block) in self._outputs:
            # Called twice: it is computed again.
            self._outputs[id(block)] = None
        elif self._before_edit:
            known = _batched(output, self.inputs.batch)
            self._outputs[id(block)] = BlockOutput(args, kwargs, output) if known else None
        return output

    def _reach_edit(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around a module in which the edited part of the strong pass begins."""
        self._before_edit = self._before_edit and self.run.branch is not None
        return inner(*args, **kwargs)


def _replay(output: BlockOutput, rows: slice, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around a block in the weak pass."""
    return _map(output.output, lambda t: t[rows]) if output.holds(args, kwargs) else inner(*args, **kwargs)


@contextlib.contextmanager
def layered(layers: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """In this block each module runs `layer(what it ran before, ...)`."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, layer in layers:
            name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
            undo.append((vars(module), name, vars(module).get(name)))
            inner = getattr(module, name)
            vars(module)[name] = functools.update_wrapper(functools.partial(layer, inner), inner)
        yield
    finally:
        for own, name, old in reversed(undo):
            if old is None:
                del own[name]
            else:
                own[name] = old


def _blocks_and_stops(way: list[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks beside the way, and the modules on it where the edited part begins.

    Inside a compiled module nothing is exchanged: there the edited part begins with the module itself.
    """
    on_way = {id(m) for m in way}
    compiled = [m for m in way if m._compiled_call_impl is not None]
    inside = {id(m) for c in compiled for m in c.modules()} - {id(c) for c in compiled}
    blocks, stops = [], []
    for module in way:
        if id(module) in inside:
            continue
        if module._compiled_call_impl is not None or not any(id(c) in on_way for c in module.children()):
            stops.append(module)
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(c for c in child if id(c) not in on_way and c is not None)
            elif name == "mid_block" and id(child) not in on_way:
                blocks.append(child)
    return blocks, stops


def _batched(output: Any, batch: int) -> bool:
    if isinstance(output, Tensor):
        return output.ndim >= 2 and output.shape[0] == batch
    return isinstance(output, tuple) and bool(output) and all(_batched(o, batch) for o in output)


def _map(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(output) if isinstance(output, Tensor) else tuple(_map(o, change) for o in output)


def _leaves(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for o in output for t in _leaves(o)]


def _shapes(args: Any, kwargs: Any) -> list[Any]:
    """Shapes of the tensor arguments, without the batch."""
    given = [*args, *(kwargs[name] for name in sorted(kwargs))]
    return [tuple(v.shape[1:]) for v in given if isinstance(v, Tensor) and v.ndim > 1]
