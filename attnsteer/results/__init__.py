"""What came out of runs: scores, paired comparisons, tables and reports."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__, {"Comparison": "comparison", "compare": "comparison", "report": "reports", "verify": "verification"}
)
