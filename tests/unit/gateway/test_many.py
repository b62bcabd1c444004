"""CaptionMany and GetModels at a real gateway in front of the fake Triton."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core.framing import MAX_REGIONS
from google.rpc import error_details_pb2, status_pb2

from tests.unit.gateway.fake_triton import WAIT_SECONDS
from tests.unit.gateway.harness import Setup, gateway_setup, request_of

Response = caption_pb2.CaptionManyResponse


def item(number: int, image: bytes | None = None, **fields: Any) -> caption_pb2.CaptionManyRequest:
    request = request_of(f"image {number}".encode() if image is None else image)
    return caption_pb2.CaptionManyRequest(id=str(number), request=request, **fields)


class Many:
    """One CaptionMany call, driven by hand."""

    def __init__(self, setup: Setup) -> None:
        self.call = setup.stub.CaptionMany(timeout=2 * WAIT_SECONDS)

    async def send(self, *items: caption_pb2.CaptionManyRequest) -> None:
        for each in items:
            await self.call.write(each)

    async def read(self) -> Any:
        return await asyncio.wait_for(self.call.read(), WAIT_SECONDS)

    async def results(self, count: int) -> dict[str, caption_pb2.ItemResult]:
        """So many results, by id; other events are passed over."""
        found: dict[str, caption_pb2.ItemResult] = {}
        while len(found) < count:
            response = await self.read()
            assert response is not grpc.aio.EOF
            if response.HasField("result"):
                assert response.result.id not in found
                found[response.result.id] = response.result
        return found


def reason_of(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    for packed in status.details:
        packed.Unpack(info)
    return str(info.reason)


def test_the_window_comes_first_and_every_item_is_answered_once() -> None:
    async def run() -> None:
        async with gateway_setup(window=8) as setup:
            many = Many(setup)
            window = (await many.read()).window
            assert (window.items, window.message_bytes) == (8, 64 * 2**20)
            await many.send(*(item(number) for number in range(20)))
            await many.call.done_writing()
            results = await many.results(20)
            assert set(results) == {str(number) for number in range(20)}
            assert all(result.response.captions for result in results.values())
            assert await many.read() is grpc.aio.EOF
            assert await many.call.code() is grpc.StatusCode.OK

    asyncio.run(run())


def test_each_item_has_an_error_of_its_own() -> None:
    async def run() -> dict[str, str]:
        async with gateway_setup() as setup:
            many = Many(setup)
            bad = item(1)
            bad.request.options.early_stopping = 9  # type: ignore[assignment]
            nameless = item(2)
            nameless.id = ""
            empty = caption_pb2.CaptionManyRequest(id="3")
            await many.send(item(0), bad, nameless, empty, item(4))
            results = await many.results(5)
            return {
                name: "" if result.HasField("response") else reason_of(result.error)
                for name, result in results.items()
            }

    assert asyncio.run(run()) == {
        "0": "",
        "1": "INVALID_OPTIONS",
        "": "INVALID_REQUEST",
        "3": "IMAGE_MISSING",
        "4": "",
    }


def test_no_more_items_are_read_than_the_window_has() -> None:
    async def run() -> None:
        async with gateway_setup(window=3) as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            many = Many(setup)
            await many.send(*(item(number) for number in range(10)))
            await asyncio.wait_for(setup.triton.arrived.wait(), WAIT_SECONDS)
            # Whoever would come, has come by the time that another's call has been answered.
            with pytest.raises(grpc.aio.AioRpcError):
                await setup.stub.Caption(request_of(b"other"), timeout=0.5)
            assert len(setup.triton.requests) == 4
            setup.triton.may_answer.set()
            assert len(await many.results(10)) == 10

    asyncio.run(run())


def test_what_is_asked_twice_is_computed_once() -> None:
    async def run() -> None:
        async with gateway_setup() as setup:
            many = Many(setup)
            await many.send(item(0), item(0, b"image 0"))
            first = [await many.read() for _ in range(3)]
            assert sum(each.HasField("result") for each in first) == 2
            await many.call.done_writing()
            # As a client does that has lost the call before.
            again = Many(setup)
            await again.send(item(0))
            assert (await again.results(1))["0"].response.cached
            assert len(setup.triton.requests) == 1

    asyncio.run(run())


def test_an_item_has_its_own_deadline() -> None:
    async def run() -> str:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            many = Many(setup)
            late = item(0)
            late.timeout.FromMilliseconds(100)
            await many.send(late)
            return reason_of((await many.results(1))["0"].error)

    assert asyncio.run(run()) == "DEADLINE_EXCEEDED"


def test_the_servers_cap_holds_for_items() -> None:
    async def run() -> str:
        async with gateway_setup(deadline_cap_seconds=0.1) as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            many = Many(setup)
            await many.send(item(0))
            return reason_of((await many.results(1))["0"].error)

    assert asyncio.run(run()) == "DEADLINE_EXCEEDED"


def test_before_the_connections_age_the_client_is_sent_elsewhere() -> None:
    async def run() -> None:
        async with gateway_setup(connection_age_seconds=0.5) as setup:
            many = Many(setup)
            assert (await many.read()).HasField("window")
            assert (await many.read()).HasField("drain")
            # What comes all the same is answered.
            await many.send(item(0))
            assert "0" in await many.results(1)
            await many.call.done_writing()
            assert await many.read() is grpc.aio.EOF

    asyncio.run(run())


def test_a_gateway_that_ends_says_so_and_answers_what_it_has() -> None:
    async def run() -> None:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            many = Many(setup)
            await many.send(item(0))
            await asyncio.wait_for(setup.triton.arrived.wait(), WAIT_SECONDS)
            draining = asyncio.create_task(setup.gateway.drain(asyncio.Event()))
            assert (await many.read()).HasField("window")
            assert (await many.read()).HasField("drain")
            await many.call.done_writing()
            setup.triton.may_answer.set()
            assert (await many.results(1))["0"].response.captions
            assert await many.read() is grpc.aio.EOF
            await asyncio.wait_for(draining, WAIT_SECONDS)

    asyncio.run(run())


def test_who_leaves_has_nothing_computed_any_more() -> None:
    async def run() -> None:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            many = Many(setup)
            await many.send(item(0))
            await asyncio.wait_for(setup.triton.arrived.wait(), WAIT_SECONDS)
            many.call.cancel()
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)

    asyncio.run(run())


def test_models_say_what_is_served() -> None:
    async def run() -> caption_pb2.GetModelsResponse:
        defaults = {"num_beams": 4, "early_stopping": True}
        async with gateway_setup(defaults, window=7, deadline_cap_seconds=1.5) as setup:
            answer: caption_pb2.GetModelsResponse = await setup.stub.GetModels(
                caption_pb2.GetModelsRequest(), timeout=10
            )
            return answer

    answer = asyncio.run(run())
    (model,) = answer.models
    assert (model.version, model.is_default, model.precision) == (3, True, "int8")
    assert (model.image_height, model.image_width) == (224, 224)
    assert model.defaults.num_beams == 4
    assert model.defaults.early_stopping == caption_pb2.EARLY_STOPPING_TRUE
    assert answer.limits.window == 7
    assert answer.limits.regions == MAX_REGIONS
    assert answer.limits.message_bytes == 64 * 2**20
    assert answer.limits.deadline_cap.ToMilliseconds() == 1500
    assert "num_beams" in {option.name for option in answer.limits.options}
    assert (answer.load.slots, answer.load.working, answer.load.waiting) == (32, 0, 0)


def test_while_nothing_is_served_nothing_is_said_to_be() -> None:
    async def run() -> grpc.StatusCode:
        async with gateway_setup() as setup:
            await setup.disconnect()
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await setup.stub.GetModels(caption_pb2.GetModelsRequest(), timeout=10)
            return raised.value.code()

    assert asyncio.run(run()) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("version", [1, 4, -1])
def test_a_version_that_is_not_served_is_not_found(version: int) -> None:
    async def run() -> None:
        async with gateway_setup() as setup:
            request = request_of()
            request.model_version = 3
            assert (await setup.stub.Caption(request, timeout=10)).model_version == 3
            request.model_version = version
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await setup.stub.Caption(request, timeout=10)
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(run())
