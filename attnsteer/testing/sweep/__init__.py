"""The sweep: builds every model type of a host library small and random, and measures what steering does to it.

`python -m attnsteer.testing.sweep transformers` measures, stores `tables/transformers.json`, and writes `docs/compatibility.md`. A
part of the sweep (`transformers.py`; others beside it) says what there is (`names()`) and measures one of them (`measure(name)`).
"""

from __future__ import annotations

from .rows import Row, Table

# The parts of the sweep, by the name of their module here.
PARTS = ("transformers", "diffusers", "pipelines", "modular")

__all__ = ["PARTS", "Row", "Table"]
