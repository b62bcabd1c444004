"""Who calls: by a token, or by the certificate that the connection came with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc

from captionserve_server.core.errors import UnauthenticatedError
from captionserve_server.gateway.tokens import TokenFileError, Tokens, read_tokens

_log = logging.getLogger(__name__)

_HEADER = "authorization"
_SCHEME = "bearer "
_COMMON_NAME = "x509_common_name"
# Of a caller of whom nothing is known, because nothing is asked.
ANYBODY = "anybody"

Context = grpc.aio.ServicerContext[Any, Any]


class Identities:
    """Tells callers by what the service is set to ask of them."""

    def __init__(self, tokens: Path | None) -> None:
        """Ask for tokens of a file, where there is one.

        Raises:
            TokenFileError: if the file cannot be read, or is none of tokens.
        """
        self._path = tokens
        self._tokens: Tokens | None = None
        self._seen: tuple[int, int] | None = None
        if tokens is not None:
            try:
                self._seen = _state(tokens)
                self._tokens = read_tokens(tokens)
            except OSError as error:
                raise TokenFileError(f"--tokens: {error.strerror or error}") from error

    def refresh(self) -> None:
        """Take in a file that has changed; one that cannot be used is said, and not taken."""
        if self._path is None:
            return
        try:
            state = _state(self._path)
            if state == self._seen:
                return
            self._seen = state
            self._tokens = read_tokens(self._path)
            _log.info("new tokens are used, %d of them", len(self._tokens.stored))
        except FileNotFoundError:
            _log.error("the tokens' file is missing, the old ones stay")
        except (OSError, TokenFileError) as error:
            _log.error("the new tokens are refused, the old ones stay: %s", error.strerror or error)

    def of(self, context: Context) -> str:
        """Who calls.

        Raises:
            UnauthenticatedError: if a token is asked for, and none that is known has come.
        """
        if self._tokens is not None:
            return self._by_token(self._tokens, context)
        for name in context.auth_context().get(_COMMON_NAME, ()):
            return name.decode(errors="replace")
        return ANYBODY

    def _by_token(self, tokens: Tokens, context: Context) -> str:
        sent = [value for name, value in context.invocation_metadata() or () if name == _HEADER]
        if not sent:
            raise UnauthenticatedError("a token is needed: authorization: Bearer TOKEN")
        text = str(sent[0])
        name = None
        if text[: len(_SCHEME)].lower() == _SCHEME:
            name = tokens.name_of(text[len(_SCHEME) :].strip())
        if name is None:
            raise UnauthenticatedError("the token is not known")
        return name


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_ino
