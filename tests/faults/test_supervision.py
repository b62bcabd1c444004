"""Processes that are killed or stopped: calls fail at once, and the service heals itself."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from captionserve import CaptionClient, CaptionError
from captionserve.v1 import caption_pb2, caption_pb2_grpc
from captionserve_server.runtime.model_repository import DECODER, MODELS
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from PIL import Image

from tests.faults.served import WAIT_SECONDS, Served, serving, wait_until
from tests.pictures import png
from tests.reference import picture

NAME = "projected"
SERVICE = "captionserve.v1.CaptionService"
_shades = itertools.count()


@pytest.fixture(scope="module")
def served(
    model_repository: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One service for all that it survives."""
    folder = tmp_path_factory.mktemp("served")
    many = ("--max-restarts", "100")
    with serving(model_repository(NAME), folder, *many) as service:
        yield service
        said = service.end()
        assert service.process.returncode == 0, said
        assert "Traceback" not in said


def health(address: str, name: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        status: int = answer.status
        return status


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *((name, signal.SIGKILL) for name in ("Triton", *MODELS)),
        # Of the others tests/faults/test_heals_under_load.py stops one now and then.
        *((name, signal.SIGSTOP) for name in ("Triton", DECODER)),
    ],
)
def test_it_heals_itself(name: str, number: signal.Signals, served: Served) -> None:
    before = served.report["pids"]["triton"]
    family = served.triton.children()
    assert len(family) == len(MODELS)
    image = picture(1)
    with CaptionClient(served.report["grpc"], timeout=WAIT_SECONDS) as client:
        right = client.caption(image, bypass_cache=True).text
        with calls_in_work(served, large(), large()) as calls, ThreadPoolExecutor(1) as pool:
            patient = pool.submit(client.caption, image, bypass_cache=True)
            served.victim(name).send_signal(number)
            for call in calls:
                error = call.exception(WAIT_SECONDS)
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert retry_delay(error) > 0
            # The client tries it again until it is answered, by a new Triton as by the old one.
            assert patient.result(WAIT_SECONDS).text == right
    wait_until(lambda: served.report["pids"]["triton"] != before)
    assert not any(process.is_running() for process in family)
    assert len(served.triton.children()) == len(MODELS)
    assert [health(served.report["grpc"], each) for each in ("", SERVICE, "live")] == [1, 1, 1]
    assert_only_the_present_one_has_shared_memory(served)


def large() -> bytes:
    """An image file that takes a second to read, is small, and has not been in work before."""
    return png(Image.new("RGB", (7000, 7000), (next(_shades), 0, 0)))


@contextmanager
def calls_in_work(served: Served, *images: bytes) -> Iterator[list[Any]]:
    """Calls that are not tried again, once the decoder works on their images."""
    target = served.report["grpc"]
    with CaptionClient(target) as client, grpc.insecure_channel(target) as channel:
        stub: Any = caption_pb2_grpc.CaptionServiceStub(channel)
        requests = [
            caption_pb2.CaptionRequest(image=caption_pb2.Image(encoded=image), bypass_cache=True)
            for image in images
        ]
        calls = [stub.Caption.future(request, timeout=WAIT_SECONDS) for request in requests]
        wait_until(lambda: client.models().working >= len(images))
        yield calls


def retry_delay(error: Any) -> float:
    """The seconds of RetryInfo; 0 without one."""
    found = error_details_pb2.RetryInfo()
    status = rpc_status.from_call(error)
    for packed in () if status is None else status.details:
        packed.Unpack(found)
    return float(found.retry_delay.ToMilliseconds() / 1e3)


def assert_only_the_present_one_has_shared_memory(served: Served) -> None:
    """What is open or mapped in /dev/shm by our name is all there is by our name."""
    option = "shm-region-prefix-name="
    command = served.triton.cmdline()
    prefix = next(word.partition(option)[2] for word in command if option in word)
    there = {str(path) for path in Path("/dev/shm").glob(f"{prefix}*") if path.suffix != ".lock"}
    used = {
        line.split(maxsplit=5)[5].strip()
        for process in (served.triton, *served.triton.children())
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        if "/dev/shm/" in line
    }
    assert there <= used


def test_while_triton_is_away_health_says_so_and_what_is_remembered_is_answered(
    served: Served,
) -> None:
    report = served.report
    image = picture(2)
    with CaptionClient(report["grpc"], timeout=WAIT_SECONDS) as client:
        right = client.caption(image).text
        with grpc.insecure_channel(report["health"]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            watch = stub.Watch(request, timeout=WAIT_SECONDS)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            served.triton.kill()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            remembered = client.caption(image)
            assert (remembered.text, remembered.cached) == (right, True)
            assert health(report["health"], "live") == health_pb2.HealthCheckResponse.SERVING
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()


def test_a_signal_while_triton_is_away_ends_it(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    with serving(model_repository(NAME), tmp_path) as served:
        family = psutil.Process(served.process.pid).children(recursive=True)
        served.triton.send_signal(signal.SIGSTOP)
        said = served.end()
    assert served.process.returncode == 0, said
    assert "Traceback" not in said
    assert not served.ready_file.exists()
    assert not any(process.is_running() for process in family)


def test_after_too_many_deaths_it_ends_and_says_why(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    log = tmp_path / "triton.log"
    arguments = ("--max-restarts", "1", "--triton-log", str(log))
    with serving(model_repository(NAME), tmp_path, *arguments) as served:
        first = served.report["pids"]["triton"]
        served.victim("decoder").kill()
        wait_until(lambda: served.report["pids"]["triton"] != first)
        family = psutil.Process(served.process.pid).children(recursive=True)
        served.triton.kill()
        served.process.wait(WAIT_SECONDS)
    said = served.log.read_text()
    assert served.process.returncode == 1, said
    assert "error: Triton has failed 2 times within 60 seconds" in said
    assert "has ended by itself" in said
    assert "Traceback" not in said
    assert "Started GRPCInferenceService" in log.read_text()
    assert not served.ready_file.exists()
    assert not any(process.is_running() for process in family)


def death_at_work(served: Served, *images: bytes) -> None:
    """The decoder dies while it works on these; until all is well again."""
    before = served.report["pids"]["triton"]
    with calls_in_work(served, *images) as calls:
        served.victim("decoder").kill()
        assert all(call.exception(WAIT_SECONDS) is not None for call in calls)
    wait_until(lambda: served.report["pids"]["triton"] != before)


def test_an_image_that_kills_the_decoder_twice_is_refused(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    poison, harmless = large(), large()
    with (
        serving(model_repository(NAME), tmp_path) as served,
        CaptionClient(served.report["grpc"], timeout=WAIT_SECONDS) as client,
    ):
        death_at_work(served, poison, harmless)
        death_at_work(served, poison)
        with pytest.raises(CaptionError) as refused:
            client.caption(poison)
        assert refused.value.reason == "MODEL_FAULT"
        assert client.caption(harmless).text
