"""Several users of one steered model: threads, tasks, two steerings, calls that are broken off, checkpointed gradients."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from typing import Any

import torch
from torch import Tensor

from ...errors import AttnSteerError
from ...steering import steer
from ..cases import NotApplicable
from ..fingerprint import fingerprint
from .bench import WHOLE, Bench, attached, own_target
from .compare import EXACT, close, require, same

LENGTHS = (6, 12, 9, 11, 7, 8, 12, 10)


def _prompts(bench: Bench) -> list[dict[str, Any]]:
    """Prompts of mixed lengths and paddings; with images they keep their length."""
    made = []
    for i, length in enumerate(LENGTHS):
        inputs = bench.inputs(1, "full", i)
        if not bench.host.images and bench.host.decoder:
            inputs = {k: v[:, :length] if v.ndim == 2 else v for k, v in inputs.items()}
        made.append(inputs)
    return made


def _target(bench: Bench) -> Any:
    if bench.host.family != "transformers":
        raise NotApplicable("only transformers models are shared by threads here")
    bench.need_action()
    return bench.target


def shared_model(bench: Bench) -> None:
    """Eight threads, and tasks with a pool of threads, on one steered model get what each gets alone."""
    target, prompts = _target(bench), _prompts(bench)
    with attached(target, bench.make(1)):
        expected = [bench.whole(target, inputs) for inputs in prompts]
        for name, all_at_once in (("thread", _in_threads), ("task", _in_tasks)):
            for i, out in enumerate(all_at_once(lambda inputs: bench.whole(target, inputs), prompts)):
                same(out, expected[i], f"the output of {name} {i} of 8 and of the same call alone")


def _in_threads(call: Any, prompts: list[Any]) -> list[Tensor]:
    found: list[Any] = [None] * len(prompts)
    barrier = threading.Barrier(len(prompts))

    def work(i: int) -> None:
        barrier.wait(timeout=60)
        try:
            with torch.no_grad():
                found[i] = call(prompts[i])
        except Exception as error:  # raised by the main thread
            found[i] = error

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


def _in_tasks(call: Any, prompts: list[Any]) -> list[Tensor]:
    def quiet(inputs: Any) -> Tensor:
        with torch.no_grad():
            return call(inputs)

    async def every() -> list[Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(quiet, inputs) for inputs in prompts))

    return asyncio.run(every())


def interrupted(bench: Bench) -> None:
    """A call that is broken off anywhere never happened: later calls, and calls over copies of its cache, are as before."""
    target = _target(bench)
    inputs, source = bench.inputs(2), random.Random(0)
    modules = [m for name, m in target.named_modules() if name]
    with attached(target, bench.make(2)):
        expected = bench.whole(target, inputs)
        for kind in (KeyboardInterrupt, asyncio.CancelledError, ValueError):
            for module in source.sample(modules, 4):

                def stop(*_: Any, kind: type[BaseException] = kind) -> None:
                    raise kind

                hook = module.register_forward_pre_hook(stop)
                try:
                    bench.host.run(target, inputs)
                except kind:
                    pass
                finally:
                    hook.remove()
        same(bench.whole(target, inputs), expected, "the output before and after calls that were broken off")
        if bench.host.decoder and not bench.host.images:
            _broken_continuation(bench, target, inputs["input_ids"])


def _broken_continuation(bench: Bench, target: Any, ids: Tensor) -> None:
    call = lambda tokens, cache: target(input_ids=tokens, past_key_values=cache, use_cache=True)  # noqa: E731

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def broken(module: Any, cache: Any, tokens: Tensor = ids[:, 8:11]) -> None:
        hook = module.register_forward_pre_hook(stop)
        try:
            call(tokens, cache)
        except KeyboardInterrupt:
            pass
        finally:
            hook.remove()

    cache = call(ids[:, :8], None).past_key_values
    expected = call(ids[:, 8:11], copy.deepcopy(cache)).logits
    # The last norm runs behind all layers: their caches are as long as each other, and can be cut back.
    last = list(target.base_model.children())[-1]
    last = next((m for m in target.base_model.children() if "norm" in type(m).__name__.lower()), last)
    used = copy.deepcopy(cache)
    broken(last, used)
    if used.get_seq_length() == 11:
        try:
            call(ids[:, 8:11], copy.deepcopy(used))
        except AttnSteerError:
            pass
        else:
            require(False, "a cache with tokens of a call that was broken off was taken for a whole one")
        try:
            used.crop(-3)
        except (RuntimeError, ValueError):
            return
        close(call(ids[:, 8:11], used).logits, expected, EXACT, "a call that was broken off, undone and made again")
        _broken_behind_a_cut(lambda tokens: call(tokens, used), lambda tokens: broken(last, used, tokens), used, ids)


def _broken_behind_a_cut(call: Any, broken: Any, cache: Any, ids: Tensor) -> None:
    """Other tokens in the place of those that were cut off: as few as that, or fewer, the cache has not become a whole one."""
    for count in (3, 2):
        try:
            cache.crop(8 - cache.get_seq_length())
            broken(ids[:, :count])
            call(ids[:, 3:4])
        except AttnSteerError:
            continue
        require(
            False, f"{count} tokens of a call that was broken off were taken for those that had been cut off before"
        )


def _checkpointing(target: Any, what: str, *args: Any) -> None:
    """Switch checkpointing, by the name that the installed transformers has: newer ones warn of the other."""
    old = getattr(target, f"gradient_checkpointing_{what}")
    getattr(target, f"activation_checkpointing_{what}", old)(*args)


def checkpointed(bench: Bench) -> None:
    """Gradients with checkpointing are those without, re-entrant or not, also with two forwards before one backward."""
    _target(bench)
    target = own_target(bench.host)
    if not target.supports_gradient_checkpointing:
        raise NotApplicable("the model has no gradient checkpointing")
    bench.need_prefill()
    calls = [bench.inputs(2, "full", seed) for seed in (0, 1)]
    first = next(iter(target.parameters()))
    found, mode = {}, target.training
    for reentrant in (None, False, True):
        if reentrant is not None:
            _checkpointing(target, "enable", {"use_reentrant": reentrant})
        target.train()
        for module in target.modules():
            # As in inference: an edit is not defined under dropout.
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        if reentrant is None and not torch.equal(*(bench.host.run(target, calls[0]) for _ in range(2))):
            target.train(mode)
            raise NotApplicable("the model drops out at random in training mode")
        try:
            with torch.enable_grad(), attached(target, bench.make(2)):
                for p in target.parameters():
                    p.grad = None
                outs = [bench.host.run(target, {**c, "use_cache": False}) for c in calls]
                (outs[0].square().mean() - outs[1].square().mean()).backward()
                found[reentrant] = first.grad.clone()
        except AttnSteerError:
            if reentrant is None:
                raise NotApplicable("refused in training mode") from None
        finally:
            _checkpointing(target, "disable")
            target.train(mode)
            for p in target.parameters():
                p.grad = None
    if len(found) < 3:
        raise NotApplicable("refused under gradient checkpointing")
    size = float(found[None].abs().max())
    for reentrant in (False, True):
        what = f"gradients with checkpointing (re-entrant: {reentrant}) and without"
        close(found[reentrant] / size, found[None] / size, EXACT, what)


def inner(bench: Bench) -> None:
    """The model below the head, and its `forward` called directly, compute what they compute inside the whole model."""
    target = _target(bench)
    base = getattr(target, "base_model", target)
    if base is target:
        raise NotApplicable("the target has no model below a head")
    if bench.case.whole_model:
        raise NotApplicable(WHOLE)
    bench.need_prefill()
    inputs, more = bench.inputs(2, "left" if "left" in bench.host.padded else "full", 4), bench.inputs(2, "full", 5)
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        kept.append(out[0])

    with attached(target, bench.make(2)):
        hook = base.register_forward_hook(keep)
        try:
            bench.host.run(target, inputs)
        finally:
            hook.remove()
        # The last: a method may run the prompt without its images beside.
        count = len(kept) - 1
        bench.host.run(target, more)
        for name, call in (("model", base), ("forward", base.forward)):
            same(call(**inputs)[0], kept[count], f"hidden states of the inner {name} and within the whole model")


def beside(bench: Bench) -> None:
    """Two steerings on different sites of one model act as one steering of both, and leave in any order."""
    target = _target(bench)
    bench.need_prefill()
    made = bench.make(2)
    with attached(target, made) as run:
        taken = {s.path for s in run.sites}
    free = [s for s in bench.setting(2).sites if s.path not in taken]
    if not free:
        raise NotApplicable("it is on every site, so there is none for a second steering")
    from ...methods.headgate import HeadGate

    where = type(made.where)(modules=[s.path.replace(".", r"\.") for s in free], kinds=tuple({s.kind for s in free}))
    gate = HeadGate({(s.layer, 0): 0.5 for s in free}, where=where)
    inputs = bench.inputs(2)
    # The library puts recorders of its own on a model at its first call.
    plain = bench.host.run(target, inputs)
    mark = fingerprint(target)
    with attached(target, made, gate):
        expected = bench.host.run(target, inputs)
    for first, second in ((0, 1), (1, 0)):
        runs = [steer(target, m, control=True) for m in (made, gate)]
        try:
            close(bench.host.run(target, inputs), expected, EXACT, "two steerings and one of both")
            runs[first].remove()
            alone = bench.host.run(target, inputs)
        finally:
            runs[first].remove()
            runs[second].remove()
        with attached(target, (made, gate)[second]):
            close(
                alone,
                bench.host.run(target, inputs),
                EXACT,
                "what is left when one of two steerings leaves, and it alone",
            )
        require(fingerprint(target) == mark, "hooks or attributes were left behind by two steerings")
        same(bench.host.run(target, inputs), plain, "the output before and after two steerings")
