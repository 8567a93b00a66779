"""`Site`: one attention operation of a model, and the printable list of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Site:
    """One place where a model computes attention.

    Attributes:
        name: dotted module name below the model that holds it.
        layer: 0-based index within its stack, in execution order.
        kind: "self", "cross" or "joint" (text and image tokens in one sequence).
        heads: number of query heads, global over tensor-parallel shards.
        kv_heads: number of key and value heads.
        modality: "text", "vision", "audio" or "image" (the latents of a diffusion model).
        stack: "decoder", "encoder" or "denoiser".
        component: pipeline component that holds the module ("" for a bare model).
        causal: whether a row sees only keys at or before its own position.
        linear: True where no softmax map exists (linear attention: only value-path edits are defined).
        refused: why it cannot be steered, "" where it can.
        parts: names of the attentions that one call of the module computes, where it is several: "text" and "image prompt" of a
            cross-attention whose outputs are added up. Gates on heads act in all; maps are edited in those that the host's
            documentation names, or in those of `Where(parts=...)`.
        module: the module itself; not part of equality or of the printed form.
        path: the module name with the pipeline component in front, unique within a target.
        tower: component, modality and stack with dots between them, such as "vision.encoder": which layers count together.
    """

    name: str
    layer: int
    kind: str
    heads: int
    kv_heads: int
    modality: str = "text"
    stack: str = "decoder"
    component: str = ""
    causal: bool = False
    linear: bool = False
    refused: str = ""
    parts: tuple[str, ...] = ()
    module: Any = field(default=None, repr=False, compare=False)
    # Read some times at each call, so it is a plain attribute.
    path: str = field(init=False, repr=False, compare=False)

    @property
    def tower(self) -> str:
        """Component, modality and stack with dots between them: "vision.encoder", "transformer.image.denoiser"."""
        return ".".join(part for part in (self.component, self.modality, self.stack) if part)

    def in_tower(self, name: str) -> bool:
        """Whether the tower is called so: whole parts of `tower` ("vision", "vision.encoder"), or of `path` ("vision_tower")."""
        return f".{name}." in f".{self.tower}." or f".{name}." in f".{self.path}."

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", f"{self.component}.{self.name}" if self.component else self.name)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values, without the module."""
        names = ("name", "layer", "kind", "heads", "kv_heads", "modality", "stack", "component", "causal", "linear")
        names += ("refused",) if self.refused else ()
        names += ("parts",) if self.parts else ()
        return {key: getattr(self, key) for key in names}


def _named(site: Site) -> str:
    return site.path + (f"  parts: {', '.join(site.parts)}" if site.parts else "")


class SiteList(tuple[Site, ...]):
    """A tuple of sites that prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        head = ("layer", "kind", "heads", "kv", "modality", "stack", "name")
        rows = [
            (s.layer, s.kind + (" (linear)" if s.linear else ""), s.heads, s.kv_heads, s.modality, s.stack, _named(s))
            for s in self
        ]
        table = [head, *[tuple(str(cell) for cell in row) for row in rows]]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, *(f"cannot be steered: {s.path}: {s.refused}" for s in self if s.refused)])

    def __repr__(self) -> str:
        return f"<{len(self)} sites>\n{self}"
