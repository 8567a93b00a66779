"""The model of a recipe: embedded, from a folder, from the hub, or with --tiny a random small one of its architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError, listing
from ..recipe.schema import ZOO_KINDS
from ..zoo.quiet import quiet
from . import store
from .loaded import Loaded

if TYPE_CHECKING:
    from ..recipe.schema import ModelSpec
    from .data.sample import Data

KINDS = {"lm": "a language model", "vlm": "a vision-language model", "image": "a diffusion pipeline"}
WEIGHTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def load(spec: ModelSpec, *, device: str | None = None, tiny: Data | None = None, folder: Path | None = None) -> Loaded:
    """The model of a recipe.

    Args:
        device: of this process, where several share a machine. tiny: the samples, to make a tiny model for them (an embedded
            model is small already). folder: of the recipe.

    Raises:
        RecipeError: it is not there, of another kind, or without safe weights.
    """
    import torch

    if spec.device_map is not None:
        device = "cpu" if tiny is not None or spec.embedded else device
    elif spec.device != "auto":
        device = spec.device
    elif device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"model.device: {device} was asked for, and there is no CUDA device here; use auto or cpu.")
    dtype = getattr(torch, spec.dtype)
    with quiet(pictures=spec.kind == "image", remarks=False):
        return _load(spec, dtype, device, tiny, folder)


def _load(spec: ModelSpec, dtype: Any, device: Any, tiny: Data | None, folder: Path | None) -> Loaded:
    if spec.zoo is not None and (tiny is None or spec.embedded):
        return _zoo(spec.zoo, spec.kind, dtype, device)
    if tiny is not None:
        from .tiny import tiny_model

        return tiny_model(spec, tiny, dtype, device)
    if spec.vllm is not None:
        return _served(spec, folder)
    if spec.path is not None:
        source = (Path() if folder is None else folder) / Path(spec.path).expanduser()
        if not source.is_dir():
            embedded = f" {spec.path} is a model of the zoo: write zoo: {spec.path}." if spec.path in ZOO_KINDS else ""
            raise RecipeError(
                f"model.path: there is no folder {source}. A path is relative to the recipe's folder.{embedded}"
            )
    else:
        source = snapshot(str(spec.hub), spec.revision, spec.kind)
    found = _folder(source, spec, dtype, device)
    # The hub's cache names a snapshot after its commit.
    return found if spec.hub is None else replace(found, revision=source.name)


def _served(spec: ModelSpec, folder: Path | None) -> Loaded:
    from . import served

    if isinstance(spec.vllm, str):
        return served.server(spec)
    options = dict(spec.vllm or {})
    name, revision = str(options.pop("model")), options.pop("revision", None)
    source = (Path() if folder is None else folder) / Path(name).expanduser()
    if not source.is_dir():
        source = snapshot(name, revision, spec.kind)
    return served.engine(spec, options, source, hashes(source))


def _zoo(name: str, kind: str, dtype: Any, device: Any) -> Loaded:
    import json

    from .. import zoo
    from ..zoo.shapes.detect import detect

    found = zoo.load(name, dtype=dtype, device=device)
    files = json.loads((zoo.folder(name) / zoo.HASHES).read_text(encoding="utf-8"))
    if kind == "image":
        return Loaded(kind, found, getattr(found, "tokenizer", None), None, files, detect, device, dtype)
    model, reader = found
    if kind == "vlm":
        return Loaded(kind, model, reader.tokenizer, reader, files, None, device, dtype)
    return Loaded(kind, model, left_padded(reader), None, files, None, device, dtype)


def snapshot(name: str, revision: str | None, kind: str) -> Path:
    """A hub repository on this machine: weights in safetensors and texts, no code and no pickles."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(WEIGHTS)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at {revision}" if revision else ""
        raise RecipeError(
            f"model.hub: {name}{at} cannot be had ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Check the "
            "name, log in with `hf auth login` if it is gated, or download it and use model.path; --tiny needs no download."
        ) from error


def _folder(source: Path, spec: ModelSpec, dtype: Any, device: Any) -> Loaded:
    pipeline, config = (source / "model_index.json").is_file(), (source / "config.json").is_file()
    if not pipeline and not config:
        there = listing(sorted(p.name for p in source.iterdir()), 6) or "nothing"
        raise RecipeError(
            f"model: {source} has neither config.json nor model_index.json, so it is no model; it has {there}."
        )
    if pipeline != (spec.kind == "image"):
        is_there = KINDS["image"] if pipeline else "a transformers model"
        raise RecipeError(f"model.kind: {source} is {is_there}, and the recipe says {spec.kind}: {KINDS[spec.kind]}.")
    if not any(source.rglob("*.safetensors")):
        raise RecipeError(
            f"model: {source} has no weights in safetensors. Other formats can run code when they are read, and are not."
        )
    try:
        load = _pipeline if pipeline else _transformers
        return load(source, spec, dtype, device)
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise RecipeError(
            f"model: {source} cannot be loaded as {KINDS[spec.kind]} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]})."
        ) from error


def _transformers(source: Path, spec: ModelSpec, dtype: Any, device: Any) -> Loaded:
    import transformers

    safe = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(source, **safe)
    auto = transformers.AutoModelForCausalLM if spec.kind == "lm" else transformers.AutoModelForImageTextToText
    if type(config) not in auto._model_mapping:
        other = transformers.AutoModelForImageTextToText if spec.kind == "lm" else transformers.AutoModelForCausalLM
        kinds = {transformers.AutoModelForCausalLM: "lm", transformers.AutoModelForImageTextToText: "vlm"}
        hint = f" Its kind is {kinds[other]}." if type(config) in other._model_mapping else ""
        raise RecipeError(
            f"model.kind: {source} is a {config.model_type} model, which is not {KINDS[spec.kind]} ({spec.kind}).{hint}"
        )
    placed = {"device_map": spec.device_map} if spec.device_map is not None else {}
    model = auto.from_pretrained(source, config=config, dtype=dtype, use_safetensors=True, **safe, **placed).eval()
    if not placed:
        model = model.to(device)
    processor = None
    if spec.kind == "vlm":
        processor = transformers.AutoProcessor.from_pretrained(source, **safe)
        tokenizer = processor.tokenizer
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **safe)
    return Loaded(
        spec.kind,
        model,
        left_padded(tokenizer),
        processor,
        hashes(source),
        None,
        model.device if placed else device,
        dtype,
    )


def left_padded(tokenizer: Any) -> Any:
    """A tokenizer that pads on the left, where generation needs it."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pipeline(source: Path, spec: ModelSpec, dtype: Any, device: Any) -> Loaded:
    import diffusers

    placed = {"device_map": spec.device_map} if spec.device_map is not None else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        source, torch_dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False, **placed
    )
    if not placed:
        pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return Loaded(spec.kind, pipe, getattr(pipe, "tokenizer", None), None, hashes(source), None, device or "cpu", dtype)


def hashes(source: Path) -> dict[str, str]:
    """SHA-256 of the weights, configs and texts (of tokenizers, templates) of a model folder, by relative path."""
    found = sorted(f for f in source.rglob("*") if f.is_file() and any(f.match(pattern) for pattern in WEIGHTS))
    return {f.relative_to(source).as_posix(): store.file_hash(f) for f in found}
