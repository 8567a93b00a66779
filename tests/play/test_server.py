"""Who is answered: this machine, with the token, asking for what there is."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from typing import Any

import pytest

from attnsteer.errors import SelectionError
from attnsteer.play import PlayServer
from attnsteer.play.drawing import Stale
from attnsteer.play.players import Busy
from attnsteer.play.server import LARGEST_BODY


class Echo:
    """A player that says what it was asked."""

    name = "echo"

    def __init__(self) -> None:
        self.gate = threading.Barrier(4)

    def about(self) -> dict[str, Any]:
        return {"name": "</script><script>owned()</script>", "kind": "lm", "dials": [], "sites": [], "example": ""}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "together" in request:
            # All of them are heard before any is answered, or this fails.
            self.gate.wait(timeout=10)
        if "wrong" in request:
            raise {
                "busy": Busy(),
                "stale": Stale(),
                "bug": ZeroDivisionError("secret"),
                "own": SelectionError("no\nsuch head"),
            }[request["wrong"]]
        return {"said": request}


@pytest.fixture(scope="module")
def server() -> Any:
    with PlayServer(Echo()) as found:
        yield found


def ask(
    server: PlayServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    data = json.dumps(body) if body is not None else None
    kind = {"Content-Type": "application/json"} if data else {}
    connection.request(method, path, data, {**kind, **{k.replace("_", "-"): v for k, v in headers.items()}})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), dict(answer.getheaders())
    connection.close()
    return found


def test_the_page_and_a_request(server: PlayServer) -> None:
    status, text, headers = ask(server, "GET", f"/{server.token}/")
    assert status == 200 and "connect-src 'self'" in text and "<script>owned" not in text
    assert headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "no-referrer"
    assert ask(server, "POST", f"/{server.token}/run", {"a": 1})[:2] == (200, '{"said": {"a": 1}}')
    assert server.address.startswith("http://127.0.0.1:") and len(server.token) >= 32


@pytest.mark.parametrize("path", ["/", "/run", "/wrong/", "/wrong/run", "/%00/", "/%C3%A9/"])
def test_without_the_token_nothing_is_answered(server: PlayServer, path: str) -> None:
    for method in ("GET", "POST"):
        status, text, _ = ask(server, method, path, {} if method == "POST" else None)
        assert status == 403 and "Open the whole address" in text and server.token not in text


def test_other_names_and_sites_are_refused(server: PlayServer) -> None:
    path = f"/{server.token}/run"
    assert ask(server, "POST", path, {}, Host="evil.example")[0] == 403
    assert ask(server, "POST", path, {}, Origin="http://evil.example")[0] == 403
    assert ask(server, "POST", path, {}, Origin=f"http://localhost:{server.port}")[0] == 200
    assert ask(server, "POST", path, {}, Content_Type="text/plain")[0] == 415


def test_wrong_requests_have_an_answer(server: PlayServer, capsys: Any) -> None:
    path = f"/{server.token}/run"
    assert ask(server, "POST", path, [1])[0] == 400
    assert ask(server, "POST", path, {}, Content_Length="99999999999")[0] == 413
    assert ask(server, "POST", f"/{server.token}/other", {})[0] == 404
    assert ask(server, "POST", path, {"wrong": "own"})[:2] == (400, '{"error": "no such head"}')
    assert ask(server, "POST", path, {"wrong": "busy"})[0] == 503
    assert ask(server, "POST", path, {"wrong": "stale"})[0] == 409
    status, text, _ = ask(server, "POST", path, {"wrong": "bug"})
    assert status == 500 and "secret" not in text and "ZeroDivisionError" in capsys.readouterr().err


def raw(server: PlayServer, head: str, body: bytes = b"") -> bytes:
    """What comes back for bytes of one's own; all of the body is sent before the answer is read."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.format(token=server.token, port=server.port).encode() + b"\r\n\r\n" + body)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
        return found


POST = "POST /{token}/run HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: "


def test_whatever_is_asked_has_an_answer_at_once(server: PlayServer) -> None:
    """Pages that are not there, numbers and nesting without end, and bodies that are too large, sent to their last byte."""
    for path in ("nothing", "../../etc/passwd", "%2e%2e/run"):
        assert ask(server, "GET", f"/{server.token}/{path}")[0] == 404
    deep = b"[" * 100_000
    assert b" 400 " in raw(server, POST + str(len(deep)), deep).partition(b"\r\n")[0]
    assert b" 413 " in raw(server, POST + "1" * 5000).partition(b"\r\n")[0]
    large = bytes(LARGEST_BODY + 1)
    for head in (POST, POST.replace("/{token}", "/wrong"), POST.replace("application/json", "text/plain")):
        status = raw(server, head + str(len(large)), large).partition(b"\r\n")[0]
        assert re.search(rb" (413|403|415) ", status), status


def test_clients_at_once(server: PlayServer) -> None:
    found: list[Any] = []
    path = f"/{server.token}/run"
    threads = [
        threading.Thread(target=lambda i=i: found.append(ask(server, "POST", path, {"i": i, "together": True})[1]))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.loads(t)["said"]["i"] for t in found) == [0, 1, 2, 3]


def test_a_port_in_use(server: PlayServer) -> None:
    with pytest.raises(SelectionError, match=rf"port {server.port} of 127\.0\.0\.1 is in use"):
        PlayServer(Echo(), server.port)


def test_after_it_the_port_is_free() -> None:
    with PlayServer(Echo()) as first:
        port = first.port
    with PlayServer(Echo(), port) as second:
        assert ask(second, "GET", f"/{second.token}/")[0] == 200
