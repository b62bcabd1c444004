"""Peers: workers and their end, calls in flight, pictures, and a service's stages."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import psutil
import pytest
from captionserve_server.bench.images import bench_images, write_images
from captionserve_server.bench.peers.generate_worker import read_images
from captionserve_server.bench.peers.in_flight import run_in_flight
from captionserve_server.bench.peers.service import counters_of, stages_ms
from captionserve_server.bench.peers.worker import PeerError, running_worker
from captionserve_server.bench.rows import Decoding, Run, TokenIds
from PIL import Image

WORKER = """
from captionserve_server.bench.peers.generate_worker import serve_lines

def answer(images, load, options):
    print("a library chatters")
    if load == 0:
        raise ValueError("a load of 0")
    tokens = [[image, options["num_beams"]] for image in range(images)]
    return {"seconds": 0.5, "latencies": [0.25] * images, "token_ids": tokens}

def load():
    print("a library greets")
    return {"library": "1.0"}, answer

serve_lines(load)
"""


def test_a_worker_answers_and_ends() -> None:
    with running_worker([sys.executable, "-c", WORKER]) as worker:
        assert worker.versions == {"library": "1.0"}
        process = psutil.Process(worker.pid)
        assert process.is_running()
        run = worker.run(2, 1, Decoding(4))
        assert run == Run(0.5, [0.25, 0.25], [(0, 4), (1, 4)])
    assert not process.is_running()


def test_a_worker_ends_with_an_error_of_ours() -> None:
    processes: list[psutil.Process] = []

    def interrupted() -> None:
        with running_worker([sys.executable, "-c", WORKER]) as worker:
            processes.append(psutil.Process(worker.pid))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not processes[0].is_running()


def test_a_worker_that_fails_says_why() -> None:
    with (
        running_worker([sys.executable, "-c", WORKER]) as worker,
        pytest.raises(PeerError, match="a load of 0"),
    ):
        worker.run(2, 0, Decoding(4))
    with (
        pytest.raises(PeerError, match="no such model"),
        running_worker([sys.executable, "-c", "raise SystemExit('no such model')"]),
    ):
        pass


def test_as_many_calls_as_asked_for_are_in_flight() -> None:
    # Each call waits until three are there; with fewer in flight, the barrier breaks.
    barrier = threading.Barrier(3, timeout=30)

    def call(image: int) -> TokenIds:
        barrier.wait()
        return (image,)

    run = run_in_flight(call, images=6, load=3)
    assert run.token_ids == [(image,) for image in range(6)]
    assert len(run.latencies) == 6
    assert 0 < max(run.latencies) <= run.seconds


def test_pictures_are_the_same_photos_each_time(tmp_path: Path) -> None:
    images = bench_images(3)
    assert images == bench_images(3)
    assert len(set(images)) == 3
    for image in images:
        with Image.open(io.BytesIO(image)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (640, 480))
    write_images(images, tmp_path / "pictures")
    assert read_images(str(tmp_path / "pictures")) == images


METRICS = """
# TYPE nv_inference_compute_infer_duration_us counter
nv_inference_compute_infer_duration_us{model="vision_encoder",version="1"} 2000000
nv_inference_compute_infer_duration_us{model="captioner",version="1"} 9000000
nv_inference_queue_duration_us{model="vision_encoder",version="1"} 7000000
captionserve_preprocess_seconds_total{version="1"} 3
captionserve_prefill_seconds_total{version="1"} 0.5
captionserve_step_seconds_total{version="1"} 4
captionserve_top_seconds_total{version="1"} 0.25
captionserve_engine_seconds_total{model="captioner",version="1"} 8
captionserve_engine_seconds_total{model="captioner_stream",version="1"} 100
captionserve_request_seconds_sum 9
captionserve_request_seconds_count 4
"""


def test_counters_are_read_from_metrics() -> None:
    assert counters_of(METRICS) == {
        "preprocess": 3.0,
        "vision_encoder": 2.0,
        "prefill": 0.5,
        "step": 4.0,
        "top": 0.25,
        "engine": 8.0,
        "gateway": 9.0,
    }


def test_stages_of_the_engine_make_up_the_run() -> None:
    run = Run(10.0, [2.5, 2.5, 2.5, 2.5], [])
    stages = stages_ms(counters_of(METRICS), run)
    assert stages == {
        "encode": 500.0,
        "prefill": 125.0,
        "steps": 1000.0,
        "choose": 62.5,
        "engine": 312.5,
        "idle": 500.0,
        "preprocess": 750.0,
        "transport": 250.0,
    }
    beside = stages["preprocess"] + stages["transport"]
    assert sum(stages.values()) - beside == 1e3 * run.seconds / 4
