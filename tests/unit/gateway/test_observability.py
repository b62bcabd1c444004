"""What a service shows of itself: metrics, lines in the log, traces."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.gateway.server import Gateway
from captionserve_server.gateway.stages import STAGES
from captionserve_server.tracing import Traces, TracingNotInstalledError
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.collector import PARENT, TRACE, collecting, parent_header
from tests.unit.gateway.fake_triton import WAIT_SECONDS
from tests.unit.gateway.harness import gateway_setup, request_of, settings_of
from tests.unit.gateway.test_lifecycle import in_flight, metrics_of, requests

DOCS = Path(__file__).parents[3] / "docs"
TRACEPARENT = ("traceparent", parent_header())
ITEM = "CaptionMany.item"


def stage_count(stage: str) -> str:
    return f'captionserve_stage_seconds_count{{stage="{stage}"}}'


def test_a_caption_is_counted_in_all_its_stages_and_once() -> None:
    async def run() -> dict[str, float]:
        async with gateway_setup() as setup:
            for _ in range(2):  # The second one is remembered.
                await setup.stub.Caption(request_of(), timeout=10)
            return await asyncio.to_thread(metrics_of, setup)

    samples = asyncio.run(run())
    assert [samples[stage_count(stage)] for stage in STAGES] == [1] * len(STAGES)
    assert samples["captionserve_first_token_seconds_count"] == 1
    # Up to the first step each stage took a thousandth, as the fake decoder says.
    assert samples['captionserve_first_token_seconds_bucket{le="0.02"}'] == 1
    assert samples["captionserve_tokens_total"] > 0
    assert samples["captionserve_cache_hits_total"] == 1
    assert samples["captionserve_serving"] == 1


def test_room_and_turns_are_shown_while_they_are_taken() -> None:
    async def run() -> tuple[dict[str, float], dict[str, float]]:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            call = setup.stub.Caption(request_of(), timeout=60)
            await asyncio.wait_for(setup.triton.arrived.wait(), WAIT_SECONDS)
            during = await asyncio.to_thread(metrics_of, setup)
            setup.triton.may_answer.set()
            await call
            await setup.gateway.wait_idle()
            return during, await asyncio.to_thread(metrics_of, setup)

    during, after = asyncio.run(run())
    size = request_of().ByteSize()
    taken = {"admitted": 1, "request_bytes": size, "working": 1, "waiting": 0}
    assert {name: during[f"captionserve_{name}"] for name in taken} == taken
    assert {after[f"captionserve_{name}"] for name in taken} == {0}
    assert during["captionserve_turns"] > 1


def test_items_of_many_are_counted_by_their_own_codes() -> None:
    async def run() -> dict[str, float]:
        async with gateway_setup() as setup:
            call = setup.stub.CaptionMany(timeout=30)
            items = [("good", request_of()), ("bad", caption_pb2.CaptionRequest())]
            for name, request in items:
                await call.write(caption_pb2.CaptionManyRequest(id=name, request=request))
            await call.done_writing()
            async for _ in call:
                pass
            await setup.gateway.wait_idle()
            return await asyncio.to_thread(metrics_of, setup)

    samples = asyncio.run(run())
    assert samples[requests(ITEM, "OK")] == 1
    assert samples[requests(ITEM, "INVALID_ARGUMENT")] == 1
    assert samples[requests("CaptionMany", "OK")] == 1
    assert samples[in_flight(ITEM)] == 0


def test_every_metric_is_documented() -> None:
    async def run() -> list[str]:
        gateway = Gateway(settings_of())
        await gateway.start()
        try:
            return [family.name for family in gateway.metrics.registry.collect()]
        finally:
            await gateway.close()

    documented = (DOCS / "metrics.md").read_text()
    for name in asyncio.run(run()):
        known = name.startswith("captionserve_process_")
        assert known or f"`{name}`" in documented or f"`{name}_total`" in documented, name


def test_a_line_in_the_log_says_how_a_call_went(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with gateway_setup() as setup:
            metadata = (("x-request-id", "mine-1"), ("authorization", "Bearer secret"))
            await setup.stub.Caption(request_of(b"secret"), timeout=10, metadata=metadata)
            await setup.gateway.wait_idle()

    with caplog.at_level(logging.INFO, "captionserve_server"):
        asyncio.run(run())
    (line,) = [record for record in caplog.records if record.getMessage() == "call"]
    told: Any = line
    assert (told.method, told.code) == ("Caption", "OK")
    assert told.seconds > 0
    assert "secret" not in str(vars(line))


def test_a_call_goes_on_with_its_callers_trace() -> None:
    async def run(endpoint: str) -> None:
        async with gateway_setup(otlp_endpoint=endpoint) as setup:
            await setup.stub.Caption(request_of(), timeout=10, metadata=(TRACEPARENT,))
            setup.triton.fail(grpc.StatusCode.INTERNAL, "a secret")
            with pytest.raises(grpc.aio.AioRpcError):
                await setup.stub.Caption(request_of(b"2"), timeout=10, metadata=(TRACEPARENT,))
            await setup.gateway.wait_idle()

    with collecting() as (collector, endpoint):
        asyncio.run(run(endpoint))  # The end of the gateway sends what is left.
    assert collector.services == {"captionserve.gateway"}
    calls = [span for span in collector.spans if span.name.endswith("/Caption")]
    assert [span.status.code for span in calls] == [
        trace_pb2.Status.STATUS_CODE_UNSET,
        trace_pb2.Status.STATUS_CODE_ERROR,
    ]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert {span.parent_span_id.hex() for span in calls} == {PARENT}
    stages = [span for span in collector.spans if span.parent_span_id == calls[0].span_id]
    assert [span.name for span in stages] == list(STAGES)
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano for span in stages)
    assert "secret" not in str(collector.spans)


def test_a_collector_that_is_away_costs_nobody_a_caption() -> None:
    async def run() -> None:
        async with gateway_setup(otlp_endpoint="http://127.0.0.1:1") as setup:
            assert (await setup.stub.Caption(request_of(), timeout=10)).captions

    asyncio.run(run())


def test_an_endpoint_without_opentelemetry_is_an_error_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracingNotInstalledError, match="pip install"):
        Traces("http://127.0.0.1:1", "test")
    Traces(None, "test").close()
