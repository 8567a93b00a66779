"""What is asked: the schema of recipes, loading and checking them, and the arms that they make."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Point": "sweep",
        "Recipe": "schema",
        "check": "checks",
        "json_schema": "schema",
        "load_recipe": "loading",
        "resolve": "checks",
        "with_values": "sweep",
    },
)
