"""The page's server: this machine alone, an address that nobody can guess, and nothing but this page and this model behind it."""

from __future__ import annotations

import errno
import hmac
import json
import secrets
import socket
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..errors import AttnSteerError, SelectionError
from ..viz.page import page
from .drawing import Stale
from .players import Busy, Player

HOST = "127.0.0.1"
LARGEST_BODY = 24 * 2**20
# Of a body that is refused, bytes that are still read, and seconds for them: who sends does not listen.
PASSED_OVER, PATIENCE = 4 * LARGEST_BODY, 5.0
PLAIN, JSON = "text/plain; charset=utf-8", "application/json"
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class PlayServer:
    """Serves one player on the loopback interface.

        with PlayServer(player("shapes-lm")) as server:
            print(server.address)

    Args:
        player: the model. port: 0 takes a free one.

    Attributes:
        address: of the page, with the token that every request has to have.

    Raises:
        SelectionError: the port is in use, or may not be used.
    """

    def __init__(self, player: Player, port: int = 0):
        self.player = player
        self.token = secrets.token_urlsafe(24)
        self.closed = False
        try:
            self._server = _Server((HOST, port), _Handler)
        except (OverflowError, TypeError) as error:
            raise SelectionError(f"port {port!r}: give one of 0 to 65535.") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise SelectionError(
                    f"port {port} of {HOST} is in use (another `attnsteer play`?); choose another one, or 0 for any that is free."
                ) from error
            raise SelectionError(
                f"port {port} of {HOST} cannot be used ({error.strerror}); choose another one."
            ) from error
        self._server.play = self
        self.port = self._server.server_address[1]
        self.address = f"http://{HOST}:{self.port}/{self.token}/"
        self._thread: threading.Thread | None = None

    def serve(self) -> None:
        """Answer until interrupted."""
        try:
            self._server.serve_forever()
        finally:
            self._server.server_close()

    def __enter__(self) -> PlayServer:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closed = True
        self._server.shutdown()
        self._server.server_close()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def html(self) -> str:
        """The page."""
        return page("play", self.player.about(), title=f"{self.player.name}, before and after", connect="'self'")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    play: PlayServer


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        if not self._enters():
            return
        if self._path():
            self._send(404, PLAIN, "There is this page, and POST run.")
            return
        self._send(200, "text/html; charset=utf-8", self.server.play.html())

    def do_POST(self) -> None:
        if not self._enters():
            return
        if self._path() != "run":
            self._send(404, PLAIN, "There is POST run.")
            return
        # A form of another site cannot send this type without being asked for leave, which is never given.
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != JSON:
            self._refuse(415, "send application/json.")
            return
        length = self.headers.get("Content-Length", "")
        # More digits than the largest has are not made a number of: that takes long, or fails.
        if not length.isdecimal() or len(length) > len(str(LARGEST_BODY)) or int(length) > LARGEST_BODY:
            self._refuse(413, f"say how long the body is; {LARGEST_BODY} bytes are the most.")
            return
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            self._refuse(400, "the body is not JSON.")
            return
        if not isinstance(request, dict):
            self._refuse(400, "the body is no JSON object.")
            return
        try:
            found = self.server.play.player.answer(request)
        except AttnSteerError as error:
            self._refuse(400, " ".join(str(error).split()))
        except Busy:
            self._refuse(503, "the model is busy with another client’s request; try again.")
        except Stale:
            self._refuse(409, "not wanted any more: this client asked for something else.")
        except Exception as error:
            # The page goes on; what went wrong is in the terminal.
            traceback.print_exc()
            self._refuse(500, f"{type(error).__name__}; the terminal has the details.")
        else:
            self._send(200, JSON, json.dumps(found, allow_nan=False))

    def _enters(self) -> bool:
        """Whether the request is for this server and has its token; it is answered here where not."""
        play = self.server.play
        if play.closed:
            # A connection that was kept open is not the way to a server that has ended.
            self.close_connection = True
            return False
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        names = {f"{name}:{play.port}" for name in (HOST, "localhost")}
        # A name that another site made point here is not ours.
        if host not in names or (origin is not None and origin not in {f"http://{name}" for name in names}):
            self._send(403, PLAIN, f"This server answers to {HOST}:{play.port} alone.")
            return False
        token = self.path.lstrip("/").partition("/")[0].partition("?")[0]
        if not hmac.compare_digest(token.encode(), play.token.encode()):
            self._send(
                403, PLAIN, "The token is missing or wrong. Open the whole address that `attnsteer play` printed."
            )
            return False
        return True

    def _path(self) -> str:
        return self.path.lstrip("/").partition("/")[2].partition("?")[0].strip("/")

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, JSON, json.dumps({"error": message}))

    def _send(self, status: int, kind: str, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        if status >= 400:
            self.close_connection = True
        try:
            self.send_response(status)
            for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            if status >= 400:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
            if status >= 400:
                self._pass_over()
        except OSError:
            # The visitor moved the slider on, left, or does not listen.
            self.close_connection = True

    def _pass_over(self) -> None:
        """What is left of a refused body: a connection that ends with something unread takes the answer with it."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        left, end = PASSED_OVER, time.monotonic() + PATIENCE
        while left > 0 and (wait := end - time.monotonic()) > 0:
            self.connection.settimeout(wait)
            part = self.rfile.read1(1 << 16)
            if not part:
                return
            left -= len(part)

    def log_message(self, format: str, *args: Any) -> None:
        """Addresses have the token in them: nothing is logged."""
