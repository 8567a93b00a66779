"""Prefix reuse: in a weak pass, blocks that run before the first edited site are replayed from the strong pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .branches import BranchInputs, Prediction


def first_edited(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules on the way to each edited site: these must run in the weak pass, all others may be replayed."""
    needed: dict[int, nn.Module] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts) + 1):
            module = model.get_submodule(".".join(parts[:i]))
            needed[id(module)] = module
    return list(needed.values())


class PrefixCache:
    """Records block outputs of a strong pass and replays them in the weak pass, up to the first edited block.

    A block is an entry of a `ModuleList` beside the way to an edited site (or the UNet's mid block) whose output is a
    tensor or a tuple of tensors with the batch first. What precedes the first edit is the same computation on the
    conditional rows, so the replay is exact.
    """

    def __init__(self, model: nn.Module, way: list[nn.Module], inputs: BranchInputs):
        self.model, self.inputs = model, inputs
        self._way = {id(m) for m in way}
        self._handles: list[Any] = []
        self._outputs: dict[int, Any] = {}
        self._open = True
        self._patched: list[tuple[nn.Module, Any]] = []
        self._blocks = _blocks_beside(model, way)

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: Any) -> None:
        self._unhook()
        self._restore()
        self._outputs.clear()

    def record(self, call: Callable[[BranchInputs], Prediction], inputs: BranchInputs) -> Prediction:
        """Run the strong pass and keep the outputs of the blocks before the first edited one."""
        if inputs is not self.inputs or self._outputs:
            return call(inputs)
        self._open = True
        for block in self._blocks:
            self._handles.append(block.register_forward_hook(self._keep))
        for site in self._stops():
            self._handles.append(site.register_forward_pre_hook(self._close))
        try:
            return call(inputs)
        finally:
            self._unhook()

    def replay(self, call: Callable[[BranchInputs], Prediction], inputs: BranchInputs) -> Prediction:
        """Run the weak pass on the conditional rows, with the kept outputs in place of the blocks that gave them."""
        rows = slice(None) if inputs.layout == self.inputs.layout else self.inputs.part(inputs.layout[0])
        for block in self._blocks:
            if id(block) in self._outputs:
                kept = _cut(self._outputs[id(block)], rows)
                self._patched.append((block, vars(block).get("forward")))
                vars(block)["forward"] = lambda *_, _kept=kept, **__: _kept
        try:
            return call(inputs)
        finally:
            self._restore()

    def _stops(self) -> list[nn.Module]:
        leaves = [
            m for m in self.model.modules() if id(m) in self._way and not any(id(c) in self._way for c in m.children())
        ]
        return leaves

    def _keep(self, block: nn.Module, args: Any, output: Any) -> None:
        if not self._open:
            return
        if id(block) in self._outputs or not _batched(output, self.inputs.batch):
            # Called twice, or of a form that is not understood: it is computed again.
            self._outputs[id(block)] = None
            return
        self._outputs[id(block)] = output

    def _close(self, *_: Any) -> None:
        self._open = False

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs = {k: v for k, v in self._outputs.items() if v is not None}

    def _restore(self) -> None:
        while self._patched:
            block, old = self._patched.pop()
            if old is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = old


def _blocks_beside(model: nn.Module, way: list[nn.Module]) -> list[nn.Module]:
    on_way = {id(m) for m in way}
    blocks = []
    for module in way:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(c for c in child if id(c) not in on_way and c is not None)
            elif name == "mid_block" and id(child) not in on_way:
                blocks.append(child)
    return blocks


def _batched(output: Any, batch: int) -> bool:
    if isinstance(output, Tensor):
        return output.ndim >= 2 and output.shape[0] == batch
    return isinstance(output, tuple) and bool(output) and all(_batched(o, batch) for o in output)


def _cut(output: Any, rows: slice) -> Any:
    return output[rows] if isinstance(output, Tensor) else tuple(_cut(o, rows) for o in output)
