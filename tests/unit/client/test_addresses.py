"""What both clients say of addresses where no captionserve answers, and who is sent a token."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import pytest
from captionserve import (
    AsyncCaptionClient,
    CaptionClient,
    CaptionError,
    CaptionResult,
    tls_credentials,
)
from captionserve.v1 import caption_pb2

from tests.certificates import CertificateFiles, certificate_pem, issued, key_pem
from tests.faults import http2
from tests.unit.client.caption_server import (
    WAIT_SECONDS,
    RecordingServicer,
    abort,
    good_response,
    unused_address,
)
from tests.unit.client.test_calls import call_async, call_blocking

Server = tuple[str, RecordingServicer]
Call = Callable[..., CaptionResult]
IMAGE = b"an image"


@pytest.fixture(params=[call_blocking, call_async])
def caption(request: pytest.FixtureRequest) -> Call:
    """One call with a client of its own."""
    call: Call = request.param
    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    return CertificateFiles(tmp_path_factory.mktemp("certificates"))


@contextmanager
def grpc_server(credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """Another gRPC server, with no service at all."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def answering(answer: bytes | None) -> Iterator[str]:
    """Answers what comes over every connection, and closes it; without an answer stays silent."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        host, port = listener.getsockname()
        kept = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if answer is None:
                    kept.append(connection)
                    continue
                with connection:
                    connection.recv(1024)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"{host}:{port}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_SECONDS)
        for connection in kept:
            connection.close()


@contextmanager
def resetting() -> Iterator[str]:
    """Ends every call as a proxy does that has lost the service behind it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        host, port = listener.getsockname()
        accepted: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                accepted.append(raw)
                with raw:
                    raw.recv(len(http2.PREFACE), socket.MSG_WAITALL)
                    connection = http2.Connection(raw)
                    connection.send(http2.frame(http2.SETTINGS, 0, 0, b""))
                    for kind, stream, _ in connection.frames():
                        if kind == http2.HEADERS:
                            code = struct.pack(">I", http2.INTERNAL_ERROR)
                            connection.send(http2.frame(http2.RST_STREAM, 0, stream, code))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"{host}:{port}"
        listener.shutdown(socket.SHUT_RDWR)
        # A client that has closed its channel may keep the connection.
        for raw in accepted:
            with suppress(OSError):
                raw.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def test_a_service_that_a_proxy_has_lost_is_waited_for() -> None:
    with resetting() as target:
        found = failure(target, 0.5)
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
    assert found.message == "a proxy has lost the service"


def failure(target: str, seconds: float, **client: Any) -> CaptionError:
    """How both clients find that nothing can be had there: alike."""
    with CaptionClient(target, **client) as blocking, pytest.raises(CaptionError) as raised:
        blocking.wait_ready(seconds)

    async def run() -> None:
        async with AsyncCaptionClient(target, **client) as client_:
            await client_.wait_ready(seconds)

    with pytest.raises(CaptionError) as other:
        asyncio.run(run())
    assert other.value.args == raised.value.args
    return raised.value


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        # As Python's http.server says it.
        b"<!DOCTYPE HTML>\n<html lang='en'>\n<head><title>Error response</title></head></html>\n",
    ],
)
def test_a_web_server_is_no_captionserve(answer: bytes) -> None:
    with answering(answer) as target:
        assert failure(target, WAIT_SECONDS).reason == "NOT_CAPTIONSERVE"


def test_another_grpc_service_is_no_captionserve() -> None:
    with grpc_server() as target:
        assert failure(target, WAIT_SECONDS).reason == "NOT_CAPTIONSERVE"


def test_who_speaks_no_tls_is_told_from_who_is_away(files: CertificateFiles) -> None:
    with grpc_server() as target:
        error = failure(target, WAIT_SECONDS, credentials=tls_credentials(files.ca))
    assert (error.reason, error.code) == ("TLS_FAILED", grpc.StatusCode.UNAVAILABLE)
    assert "does not speak TLS" in error.message


def test_a_certificate_of_another_is_no_matter_of_time(files: CertificateFiles) -> None:
    pair = [(files.key.read_bytes(), files.certificate.read_bytes())]
    stranger = certificate_pem(issued("another authority"))
    with grpc_server(grpc.ssl_server_credentials(pair)) as target:
        error = failure(target, WAIT_SECONDS, credentials=tls_credentials(stranger))
        assert (error.reason, "authority" in error.message) == ("TLS_FAILED", True)
        by_name = target.replace("127.0.0.1", "localhost")
        error = failure(by_name, WAIT_SECONDS, credentials=tls_credentials(files.ca))
        assert (error.reason, "another name" in error.message) == ("TLS_FAILED", True)


def test_certificates_that_cannot_be_used_are_no_matter_of_time(files: CertificateFiles) -> None:
    pair = [(files.key.read_bytes(), files.certificate.read_bytes())]
    others_key = key_pem(issued("another"))
    with grpc_server(grpc.ssl_server_credentials(pair)) as target:
        for given in ((b"nonsense",), (files.ca, files.certificate, others_key)):
            error = failure(target, WAIT_SECONDS, credentials=tls_credentials(*given))
            assert (error.reason, "cannot be used" in error.message) == ("TLS_FAILED", True)


def test_whoever_wants_tls_may_be_restarting(files: CertificateFiles) -> None:
    pair = [(files.key.read_bytes(), files.certificate.read_bytes())]
    ca = files.ca.read_bytes()
    own = issued("alice", files.authority)
    with grpc_server(grpc.ssl_server_credentials(pair, ca, True)) as target:
        for client in ({}, {"credentials": tls_credentials(files.ca)}):
            error = failure(target, 0.5, **client)
            assert error.reason == "UNAVAILABLE"
            assert "wants TLS, or a client's certificate" in error.message
        known = tls_credentials(files.ca, certificate_pem(own), key_pem(own))
        assert failure(target, WAIT_SECONDS, credentials=known).reason == "NOT_CAPTIONSERVE"


def test_nobody_is_unavailable_in_the_end() -> None:
    error = failure(unused_address(), 0.5)
    assert (error.reason, error.code) == ("UNAVAILABLE", grpc.StatusCode.UNAVAILABLE)
    assert error.message.startswith("nobody listens at this address: is the service started")
    error = failure("nowhere.invalid:9000", 0.5)
    assert (error.reason, error.message) == ("UNAVAILABLE", "this address is not known")


def test_who_listens_and_says_nothing_is_waited_for() -> None:
    with answering(None) as target:
        error = failure(target, 0.3)
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.message == "the deadline passed before the service answered"


@pytest.mark.parametrize("target", ["", "http://127.0.0.1:9000", "https://captions:9000"])
def test_what_is_no_target_is_refused(target: str, caption: Call) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        caption(target, IMAGE, client={})


def test_a_certificate_needs_its_key(files: CertificateFiles) -> None:
    with pytest.raises(ValueError, match="together"):
        tls_credentials(files.ca, files.certificate)


@pytest.mark.parametrize(
    "target",
    [
        "10.0.0.1:9000",
        "captions:9000",
        "dns:///captions:9000",
        "[::2]:9000",
        "127.0.0.1.de:9",
        "ipv4:127.0.0.1:1,10.0.0.1:2",
    ],
)
def test_a_token_is_not_sent_in_the_clear(target: str, caption: Call) -> None:
    with pytest.raises(ValueError, match="for everybody to read"):
        caption(target, IMAGE, client={"token": "secret"})


@pytest.mark.parametrize(
    "target",
    [
        "localhost:9",
        "127.0.0.1:9",
        "127.8.0.1:9",
        "[::1]:9",
        "unix:/s",
        "ipv4:127.0.0.1:1,127.0.0.1:2",
    ],
)
def test_a_token_may_stay_on_this_machine(target: str) -> None:
    CaptionClient(target, token="secret").close()


def test_a_token_is_asked_for_with_each_attempt(server: Server, caption: Call) -> None:
    target, servicer = server

    def refuse_first(
        request: caption_pb2.CaptionRequest, context: grpc.ServicerContext
    ) -> caption_pb2.CaptionResponse:
        if len(servicer.requests) == 1:
            abort(context, grpc.StatusCode.UNAVAILABLE, b"")
        return good_response()

    servicer.answer = refuse_first
    tokens = iter(["old", "new"])
    caption(target, IMAGE, client={"token": lambda: next(tokens)})
    sent = [entry["authorization"] for entry in servicer.metadata]
    assert sent == ["Bearer old", "Bearer new"]


@pytest.mark.parametrize("token", ["secret\n", "secr\u00e9t", "a\0secret"])
def test_a_token_that_cannot_be_sent_is_not_repeated(
    token: str, server: Server, caption: Call
) -> None:
    with pytest.raises(ValueError, match="printable") as raised:
        caption(server[0], IMAGE, client={"token": token})
    assert "secr" not in str(raised.value)


def test_a_token_is_not_in_what_a_debugger_shows() -> None:
    with CaptionClient("localhost:9", token="secret") as client:
        assert "secret" not in repr(client._connection)
