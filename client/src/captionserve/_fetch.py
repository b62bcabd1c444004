"""Fetching an image from the web, bounded in bytes, in time and in redirects.

Where an address leads is not judged: whoever lets others choose it lets them reach whatever this
machine can reach.
"""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from email.message import Message
from typing import IO

# What fits into a message of the service, which refuses more.
MAX_BYTES = 64 << 20
MAX_REDIRECTS = 5
DEFAULT_SECONDS = 30.0
_CHUNK_BYTES = 1 << 16
# Some servers refuse the name of Python's own.
_AGENT = "captionserve"


def fetch(url: str, seconds: float | None = None, most_bytes: int = MAX_BYTES) -> bytes:
    """What an http or https address answers.

    Args:
        url: where redirects lead must be http or https as well.
        seconds: everything together may take, the lookup of the name included; None for 30.
        most_bytes: that the answer may have.

    Raises:
        ValueError: if the address is none of http or https, or the time is not positive.
        TimeoutError: if it takes longer.
        ConnectionError: if nobody answers.
        OSError: if the answer has another status than 200, or too many bytes or redirects.
    """
    seconds = DEFAULT_SECONDS if seconds is None else seconds
    if not seconds > 0:
        raise ValueError(f"timeout must be a positive number of seconds, is {seconds}")
    if not _is_of_the_web(url):
        raise ValueError("only http and https addresses are fetched")
    answer: Future[bytes] = Future()
    # In a thread of its own, since the timeout of a socket begins anew with each byte, and that of
    # a name's lookup cannot be set; it sees by itself that nobody waits any more.
    work = (answer, url, time.monotonic() + seconds, most_bytes)
    threading.Thread(target=_answer, args=work, name="fetch-image", daemon=True).start()
    try:
        return answer.result(seconds)
    except FutureTimeoutError:
        raise TimeoutError(f"nothing came of an address in {seconds:g} seconds") from None


def _answer(answer: Future[bytes], url: str, ends: float, most_bytes: int) -> None:
    try:
        answer.set_result(_content(url, ends, most_bytes))
    except Exception as error:  # Whoever waits has to hear of it.
        answer.set_exception(_as_os_error(error))


def _as_os_error(error: Exception) -> OSError:
    """What urllib and http.client raise of an answer, without anything of the address."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return OSError(f"the address answered with status {error.code}")
    if isinstance(error, urllib.error.URLError):
        late = isinstance(error.reason, TimeoutError)
        return (TimeoutError if late else ConnectionError)(f"nobody answered: {error.reason}")
    if isinstance(error, OSError):
        return error
    return OSError(f"what the address answered cannot be read ({type(error).__name__})")


def _content(url: str, ends: float, most_bytes: int) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": _AGENT})
    with _opener().open(request, timeout=max(ends - time.monotonic(), 0.001)) as response:
        if response.status != http.client.OK:
            raise OSError(f"the address answered with status {response.status}")
        parts, size = [], 0
        while part := response.read1(_CHUNK_BYTES):
            parts.append(part)
            size += len(part)
            if size > most_bytes:
                raise OSError(f"the address answered with more than {most_bytes} bytes")
            if time.monotonic() > ends:
                raise TimeoutError("the address did not answer in time")
    if response.length:
        raise OSError("the answer ended before it was complete")
    return b"".join(parts)


def _opener() -> urllib.request.OpenerDirector:
    """One that knows http and https alone; urllib's usual one opens local files as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few of them, to the web only."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage | Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The next request."""
        if not _is_of_the_web(newurl):
            raise OSError("the address leads to one that is neither http nor https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _is_of_the_web(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))
