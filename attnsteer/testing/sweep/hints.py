"""What the shrinking rule does not find, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Another class than that of the first mapping.
CLASSES: dict[str, str] = {}

# Values of configs; see `small_configs.small`.
CONFIGS: dict[str, dict[str, Any]] = {}

# Arguments of the forward.
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {}

# Types whose models are made of parts that the library does not have, with the reason.
ELSEWHERE: dict[str, str] = {}
