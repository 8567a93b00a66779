"""The nodes of the ComfyUI pack (`integrations/comfyui`), as a table; that program is imported when the pack asks for its classes.

A node takes a MODEL and gives a steered clone of it with a REPORT, which says after sampling whether the method fired and how much
it changed. One table makes nodes of both of that program's forms.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import NAG, PAG, SEG, AttentionRefocusing, HeadSet, SoftPAG, Where
from .errors import SelectionError
from .hosts.comfyui.install import Report, install
from .hosts.comfyui.preview import Maps, WordMaps
from .hosts.comfyui.words import prompt_of

REPORT, MAPS = "ATTNSTEER_REPORT", "ATTNSTEER_MAPS"
CATEGORY = "attnsteer"


@dataclass(frozen=True)
class Slot:
    """One input of a node: its type as that program spells it, its default, and further settings."""

    name: str
    kind: str
    default: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """One node: `run(unique_id, **inputs)` returns its outputs."""

    name: str
    title: str
    about: str
    inputs: Sequence[Slot]
    outputs: Sequence[tuple[str, str]]
    run: Callable[..., tuple[Any, ...]]
    ends: bool = False


def real(name: str, default: float, low: float, high: float, step: float = 0.05) -> Slot:
    """A number."""
    return Slot(name, "FLOAT", default, {"min": low, "max": high, "step": step})


def text(name: str, default: str = "", tooltip: str = "", multiline: bool = False) -> Slot:
    """A text."""
    return Slot(name, "STRING", default, {"multiline": multiline, "tooltip": tooltip})


# What a user types.


def where_of(layers: str, steps_from: float = 0.0, steps_to: float = 1.0) -> Where:
    """`layers` as "4, 7-9" or "" for the method's own choice; steps as fractions of the schedule.

    Raises:
        SelectionError: it is neither.
    """
    wanted: dict[str, Any] = {}
    if layers.strip():
        wanted["layers"] = layers.replace(" ", "")
    if (steps_from, steps_to) != (0.0, 1.0):
        wanted["steps"] = (float(steps_from), float(steps_to))
    return Where(**wanted)


def heads_of(given: str) -> HeadSet | None:
    """A head set from lines such as "4: 0, 2, 5"; None where there are none.

    Raises:
        SelectionError: a line has another form.
    """
    found: dict[int, list[int]] = {}
    for line in filter(None, map(str.strip, re.split(r"[\n;]", given))):
        match = re.fullmatch(r"(\d+)\s*:\s*(\d+(?:\s*,\s*\d+)*)", line)
        if match is None:
            raise SelectionError(f"heads {line!r}: give one layer a line and its heads, such as 4: 0, 2, 5.")
        found.setdefault(int(match[1]), []).extend(int(h) for h in match[2].split(","))
    return HeadSet(found) if found else None


def boxes_of(given: str) -> dict[str, tuple[float, float, float, float]]:
    """Boxes from lines such as "red circle: 0.0, 0.1, 0.5, 0.9", fractions of the image from the left and the top.

    Raises:
        SelectionError: a line has another form, or there is none.
    """
    found: dict[str, tuple[float, float, float, float]] = {}
    for line in filter(None, map(str.strip, given.splitlines())):
        phrase, _, numbers = line.rpartition(":")
        try:
            box = tuple(float(n) for n in numbers.split(","))
        except ValueError:
            box = ()
        if not phrase.strip() or len(box) != 4:
            raise SelectionError(
                f"box {line!r}: give a phrase and x0, y0, x1, y1, such as red circle: 0.0, 0.1, 0.5, 0.9."
            )
        found[phrase.strip()] = box
    if not found:
        raise SelectionError("give at least one box, such as red circle: 0.0, 0.1, 0.5, 0.9.")
    return found


# What nodes do.


def badge(unique_id: Any) -> Callable[[str], None] | None:
    """Puts a text under a node, where the program's server runs."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    if unique_id is None or instance is None or not hasattr(instance, "send_progress_text"):
        return None
    return lambda told: instance.send_progress_text(told, str(unique_id))


def pag(
    unique_id: Any, model: Any, scale: float, layers: str, steps_from: float, steps_to: float
) -> tuple[Any, Report]:
    """PAG."""
    return install(model, PAG(scale, where=where_of(layers, steps_from, steps_to)), publish=badge(unique_id))


def softpag(
    unique_id: Any,
    model: Any,
    scale: float,
    strength: float,
    heads: str,
    layers: str,
    steps_from: float,
    steps_to: float,
) -> tuple[Any, Report]:
    """SoftPAG per head; the layers of the heads, where none are given."""
    chosen, where = heads_of(heads), where_of(layers, steps_from, steps_to)
    if chosen is not None and where.layers is None:
        where = where_of(",".join(map(str, sorted({layer for layer, _ in chosen}))), steps_from, steps_to)
    return install(model, SoftPAG(scale, strength, heads=chosen, where=where), publish=badge(unique_id))


def seg(
    unique_id: Any,
    model: Any,
    scale: float,
    infinite: bool,
    sigma: float,
    layers: str,
    steps_from: float,
    steps_to: float,
) -> tuple[Any, Report]:
    """SEG."""
    width = {} if infinite else {"sigma": sigma}
    return install(model, SEG(scale, where=where_of(layers, steps_from, steps_to), **width), publish=badge(unique_id))


def nag(
    unique_id: Any,
    model: Any,
    negative: Any,
    scale: float,
    tau: float,
    alpha: float,
    steps_from: float,
    steps_to: float,
) -> tuple[Any, Report]:
    """NAG with a negative conditioning of its own, so that it acts at CFG 1 and where branches run apart."""
    if len(negative) != 1:
        raise SelectionError(
            f"NAG takes one negative prompt; this conditioning has {len(negative)} parts. Encode one text."
        )
    context, more = negative[0]
    given = {"context": context}
    if more.get("pooled_output") is not None:
        given["y"] = more["pooled_output"]
    method = NAG(given, scale=scale, tau=tau, alpha=alpha, where=where_of("", steps_from, steps_to))
    return install(model, method, publish=badge(unique_id))


def refocus(unique_id: Any, model: Any, clip: Any, text: str, boxes: str, step_size: float) -> tuple[Any, Report]:
    """AttentionRefocusing; `text` is the positive prompt, in which the phrases of the boxes stand."""
    prompt, method = prompt_of(clip, text), AttentionRefocusing(boxes=boxes_of(boxes), step_size=step_size)
    # What cannot be found is said here, not after the model was loaded.
    prompt.terms(method.phrases(), method.include)
    return install(model, method, publish=badge(unique_id), prompt=prompt)


def preview(unique_id: Any, model: Any, clip: Any, text: str, words: str, layers: str) -> tuple[Any, Maps]:
    """Reads the maps of some words, a line or a comma apart."""
    phrases = [w.strip() for w in re.split(r"[\n,]", words) if w.strip()]
    maps = Maps(prompt_of(clip, text), phrases)
    clone, report = install(model, WordMaps(maps, where=where_of(layers)))
    report.images["maps"] = maps
    return clone, maps


def pictures(unique_id: Any, latent: Any, maps: Maps) -> tuple[Any]:
    """The maps of the run that made `latent`."""
    return (maps.images(),)


def told(unique_id: Any, latent: Any, report: Report) -> tuple[str]:
    """The report of the run that made `latent`."""
    return (report.text,)


MODEL = Slot("model", "MODEL")
LATENT = Slot("latent", "LATENT")
LAYERS = text("layers", "", 'such as "4, 7-9"; empty: the middle block of a UNet')
STEPS = (real("steps_from", 0.0, 0.0, 1.0), real("steps_to", 1.0, 0.0, 1.0))
STEERED = (("model", "MODEL"), ("report", REPORT))
PROMPT = (Slot("clip", "CLIP"), text("text", "", "the positive prompt, as it was encoded", multiline=True))

NODES = (
    Node(
        "AttnsteerPAG", "Perturbed attention (attnsteer)",
        "Guides away from a prediction whose self-attention maps are the identity.",
        (MODEL, real("scale", 3.0, 0.0, 30.0), LAYERS, *STEPS), STEERED, pag,
    ),
    Node(
        "AttnsteerSoftPAG", "Soft perturbed attention, per head (attnsteer)",
        "The same by degrees, and in chosen heads only.",
        (
            MODEL, real("scale", 3.0, 0.0, 30.0), real("strength", 0.5, 0.0, 1.0),
            text("heads", "", "a line for each layer, such as 4: 0, 2, 5; empty: all heads", multiline=True), LAYERS, *STEPS,
        ),
        STEERED, softpag,
    ),
    Node(
        "AttnsteerSEG", "Smoothed energy guidance (attnsteer)", "Guides away from a prediction whose queries are blurred.",
        (
            MODEL, real("scale", 3.0, 0.0, 30.0), Slot("infinite", "BOOLEAN", True), real("sigma", 10.0, 0.1, 9999.0, 0.1), LAYERS,
            *STEPS,
        ),
        STEERED, seg,
    ),
    Node(
        "AttnsteerNAG", "Normalized attention guidance (attnsteer)",
        "A negative prompt inside attention; acts at CFG 1 too, and where both prompts run in separate calls.",
        (
            MODEL, Slot("negative", "CONDITIONING"), real("scale", 4.0, 0.0, 50.0), real("tau", 2.5, 0.05, 20.0),
            real("alpha", 0.25, 0.0, 1.0), *STEPS,
        ),
        STEERED, nag,
    ),
    Node(
        "AttnsteerRefocus", "Boxes by attention refocusing (attnsteer)",
        "Moves the latent so that words of the prompt are attended to inside their boxes.",
        (
            MODEL, *PROMPT, text("boxes", "", "a line each: red circle: 0.0, 0.1, 0.5, 0.9", multiline=True),
            real("step_size", 1.0, 0.0, 20.0),
        ),
        STEERED, refocus,
    ),
    Node(
        "AttnsteerWordMaps", "Attention of words (attnsteer)", "Reads what the words of the prompt are attended to by.",
        (MODEL, *PROMPT, text("words", "", "words of the prompt, a comma apart"), LAYERS),
        (("model", "MODEL"), ("maps", MAPS)), preview,
    ),
    Node(
        "AttnsteerMapPreview", "Attention of words, as pictures (attnsteer)", "After sampling: one picture for each word.",
        (LATENT, Slot("maps", MAPS)), (("images", "IMAGE"),), pictures,
    ),
    Node(
        "AttnsteerReport", "What attnsteer did", "After sampling: whether a method fired, and how much it changed.",
        (LATENT, Slot("report", REPORT)), (("text", "STRING"),), told, ends=True,
    ),
)  # fmt: skip


# Both forms of that program's nodes.


def classic() -> dict[str, type]:
    """Node classes of the older form: name -> class."""
    return {node.name: _classic(node) for node in NODES}


def _classic(node: Node) -> type:
    def input_types(cls: type) -> dict[str, Any]:
        required = {}
        for slot in node.inputs:
            given = {} if slot.default is None else {"default": slot.default}
            required[slot.name] = (slot.kind, {**given, **slot.settings})
        return {"required": required, "hidden": {"unique_id": "UNIQUE_ID"}}

    def execute(self: Any, unique_id: Any = None, **inputs: Any) -> Any:
        found = node.run(unique_id, **inputs)
        return {"ui": {"text": found}, "result": found} if node.ends else found

    return type(
        node.name,
        (),
        {
            "__doc__": node.about,
            "INPUT_TYPES": classmethod(input_types),
            "RETURN_TYPES": tuple(kind for _, kind in node.outputs),
            "RETURN_NAMES": tuple(name for name, _ in node.outputs),
            "FUNCTION": "execute",
            "CATEGORY": CATEGORY,
            "DESCRIPTION": node.about,
            "OUTPUT_NODE": node.ends,
            "execute": execute,
        },
    )


def current() -> list[type]:
    """Node classes of the newer form, over `comfy_api`."""
    api = importlib.import_module("comfy_api.latest")
    return [_current(node, api.io, api.ui) for node in NODES]


def _current(node: Node, io: Any, ui: Any) -> type:
    types = {"MODEL": "Model", "CLIP": "Clip", "CONDITIONING": "Conditioning", "LATENT": "Latent", "IMAGE": "Image"}
    types |= {"FLOAT": "Float", "STRING": "String", "BOOLEAN": "Boolean"}
    of = lambda kind: getattr(io, types[kind]) if kind in types else io.Custom(kind)  # noqa: E731

    def define_schema(cls: type) -> Any:
        inputs = [
            of(s.kind).Input(s.name, **({} if s.default is None else {"default": s.default}), **s.settings)
            for s in node.inputs
        ]
        return io.Schema(
            node_id=node.name,
            display_name=node.title,
            category=CATEGORY,
            description=node.about,
            inputs=inputs,
            outputs=[of(kind).Output(display_name=name) for name, kind in node.outputs],
            hidden=[io.Hidden.unique_id],
            is_output_node=node.ends,
            not_idempotent=node.ends,
        )

    def execute(cls: Any, **inputs: Any) -> Any:
        found = node.run(getattr(getattr(cls, "hidden", None), "unique_id", None), **inputs)
        return io.NodeOutput(*found, ui=ui.PreviewText(found[0])) if node.ends else io.NodeOutput(*found)

    body = {"__doc__": node.about, "define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    return type(node.name, (io.ComfyNode,), body)
