"""A model built from its config alone, on the `meta` device: its attention sites without its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import zoo
from .errors import AttnSteerError, UnknownName, UnsupportedHost, did_you_mean, listing
from .hosts.diffusers.host import DENOISERS
from .site import Site, SiteList
from .steering import sites

CONFIGS = ("config.json", "model_index.json", "*/config.json")


def sites_of(source: str | Path, component: str | None = None) -> SiteList:
    """The attention sites of a saved model or pipeline, from its config files only.

    Args:
        source: an embedded model by its name, a folder with `config.json` or `model_index.json`, or a hub id.
        component: one part of a pipeline; None: its denoisers.

    Code that a repository brings along is never run, so a model that needs it is refused.

    Raises:
        UnknownName: there is no such folder, hub repository or component.
        UnsupportedHost: the config names no class of transformers or diffusers, or has no attention to reach.
    """
    folder = _folder(str(source))
    index = _read(folder / "model_index.json")
    if index is not None:
        found = _pipeline_sites(folder, index, component)
    elif component is not None:
        raise UnknownName(f"{source} is a single model, not a pipeline; it has no component {component!r}.")
    else:
        found = list(sites(_model(folder)))
    if not found:
        raise UnsupportedHost(f"{source} has no attention that can be reached.")
    return SiteList(found)


def _pipeline_sites(folder: Path, index: dict[str, Any], component: str | None) -> list[Site]:
    parts = {
        k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and all(isinstance(x, str) for x in v)
    }
    names = [n for n in DENOISERS if n in parts] if component is None else [component]
    if component is not None and component not in parts:
        raise UnknownName(
            f"{folder} has no component {component!r}; it has {listing(parts)}.{did_you_mean(component, parts)}"
        )
    if not names:
        raise UnsupportedHost(f"{folder} has none of {listing(DENOISERS)}; name one of its parts: {listing(parts)}.")
    found: list[Site] = []
    for name in names:
        library, kind = parts[name]
        if library not in ("diffusers", "transformers"):
            raise UnsupportedHost(f"component {name!r} is a {library}.{kind}, code of its own, which is not run here.")
        if not (folder / name / "config.json").is_file():
            raise UnsupportedHost(f"component {name!r} ({kind}) has no config.json, so it is no model.")
        found += [dataclasses.replace(s, component=name) for s in sites(_model(folder / name))]
    return found


def _folder(source: str) -> Path:
    path = Path(source)
    if source in zoo.KNOWN and not path.is_dir():
        return zoo.folder(source)
    if path.is_dir():
        if any((path / name).is_file() for name in CONFIGS[:2]):
            return path
        raise UnknownName(f"{source} has neither config.json nor model_index.json.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(CONFIGS)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UnknownName(
            f"there is no folder {source!r}, and no hub repository of that name can be reached "
            f"({type(error).__name__}).{did_you_mean(source, zoo.KNOWN)}"
        ) from error


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedHost(f"{path} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise UnsupportedHost(f"{path} is not an object.")
    return record


def _model(folder: Path) -> nn.Module:
    config = _read(folder / "config.json") or {}
    build = _diffusers_model if "_class_name" in config else _transformers_model
    try:
        return _without_weights(build(folder, config))
    except AttnSteerError:
        raise
    except Exception as error:  # whatever a config makes a library raise
        raise UnsupportedHost(
            f"{folder}/config.json does not make a model: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _transformers_model(folder: Path, config: dict[str, Any]) -> Callable[[], nn.Module]:
    import transformers

    if "model_type" not in config:
        raise UnsupportedHost(f"{folder}/config.json has neither a model_type nor a _class_name.")
    if config["model_type"] not in transformers.CONFIG_MAPPING:
        own = "; the repository's own code is not run here" if "auto_map" in config else ""
        raise UnsupportedHost(
            f"{folder}/config.json has model_type {config['model_type']!r}, which transformers "
            f"{transformers.__version__} does not have{own}."
        )
    parsed = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    for name in parsed.architectures or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            # Which attention runs does not matter to a list of sites, and eager asks for no other package.
            return lambda: cls._from_config(parsed, attn_implementation="eager")
    return lambda: transformers.AutoModel.from_config(parsed, attn_implementation="eager", trust_remote_code=False)


def _diffusers_model(folder: Path, config: dict[str, Any]) -> Callable[[], nn.Module]:
    import diffusers

    name = config["_class_name"]
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise UnsupportedHost(f"{folder}/config.json names the class {name!r}, which this diffusers does not have.")
    return lambda: cls.from_config(config)


def _without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):
        # Some constructors compute with their tensors; only parameters are left out then.
        from accelerate import init_empty_weights

        with init_empty_weights():
            return build()
