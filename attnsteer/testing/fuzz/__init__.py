"""Differential fuzz of steered language models: random prompts, masks, calls and methods against dense attention written out.

`python -m attnsteer.testing.fuzz --cases 2000 --seed 0` runs it long; every failure is printed as the line that runs it again.
"""

from .case import Case, Picker, cases, draw
from .run import Outcome, check

__all__ = ["Case", "Outcome", "Picker", "cases", "check", "draw"]
