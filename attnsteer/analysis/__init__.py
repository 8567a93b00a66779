"""What heads are: profiles, sinks, their weights. Imported on first use."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {})
