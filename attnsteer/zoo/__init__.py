"""Models to try and evaluate methods on, in the public formats.

Embedded ones (`NAMES`) were trained by this project and need no download; real checkpoints (`FETCHED`) are fetched once, on
request, by `fetch(name)` or `attnsteer zoo fetch NAME`. `load(name)` returns stock transformers and diffusers objects.
`folder(name)` is where they lie: `from_pretrained` of either library loads that folder without attnsteer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UnknownName, ZooError, did_you_mean
from . import fetched
from .fetched import NAMES as FETCHED
from .fetched import fetch
from .hashes import HASHES, checked, seal

__all__ = [
    "FETCHED",
    "HASHES",
    "KNOWN",
    "NAMES",
    "Text",
    "Vision",
    "available",
    "fetch",
    "folder",
    "load",
    "present",
    "seal",
]

MODELS = Path(__file__).parent / "models"
NAMES = ("shapes-lm", "shapes-lvlm", "shapes-sd", "shapes-mmdit")
KNOWN = (*NAMES, *FETCHED)
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


def available() -> tuple[str, ...]:
    """The embedded models of this installation."""
    return tuple(n for n in NAMES if (MODELS / n / HASHES).is_file())


def present() -> tuple[str, ...]:
    """The fetched models of this machine."""
    return tuple(n for n in FETCHED if (fetched.place(n) / HASHES).is_file())


def folder(name: str) -> Path:
    """The folder of a model, its files checked against their hashes.

    Raises:
        UnknownName: no model of this name.
        ZooError: a file is missing, cut short or changed; the message names it.
    """
    if name in FETCHED:
        path = fetched.place(name)
        if not (path / HASHES).is_file():
            raise ZooError(f"{name} is not in {path.parent}; fetch it once: attnsteer zoo fetch {name}")
        return checked(path, f"remove {path} and fetch {name} again")
    if name not in NAMES:
        raise UnknownName(
            f"no model {name!r}; embedded: {', '.join(NAMES)}; to be fetched: {', '.join(FETCHED)}.{did_you_mean(name, KNOWN)}"
        )
    path = MODELS / name
    if not (path / HASHES).is_file():
        raise ZooError(
            f"{path / HASHES} is missing, so {name} is not part of this installation. Install attnsteer again, or train "
            f"it: python -m attnsteer.zoo.train {name}"
        )
    return checked(path, "install attnsteer again")


def load(name: str, *, dtype: Any = None, device: Any = "cpu", download: bool = False) -> Any:
    """An embedded or fetched model.

    Args:
        name: of `NAMES` or `FETCHED`.
        dtype: of the weights; fp32 unless given (embedded ones are stored in half precision).
        device: to put it on.
        download: fetch it first where it is not there; without it, nothing is ever downloaded.

    Returns:
        "shapes-lm": `Text(model, tokenizer)`, a LlamaForCausalLM; "shapes-lvlm": `Vision(model, processor)`, a
        LlavaForConditionalGeneration; "shapes-sd": a StableDiffusionPipeline; "shapes-mmdit": a
        StableDiffusion3Pipeline without T5; fetched ones: `Text` with a model of their own class.

    Raises:
        UnknownName, ZooError: see `folder` and `fetch`.
    """
    path = fetch(name) if download and name in FETCHED else folder(name)
    import torch

    from .quiet import quiet

    dtype = torch.float32 if dtype is None else dtype
    pictures = name in PIPELINES
    with quiet(pictures=pictures):
        if name in FETCHED:
            return Text(*fetched.load(name, path, dtype, device))
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
