"""Keeping a number of calls to a service in flight."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from captionserve_server.bench.rows import Run, TokenIds

CALL_SECONDS = 600.0
"""How long one call may take: longer than any that is waited for."""


def run_in_flight(call: Callable[[int], TokenIds], images: int, load: int) -> Run:
    """Call for images 0 .. images - 1, `load` at once.

    Args:
        call: gives an image's token ids; called by many threads.
        images: how many.
        load: how many at once.
    """

    def timed(image: int) -> tuple[float, TokenIds]:
        begin = time.perf_counter()
        tokens = call(image)
        return time.perf_counter() - begin, tokens

    begin = time.perf_counter()
    with ThreadPoolExecutor(load) as pool:
        answers = list(pool.map(timed, range(images)))
    seconds = time.perf_counter() - begin
    return Run(seconds, [latency for latency, _ in answers], [tokens for _, tokens in answers])
