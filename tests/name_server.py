"""A name server for one name, whose addresses change as those of a headless Service do."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset


class Name:
    """A name server that knows one name, which has the addresses of whoever is to be found.

    Attributes:
        name: the name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._hosts: Collection[str] = ()
        self._port = 0

    def target(self, port: int) -> str:
        """What gRPC calls the name at this name server."""
        return f"dns://127.0.0.1:{self._port}/{self.name}:{port}"

    @contextmanager
    def served(self) -> Iterator[None]:
        """Answer while the block runs."""
        name = self

        class Answering(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                asked, socket = self.request
                socket.sendto(name.answer(asked), self.client_address)

        with socketserver.UDPServer(("127.0.0.1", 0), Answering) as server:
            self._port = server.server_address[1]
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()

    def tell(self, hosts: Collection[str]) -> None:
        """Have these addresses from now on."""
        self._hosts = hosts

    def answer(self, asked: bytes) -> bytes:
        """The answer to a question, as both travel."""
        message = dns.message.from_wire(asked)
        answer = dns.message.make_response(message)
        answer.flags |= dns.flags.AA
        (question,) = message.question
        # Of another type, such as AAAA, it has none.
        if question.rdtype == dns.rdatatype.A:
            answer.answer.append(dns.rrset.from_text_list(question.name, 0, "IN", "A", self._hosts))
        return answer.to_wire()
