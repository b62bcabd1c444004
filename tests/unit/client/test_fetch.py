"""Fetching from the web: what is answered, and the bounds on bytes, time and redirects."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from captionserve._fetch import MAX_REDIRECTS, fetch

from tests.unit.client.caption_server import WAIT_SECONDS, unused_address

CONTENT = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    """Answers by the path."""

    protocol_version = "HTTP/1.1"
    given_up = threading.Event()

    def do_GET(self) -> None:
        kind, _, rest = self.path.strip("/").partition("/")
        if kind == "redirect":
            left = int(rest)
            self._head(302, Location=f"/redirect/{left - 1}" if left > 1 else "/image")
        elif kind == "leave":
            self._head(302, Location=f"{rest}://a.example/b.png")
        elif kind == "status":
            self._head(int(rest))
        elif kind == "cut":
            self._head(200, length=len(CONTENT) + 1)
            self.wfile.write(CONTENT)
            self.close_connection = True
        elif kind == "slow":
            self._head(200, length=len(CONTENT))
            # Always something, never all of it: each wait of a socket is short.
            for each in CONTENT:
                self.wfile.write(bytes([each]))
                if self.given_up.wait(0.02):
                    return
        elif kind == "endless":
            self._head(200, Connection="close")
            while not self.given_up.is_set():
                self.wfile.write(CONTENT)
        else:
            self._head(200, length=len(CONTENT))
            self.wfile.write(CONTENT)

    def _head(self, status: int, *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        if "Connection" not in headers:
            headers["Content-Length"] = str(length or 0)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that has gone is no error."""


@pytest.fixture
def web() -> Iterator[str]:
    Handler.given_up.clear()
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Handler.given_up.set()
        server.shutdown()


def test_the_content_is_given(web: str) -> None:
    assert fetch(f"{web}/image", WAIT_SECONDS) == CONTENT


def test_a_few_redirects_are_followed(web: str) -> None:
    assert fetch(f"{web}/redirect/{MAX_REDIRECTS}", WAIT_SECONDS) == CONTENT
    with pytest.raises(OSError, match="status 302"):
        fetch(f"{web}/redirect/{MAX_REDIRECTS + 1}", WAIT_SECONDS)


@pytest.mark.parametrize(
    # urllib itself follows to some; of the others it says that they are no answer.
    ("scheme", "said"),
    [("ftp", "neither http nor https"), ("file", "status 302"), ("data", "status 302")],
)
def test_no_redirect_leaves_the_web(web: str, scheme: str, said: str) -> None:
    with pytest.raises(OSError, match=said):
        fetch(f"{web}/leave/{scheme}", WAIT_SECONDS)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://a.example/b", "data:,a", "a.png"])
def test_nothing_but_the_web_is_opened(url: str) -> None:
    with pytest.raises(ValueError, match="only http and https"):
        fetch(url, WAIT_SECONDS)


@pytest.mark.parametrize("status", [204, 404, 500])
def test_another_status_is_no_image(web: str, status: int) -> None:
    with pytest.raises(OSError, match=f"status {status}"):
        fetch(f"{web}/status/{status}", WAIT_SECONDS)


def test_no_more_is_read_than_allowed(web: str) -> None:
    assert fetch(f"{web}/image", WAIT_SECONDS, len(CONTENT)) == CONTENT
    for path in ("image", "endless"):
        with pytest.raises(OSError, match="more than"):
            fetch(f"{web}/{path}", WAIT_SECONDS, len(CONTENT) - 1)


def test_a_cut_answer_is_none(web: str) -> None:
    with pytest.raises(OSError, match="before it was complete"):
        fetch(f"{web}/cut", WAIT_SECONDS)


def test_the_time_is_for_all_of_it(web: str) -> None:
    # Each byte comes within it, all of them take minutes.
    with pytest.raises(TimeoutError):
        fetch(f"{web}/slow", 0.5)


def test_a_host_that_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.3)


def test_nobody_who_listens_is_a_connection_error() -> None:
    with pytest.raises(ConnectionError):
        fetch(f"http://{unused_address()}/", WAIT_SECONDS)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout must be a positive"):
        fetch("http://127.0.0.1/", seconds)
