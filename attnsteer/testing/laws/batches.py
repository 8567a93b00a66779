"""A sample is steered as if it were alone: in a batch, with values of its own, beside padding, with a mask or without one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...errors import UnsupportedHost
from ...intervention import Intervention
from ...parameters import declared
from ..cases import NotApplicable
from .bench import Bench, attached, one_sample
from .compare import EXACT, close, same, scale


def batch(bench: Bench) -> None:
    """A sample in a batch is the sample alone."""
    bench.need_action()
    inputs = bench.inputs(3, None, 7)
    with attached(bench.target, bench.make(3)):
        together = bench.whole(bench.target, inputs)
    with attached(bench.target, bench.make(1)):
        for b in range(3):
            alone = bench.whole(bench.target, one_sample(inputs, b, 3))
            close(together[b], alone[0], EXACT * scale(bench.host, together), f"sample {b} of 3 and the sample alone")


def per_row(bench: Bench) -> None:
    """With values per sample, each sample is the sample alone with its own; one that has None is as without the method."""
    bench.need_action()
    batch, inputs = bench.make(3), bench.inputs(3, None, 7)
    names = per_sample(batch)
    if not names:
        raise NotApplicable("no parameter of the method takes one value per sample")
    for name in names:
        form, value = declared(type(batch), name), getattr(batch, name)
        # What is optional has no value that leaves a sample alone.
        idle = value if form.optional else None
        given, alone = [value, idle, _other(value)], {}
        try:
            for b in (2, 0):
                with attached(bench.target, bench.make(1).new(**{name: given[b]})):
                    alone[b] = bench.whole(bench.target, one_sample(inputs, b, 3))
        except UnsupportedHost:
            # The other value is not defined on this host (a blur needs a grid of tokens).
            given[2] = value
            with attached(bench.target, bench.make(1)):
                alone = {b: bench.whole(bench.target, one_sample(inputs, b, 3)) for b in (0, 2)}
        with attached(bench.target, batch.new(**{name: _spread(given)})):
            together = bench.whole(bench.target, inputs)
        for b in (0, 2):
            what = f"sample {b} of 3 with {name} per sample, and the sample alone with its own"
            close(together[b], alone[b][0], EXACT * scale(bench.host, together), what)
        if idle is None:
            plain = bench.plain(3, None, 7)
            same(together[1], plain[1], f"the sample whose {name} is None, and the same without the method")


def per_sample(method: Intervention) -> list[str]:
    """The parameters of a method that have a value now, and take one per sample."""
    forms = ((f.name, declared(type(method), f.name)) for f in fields(method))
    return [n for n, form in forms if form is not None and form.per_sample and getattr(method, n) is not None]


def _other(value: Any) -> Any:
    """Another value that the parameter takes."""
    if isinstance(value, Mapping):
        return {key: _other(v) for key, v in value.items()}
    return 0.5 * value if math.isfinite(value) else 1.5


def _spread(given: list[Any]) -> Any:
    """Values of samples as a method takes them; of mappings, a mapping to lists."""
    if not isinstance(given[0], Mapping):
        return given
    return {key: [None if g is None else g[key] for g in given] for key in given[0]}


def padding(bench: Bench) -> None:
    """A row in a padded batch is the row alone."""
    if not bench.host.padded:
        raise NotApplicable("no padding on this host, or its positions count padding")
    bench.need_action()
    for side in bench.host.padded:
        if side == "right" and bench.last_row_only:
            # The last slot of a shorter row is padding, so the row's own last token is not edited: by definition.
            continue
        inputs = bench.inputs(3, side, 7)
        mask = inputs["attention_mask"].bool()
        # Behind padding on the right nothing is decoded: the new tokens would stand after a hole.
        run = bench.host.run if side == "right" else bench.whole
        with attached(bench.target, bench.make(3)):
            together = run(bench.target, inputs)
        with attached(bench.target, bench.make(1)):
            # Row 0 has no padding.
            for b in (1, 2):
                alone = run(bench.target, one_sample(inputs, b, 3))
                row = together[b]
                if "decoder_input_ids" not in inputs and row.ndim == 2:
                    steps = row.shape[0] - mask.shape[1]
                    row = row[[*mask[b].nonzero()[:, 0].tolist(), *range(mask.shape[1], mask.shape[1] + steps)]]
                close(row, alone[0], EXACT, f"row {b} with {side} padding and the row alone")


def mask(bench: Bench) -> None:
    """A call without an attention mask is the call with a mask of ones."""
    if not bench.host.masked:
        raise NotApplicable("its calls take no attention mask over tokens")
    bench.need_action()
    with attached(bench.target, bench.make(2)):
        given = bench.whole(bench.target, bench.inputs(2, "full"))
    close(bench.acting[0], given, EXACT, "output without a mask and with a mask of ones")
