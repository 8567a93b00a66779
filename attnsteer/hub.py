"""Folders to the hub and back: a card, a manifest that is checked before anything is read, and nothing that can run.

Methods and head sets are repositories of the type "model", runs of the type "dataset". Only JSON, JSON Lines, YAML, safetensors,
pictures and texts travel; a repository with anything else is refused whole.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ._version import __version__
from .errors import HubError, SelectionError, SerializationError, listing
from .manifest import MANIFEST, checked_manifest, inside, write_manifest

CARD = "README.md"
# What a repository has beside the files of the manifest.
BESIDE = (CARD, MANIFEST, ".gitattributes")
TYPES = {"method": "model", "heads": "model", "run": "dataset"}
# Bytes of a file and of all files of a repository; depth of JSON, and its bytes where it is read whole.
MOST_FILE, MOST_ALL = 1 << 30, 1 << 34
MOST_JSON, DEPTH = 1 << 24, 60


def upload(
    folder: Path,
    names: Iterable[str],
    repo: str,
    kind: str,
    *,
    about: Mapping[str, Any],
    card: str,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Put files of a folder into a repository, which is made where there is none; returns the address of the commit.

    A card that is there already is kept. The files are hashed into MANIFEST.json, with what `about` says.

    Raises:
        HubError: the hub refuses, is not there, or the name is none.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="attnsteer", library_version=__version__)
    names = list(names)
    with tempfile.TemporaryDirectory(prefix="attnsteer-hub-") as scratch, told(f"{kind} to {repo}"):
        made = Path(scratch)
        for name in names:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes((folder / name).read_bytes())
        write_manifest(made, names, kind, **about)
        api.create_repo(repo, repo_type=TYPES[kind], private=private, exist_ok=True)
        if not api.file_exists(repo, CARD, repo_type=TYPES[kind]):
            (made / CARD).write_text(card, encoding="utf-8")
        done = api.upload_folder(
            repo_id=repo,
            repo_type=TYPES[kind],
            folder_path=made,
            commit_message=f"attnsteer {__version__}: {kind}",
            # What an earlier version of the artefact had and this one has not.
            delete_patterns=["*.json", "*.jsonl", "*.safetensors"],
        )
    return str(done.commit_url)


def download(
    repo: str,
    kind: str,
    known: Callable[[str], bool],
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    to: str | Path | None = None,
) -> Path:
    """A repository's artefact in a folder on this machine, after its manifest was checked; nothing of it was read before.

    Args:
        known: whether a folder of this kind may have a file of this name. revision: commit, tag or branch.
        to: where to put it; None: the hub's cache.

    Raises:
        HubError: it is not there, cannot be reached, or cannot be written here.
        SerializationError: it has files that no such artefact has, or is not what its manifest says.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint, token=token, library_name="attnsteer", library_version=__version__)
    with told(f"{kind} from {repo}" + (f" at {revision}" if revision else "")):
        commit = api.repo_info(repo, revision=revision, repo_type=TYPES[kind]).sha
        tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=TYPES[kind])
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    _check_tree(repo, kind, sizes, known)
    with told(f"{kind} from {repo}"):
        folder = Path(
            api.snapshot_download(
                repo,
                revision=commit,
                repo_type=TYPES[kind],
                allow_patterns=[
                    re.sub(r"([\[\]*?])", r"[\1]", name) for name in sizes if name not in (CARD, ".gitattributes")
                ],
                local_dir=to,
            )
        )
    _whole(folder, kind, sizes, known)
    return folder


def _check_tree(repo: str, kind: str, sizes: Mapping[str, int], known: Callable[[str], bool]) -> None:
    """Raise a SerializationError for a repository that is not of this kind, before any of its files is fetched."""
    strange = sorted(name for name in sizes if not inside(name) or not (name in BESIDE or known(name)))
    if strange:
        raise SerializationError(
            f"{repo} has {listing(map(repr, strange), 4)}, which no {kind} of attnsteer has; nothing of it was fetched."
        )
    if MANIFEST not in sizes:
        raise SerializationError(
            f"{repo} has no {MANIFEST}, so that nothing in it can be checked; push it again with push_to_hub."
        )
    large = [f"{name} ({size:,} bytes)" for name, size in sizes.items() if size > MOST_FILE]
    large += [f"{n} ({s:,} bytes)" for n, s in sizes.items() if n.endswith(".json") and MOST_JSON < s <= MOST_FILE]
    if large or sum(sizes.values()) > MOST_ALL:
        raise SerializationError(f"{repo} is larger than any {kind}: {listing(large, 3) or 'all files together'}.")


def _whole(folder: Path, kind: str, sizes: Mapping[str, int], known: Callable[[str], bool]) -> None:
    """Check what was fetched against its manifest, and the form of its JSON."""
    # The hub's cache has links into its own store, so that links are told from files where the tree is listed.
    names = [n for n in sizes if n not in BESIDE]
    manifest = checked_manifest(folder, kind, names, links=True)
    loose = sorted(set(names) - set(manifest["files"]))
    if loose:
        raise SerializationError(f"{folder} has {listing(loose, 4)}, which its {MANIFEST} does not name.")
    for name in names:
        if name.endswith(".json"):
            checked_json(folder / name)


def checked_json(path: Path) -> Any:
    """A JSON file: no deeper than anything here, no numbers that are none.

    Raises:
        SerializationError: it is not that.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, OSError, RecursionError) as error:
        raise SerializationError(f"{path} is no JSON that can be read: {error or type(error).__name__}.") from error
    level, deep = [found], 0
    while level:
        deep += 1
        if deep > DEPTH:
            raise SerializationError(f"{path} is nested deeper than {DEPTH} levels.")
        level = [
            v for one in level if isinstance(one, dict | list) for v in (one.values() if isinstance(one, dict) else one)
        ]
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def model_facts(model: Any) -> dict[str, Any] | None:
    """What tells one model from another: id and resolved commit where they are known, its class, layers and heads.

    Args:
        model: a model, a pipeline, or an id; None: nothing is known.
    """
    if model is None:
        return None
    if isinstance(model, str):
        return {"id": model}
    config = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    get = inner.get if isinstance(inner, Mapping) else lambda k, d=None: getattr(inner, k, d)
    name = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or "")
    found = {
        "id": name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None,
        "revision": getattr(config, "_commit_hash", None),
        "class": type(model).__name__,
        "layers": get("num_hidden_layers"),
        "heads": get("num_attention_heads"),
    }
    return {k: v for k, v in found.items() if isinstance(v, str | int)}


def check_model(manifest: Mapping[str, Any], model: Any, what: str) -> None:
    """Refuse what was made for another model.

    Raises:
        SelectionError: it was.
    """
    said, here = manifest.get("model") or {}, model_facts(model) or {}
    differ = [k for k in ("id", "class", "layers", "heads") if k in said and k in here and said[k] != here[k]]
    if differ:
        told_of = ", ".join(f"{k} {said[k]!r} instead of {here[k]!r}" for k in differ)
        raise SelectionError(
            f"{what} was made for another model ({told_of}); heads of one model mean nothing in another. Search for yours, or "
            "leave model= out if you know that they fit."
        )


def card(title: str, kind: str, body: str, *, base_model: str | None = None, tags: Iterable[str] = ()) -> str:
    """A README with the front matter that the hub reads; YAML takes JSON's texts."""
    head: dict[str, Any] = {"library_name": "attnsteer", "tags": ["attnsteer", kind, *tags]}
    if base_model and kind != "run":
        head["base_model"] = base_model
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    return "\n".join(["---", *lines, "---", "", f"# {title}", "", body.strip(), ""])


def origin(about: Mapping[str, Any] | None) -> str:
    """A line of a card on the model."""
    facts = dict(about or {})
    if not facts:
        return "- model: not said"
    name = facts.pop("id", None) or facts.get("class", "not named")
    rest = ", ".join(f"{k} {v}" for k, v in facts.items() if v is not None)
    return f"- model: {name}" + (f" ({rest})" if rest else "")


@contextmanager
def told(what: str) -> Iterator[None]:
    """Errors of the hub's client in one line, with what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RevisionNotFoundError as error:
        raise HubError(
            f"{what}: there is no such revision; name a commit, tag or branch that the repository has."
        ) from error
    except GatedRepoError as error:
        raise HubError(
            f"{what}: the repository is gated; accept its terms on its page, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: there is no such repository, or it is private; check the name, or `hf auth login` and try again."
        ) from error
    except RemoteEntryNotFoundError as error:
        raise HubError(f"{what}: a file is not there any more; try again, or name another revision.") from error
    except HFValidationError as error:
        raise HubError(
            f"{what}: this is no name of a repository; write owner/name, in letters, digits, - _ and ."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise HubError(f"{what}: {STATUS.get(status, f'the hub answered {status}; try again later')}.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        raise HubError(
            f"{what}: the hub cannot be reached, or broke off ({type(error).__name__}); check the network and HF_ENDPOINT, unset "
            "HF_HUB_OFFLINE, and try again."
        ) from error
    except PermissionError as error:
        raise HubError(
            f"{what}: {error.filename} cannot be written; give a folder of your own, or set HF_HOME."
        ) from error
    except (ValueError, OSError) as error:
        raise HubError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}; try again.") from error


STATUS = {
    401: "the hub does not know who you are; `hf auth login`, or give token=",
    403: "you may not do this; take a repository under your own name, or a token with write rights",
    404: "there is no such repository; check the name",
    409: "the repository has just been changed or is of another kind; try again, or take another name",
    413: "a file is larger than the hub takes",
    429: "the hub asks to wait; try again later",
}
