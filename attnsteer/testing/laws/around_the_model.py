"""Steering beside what else is done to a model: undoing, hooks, threads, compilation, saving."""

from __future__ import annotations

import tempfile
import threading
from typing import Any

import torch

from ...errors import UnknownName
from ...intervention import Intervention
from ...registry import registered_name
from ..cases import NotApplicable
from ..fingerprint import fingerprint
from .bench import Bench, attached, shared_target
from .compare import EXACT, Broken, close, require, same, scale


def undo(bench: Bench) -> None:
    """After the context, and after an exception in the forward, the target is as if never steered."""
    bench.need_action()
    target, made, inputs = bench.target, bench.make(2), bench.inputs(2)
    plain, mark = bench.plain_run(), fingerprint(target)
    with attached(target, made):
        bench.host.run(target, inputs)
        require(fingerprint(target) != mark, "steering left no trace while it was attached: this law cannot see it")
    require(fingerprint(target) == mark, "hooks, processors or attributes were left behind after the context")
    same(bench.host.run(target, inputs), plain, "the output before and after steering")

    class Failed(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Failed

    with attached(target, made) as run:
        last = run.sites[-1].module
        bench.host.run(target, inputs)
        hook = last.register_forward_hook(fail)
        try:
            bench.host.run(target, inputs)
        except Failed:
            pass
        else:
            raise Broken("the hook did not run")
        finally:
            hook.remove()
    require(fingerprint(target) == mark, "hooks, processors or attributes were left behind after an exception")
    same(bench.host.run(target, inputs), plain, "the output before steering and after an exception in it")


def dispatch(bench: Bench) -> None:
    """accelerate's hooks before or after steering change nothing."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    bench.need_action()
    target, made, inputs = bench.target, bench.make(2), bench.inputs(2)
    plain, expected = bench.plain_run(), bench.steered_run
    with attached(target, made) as run:
        modules = (bench.host.module(target), run.sites[0].module)
    for m in modules:
        add_hook_to_module(m, ModelHook())
    try:
        with attached(target, made):
            same(bench.run(target, inputs), expected, "the output with hooks put on before steering")
        same(bench.host.run(target, inputs), plain, "the unsteered output with hooks")
    finally:
        for m in modules:
            remove_hook_from_module(m)
    with attached(target, made):
        for m in modules:
            add_hook_to_module(m, ModelHook())
        try:
            same(bench.run(target, inputs), expected, "the output with hooks put on while steering")
        finally:
            for m in modules:
                remove_hook_from_module(m)
    same(bench.host.run(target, inputs), plain, "the unsteered output after all hooks")


def round_trip(bench: Bench) -> None:
    """Save, load, same output."""
    bench.need_action()
    made, inputs = bench.make(2), bench.inputs(2)
    try:
        registered_name(type(made))
    except UnknownName as error:
        raise NotApplicable(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        loaded = Intervention.from_pretrained(made.save_pretrained(folder))
    require(loaded == made, f"saved {made}, loaded {loaded}")
    with attached(bench.target, loaded):
        same(bench.whole(bench.target, inputs), bench.acting[0], "the output of the method and of its saved copy")


def threads(bench: Bench) -> None:
    """Two threads with two models do not see each other; the models are unsteered afterwards."""
    bench.need_action()
    targets = [bench.target, shared_target(bench.host, 1)]
    inputs = [bench.inputs(2, None, seed) for seed in (0, 1)]
    made = bench.make(2)
    with attached(targets[1], made):
        expected = [bench.steered_run, bench.run(targets[1], inputs[1])]
    barrier, got, errors = threading.Barrier(2), [None, None], []

    def work(i: int) -> None:
        try:
            with torch.no_grad(), attached(targets[i], made):
                barrier.wait(timeout=30)
                for _ in range(2):
                    got[i] = bench.run(targets[i], inputs[i])
        except BaseException as error:  # reported by the main thread
            errors.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    for i in range(2):
        same(got[i], expected[i], f"the output of thread {i} and of the same run alone")
    same(bench.host.run(targets[1], inputs[0]), bench.plain_run(), "the unsteered output before and after the threads")


def compiled(bench: Bench) -> None:
    """A compiled model, compiled before or after steering, acts as the uncompiled one; never ignored."""
    if bench.host.family == "pipeline":
        raise NotApplicable("pipelines are not compiled here; their denoisers have this law")
    bench.need_prefill()
    target, made, inputs = bench.host.build(), bench.make(2), bench.inputs(2)
    with attached(target, made):
        expected = bench.host.run(target, inputs)
    plain = bench.host.run(target, inputs)
    tolerance = EXACT * scale(bench.host, plain)
    torch._dynamo.reset()
    try:
        model = torch.compile(target, backend="eager")
        close(bench.host.run(model, inputs), plain, tolerance, "the unsteered output, compiled and not")
        with attached(model, made) as run:
            out = bench.host.run(model, inputs)
            require(run.audit.fired(0), "the audit says that the method never fired in the compiled model")
        close(out, expected, tolerance, "the steered output, compiled and not")
        close(bench.host.run(model, inputs), plain, tolerance, "the unsteered output, compiled, after steering")
    finally:
        torch._dynamo.reset()
