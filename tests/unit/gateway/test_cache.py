"""What is remembered, what is shared, and who is told what when callers come and go."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core.errors import (
    DeadlineExceededError,
    ModelFaultError,
    OverloadedError,
)
from captionserve_server.core.framing import WHOLE, Framing
from captionserve_server.core.options import DecodingOptions
from captionserve_server.gateway.cache import (
    ENTRY_OVERHEAD_BYTES,
    AnswerCache,
    SharedWork,
    answer_key,
    image_digest,
)
from captionserve_server.gateway.kserve import InputTensor
from captionserve_server.triton import wire
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.gateway.fake_triton import WAIT_SECONDS
from tests.unit.gateway.harness import Setup, gateway_setup, request_of
from tests.unit.gateway.test_failures import failure_of, violations_of
from tests.unit.gateway.test_lifecycle import metrics_of


def framed(**framing: Any) -> caption_pb2.CaptionRequest:
    """The same image and options, and what else is asked of it."""
    request = caption_pb2.CaptionRequest(**framing)
    request.MergeFrom(request_of())
    return request


def bypassing(request: caption_pb2.CaptionRequest) -> caption_pb2.CaptionRequest:
    request.bypass_cache = True
    return request


def calls_in_turn(
    *requests: caption_pb2.CaptionRequest, **config: Any
) -> tuple[list[bool], int, dict[str, float]]:
    """Whether each answer was cached, how often the decoder was asked, and the metrics."""

    async def run() -> tuple[list[bool], int, dict[str, float]]:
        async with gateway_setup(**config) as setup:
            cached = [(await setup.stub.Caption(each, timeout=10)).cached for each in requests]
            return cached, len(setup.triton.requests), await asyncio.to_thread(metrics_of, setup)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("second", "cached"),
    [
        (request_of(), True),
        # What the checkpoint does by itself may be said outright.
        (request_of(num_beams=1), True),
        (request_of(num_beams=2), False),
        (request_of(b"another"), False),
        (framed(resize=caption_pb2.RESIZE_CHECKPOINT), True),
        (framed(resize=caption_pb2.RESIZE_LETTERBOX), False),
        (framed(regions=[caption_pb2.Region(right=1, bottom=1)]), False),
        (framed(tiles=caption_pb2.Tiles(rows=1, cols=1)), False),
        (bypassing(request_of()), False),
    ],
)
def test_the_same_image_and_options_are_answered_from_memory(
    second: caption_pb2.CaptionRequest, cached: bool
) -> None:
    found, asked, samples = calls_in_turn(request_of(), second)
    assert found == [False, cached]
    assert asked == 2 - cached
    assert samples["captionserve_cache_hits_total"] == cached
    assert samples["captionserve_cache_bytes"] > ENTRY_OVERHEAD_BYTES


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"allow_partial": True},
        {"do_sample": True, "seed": 3, "allow_partial": True},
    ],
)
def test_what_may_differ_the_next_time_is_not_remembered(options: dict[str, Any]) -> None:
    found, asked, samples = calls_in_turn(request_of(**options), request_of(**options))
    assert (found, asked) == ([False, False], 2)
    assert samples["captionserve_cache_bytes"] == 0


def test_sampling_with_a_seed_is_remembered() -> None:
    request = request_of(do_sample=True, seed=3)
    assert calls_in_turn(request, request)[0] == [False, True]


def test_what_bypassed_the_cache_refreshes_it() -> None:
    assert calls_in_turn(bypassing(request_of()), request_of())[:2] == ([False, True], 1)


def test_without_memory_nothing_is_remembered() -> None:
    assert calls_in_turn(request_of(), request_of(), cache_megabytes=0)[:2] == ([False, False], 2)


def test_a_large_image_is_remembered_like_a_small_one() -> None:
    image = bytes(3 * 2**20)
    requests = [request_of(image), request_of(image), request_of(image + b"\0")]
    assert calls_in_turn(*requests)[0] == [False, True, False]


def test_errors_are_not_remembered() -> None:
    async def run() -> caption_pb2.CaptionResponse:
        async with gateway_setup() as setup:
            well = setup.triton.stream
            setup.triton.stream_error("onnx runtime error")
            await failure_of(setup.stub, request_of())
            setup.triton.stream = well
            response: caption_pb2.CaptionResponse = await setup.stub.Caption(
                request_of(), timeout=10
            )
            return response

    response = asyncio.run(run())
    assert response.captions[0].text == "a red apple"
    assert not response.cached


def test_options_are_judged_before_the_model_is_asked() -> None:
    async def run() -> tuple[dict[str, str], int]:
        async with gateway_setup() as setup:
            failure = await failure_of(setup.stub, request_of(num_beams=99, max_length=1))
            return violations_of(failure), len(setup.triton.requests)

    violations, asked = asyncio.run(run())
    assert set(violations) == {"options.num_beams", "options.max_length"}
    assert asked == 0


def test_the_checkpoints_own_defaults_count() -> None:
    async def run() -> dict[str, str]:
        async with gateway_setup(defaults={"num_beams": 4}) as setup:
            await setup.stub.Caption(request_of(num_return_sequences=4), timeout=10)
            failure = await failure_of(setup.stub, request_of(num_return_sequences=5))
            return violations_of(failure)

    assert set(asyncio.run(run())) == {"options.num_return_sequences", "options.num_beams"}


def test_what_is_remembered_of_another_version_is_not_given() -> None:
    async def run() -> list[bool]:
        async with gateway_setup() as setup:
            await setup.stub.Caption(request_of(), timeout=10)
            setup.triton.version = 4
            await setup.disconnect()
            await setup.gateway.connect(setup.triton.address, [4], WAIT_SECONDS)
            calls = [await setup.stub.Caption(request_of(), timeout=10) for _ in range(2)]
            return [call.cached for call in calls]

    assert asyncio.run(run()) == [False, True]


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop go on until the condition holds."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0)

    await asyncio.wait_for(poll(), WAIT_SECONDS)


def waiters(setup: Setup) -> int:
    """How many calls wait for work in flight."""
    return sum(work.waiters for work in setup.gateway._service._captions._in_flight.values())


async def begin_pair(
    setup: Setup,
    second: caption_pb2.CaptionRequest,
    first: caption_pb2.CaptionRequest = request_of(),  # noqa: B008  # Nobody changes it.
) -> list[Any]:
    """Two calls that wait for the decoder, in their order."""
    setup.triton.stream = setup.triton.stream_when_allowed
    calls = []
    for count, request in enumerate((first, second), 1):
        calls.append(setup.stub.Caption(request, timeout=60))
        await until(lambda count=count: waiters(setup) == count)  # type: ignore[misc]
    return calls


@pytest.mark.parametrize(
    ("second", "shared"),
    [
        (request_of(), True),
        (request_of(num_beams=1), True),
        (request_of(num_beams=2), False),
        (bypassing(request_of()), False),
    ],
)
def test_identical_calls_in_flight_are_computed_once(
    second: caption_pb2.CaptionRequest, shared: bool
) -> None:
    async def run() -> tuple[list[bool], int, dict[str, float]]:
        # Shared without any memory, too.
        async with gateway_setup(cache_megabytes=0) as setup:
            calls = await begin_pair(setup, second)
            setup.triton.may_answer.set()
            cached = [(await call).cached for call in calls]
            return cached, len(setup.triton.requests), await asyncio.to_thread(metrics_of, setup)

    cached, asked, samples = asyncio.run(run())
    assert cached == [False, shared]
    assert asked == 2 - shared
    assert samples["captionserve_cache_joined_total"] == shared


@pytest.mark.parametrize("megabytes", [0, 1])
@pytest.mark.parametrize("second", [request_of(), request_of(output_stages=True)], ids=str)
def test_who_joins_anothers_work_is_told_none_of_its_stages(
    second: caption_pb2.CaptionRequest, megabytes: int
) -> None:
    async def run() -> tuple[list[caption_pb2.CaptionResponse], int]:
        async with gateway_setup(cache_megabytes=megabytes) as setup:
            calls = await begin_pair(setup, second, request_of(output_stages=True))
            setup.triton.may_answer.set()
            return [await call for call in calls], len(setup.triton.requests)

    (own, joined), asked = asyncio.run(run())
    assert asked == 1
    assert (bool(own.stages), own.cached) == (True, False)
    assert (bool(joined.stages), joined.cached) == (False, True)
    assert joined.captions == own.captions


def test_sampling_without_a_seed_is_not_shared() -> None:
    async def run() -> int:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            calls = [setup.stub.Caption(request_of(do_sample=True), timeout=60) for _ in range(2)]
            await until(lambda: waiters(setup) == 2)
            setup.triton.may_answer.set()
            assert [(await call).cached for call in calls] == [False, False]
            return len(setup.triton.requests)

    assert asyncio.run(run()) == 2


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_caller_that_gives_up_does_not_end_the_others_work(leaver: int) -> None:
    async def run() -> bool:
        async with gateway_setup() as setup:
            calls = await begin_pair(setup, request_of())
            calls[leaver].cancel()
            await until(lambda: waiters(setup) == 1)
            assert not setup.triton.cancelled.is_set()
            setup.triton.may_answer.set()
            return bool((await calls[1 - leaver]).cached)

    assert asyncio.run(run()) == (leaver == 0)


def test_when_the_last_caller_has_gone_the_work_ends_and_the_next_begins_anew() -> None:
    async def run() -> tuple[bool, int]:
        async with gateway_setup() as setup:
            for call in await begin_pair(setup, request_of()):
                call.cancel()
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            setup.triton.may_answer.set()
            response = await setup.stub.Caption(request_of(), timeout=10)
            return response.cached, len(setup.triton.requests)

    assert asyncio.run(run()) == (False, 2)


def test_who_may_not_begin_work_may_join_it() -> None:
    def refuse() -> None:
        raise OverloadedError("too many requests are waiting")

    async def run() -> None:
        shared: SharedWork[int] = SharedWork()
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def compute() -> int:
            return await done

        first = asyncio.create_task(shared.run("a", compute, 60.0, admit=lambda: None))
        await settle()
        second = asyncio.create_task(shared.run("a", compute, 60.0, admit=refuse))
        with pytest.raises(OverloadedError):
            await shared.run("b", compute, 60.0, admit=refuse)
        done.set_result(7)
        assert (await first, await second) == ((7, False), (7, True))

    asyncio.run(run())


async def settle() -> None:
    """Let everything happen that can happen now."""
    for _ in range(10):
        await asyncio.sleep(0)


Operations = list[tuple[str, int]]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["call", "call", "leave", "finish", "fail", "run out"]),
            st.integers(0, 7),
        ),
        max_size=30,
    )
)
def test_whatever_the_order_everybody_is_told_what_is_theirs(operations: Operations) -> None:
    asyncio.run(interleave(operations))


async def interleave(operations: Operations) -> None:
    """Callers of two keys come and go, and a fake decoder ends work well or not."""
    shared: SharedWork[int] = SharedWork()
    running: dict[int, asyncio.Future[int]] = {}
    waiting: dict[int, list[asyncio.Task[tuple[int, bool]]]] = {0: [], 1: []}
    # Whether the one who began the work in flight is still among those who wait.
    beginner_waits = {0: False, 1: False}
    begun = 0

    async def compute(key: int) -> int:
        nonlocal begun
        assert key not in running, "the same work twice at once"
        begun += 1
        running[key] = asyncio.get_running_loop().create_future()
        try:
            return await running[key]
        finally:
            del running[key]

    for operation, number in operations:
        key = number % 2
        callers = waiting[key]
        if operation == "call":
            if not callers:
                beginner_waits[key] = True
            callers.append(
                asyncio.create_task(
                    shared.run(key, partial(compute, key), 60.0, admit=lambda: None)
                )
            )
        elif callers and operation == "leave":
            index = number // 2 % len(callers)
            # The order of callers is that of their coming.
            beginner_waits[key] &= index != 0
            callers.pop(index).cancel()
        elif callers and operation == "finish":
            running[key].set_result(begun)
            await settle()
            values, joined = zip(*(caller.result() for caller in callers), strict=True)
            assert set(values) == {begun}
            assert list(joined) == [not beginner_waits[key]] + [True] * (len(callers) - 1)
            callers.clear()
        elif callers and operation == "fail":
            running[key].set_exception(ModelFaultError("a fault"))
            await settle()
            assert all(isinstance(caller.exception(), ModelFaultError) for caller in callers)
            callers.clear()
        elif callers:
            before = begun
            running[key].set_exception(DeadlineExceededError("too late"))
            await settle()
            if beginner_waits[key]:
                assert isinstance(callers.pop(0).exception(), DeadlineExceededError)
            # Those who joined still have time: the first of them begins anew.
            assert not any(caller.done() for caller in callers)
            assert begun == before + bool(callers)
            beginner_waits[key] = True
        await settle()
        assert (key in running) == bool(callers), "work goes on just as long as somebody waits"
        assert len(shared._in_flight) == len(running)


def test_a_callers_own_time_does_not_end_the_work_of_the_others() -> None:
    async def run() -> tuple[int, bool]:
        shared: SharedWork[int] = SharedWork()
        done = asyncio.get_running_loop().create_future()

        async def compute() -> int:
            return int(await done)

        patient = asyncio.create_task(shared.run("key", compute, 60.0, admit=lambda: None))
        await settle()
        with pytest.raises(DeadlineExceededError):
            await shared.run("key", compute, 0.0, admit=lambda: None)
        done.set_result(7)
        return await patient

    assert asyncio.run(run()) == (7, False)


def test_memory_stays_within_its_bound_and_the_oldest_go_first() -> None:
    response = caption_pb2.CaptionResponse(captions=[caption_pb2.Caption(text=1000 * "a")])
    size = response.ByteSize() + ENTRY_OVERHEAD_BYTES
    cache = AnswerCache(3 * size)
    keys = [bytes([number]) * 32 for number in range(4)]
    for key in keys[:3]:
        cache.put(key, response)
    assert cache.used_bytes == 3 * size
    assert cache.get(keys[0]) == response
    cache.put(keys[3], response)
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    too_large = caption_pb2.CaptionResponse(captions=[caption_pb2.Caption(text=9999 * "a")])
    cache.put(keys[1], too_large)
    assert cache.get(keys[1]) is None
    assert cache.used_bytes == 3 * size


def test_the_overhead_that_is_counted_is_what_an_entry_takes() -> None:
    count = 2000
    cache = AnswerCache(2**30)
    response = caption_pb2.CaptionResponse(model_version=3)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(count):
            cache.put(number.to_bytes(32, "big"), response)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used / 2 <= cache.used_bytes
    assert used <= cache.used_bytes


def tensor(raw: bytes, shape: tuple[int, ...] = (1,)) -> InputTensor:
    return InputTensor(wire.PIXEL_VALUES, shape, raw)


def test_a_key_tells_images_framings_options_and_versions_apart() -> None:
    plain, beams = DecodingOptions(), DecodingOptions(num_beams=2)
    image, box = tensor(b"ab"), (0, 0, 1, 2)
    asked: list[tuple[InputTensor, Framing, DecodingOptions, int, str]] = [
        (image, WHOLE, plain, 1, ""),
        (image, WHOLE, plain, 1, "alice"),
        (image, WHOLE, plain, 2, ""),
        (image, WHOLE, beams, 1, ""),
        (image, Framing(regions=(box,)), plain, 1, ""),
        (image, Framing(regions=(box, box)), plain, 1, ""),
        (image, Framing(tiles=(1, 2)), plain, 1, ""),
        (image, Framing(tiles=(2, 1)), plain, 1, ""),
        (image, Framing(resize="letterbox"), plain, 1, ""),
        (image, Framing(resize="center_crop"), plain, 1, ""),
        (tensor(b"ab", (2,)), WHOLE, plain, 1, ""),
        (tensor(b"ac"), WHOLE, plain, 1, ""),
        (tensor(bytes(2**21)), WHOLE, plain, 1, ""),
    ]

    async def run() -> list[bytes]:
        return [
            answer_key(await image_digest(each), framing, options, version, scope)
            for each, framing, options, version, scope in asked
            for _ in range(2)
        ]

    keys = asyncio.run(run())
    assert keys[::2] == keys[1::2]
    assert len(set(keys)) == len(asked)
    assert {len(key) for key in keys} == {32}
