"""What is asked: the schema of recipes, loading and checking them, and the arms that they make."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Arm": "arms",
        "Point": "sweep",
        "Recipe": "schema",
        "check": "checks",
        "json_schema": "schema",
        "load_recipe": "loading",
        "resolve": "resolved",
        "with_values": "validate",
    },
)
