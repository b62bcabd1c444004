"""captionserve itself, through its gateway and its typed client."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from captionserve import CaptionClient, GenerationOptions
from prometheus_client.parser import text_string_to_metric_families

from captionserve_server.bench.peers.system import CALL_SECONDS, Options, Peer, System, TokenIds
from captionserve_server.bulk.captioners import Captioner, Service
from captionserve_server.runtime.model_repository import VISION_ENCODER
from captionserve_server.serving.launch import launched_service

_COMPUTE = "nv_inference_compute_infer_duration_us_total"
_OWN = re.compile(r"captionserve_(\w+)_seconds_(?:total|sum)")

# The decoder shows its figures every tenth of a second; on busy cores it may be late.
_PAUSE_SECONDS = 0.5
_MOST_PAUSES = 20


class _Service(System):
    """A service, asked by the typed client."""

    def __init__(self, client: CaptionClient, *metrics: str) -> None:
        self._client = client
        self._metrics = metrics

    def caption(self, files: list[bytes], options: Options, streamed: bool) -> list[TokenIds]:
        """Caption a file, past the cache."""
        (file,) = files
        chosen = GenerationOptions(**options)  # type: ignore[arg-type]
        if not streamed:
            result = self._client.caption(file, chosen, bypass_cache=True)
            return [result.captions[0].token_ids]
        *_, last = self._client.caption_stream(file, chosen)
        assert last.result is not None
        return [last.result.captions[0].token_ids]

    def captioner(self) -> Captioner:
        """The service, by CaptionMany."""
        return Service(self._client)

    def stage_seconds(self) -> dict[str, float]:
        """What Triton and the gateway count, the last captions included."""
        return standing_still(self._counted, _PAUSE_SECONDS)

    def _counted(self) -> dict[str, float]:
        text = ""
        for address in self._metrics:
            with urllib.request.urlopen(f"http://{address}/metrics") as answer:
                text += answer.read().decode()
        return stage_seconds_of(text)


@contextmanager
def service_peer(repository: Path) -> Iterator[Peer]:
    """A service of its own on free loopback ports, ended on leaving; nothing is cached.

    Raises:
        LaunchError: if it does not start.
    """
    with (
        launched_service(repository, "--cache-megabytes", "0") as service,
        CaptionClient(service.grpc, timeout=CALL_SECONDS) as client,
    ):
        # Triton and its models are the gateway's descendants.
        pid = service.pids["gateway"]
        yield Peer(pid, _Service(client, service.triton_metrics, service.metrics).run)


def standing_still(read: Callable[[], dict[str, float]], pause: float) -> dict[str, float]:
    """What is read twice in a row, so many seconds apart; the last reading where nothing is."""
    last = read()
    for _ in range(_MOST_PAUSES):
        time.sleep(pause)
        before, last = last, read()
        if last == before:
            break
    return last


def stage_seconds_of(metrics: str) -> dict[str, float]:
    """The seconds that a service has spent by stage, from its metrics in Prometheus' text format.

    "vision_encoder", the encoder's graph; "prefill", "step" and "top", the decoder's; "engine", its
    thread, which waits for all of those; "image", decoding and resizing, beside it; "request", what
    the gateway took for its calls. And whatever else a service comes to count.
    """
    seconds: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if own := _OWN.fullmatch(sample.name):
                seconds[own[1]] = sample.value + seconds.get(own[1], 0.0)
            elif sample.name == _COMPUTE and sample.labels["model"] == VISION_ENCODER:
                seconds[VISION_ENCODER] = sample.value / 1e6
    return seconds
