"""TLS, client certificates and tokens at a real gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from captionserve.v1 import caption_pb2, caption_pb2_grpc
from captionserve_server.gateway.credentials import CertificateError
from captionserve_server.gateway.server import Gateway
from captionserve_server.gateway.tokens import TokenFileError, create_token, revoke_tokens
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import ValidationError

from tests.certificates import CertificateFiles, certificate_pem, issued, key_pem
from tests.unit.gateway.harness import Setup, detail_of, gateway_setup, request_of, settings_of


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    return CertificateFiles(tmp_path)


async def caption(
    setup: Setup,
    credentials: grpc.ChannelCredentials | None,
    token: str | None = None,
    **call: Any,
) -> Any:
    """One call over a connection of its own."""
    address = setup.gateway.address
    opened = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials)
    )
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    async with opened as channel:
        stub: Any = caption_pb2_grpc.CaptionServiceStub(channel)
        return await stub.Caption(request_of(**call), timeout=10, metadata=metadata)


async def code_of(setup: Setup, *arguments: Any) -> grpc.StatusCode:
    """How such a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await caption(setup, *arguments)
    return raised.value.code()


def test_with_a_certificate_tls_is_spoken_and_nothing_else(files: CertificateFiles) -> None:
    async def run() -> None:
        async with gateway_setup(**files.settings) as setup:
            assert (await caption(setup, files.credentials())).captions
            assert await code_of(setup, None) is grpc.StatusCode.UNAVAILABLE
            assert setup.triton.requests

    asyncio.run(run())


def test_a_client_without_a_certificate_is_turned_away_where_one_is_asked_for(
    files: CertificateFiles,
) -> None:
    async def run() -> None:
        async with gateway_setup(**files.settings, tls_client_ca=files.ca) as setup:
            client = issued("alice", files.authority)
            assert (await caption(setup, files.credentials(client))).captions
            for stranger in (None, issued("alice", issued("another authority"))):
                code = await code_of(setup, files.credentials(stranger))
                assert code is grpc.StatusCode.UNAVAILABLE
            assert len(setup.triton.requests) == 1

    asyncio.run(run())


def test_a_new_certificate_is_used_without_dropping_a_stream(files: CertificateFiles) -> None:
    async def run() -> None:
        async with gateway_setup(**files.settings) as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            async with grpc.aio.secure_channel(
                setup.gateway.address, files.credentials()
            ) as channel:
                stub: Any = caption_pb2_grpc.CaptionServiceStub(channel)
                request = caption_pb2.StreamCaptionRequest(request=request_of())
                call = stub.StreamCaption(request, timeout=30)
                await call.read()

                old = files.credentials()
                files.authority = issued("a new authority")
                files.ca.write_bytes(certificate_pem(files.authority))
                files.write(issued("server", files.authority))
                setup.gateway.refresh()

                setup.triton.may_answer.set()
                assert (await call.read()).response.captions
            assert (await caption(setup, files.credentials())).captions
            assert await code_of(setup, old) is grpc.StatusCode.UNAVAILABLE

    asyncio.run(run())


@pytest.mark.parametrize("wrong", ["no certificate", "another's key", "ended", "missing"])
def test_a_bad_new_pair_is_refused_and_the_old_one_kept(
    wrong: str, files: CertificateFiles, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with gateway_setup(**files.settings) as setup:
            spoil(files, wrong)
            setup.gateway.refresh()
            assert (await caption(setup, files.credentials())).captions

    asyncio.run(run())
    assert "the new certificate is refused, the old one stays" in caplog.text


@pytest.mark.parametrize("wrong", ["no certificate", "another's key", "ended", "missing"])
def test_a_bad_pair_at_the_start_is_an_error_in_words(wrong: str, files: CertificateFiles) -> None:
    spoil(files, wrong)
    with pytest.raises(CertificateError, match="--tls-") as raised:
        Gateway(settings_of(**files.settings))
    assert str(files.key) not in str(raised.value)


def spoil(files: CertificateFiles, wrong: str) -> None:
    if wrong == "no certificate":
        files.certificate.write_text("nonsense")
    elif wrong == "another's key":
        files.key.write_bytes(key_pem(issued("another")))
    elif wrong == "ended":
        files.write(issued("server", files.authority, days=-1))
    else:
        files.key.unlink()


def test_a_token_decides_who_may_call(files: CertificateFiles) -> None:
    token = create_token(files.tokens, "alice")

    async def run() -> None:
        async with gateway_setup(tokens=files.tokens) as setup:
            assert (await caption(setup, None, token)).captions
            for wrong in (None, "", "other", token[:-1], token.upper()):
                assert await code_of(setup, None, wrong) is grpc.StatusCode.UNAUTHENTICATED
            assert len(setup.triton.requests) == 1
            # Rotation needs no restart.
            second = create_token(files.tokens, "alice")
            setup.gateway.refresh()
            assert (await caption(setup, None, second)).captions
            revoke_tokens(files.tokens, "alice")
            setup.gateway.refresh()
            assert await code_of(setup, None, token) is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())


@pytest.mark.parametrize("content", ["nonsense", "alice 12\n", None])
def test_bad_new_tokens_are_refused_and_the_old_ones_kept(
    content: str | None, files: CertificateFiles, caplog: pytest.LogCaptureFixture
) -> None:
    token = create_token(files.tokens, "alice")

    async def run() -> None:
        async with gateway_setup(tokens=files.tokens) as setup:
            if content is None:
                files.tokens.unlink()
            else:
                files.tokens.write_text(content)
            setup.gateway.refresh()
            assert (await caption(setup, None, token)).captions

    asyncio.run(run())
    assert "the old ones stay" in caplog.text
    assert token not in caplog.text


@pytest.mark.parametrize("content", ["nonsense", None])
def test_tokens_that_cannot_be_read_at_the_start_are_an_error_in_words(
    content: str | None, files: CertificateFiles
) -> None:
    if content is not None:
        files.tokens.write_text(content)
    with pytest.raises(TokenFileError, match="--tokens: ") as raised:
        Gateway(settings_of(tokens=files.tokens))
    assert str(files.tokens) not in str(raised.value)
    assert "nonsense" not in str(raised.value)


@asynccontextmanager
async def unread_call(setup: Setup, *metadata: tuple[str, str]) -> AsyncIterator[Any]:
    """A call of which only the beginning is sent: no byte of its request."""
    method = "/captionserve.v1.CaptionService/Caption"
    call: Any = setup.channel.stream_unary(method)(timeout=20, metadata=metadata)
    try:
        yield call
    finally:
        call.cancel()


def test_who_is_not_known_is_refused_before_a_byte_is_read(files: CertificateFiles) -> None:
    create_token(files.tokens, "alice")

    async def run() -> None:
        async with gateway_setup(tokens=files.tokens) as setup, unread_call(setup) as call:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
            info = detail_of(raised.value, error_details_pb2.ErrorInfo())
            assert info.reason == "UNAUTHENTICATED"

    asyncio.run(run())


def test_bytes_are_reserved_before_they_are_read() -> None:
    async def run() -> None:
        async with gateway_setup(max_request_megabytes=1) as setup:
            # Who does not say how much it sends is taken to send as much as there may be.
            for size in (str(2**20 + 1), None):
                announced = () if size is None else (("captionserve-request-bytes", size),)
                async with unread_call(setup, *announced) as call:
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        await call
                    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            small = (("captionserve-request-bytes", "1000"),)
            assert (await setup.stub.Caption(request_of(), timeout=10, metadata=small)).captions

    asyncio.run(run())


@pytest.mark.parametrize("size", ["10", "-1", "x", "\u0661", 20 * "9", ""])
def test_more_than_announced_is_refused(size: str) -> None:
    async def run() -> grpc.StatusCode:
        async with gateway_setup() as setup:
            announced = (("captionserve-request-bytes", size),)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await setup.stub.Caption(request_of(bytes(100)), timeout=10, metadata=announced)
            assert setup.triton.requests == []
            return raised.value.code()

    if size.isascii():
        assert asyncio.run(run()) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_caller_may_have_so_many_calls(files: CertificateFiles) -> None:
    tokens = [create_token(files.tokens, name) for name in ("alice", "bob")]

    async def run() -> None:
        async with gateway_setup(tokens=files.tokens, max_concurrent_per_client=1) as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            first = asyncio.create_task(caption(setup, None, tokens[0], image=b"1"))
            await setup.triton.arrived.wait()
            assert await code_of(setup, None, tokens[0]) is grpc.StatusCode.RESOURCE_EXHAUSTED
            second = asyncio.create_task(caption(setup, None, tokens[1], image=b"2"))
            setup.triton.may_answer.set()
            assert (await first).captions
            assert (await second).captions

    asyncio.run(run())


def test_health_is_open_and_reflection_and_models_are_not(files: CertificateFiles) -> None:
    create_token(files.tokens, "alice")

    async def run() -> None:
        async with gateway_setup(tokens=files.tokens) as setup:
            health: Any = health_pb2_grpc.HealthStub(setup.channel)
            assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=10)).status
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await setup.stub.GetModels(caption_pb2.GetModelsRequest(), timeout=10)
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
            make_stub: Any = reflection_pb2_grpc.ServerReflectionStub
            question = reflection_pb2.ServerReflectionRequest(list_services="")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in make_stub(setup.channel).ServerReflectionInfo(iter([question])):
                    pass
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "10.0.0.1:9000", "captions:9000"])
def test_others_than_loopback_need_security(listen: str, files: CertificateFiles) -> None:
    create_token(files.tokens, "alice")
    with pytest.raises(ValidationError, match="open to others"):
        settings_of(listen=listen)
    for partly in (files.settings, {"tokens": files.tokens}):
        with pytest.raises(ValidationError, match="open to others"):
            settings_of(listen=listen, **partly)
    settings_of(listen=listen, insecure=True)
    settings_of(listen=listen, **files.settings, tokens=files.tokens)
    settings_of(listen=listen, **files.settings, tls_client_ca=files.ca)


@pytest.mark.parametrize("alone", ["tls_certificate", "tls_key", "tls_client_ca"])
def test_settings_of_tls_go_together(alone: str, files: CertificateFiles) -> None:
    with pytest.raises(ValidationError, match="--tls-"):
        settings_of(**{alone: files.ca})
