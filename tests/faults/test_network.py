"""Connections that are slow, cut, swallowed or silent: calls end in words, and nothing stays."""

from __future__ import annotations

import contextlib
import queue
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import psutil
import pytest
from captionserve import (
    BeamFate,
    CaptionClient,
    CaptionError,
    Continuation,
    GenerationOptions,
    _transport,
)
from captionserve.v1 import caption_pb2_grpc
from captionserve_server.serving.ready import ReadyReport
from PIL import Image

from tests.faults.proxy import DOWN, UP, Proxy, proxy_to
from tests.faults.served import WAIT_SECONDS, Served, wait_until
from tests.pictures import png
from tests.reference import picture
from tests.scraped import total

# gRPC's own, which come and go.
FILES_SLACK = 6


@pytest.fixture
def running(impatient: Served) -> ReadyReport:
    """The service that soon gives up on who is silent."""
    with CaptionClient(impatient.report["grpc"]) as client:
        client.caption(picture(1))
    return ReadyReport(**impatient.report)


@contextmanager
def everything_is_given_back(running: ReadyReport) -> Iterator[None]:
    """After the block no call is in flight or work, and no more files are open than before."""
    gateway = psutil.Process(running.pids["gateway"])
    files = gateway.num_fds()
    yield
    with CaptionClient(running.grpc) as client:
        wait_until(lambda: (load := client.models()).working == load.waiting == 0)
        assert client.caption(picture(1), bypass_cache=True).text
    wait_until(lambda: total(running.metrics, "captionserve_requests_in_flight") == 0)
    wait_until(lambda: gateway.num_fds() <= files + FILES_SLACK)


@pytest.fixture
def proxy(running: ReadyReport) -> Iterator[Proxy]:
    with everything_is_given_back(running), proxy_to(running.grpc) as made:
        yield made


def noise() -> Image.Image:
    """A picture whose file many packets carry."""
    return Image.effect_noise((600, 600), 90).convert("RGB")


def test_who_is_slow_is_answered_and_holds_up_nobody(running: ReadyReport, proxy: Proxy) -> None:
    proxy.bytes_per_second = 3e6
    image = png(noise())
    with (
        CaptionClient(proxy.address, timeout=WAIT_SECONDS) as slow,
        CaptionClient(running.grpc) as quick,
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(slow.caption, image, bypass_cache=True)
        wait_until(lambda: proxy.passed[UP] > 10_000)
        assert quick.caption(picture(2), bypass_cache=True).text
        assert not call.done()
        assert call.result().text == quick.caption(image, bypass_cache=True).text


def test_a_request_that_is_cut_is_made_again(proxy: Proxy) -> None:
    with CaptionClient(proxy.address, timeout=WAIT_SECONDS) as client:
        right = client.caption(image := png(noise())).text
        proxy.cut_at[UP] = proxy.passed[UP] + len(image) // 2
        assert client.caption(image, bypass_cache=True).text == right
    assert proxy.connections == 2


def fates_of(step: Iterable[Continuation]) -> list[tuple[int, int, str]]:
    """What a step of a search has kept and finished."""
    return [
        (each.parent, each.token_id, each.fate) for each in step if each.fate != BeamFate.DROPPED
    ]


def test_a_stream_that_is_cut_goes_on_behind_what_it_gave(proxy: Proxy) -> None:
    with CaptionClient(proxy.address, timeout=WAIT_SECONDS) as client:
        options = GenerationOptions(num_beams=4, output_beams=True, max_length=30, min_length=30)
        updates = client.caption_stream(picture(1), options)
        first = next(updates)
        proxy.cut()
        *parts, last = updates
        assert last.result is not None
        assert last.result.beams is not None
        assert "".join(each.text for each in (first, *parts)) == last.result.text
        steps = [step for each in (first, *parts) for step in each.beam_steps]
        assert [fates_of(step) for step in steps] == [
            fates_of(step) for step in last.result.beams.steps
        ]
    assert proxy.connections == 2


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_many_images_over_connections_that_are_cut(direction: int, proxy: Proxy) -> None:
    images = [picture(seed) for seed in range(60)]
    with CaptionClient(proxy.address, timeout=WAIT_SECONDS) as client:
        right = [client.caption(image).text for image in images]
        each = proxy.passed[direction] // len(images)
        outcomes = []
        for outcome in client.caption_many(images, ordered=False, window=4):
            outcomes.append(outcome)
            if len(outcomes) % 15 == 1:
                proxy.cut_at[direction] = proxy.passed[direction] + 5 * each
    assert sorted(outcome.index for outcome in outcomes) == list(range(len(images)))
    assert all(
        outcome.result and outcome.result.text == right[outcome.index] for outcome in outcomes
    )
    assert proxy.connections > 2


def test_a_swallowed_connection_costs_a_call_its_time_and_no_more(proxy: Proxy) -> None:
    with CaptionClient(proxy.address) as client:
        client.caption(picture(1))
        proxy.swallow()
        with pytest.raises(CaptionError) as caught:
            client.caption(picture(1), timeout=0.5)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_swallowed_connection_is_noticed_and_replaced(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_transport, "_KEEPALIVE_MILLISECONDS", 1000)
    monkeypatch.setattr(_transport, "_KEEPALIVE_TIMEOUT_MILLISECONDS", 1000)
    with CaptionClient(proxy.address, timeout=WAIT_SECONDS) as client:
        right = client.caption(picture(1)).text
        proxy.swallow()
        assert client.caption(picture(1)).text == right
    assert proxy.connections == 2


def test_calls_of_a_client_that_has_vanished_end(running: ReadyReport, proxy: Proxy) -> None:
    with grpc.insecure_channel(proxy.address) as channel:
        stub: Any = caption_pb2_grpc.CaptionServiceStub(channel)
        items: queue.Queue[Any] = queue.Queue()
        call = stub.CaptionMany(iter(items.get, None))
        assert next(call).window.items > 0
        assert total(running.metrics, "captionserve_requests_in_flight") == 1
        proxy.swallow()
        wait_until(lambda: total(running.metrics, "captionserve_requests_in_flight") == 0)
        items.put(None)


def test_a_half_closed_connection_ends_its_calls(proxy: Proxy) -> None:
    image = png(noise())
    with (
        CaptionClient(proxy.address, timeout=WAIT_SECONDS) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        client.caption(picture(1))
        proxy.bytes_per_second = 3e6
        call = pool.submit(client.caption, image)
        begun = proxy.passed[UP]
        wait_until(lambda: proxy.passed[UP] > begun + len(image) // 4)
        proxy.half_close()
        proxy.bytes_per_second = None
        assert call.result().text


@pytest.mark.parametrize("beginning", [b"", b"PRI * HTTP/2.0\r\n", b"\x16\x03\x01"])
def test_silent_connections_are_closed_and_disturb_nobody(
    beginning: bytes, running: ReadyReport
) -> None:
    host, _, port = running.grpc.rpartition(":")
    with everything_is_given_back(running), ExitStack() as stack:
        silent = []
        for _ in range(64):
            one = stack.enter_context(socket.create_connection((host, int(port)), WAIT_SECONDS))
            one.sendall(beginning)
            silent.append(one)
        with CaptionClient(running.grpc) as client:
            assert client.caption(picture(1), bypass_cache=True).text
        for one in silent:
            # What the server says first may come before it closes.
            with contextlib.suppress(ConnectionResetError):
                while one.recv(4096):
                    pass
