"""captionserve itself, through its gateway and its typed client."""

from __future__ import annotations

import dataclasses
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from captionserve import CaptionClient, GenerationOptions
from prometheus_client.parser import text_string_to_metric_families

from captionserve_server.bench.peers.in_flight import CALL_SECONDS, run_in_flight
from captionserve_server.bench.rows import Decoding, Run, TokenIds
from captionserve_server.serving.launch import launched_service
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.triton import wire

_COMPUTE = "nv_inference_compute_infer_duration_us_total"
_OWN = re.compile(r"captionserve_(\w+)_seconds_total")
_REQUESTS = "captionserve_request_seconds_sum"

Counters = dict[str, float]
"""Seconds, since the service began, by what they were spent on."""


class ServicePeer:
    """Drives a running service."""

    def __init__(self, service: ReadyReport, images: list[bytes]) -> None:
        """Connect to it; images are JPEG files."""
        self._service = service
        self._images = images
        self._client = CaptionClient(service.grpc, timeout=CALL_SECONDS)

    @property
    def pid(self) -> int:
        """The gateway, whose descendants are Triton and its models."""
        return self._service.pids["gateway"]

    @property
    def versions(self) -> dict[str, str]:
        """What it is made of."""
        return {name: version(name) for name in ("captionserve-server", "onnxruntime")}

    def run(self, images: int, load: int, decoding: Decoding) -> Run:
        """Caption the first `images` images with `load` requests in flight, nothing cached."""
        given = decoding.as_options()
        options = GenerationOptions(
            num_beams=given["num_beams"],
            min_length=given.get("min_length"),
            max_length=given.get("max_length"),
        )
        before = self._counters()
        run = run_in_flight(lambda image: self._call(image, options), images, load)
        after = self._counters()
        spent = {name: after[name] - before[name] for name in after}
        return dataclasses.replace(run, stages=stages_ms(spent, run))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _call(self, image: int, options: GenerationOptions) -> TokenIds:
        file = self._images[image % len(self._images)]
        result = self._client.caption(file, options, bypass_cache=True)
        return result.captions[0].token_ids

    def _counters(self) -> Counters:
        addresses = (self._service.triton_metrics, self._service.metrics)
        return counters_of("".join(map(_metrics_at, addresses)))


def _metrics_at(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        text: str = answer.read().decode()
    return text


def counters_of(metrics: str) -> Counters:
    """Triton's and the gateway's metrics as counters.

    Args:
        metrics: in Prometheus' text format.

    Returns:
        "preprocess", decoding and resizing; "vision_encoder", the model's computing; "prefill",
        "step" and "top", the decoder's graphs; "engine", the rounds of the captioner's engine,
        which waits for all but "preprocess"; "gateway", the calls from arrival to end.
    """
    seconds: Counters = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            model = sample.labels.get("model")
            own = _OWN.fullmatch(sample.name)
            if sample.name == _COMPUTE and model == wire.VISION_ENCODER.name:
                seconds[model] = sample.value / 1e6
            elif own and model in (None, wire.CAPTIONER.name):
                seconds[own[1]] = sample.value
            elif sample.name == _REQUESTS:
                seconds["gateway"] = sample.value
    return seconds


def stages_ms(spent: Counters, run: Run) -> dict[str, float]:
    """Milliseconds per image of each stage.

    Args:
        spent: what each counter of `counters_of` grew by over a run.
        run: the run as the client saw it.

    Returns:
        "encode", "prefill", "steps" and "choose", the graphs; "engine", what else the engine's
        thread did: scheduling, searching, calling the other models; "idle", the time it waited for
        images. Those six make up the run. Beside them go "preprocess" and "transport", by which
        a call took longer to the client than to the gateway.
    """
    graphs = {
        "encode": spent[wire.VISION_ENCODER.name],
        "prefill": spent["prefill"],
        "steps": spent["step"],
        "choose": spent["top"],
    }
    seconds = {
        **graphs,
        "engine": spent["engine"] - sum(graphs.values()),
        "idle": run.seconds - spent["engine"],
        "preprocess": spent[wire.PREPROCESS.name],
        "transport": sum(run.latencies) - spent["gateway"],
    }
    return {name: 1e3 * value / len(run.latencies) for name, value in seconds.items()}


@contextmanager
def service_peer(repository: Path, images: list[bytes]) -> Iterator[ServicePeer]:
    """A service of its own on free loopback ports, ended on leaving.

    Args:
        repository: an exported model repository.
        images: JPEG files.

    Raises:
        LaunchError: if it does not start.
    """
    with launched_service(repository, "--response-cache-megabytes", "0") as service:
        peer = ServicePeer(service, images)
        try:
            yield peer
        finally:
            peer.close()
