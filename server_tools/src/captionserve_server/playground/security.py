"""Who may talk to the page's server: the page itself, from an address and not from a rebound name.

A web page of somebody else may make a browser send requests to this machine, and a name of somebody
else may point to it. Such requests name themselves: in Host, Origin and Sec-Fetch-Site.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # Nothing from elsewhere, nothing inline; pictures of the visitor's own are blobs.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
"""What every response says."""


def own_names(host: str, more: Iterable[str] = ()) -> frozenset[str]:
    """The names by which a server may be asked, beside every IP address.

    Args:
        host: where it listens.
        more: others that lead to it, such as that of a proxy.
    """
    names = ("localhost", host, socket.gethostname(), *more)
    return frozenset(name.lower() for name in names)


class OwnPageOnly:
    """Refuses what other pages ask for, and says what the own page may do."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        """Guard an app.

        Args:
            app: what is guarded.
            names: of hosts that it may be asked by, in lower case.
        """
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
            return
        error = {"code": "PERMISSION_DENIED", "reason": "NOT_THIS_PAGE", "message": refusal}
        response = JSONResponse({"error": error}, status_code=403)
        await response(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers) -> str | None:
        """Why a request is not answered; None if it is."""
        host = headers.get("host", "")
        if not self._is_own(host):
            return "this server is asked by its address, not by a name that points to it"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "only the playground's own page may ask this server"
        if headers.get("sec-fetch-site", "none") not in {"same-origin", "none"}:
            return "only the playground's own page may ask this server"
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        # Nobody's name server answers for an address.
        return True
