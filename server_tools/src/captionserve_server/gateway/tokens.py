"""Bearer tokens: who may call, by the hash of what they send.

A file has a line for each token: its name, and its SHA-256 in hexadecimal. Tokens are random, of
256 bits, so that a plain hash keeps them: there is nothing to guess. Names may have several tokens,
the old and the new one while it is rotated.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_TOKEN_BYTES = 32
_PREFIX = "cst_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HEAD = "# Tokens of captionserve, hashed; see `captionserve token`.\n"


class TokenFileError(OSError):
    """A file of tokens that cannot be used; says which line is wrong, and never what it holds."""


class StoredToken(NamedTuple):
    """What is kept of a token."""

    name: str
    digest: bytes


class Tokens:
    """The tokens of one state of a file."""

    def __init__(self, stored: list[StoredToken]) -> None:
        """Know these."""
        self.stored = stored

    @classmethod
    def parse(cls, text: str) -> Tokens:
        """Read a file's content.

        Raises:
            TokenFileError: if a line is no token.
        """
        stored = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, digest = line.strip().partition(" ")
            if not _NAME.fullmatch(name) or not _DIGEST.fullmatch(digest.strip()):
                raise TokenFileError(f"line {number} of the tokens is not a name and a hash")
            stored.append(StoredToken(name, bytes.fromhex(digest.strip())))
        return cls(stored)

    def name_of(self, token: str) -> str | None:
        """Whose token it is; takes as long for every token, known or not."""
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for each in self.stored:
            if hmac.compare_digest(digest, each.digest):
                found = each.name
        return found


def create_token(path: Path, name: str) -> str:
    """Add a token to a file, which is made if there is none; the token, which is kept nowhere.

    Raises:
        ValueError: if the name is none that a log can show.
        TokenFileError: if the file is none of tokens.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("a name has up to 64 letters of ASCII, digits and ._-")
    token = _PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    with _changed(path) as tokens:
        tokens.append(StoredToken(name, hashlib.sha256(token.encode()).digest()))
    return token


def revoke_tokens(path: Path, name: str, *, keep_newest: bool = False) -> int:
    """Take the tokens of a name out of a file; how many were.

    Args:
        path: of the file.
        name: whose.
        keep_newest: whether the one that was created last stays.

    Raises:
        FileNotFoundError: if there is no file.
        TokenFileError: if it is none of tokens.
    """
    path.stat()
    with _changed(path) as tokens:
        of_name = [each for each in tokens if each.name == name]
        revoked = of_name[:-1] if keep_newest else of_name
        tokens[:] = [each for each in tokens if each not in revoked]
    return len(revoked)


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file.

    Raises:
        OSError: if it cannot be read.
        TokenFileError: if it is none of tokens.
    """
    try:
        return Tokens.parse(path.read_text())
    except UnicodeDecodeError as error:
        raise TokenFileError("the tokens are no text") from error


@contextmanager
def _changed(path: Path) -> Iterator[list[StoredToken]]:
    """The tokens of a file, to be changed by one process at a time; written as a whole."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokens = read_tokens(path).stored if path.exists() else []
        yield tokens
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.touch(mode=0o600)
        with draft.open("w") as file:
            file.write(_HEAD + "".join(f"{name} {digest.hex()}\n" for name, digest in tokens))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
