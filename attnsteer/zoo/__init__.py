"""Models to try and evaluate methods on, in the public formats.

Embedded ones (`NAMES`) were trained by this project and need no download; real checkpoints (`FETCHED`) are fetched once, on
request, by `fetch(name)` or `attnsteer zoo fetch NAME`; of `ASSEMBLED` ones a part is embedded and a part fetched. `load(name)`
returns stock transformers and diffusers objects. `folder(name)` is where they lie: `from_pretrained` of either library loads the
folder of an embedded or fetched one without attnsteer. `preset(name, method)` is a method with the settings that were tuned for a
model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ZooError
from . import fetched
from .fetched import fetch
from .folders import ASSEMBLED, FETCHED, KNOWN, MODELS, NAMES, available, folder, present
from .hashes import HASHES, seal
from .presets import PRESETS, preset, presets

__all__ = [
    "ASSEMBLED",
    "FETCHED",
    "HASHES",
    "KNOWN",
    "MODELS",
    "NAMES",
    "PRESETS",
    "Text",
    "Vision",
    "available",
    "fetch",
    "folder",
    "load",
    "present",
    "preset",
    "presets",
    "seal",
]

# The pipelines: their class, and the parts that they are without.
PIPELINES = {
    "shapes-sd": ("StableDiffusionPipeline", ("safety_checker",)),
    "shapes-mmdit": ("StableDiffusion3Pipeline", ("text_encoder_3", "tokenizer_3")),
}


class Text(NamedTuple):
    """A language model and its tokenizer."""

    model: Any
    tokenizer: Any


class Vision(NamedTuple):
    """A vision-language model and its processor."""

    model: Any
    processor: Any


def load(
    name: str, *, dtype: Any = None, device: Any = "cpu", download: bool = False, registers: bool | None = None
) -> Any:
    """An embedded or fetched model.

    Args:
        name: of `NAMES`, `FETCHED` or `ASSEMBLED`.
        dtype: of the weights; fp32 unless given (embedded ones are stored in half precision).
        device: to put it on.
        download: fetch it first where it is not there; without it, nothing is ever downloaded.
        registers: of "smollm2-llava" alone: with its planted visual sinks (the default), or without: the control.

    Returns:
        "shapes-lm": `Text(model, tokenizer)`, a LlamaForCausalLM; "shapes-lvlm": `Vision(model, processor)`, a
        LlavaForConditionalGeneration; "shapes-sd": a StableDiffusionPipeline; "shapes-mmdit": a
        StableDiffusion3Pipeline without T5; "smollm2-llava": `Vision` again, whose text model is SmolLM2-135M; fetched ones:
        `Text` with a model of their own class.

    Raises:
        UnknownName, ZooError: see `folder` and `fetch`; `registers` of a model that has none.
    """
    if registers is not None and name not in ASSEMBLED:
        raise ZooError(f"registers={registers}: {name} has none; {', '.join(ASSEMBLED)} has.")
    if download and name in (*FETCHED, *ASSEMBLED):
        fetch(ASSEMBLED.get(name, name))
    path = folder(name)
    import torch

    from .quiet import quiet

    dtype = torch.float32 if dtype is None else dtype
    pictures = name in PIPELINES
    with quiet(pictures=pictures):
        if name in FETCHED:
            return Text(*fetched.load(name, path, dtype, device))
        if name in ASSEMBLED:
            from . import llava

            return Vision(*llava.load(path, dtype, device, registers is not False))
        return (_pipeline if pictures else _model)(name, path, dtype, device)


def _model(name: str, path: Path, dtype: Any, device: Any) -> Any:
    import transformers

    if name == "shapes-lm":
        model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=dtype)
        return Text(model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(path))
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype)
    return Vision(model.to(device).eval(), transformers.AutoProcessor.from_pretrained(path))


def _pipeline(name: str, path: Path, dtype: Any, device: Any) -> Any:
    import diffusers

    kind, absent = PIPELINES[name]
    pipe = getattr(diffusers, kind).from_pretrained(path, **dict.fromkeys(absent)).to(device)
    # Their weights are stored in half precision, and loaded in single.
    pipe = pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
