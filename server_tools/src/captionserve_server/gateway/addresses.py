"""Whether an address can be listened on, said in a sentence.

gRPC says so in its own log alone, in its own words.
"""

from __future__ import annotations

import errno
import socket

_WAYS_OUT = {
    errno.EADDRINUSE: (
        "something listens there already: end it, or give another address with {flag}; port 0 is "
        "any free one"
    ),
    errno.EADDRNOTAVAIL: (
        "this machine has no such address: {flag} wants one of its own, or 127.0.0.1 for itself "
        "alone, or 0.0.0.0 for all networks"
    ),
    errno.EACCES: "ports below 1024 need a privilege: give a higher one with {flag}",
}
_UNKNOWN_NAME = "the name is not known here: give an address of this machine with {flag}"


def check_address(listen: str, flag: str) -> None:
    """Bind for a moment.

    Args:
        listen: HOST:PORT; port 0 is any free one.
        flag: sets it.

    Raises:
        OSError: if it cannot be listened on; says why, and what to do.
    """
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: connections that have just ended are in nobody's way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise OSError(f"cannot listen on {listen}: {_UNKNOWN_NAME.format(flag=flag)}") from error
    except OSError as error:
        way_out = _WAYS_OUT.get(error.errno or 0, str(error.strerror))
        raise OSError(f"cannot listen on {listen}: {way_out.format(flag=flag)}") from error
