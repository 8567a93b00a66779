"""The mean of a number that came with each answer: what another harness gave a sample.

It says what the harness says, with a paired interval; what the number means is the harness's own matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Mean, Metric


def metric(figure: str = "", better: int = 1) -> Metric:
    """Columns: `value`. The record has `value`.

    Args:
        figure: what the harness calls it. better: 1 where more is better, -1 where less is, 0 where neither.
    """

    def read(record: Mapping[str, Any]) -> dict[str, float]:
        return {"value": float(record["value"])}

    return Metric(
        "given", ("value",), read, {"mean": Mean("value")}, note=figure, better={"mean": better} if better else {}
    )
