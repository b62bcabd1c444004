"""Starting, health, reflection, metrics, and stopping with calls in flight."""

from __future__ import annotations

import asyncio
import socket
import urllib.request
from typing import Any

import grpc
import pytest
from captionserve.v1 import caption_pb2_grpc
from captionserve_server.gateway.server import Gateway
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.unit.gateway.fake_triton import WAIT_SECONDS
from tests.unit.gateway.harness import Setup, gateway_setup, request_of, settings_of

SERVICE = "captionserve.v1.CaptionService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(setup: Setup, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(setup.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    status: int = answer.status
    return status


def watch_health(setup: Setup, service: str = SERVICE) -> Any:
    """A stream of what the health service says from now on."""
    stub: Any = health_pb2_grpc.HealthStub(setup.channel)
    return stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)


async def begin_to_stop(setup: Setup) -> tuple[asyncio.Task[None], Any]:
    """The gateway's stop, and a watcher of its health; the one has begun, the other has seen it."""
    watch = watch_health(setup)
    assert (await watch.read()).status == SERVING
    stopping = asyncio.create_task(setup.gateway.drain(asyncio.Event()))
    assert (await watch.read()).status == NOT_SERVING
    async with grpc.aio.insecure_channel(setup.gateway.address) as newcomer:
        second: Any = caption_pb2_grpc.CaptionServiceStub(newcomer)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await second.Caption(request_of(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    return stopping, watch


def metrics_of(setup: Setup) -> dict[str, float]:
    """Every sample, by its name with labels."""
    url = f"http://{setup.gateway.metrics_address}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def requests(method: str, code: str, identity: str = "anybody") -> str:
    """The sample that counts calls that ended so."""
    labels = f'code="{code}",identity="{identity}",method="{method}"'
    return f"captionserve_requests_total{{{labels}}}"


def in_flight(method: str) -> str:
    """The sample that counts calls now."""
    return f'captionserve_requests_in_flight{{method="{method}"}}'


def test_the_address_is_the_bound_one() -> None:
    async def run() -> None:
        async with gateway_setup() as setup:
            host, port = setup.gateway.address.split(":")
            assert host == "127.0.0.1"
            assert int(port) > 0

    asyncio.run(run())


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_follows_set_serving(service: str) -> None:
    async def run() -> list[int]:
        async with gateway_setup() as setup:
            states = [await health_of(setup, service)]
            for serving in (False, True):
                await setup.gateway.set_serving(serving)
                states.append(await health_of(setup, service))
            return states

    assert asyncio.run(run()) == [SERVING, NOT_SERVING, SERVING]


@pytest.mark.parametrize("service", ["", SERVICE])
def test_a_watcher_hears_of_every_change(service: str) -> None:
    async def run() -> tuple[list[int], dict[str, float]]:
        async with gateway_setup() as setup:
            watch = watch_health(setup, service)
            states = [(await watch.read()).status]
            for serving in (False, True):
                await setup.gateway.set_serving(serving)
                states.append((await watch.read()).status)
            return states, await asyncio.to_thread(metrics_of, setup)

    states, samples = asyncio.run(run())
    assert states == [SERVING, NOT_SERVING, SERVING]
    assert not [name for name in samples if "_in_flight" in name], "a watcher is no caption call"


def test_a_watcher_that_leaves_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> list[int]:
        async with gateway_setup() as setup:
            leaver, stayer = watch_health(setup), watch_health(setup)
            await leaver.read()
            states = [(await stayer.read()).status]
            leaver.cancel()
            await setup.gateway.set_serving(False)
            states.append((await stayer.read()).status)
            return states

    assert asyncio.run(run()) == [SERVING, NOT_SERVING]
    assert "a handler failed" not in caplog.text


def test_a_watcher_of_a_service_that_is_not_here_may_wait_for_it() -> None:
    async def run() -> int:
        async with gateway_setup() as setup:
            status: int = (await watch_health(setup, "no.such.Service").read()).status
            return status

    assert asyncio.run(run()) == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.mark.parametrize("method", ["Check", "Watch"])
def test_bytes_that_are_no_question_of_health_are_invalid(method: str) -> None:
    async def run() -> grpc.aio.AioRpcError:
        async with gateway_setup() as setup:
            # Without serialisers the bytes go out as they are; both kinds of call send them alike.
            call: Any = setup.channel.unary_stream(f"/grpc.health.v1.Health/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(b"\xff\xff", timeout=10).read()
            return raised.value

    error = asyncio.run(run())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "the request is not a valid message"


def test_health_of_a_service_that_is_not_here() -> None:
    async def run() -> grpc.StatusCode:
        async with gateway_setup() as setup:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await health_of(setup, "no.such.Service")
            return raised.value.code()

    assert asyncio.run(run()) is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services() -> None:
    async def run() -> set[str]:
        async with gateway_setup() as setup:
            make_stub: Any = reflection_pb2_grpc.ServerReflectionStub
            stub = make_stub(setup.channel)
            question = reflection_pb2.ServerReflectionRequest(list_services="")
            call = stub.ServerReflectionInfo(iter([question]), timeout=10)
            return {
                service.name
                async for answer in call
                for service in answer.list_services_response.service
            }

    assert SERVICE in asyncio.run(run())


def test_calls_are_counted_by_code() -> None:
    async def run() -> dict[str, float]:
        async with gateway_setup() as setup:
            await setup.stub.Caption(request_of(), timeout=10)
            await setup.stub.Caption(request_of(), timeout=10)
            setup.triton.fail(grpc.StatusCode.INTERNAL, "onnx runtime error")
            with pytest.raises(grpc.aio.AioRpcError):
                await setup.stub.Caption(request_of(b"another"), timeout=10)
            await health_of(setup, "")
            return await asyncio.to_thread(metrics_of, setup)

    samples = asyncio.run(run())
    assert samples[requests("Caption", "OK")] == 2
    assert samples[requests("Caption", "INTERNAL")] == 1
    assert samples['captionserve_request_seconds_count{method="Caption"}'] == 3
    assert samples[in_flight("Caption")] == 0


def test_cancelled_calls_are_counted_and_calls_in_flight_shown() -> None:
    async def run() -> tuple[dict[str, float], dict[str, float]]:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            call = setup.stub.Caption(request_of(), timeout=60)
            await asyncio.wait_for(setup.triton.arrived.wait(), WAIT_SECONDS)
            during = await asyncio.to_thread(metrics_of, setup)
            call.cancel()
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            return during, await asyncio.to_thread(metrics_of, setup)

    during, after = asyncio.run(run())
    assert during[in_flight("Caption")] == 1
    assert after[in_flight("Caption")] == 0
    assert after[requests("Caption", "CANCELLED")] == 1


def test_stopping_lets_calls_in_flight_finish() -> None:
    async def run() -> str:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            call = setup.stub.Caption(request_of(), timeout=60)
            await asyncio.wait_for(setup.triton.arrived.wait(), WAIT_SECONDS)
            stopping, _watch = await begin_to_stop(setup)
            setup.triton.may_answer.set()
            answer = await call
            # The watcher of the health would stay for ever; it must not hold the end up.
            await asyncio.wait_for(stopping, WAIT_SECONDS)
            return str(answer.captions[0].text)

    assert asyncio.run(run()) == "a red apple"


def test_after_the_grace_period_calls_are_ended() -> None:
    async def run() -> grpc.StatusCode:
        async with gateway_setup(drain_seconds=0.2) as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            call = setup.stub.Caption(request_of(), timeout=60)
            await asyncio.wait_for(setup.triton.arrived.wait(), WAIT_SECONDS)
            await setup.gateway.drain(asyncio.Event())
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            return raised.value.code()

    assert asyncio.run(run()) is grpc.StatusCode.UNAVAILABLE


def test_stopping_twice_does_nothing_more() -> None:
    async def run() -> None:
        async with gateway_setup() as setup:
            await setup.gateway.drain(asyncio.Event())
            await setup.gateway.drain(asyncio.Event())

    asyncio.run(run())


@pytest.mark.parametrize("setting", ["listen", "metrics_listen", "health_listen"])
def test_an_address_in_use_is_an_os_error(setting: str) -> None:
    async def run(address: str) -> None:
        settings: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            setting: address,
        }
        gateway = Gateway(settings_of(**settings))
        with pytest.raises(OSError, match=r"(?i)in use|cannot listen"):
            await gateway.start()

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asyncio.run(run(f"127.0.0.1:{taken.getsockname()[1]}"))
