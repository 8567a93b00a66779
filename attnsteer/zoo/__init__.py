"""Small models trained by this project, in the public formats, to try and test methods without a download.

`load("shapes-lm")` and its like return stock transformers and diffusers objects. `folder(name)` is where they lie:
`from_pretrained` of either library loads that folder without attnsteer.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UnknownName, ZooError, did_you_mean

MODELS = Path(__file__).parent / "models"
NAMES = ("shapes-lm", "shapes-lvlm", "shapes-sd", "shapes-mmdit")
HASHES = "sha256.json"
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


def folder(name: str) -> Path:
    """The folder of a model, its files checked against their hashes.

    Raises:
        UnknownName: no model of this name.
        ZooError: a file is missing, cut short or changed; the message names it.
    """
    if name not in NAMES:
        raise UnknownName(f"no embedded model {name!r}; there are {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")
    path = MODELS / name
    if not (path / HASHES).is_file():
        raise ZooError(
            f"{path / HASHES} is missing, so {name} is not part of this installation. Install attnsteer again, or train "
            f"it: python -m attnsteer.zoo.train {name}"
        )
    try:
        wanted = json.loads((path / HASHES).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ZooError(f"{path / HASHES} is not JSON ({error}); install attnsteer again.") from error
    for file, digest in wanted.items():
        whole = path / file
        if not whole.is_file():
            raise ZooError(f"{whole} is missing; install attnsteer again.")
        if _digest(whole, whole.stat().st_mtime_ns, whole.stat().st_size) != digest:
            raise ZooError(
                f"{whole} is cut short or changed (its hash is not the recorded one); install attnsteer again."
            )
    return path


@functools.lru_cache(maxsize=256)
def _digest(path: Path, modified: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(path: Path) -> None:
    """Write the hashes of a model folder; `folder` checks them."""
    files = sorted(
        f for f in path.rglob("*") if f.is_file() and f.suffix in (".safetensors", ".json") and f.name != HASHES
    )
    found = {f.relative_to(path).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    (path / HASHES).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def load(name: str, *, dtype: Any = None, device: Any = "cpu") -> Any:
    """An embedded model.

    Args:
        name: of `NAMES`.
        dtype: of the weights; fp32 unless given (they are stored in half precision).
        device: to put it on.

    Returns:
        "shapes-lm": `Text(model, tokenizer)`, a LlamaForCausalLM; "shapes-lvlm": `Vision(model, processor)`, a
        LlavaForConditionalGeneration; "shapes-sd": a StableDiffusionPipeline; "shapes-mmdit": a
        StableDiffusion3Pipeline without T5.

    Raises:
        UnknownName, ZooError: see `folder`.
    """
    path = folder(name)
    import torch

    from .quiet import quiet

    dtype = torch.float32 if dtype is None else dtype
    pictures = name in PIPELINES
    with quiet(pictures=pictures):
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
