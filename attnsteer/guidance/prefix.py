"""Prefix reuse: in a weak pass, blocks that run before the first edited site are replayed from the strong pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .branches import BranchInputs, Prediction


def way_to(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules on the way to each edited site: these must run in the weak pass, all others may be replayed."""
    needed: dict[int, nn.Module] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts) + 1):
            module = model.get_submodule(".".join(parts[:i]))
            needed[id(module)] = module
    return list(needed.values())


class Kept:
    """One block's output in the strong pass, with what tells whether it still holds."""

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


class PrefixCache:
    """Records block outputs of a strong pass and replays them in the weak pass, up to the first edited block.

    A block is an entry of a `ModuleList` beside the way to an edited site (or the UNet's mid block) whose output is a
    tensor or a tuple of tensors with the batch first. What precedes the first edit is the same computation on the
    conditional rows, so the replay is exact.

    Args:
        way: as from `way_to`; None records and replays nothing. inputs: of the strong pass.
    """

    def __init__(self, run: Any, model: nn.Module, way: list[nn.Module] | None, inputs: BranchInputs):
        self.run, self.inputs = run, inputs
        way = way or []
        on_way = {id(m) for m in way}
        self._blocks = _blocks_beside(way, on_way)
        self._stops = [m for m in way if not any(id(c) in on_way for c in m.children())]
        self._outputs: dict[int, Kept | None] = {}
        self._recorded = False
        self._open = True

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: Any) -> None:
        self._outputs.clear()

    def record(self, call: Callable[[BranchInputs], Prediction], inputs: BranchInputs) -> Prediction:
        """Run the strong pass and keep the outputs of the blocks before the first edited one."""
        if inputs is not self.inputs or self._recorded:
            return call(inputs)
        self._recorded = True
        handles = [b.register_forward_hook(self._keep, with_kwargs=True) for b in self._blocks]
        handles += [site.register_forward_pre_hook(self._close) for site in self._stops]
        try:
            return call(inputs)
        finally:
            for handle in handles:
                handle.remove()

    def replay(self, call: Callable[[BranchInputs], Prediction], inputs: BranchInputs) -> Prediction:
        """Run the weak pass on the conditional rows, with the kept outputs in place of the blocks that gave them."""
        rows = slice(None) if inputs.layout == self.inputs.layout else self.inputs.part(inputs.layout[0])
        patched = []
        try:
            for block in self._blocks:
                kept = self._outputs.get(id(block))
                if kept is not None:
                    patched.append((block, vars(block).get("forward")))
                    vars(block)["forward"] = _player(kept, rows, block.forward)
            return call(inputs)
        finally:
            for block, old in patched:
                if old is None:
                    del vars(block)["forward"]
                else:
                    vars(block)["forward"] = old

    def _keep(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.run._open:
            # A weak pass of another method, inside this strong one.
            return
        if id(block) in self._outputs:
            # Called twice: it is computed again.
            self._outputs[id(block)] = None
        elif self._open:
            self._outputs[id(block)] = Kept(args, kwargs, output) if _batched(output, self.inputs.batch) else None

    def _close(self, *_: Any) -> None:
        self._open = self._open and bool(self.run._open)


def _player(kept: Kept, rows: slice, compute: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _map(kept.output, lambda t: t[rows]) if kept.holds(args, kwargs) else compute(*args, **kwargs)

    return forward


def _blocks_beside(way: list[nn.Module], on_way: set[int]) -> list[nn.Module]:
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


def _map(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(output) if isinstance(output, Tensor) else tuple(_map(o, change) for o in output)


def _leaves(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for o in output for t in _leaves(o)]


def _shapes(args: Any, kwargs: Any) -> list[Any]:
    """Shapes of the tensor arguments, without the batch."""
    given = [*args, *(kwargs[name] for name in sorted(kwargs))]
    return [tuple(v.shape[1:]) for v in given if isinstance(v, Tensor) and v.ndim > 1]
