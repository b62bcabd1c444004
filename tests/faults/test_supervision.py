"""Processes that are killed or stopped: calls fail at once, and the service heals itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from captionserve import CaptionClient, CaptionError, GenerationOptions
from captionserve_server.runtime.model_repository import MODELS
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from tests.faults.served import WAIT_SECONDS, Served, serving, wait_until
from tests.reference import picture

NAME = "projected"
SERVICE = "captionserve.v1.CaptionService"
LONG = GenerationOptions(num_beams=8, max_length=200, min_length=199)


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("name", ["Triton", *MODELS])
def test_it_heals_itself(name: str, number: signal.Signals, served: Served) -> None:
    before = served.report["pids"]["triton"]
    family = served.triton.children()
    assert len(family) == len(MODELS)
    image, ended = picture(1), []
    with CaptionClient(served.report["grpc"]) as client:
        right = client.caption(image, bypass_cache=True).text

        def caption() -> None:
            try:
                client.caption(image, LONG, bypass_cache=True, timeout=WAIT_SECONDS)
                ended.append(None)
            except CaptionError as error:
                ended.append(error)

        calls = [threading.Thread(target=caption) for _ in range(3)]
        for call in calls:
            call.start()

        served.victim(name).send_signal(number)

        # The ready file names the new Triton, which answers as the old one did.
        wait_until(lambda: served.report["pids"]["triton"] != before)
        assert client.caption(image, bypass_cache=True, timeout=WAIT_SECONDS).text == right
        for call in calls:
            call.join(WAIT_SECONDS)
    assert len(ended) == len(calls)
    assert {error.code for error in ended if error} <= {grpc.StatusCode.UNAVAILABLE}
    assert not any(process.is_running() for process in family)
    assert len(served.triton.children()) == len(MODELS)
    assert [health(served.report["grpc"], each) for each in ("", SERVICE, "live")] == [1, 1, 1]
    assert_only_the_present_one_has_shared_memory(served)


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
    assert "the last time: Triton has ended by itself" in said
    assert "Traceback" not in said
    assert "Started GRPCInferenceService" in log.read_text()
    assert not served.ready_file.exists()
    assert not any(process.is_running() for process in family)


def caption_that_kills(served: Served, client: CaptionClient, image: Image.Image) -> None:
    """Ask for a caption, and kill the decoder while it works on that; until all is well again."""
    before = served.report["pids"]["triton"]
    decoder = served.victim("decoder")
    used = sum(decoder.cpu_times()[:2])
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.caption, image, LONG, timeout=1.0)
        wait_until(lambda: sum(decoder.cpu_times()[:2]) > used + 0.05)
        decoder.kill()
        assert call.exception(WAIT_SECONDS) is not None
    wait_until(lambda: served.report["pids"]["triton"] != before)


def test_an_image_that_kills_the_decoder_twice_is_refused(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    poison, harmless = picture(3), picture(4)
    with (
        serving(model_repository(NAME), tmp_path) as served,
        CaptionClient(served.report["grpc"], timeout=WAIT_SECONDS) as client,
    ):
        for _ in range(2):
            caption_that_kills(served, client, poison)
        with pytest.raises(CaptionError) as refused:
            client.caption(poison)
        assert refused.value.reason == "MODEL_FAULT"
        assert client.caption(harmless).text
