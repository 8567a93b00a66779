"""A stand-in for the hub on this machine: the requests of one round trip (create, upload, list, download), and its ways to fail."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]
PLURALS = {"models": "model", "datasets": "dataset"}


@dataclass
class Hub:
    """Repositories by (type, owner/name), each a list of (commit, files).

    Attributes:
        fail: part of a path -> status with which a request for it is answered. cut: bodies of files end half-way.
        wrong: name of a file -> bytes that are sent in place of its own. log: (method, path) of every request.
    """

    url: str = ""
    repos: dict[tuple[str, str], list[tuple[str, Files]]] = field(default_factory=dict)
    fail: dict[str, int] = field(default_factory=dict)
    cut: bool = False
    wrong: Files = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)

    def put(self, repo: str, files: Files, kind: str = "model") -> None:
        """A new commit with these files alone, whatever they are called."""
        commits = self.repos.setdefault((kind, repo), [("0" * 40, {})])
        text = json.dumps([len(commits), repo, kind, sorted(files)])
        commits.append((hashlib.sha1(text.encode()).hexdigest(), dict(files)))

    def files(self, repo: str, kind: str = "model") -> Files:
        """Those of the newest commit."""
        return self.repos[kind, repo][-1][1]


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def body(self) -> bytes:
            if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = b""
            while size := int(self.rfile.readline().strip(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def send(
            self, status: int, value: Any = None, raw: bytes | None = None, cut: bool = False, **headers: str
        ) -> None:
            data = raw if raw is not None else b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            own = {"Content-Type": "application/json", "Content-Length": str(len(data))}
            for key, text in {**own, **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
                self.send_header(key, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True

        def refuse(self, status: int, code: str, said: str) -> None:
            self.send(status, {"error": said}, X_Error_Code=code, X_Error_Message=said)

        def answer(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            raw, parts = self.body(), path.strip("/").split("/")
            hub.log.append((self.command, path))
            status = next((s for part, s in hub.fail.items() if part in path), None)
            if status is not None:
                return self.refuse(status, "", "refused on purpose")
            if parts[:3] == ["api", "repos", "create"]:
                return self.create(json.loads(raw))
            if parts == ["api", "validate-yaml"]:
                return self.send(200, {"errors": [], "warnings": []})
            if parts[0] == "api" and parts[1] in PLURALS:
                return self.api(PLURALS[parts[1]], "/".join(parts[2:4]), parts[4:], raw)
            if "resolve" in parts:
                return self.resolve(parts)
            return self.refuse(404, "", f"no such route: {path}")

        def create(self, asked: dict[str, Any]) -> None:
            name, kind = f"{asked.get('organization') or 'me'}/{asked['name']}", asked.get("type") or "model"
            url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
            if not self.headers.get("authorization"):
                return self.refuse(401, "", "no token")
            if (kind, name) in hub.repos:
                return self.send(409, {"error": "You already created this repo", "url": url})
            hub.repos[kind, name] = [("0" * 40, {})]
            return self.send(200, {"url": url, "name": name, "id": name})

        def found(self, kind: str, repo: str, revision: str) -> tuple[str, Files] | None:
            """The commit of a revision; an answer was sent where there is none."""
            commits = hub.repos.get((kind, repo))
            if commits is None:
                self.refuse(404, "RepoNotFound", "Repository not found")
                return None
            of = [c for c in commits if c[0] == revision] or ([commits[-1]] if revision == "main" else [])
            if not of:
                self.refuse(404, "RevisionNotFound", "Revision not found")
            return of[0] if of else None

        def api(self, kind: str, repo: str, rest: list[str], raw: bytes) -> None:
            revision = rest[1] if len(rest) > 1 and rest[0] in ("revision", "tree") else "main"
            commit = self.found(kind, repo, revision)
            if commit is None:
                return None
            sha, files = commit
            if not rest or rest[0] == "revision":
                siblings = [{"rfilename": f} for f in files]
                return self.send(200, {"id": repo, "sha": sha, "siblings": siblings, "private": False, "tags": []})
            if rest[0] == "tree":
                rows = [{"type": "file", "path": f, "size": len(b), "oid": oid(b)} for f, b in files.items()]
                return self.send(200, rows)
            if rest[0] == "preupload":
                asked = [f["path"] for f in json.loads(raw)["files"]]
                rows = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in asked]
                return self.send(200, {"files": rows})
            if rest[0] == "commit":
                return self.commit(kind, repo, dict(files), raw)
            return self.refuse(404, "", f"no such route: {rest}")

        def commit(self, kind: str, repo: str, files: Files, raw: bytes) -> None:
            for line in raw.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"], None)
            hub.put(repo, files, kind)
            sha = hub.repos[kind, repo][-1][0]
            self.send(
                200,
                {"success": True, "commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""},
            )

        def resolve(self, parts: list[str]) -> None:
            at = parts.index("resolve")
            own = parts[:at]
            kind = PLURALS.get(own[0], "model")
            commit = self.found(kind, "/".join(own[1:] if own[0] in PLURALS else own), parts[at + 1])
            if commit is None:
                return None
            sha, files = commit
            name = "/".join(parts[at + 2 :])
            if name not in files:
                return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            content = hub.wrong.get(name, files[name])
            head = {"X_Repo_Commit": sha, "ETag": f'"{oid(files[name])}"', "Accept_Ranges": "bytes"}
            begin = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            if begin:
                span = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                return self.send(206, raw=content[begin:], cut=hub.cut, Content_Range=span, **head)
            return self.send(200, raw=content, cut=hub.cut and self.command == "GET", **head)

        do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = answer

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that listens on this machine alone while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
