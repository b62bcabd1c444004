"""Connections, streams, cancelled calls and restarts, again and again: nothing is left of them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from captionserve import CaptionClient
from captionserve_server.serving.ready import ReadyReport

from tests.faults import load
from tests.faults.footprint import Footprint, footprint, idle, leaks, settled
from tests.faults.proxy import proxy_to
from tests.faults.served import WAIT_SECONDS, Served, wait_until
from tests.pictures import png
from tests.reference import picture


def report(served: Served) -> ReadyReport:
    return ReadyReport(**served.report)


def connections(served: Served) -> None:
    """Many connections, each for a call."""
    for _ in range(100):
        with CaptionClient(served.report["grpc"]) as client:
            client.caption(picture(1))


def many(served: Served) -> None:
    """CaptionMany calls, each second of which is left in the middle."""
    images = [picture(seed) for seed in range(40)]
    with CaptionClient(served.report["grpc"], timeout=WAIT_SECONDS) as client:
        for number in range(6):
            outcomes = client.caption_many(images, window=16, bypass_cache=True)
            for outcome in outcomes:
                assert outcome.error is None
                if number % 2 and outcome.index == 10:
                    outcomes.close()
                    break


def cancelled(served: Served) -> None:
    """Calls that are given up at once, or a little later."""
    with grpc.insecure_channel(served.report["grpc"]) as channel:
        call: Any = channel.unary_unary(load.METHOD)
        request = load.request_of(png(picture(1)), num_beams=4)
        for number in range(300):
            future = call.future(request, timeout=WAIT_SECONDS)
            if number % 2:
                # So many at once are also refused.
                with contextlib.suppress(grpc.FutureTimeoutError, grpc.RpcError):
                    future.result(timeout=0.001)
            future.cancel()


def restart(served: Served) -> None:
    """A death of the decoder at work."""
    before = served.report["pids"]["triton"]
    with CaptionClient(served.report["grpc"]) as client, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(client.caption, picture(n), bypass_cache=True) for n in range(8)]
        served.victim("decoder").kill()
        for call in calls:
            assert call.result(WAIT_SECONDS).text
    wait_until(lambda: served.report["pids"]["triton"] != before)


@pytest.mark.parametrize("way", [connections, many, cancelled, restart])
def test_nothing_is_left(way: Callable[[Served], None], impatient: Served) -> None:
    seen: list[Footprint] = []
    for _ in range(2):
        way(impatient)
        seen.append(idle(report(impatient)))
    before = dataclasses.replace(seen[-1], threads=max(each.threads for each in seen))
    way(impatient)
    assert leaks(before, settled(report(impatient), before)) == []


def test_what_is_planted_is_found(impatient: Served) -> None:
    # The control: the test above must be able to fail.
    running = report(impatient)
    before = footprint(running)

    def found(name: str) -> bool:
        return any(leak.startswith(f"{name}: ") for leak in leaks(before, footprint(running)))

    with ExitStack() as planted:
        host, _, port = running.grpc.rpartition(":")
        for _ in range(20):
            planted.enter_context(socket.create_connection((host, int(port))))
        wait_until(lambda: found("open_files"))

        (prefix,) = re.findall(
            r"shm-region-prefix-name=(\S+)", " ".join(impatient.triton.cmdline())
        )
        forgotten = Path("/dev/shm", f"{prefix}-planted")
        forgotten.touch()
        planted.callback(forgotten.unlink)
        assert found("shared_files")

        # A request that the gateway has most of, and never gets the rest.
        proxy = planted.enter_context(proxy_to(running.grpc))
        channel = planted.enter_context(
            grpc.insecure_channel(proxy.address, [("grpc.max_send_message_length", -1)])
        )
        proxy.swallow_at = 56 << 20
        begin: Any = channel.unary_unary(load.METHOD)
        call = begin.future(bytes(63 << 20), timeout=WAIT_SECONDS)
        wait_until(lambda: found("memory"))
        call.cancel()
    assert leaks(before, settled(running, before)) == []
