"""A sample is steered as if it were alone: in a batch, beside padding, with a mask or without one."""

from __future__ import annotations

from ..cases import NotApplicable
from .bench import Bench, attached, one_sample
from .compare import EXACT, close, scale


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
