"""What is said of a machine: enough, a drawback, or no service; and that Triton is really tried."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from captionserve_server.runtime.processor import Processor
from captionserve_server.serving import doctor
from captionserve_server.serving.doctor import (
    MEASURED,
    SHARED_MEBIBYTES,
    Finding,
    Verdict,
    can_serve,
    examine,
    expected,
    instructions,
    memory,
    shared_memory,
    triton,
)
from captionserve_server.serving.private_folder import PrivateFolder

GIBIBYTE = 2**30


@pytest.mark.parametrize(
    ("gibibytes", "verdict", "advice"),
    [
        (0.3, Verdict.ERROR, "the demo takes 0.4 GiB"),
        (1.0, Verdict.WARNING, "enough for the demo; a full-size model takes 1.8 GiB in int8"),
        (2.0, Verdict.WARNING, "--precision int8"),
        (3.0, Verdict.OK, ""),
    ],
)
def test_memory_is_judged_by_what_services_took(
    gibibytes: float, verdict: Verdict, advice: str
) -> None:
    finding = memory(int(gibibytes * GIBIBYTE))
    assert finding.found == f"{gibibytes} GiB"
    assert finding.verdict is verdict
    assert advice in finding.advice
    assert bool(finding.advice) is (verdict is not Verdict.OK)


@pytest.mark.parametrize(
    ("mebibytes", "verdict", "advice"),
    [
        (8, Verdict.ERROR, "Triton does not start: give it 336 MiB"),
        (64, Verdict.WARNING, "docker run --shm-size 336m"),
        (SHARED_MEBIBYTES, Verdict.OK, ""),
    ],
)
def test_shared_memory_is_judged_by_what_is_free(
    mebibytes: int,
    verdict: Verdict,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = SimpleNamespace(f_bavail=mebibytes * 256, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda folder: free)
    finding = shared_memory(tmp_path)
    assert finding.found.startswith(f"{mebibytes} MiB free")
    assert finding.verdict is verdict
    assert advice in finding.advice


def test_shared_memory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    finding = shared_memory(tmp_path / "missing")
    assert finding.verdict is Verdict.ERROR
    assert finding.found == "No such file or directory"


def test_a_processor_without_avx2_is_warned_of() -> None:
    assert instructions(Processor("old", ())).verdict is Verdict.WARNING
    assert instructions(Processor("new", ("avx2", "avx512f"))).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("found", "page"),
    [
        (("avx2",), "bench-full.json"),
        (("avx2", "avx512f", "avx512_vnni"), "bench-full.json"),
        (("avx2", "avx512f", "avx512_vnni", "amx_int8"), "bench-full-amx.json"),
        ((), None),
    ],
)
def test_the_nearest_measurement_is_what_is_expected(
    found: tuple[str, ...], page: str | None
) -> None:
    measured = expected(Processor("any", found))
    assert (measured and measured.page) == page


@pytest.mark.parametrize(
    ("missing", "verdict"), [("torch", Verdict.WARNING), ("onnxruntime", Verdict.ERROR)]
)
def test_a_missing_package_is_named(
    missing: str, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(package: str) -> str:
        if package == missing:
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(doctor, "version", without)
    (finding,) = (each for each in examine() if each.name == "packages")
    assert f"{missing} missing" in finding.found
    assert finding.verdict is verdict
    assert "pip install" in finding.advice


def test_only_errors_keep_from_serving() -> None:
    fine, drawback, error = (Finding("any", "", verdict) for verdict in Verdict)
    assert can_serve([fine, drawback])
    assert not can_serve([fine, error, drawback])


def test_triton_is_started_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes: list[str] = []

    class Recorded(PrivateFolder):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            prefixes.append(self.shared_memory_prefix)

    monkeypatch.setattr(doctor, "PrivateFolder", Recorded)
    finding = triton(None)
    assert finding.verdict is Verdict.OK, finding.advice
    assert "started a Python model in" in finding.found
    (prefix,) = prefixes
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        assert not list(folder.glob(f"{prefix}*"))


def test_a_python_model_that_does_not_start_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE_MODEL", "import no_such_package\n")
    finding = triton(None)
    assert finding.verdict is Verdict.ERROR
    assert finding.found.endswith("does not start")
    assert "No module named 'no_such_package'" in finding.advice


def test_a_triton_that_is_none_is_not_found(tmp_path: Path) -> None:
    for binary in (tmp_path / "missing", Path("/bin/true")):
        finding = triton(binary)
        assert (finding.found, finding.verdict) == ("not found", Verdict.ERROR)
        assert finding.advice.startswith(str(binary.resolve()))


def test_every_measurement_says_both_precisions() -> None:
    for each in MEASURED:
        assert set(each.images_per_second) == set(each.gibibytes) == {"int8", "fp32"}
