"""One process for each model type, forked from one that has imported the library, with limits on time and memory."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from .rows import Row


def rows(
    measure: Callable[[str], Row],
    names: Iterable[str],
    timeout: int = 120,
    gigabytes: int = 12,
    prepare: Callable[[str], None] | None = None,
) -> Iterator[Row]:
    """The row of each name, one after the other. What takes too long or dies is a row that says so.

    Args:
        prepare: called here before each, for imports that the next ones share.
    """
    # What is there now is shared with the children; collecting it would copy it.
    gc.collect()
    gc.freeze()
    for name in names:
        if prepare is not None:
            prepare(name)
            gc.freeze()
        yield _in_a_process(measure, name, timeout, gigabytes)


def _in_a_process(measure: Callable[[str], Row], name: str, timeout: int, gigabytes: int) -> Row:
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _child(measure, name, timeout, gigabytes, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return Row(**json.loads(text))
    ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    reason = f"it took more than {timeout} s of processor time" if ended == f"signal {int(signal.SIGXCPU)}" else ended
    return Row(name, verdict="not built", reason=reason)


def _child(measure: Callable[[str], Row], name: str, timeout: int, gigabytes: int, writer: int) -> None:
    """Measures, writes the row as JSON, and ends without the parent's clean-up."""
    try:
        # Of processor time: a machine that others use is no fault of the type's.
        resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout + 5))
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
        row = measure(name)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(json.dumps(asdict(row)).encode())
    except BaseException as error:  # whatever it is, the next type must run
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
