"""captionserve itself, through its gateway and its typed client."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from captionserve import CaptionClient, GenerationOptions
from prometheus_client.parser import text_string_to_metric_families

from captionserve_server.bench.peers.loads import CALL_SECONDS, CalledPeer
from captionserve_server.bench.rows import Options, TokenIds
from captionserve_server.runtime.model_repository import VISION_ENCODER
from captionserve_server.serving.launch import launched_service

_COMPUTE = "nv_inference_compute_infer_duration_us_total"
_OWN = re.compile(r"captionserve_(\w+)_seconds_(?:total|sum)")


@contextmanager
def service_peer(repository: Path, images: Sequence[bytes]) -> Iterator[CalledPeer]:
    """A service of its own on free loopback ports, ended on leaving; nothing is cached.

    Args:
        repository: an exported model repository.
        images: JPEG files.

    Raises:
        LaunchError: if it does not start.
    """
    with (
        launched_service(repository, "--cache-megabytes", "0") as service,
        CaptionClient(service.grpc, timeout=CALL_SECONDS) as client,
    ):

        def call(file: bytes, options: Options, streamed: bool) -> TokenIds:
            chosen = GenerationOptions(**options)  # type: ignore[arg-type]
            if not streamed:
                return client.caption(file, chosen, bypass_cache=True).captions[0].token_ids
            *_, last = client.caption_stream(file, chosen)
            assert last.result is not None
            return last.result.captions[0].token_ids

        yield CalledPeer(
            # Triton and its models are the gateway's descendants.
            service.pids["gateway"],
            {name: version(name) for name in ("captionserve-server", "onnxruntime")},
            call,
            images,
            partial(_stage_seconds, service.triton_metrics, service.metrics),
        )


def _stage_seconds(*addresses: str) -> dict[str, float]:
    text = ""
    for address in addresses:
        with urllib.request.urlopen(f"http://{address}/metrics") as answer:
            text += answer.read().decode()
    return stage_seconds_of(text)


def stage_seconds_of(metrics: str) -> dict[str, float]:
    """The time that a service has spent, by stage, from Triton's and the gateway's metrics.

    Args:
        metrics: in Prometheus' text format.

    Returns:
        "vision_encoder", the encoder's graph; "prefill", "step" and "top", the decoder's; "engine",
        the engine's thread, which waits for all of those; "image", decoding and resizing, beside
        it; "request", what the gateway took for its calls. And whatever else it comes to count.
    """
    seconds: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if own := _OWN.fullmatch(sample.name):
                seconds[own[1]] = sample.value + seconds.get(own[1], 0.0)
            elif sample.name == _COMPUTE and sample.labels["model"] == VISION_ENCODER:
                seconds[VISION_ENCODER] = sample.value / 1e6
    return seconds
