"""What the whole service shows of itself, with a real Triton."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
from captionserve.v1 import caption_pb2, caption_pb2_grpc
from captionserve_server.core.engine.timeline import STAGES as DECODER_STAGES
from captionserve_server.gateway.stages import STAGES
from captionserve_server.triton import wire
from tritonclient.grpc import InferenceServerClient, InferInput

from tests.collector import TRACE, collecting, parent_header
from tests.faults.served import serving
from tests.pictures import png
from tests.reference import picture

METRICS_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def families(address: str) -> set[str]:
    """Our own metrics at an address."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    return set(re.findall(r"^# TYPE (captionserve_\w+) ", page, re.MULTILINE))


def test_metrics_traces_and_logs_tell_of_a_caption(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    image, parent = png(picture(1)), parent_header()
    with collecting() as (collector, endpoint):
        flags = ("--otlp-endpoint", endpoint, "--log-format", "json")
        with serving(model_repository("projected"), tmp_path, *flags) as served:
            report = served.report
            with grpc.insecure_channel(report["grpc"]) as channel:
                request = caption_pb2.CaptionRequest(image=caption_pb2.Image(encoded=image))
                caption_pb2_grpc.CaptionServiceStub(channel).Caption(
                    request, metadata=(("traceparent", parent), ("x-request-id", "mine"))
                )
            with InferenceServerClient(report["triton_grpc"]) as client:
                tensor = InferInput(wire.IMAGE.name, [1], "BYTES")
                tensor.set_data_from_numpy(np.array([image], np.object_))
                client.infer("captioner", [tensor], headers={"traceparent": parent})
            shown = families(report["metrics"]) | families(report["triton_metrics"])
            said = served.end()

    documented = METRICS_PAGE.read_text()
    ours = {name for name in shown if not name.startswith("captionserve_process_")}
    assert [name for name in ours if f"`{name}`" not in documented] == []

    assert collector.services == {"captionserve.gateway", "captionserve.captioner"}
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    for call, stages in (("/Caption", list(STAGES)), ("captioner/infer", list(DECODER_STAGES))):
        (span,) = [span for span in collector.spans if span.name.endswith(call)]
        parts = [each for each in collector.spans if each.parent_span_id == span.span_id]
        assert [part.name for part in parts] == stages
        # One clock on one machine: what is a part of the call lies in it.
        assert all(part.start_time_unix_nano >= span.start_time_unix_nano for part in parts)
        assert all(part.end_time_unix_nano <= span.end_time_unix_nano for part in parts)

    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line.get("request_id") == "mine"]
    assert (line["event"], line["method"], line["code"]) == ("call", "Caption", "OK")
    assert list(line["stages"]) == list(STAGES)
    assert sum(line["stages"].values()) <= line["seconds"] + 0.001
