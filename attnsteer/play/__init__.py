"""`attnsteer play`: a page on this machine alone, on which a model is steered by hand and compared with itself."""

from .players import Player, player
from .server import PlayServer

__all__ = ["PlayServer", "Player", "player"]
