"""What a machine has of what a service needs, and what was measured on machines like it.

Everything is looked at as `serve` will use it; for Triton that is a start of it, with a model that
does nothing.
"""

from __future__ import annotations

import asyncio
import enum
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from captionserve_server.runtime.cores import available_cores
from captionserve_server.runtime.memory import available_memory
from captionserve_server.runtime.processor import Processor, processor
from captionserve_server.serving.installation import TritonNotFoundError, find_triton
from captionserve_server.serving.private_folder import NoPlainFolderError, PrivateFolder
from captionserve_server.serving.triton_log import TritonLog
from captionserve_server.serving.triton_process import TritonProcess, TritonStartError

_SUPPORTED_PYTHONS = ((3, 10), (3, 13))
_NEEDED_PACKAGES = ("captionserve", "captionserve-server", "onnxruntime", "numpy", "grpcio")
# Of an export, which a machine that serves need not be able to do.
_EXPORT_PACKAGES = ("torch", "transformers")
_MEBIBYTE = 2**20
_GIBIBYTE = 2**30

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEBIBYTES = 16
"""Regions that Triton makes for its models at the start; docs/deploying.md has the sum."""
SHARED_MEBIBYTES = 336
"""What they may come to with large images, the default --max-message-megabytes and slots."""
DEMO_GIBIBYTES = 0.4
"""Memory of a service of the demo checkpoint; docs/measurements/bench-demo.json."""

_TRITON_SECONDS = 60.0
_PROBE = "probe"
_PROBE_CONFIG = f"""name: "{_PROBE}"
backend: "python"
max_batch_size: 0
input [ {{ name: "IN" data_type: TYPE_FP32 dims: [ 1 ] }} ]
output [ {{ name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""
# What the models of a service import.
_PROBE_MODEL = """import captionserve_server.triton.decoder


class TritonPythonModel:
    def execute(self, requests):
        raise NotImplementedError
"""


class Verdict(str, enum.Enum):
    """What a finding means for a service."""

    OK = "ok"
    WARNING = "warning"
    """It serves, with a drawback that the advice names."""
    ERROR = "error"
    """It cannot serve."""

    __str__ = str.__str__


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        found: what there is of it.
        verdict: whether that is enough.
        advice: what to do about it; empty where there is nothing to be done.
    """

    name: str
    found: str
    verdict: Verdict = Verdict.OK
    advice: str = ""


@dataclass(frozen=True)
class Measured:
    """What a committed benchmark found: full-size, 4 beams, 16 tokens, 16 calls at once, 2 cores.

    Attributes:
        page: the benchmark, in docs/measurements.
        instructions: the best of TELLING_INSTRUCTIONS on its machine.
        images_per_second: by precision.
        gibibytes: memory of the service, likewise.
    """

    page: str
    instructions: str
    images_per_second: Mapping[str, float]
    gibibytes: Mapping[str, float]


MEASURED_CORES = 2
MEASURED = (
    Measured(
        "bench-full-amx.json", "amx_int8", {"int8": 10.5, "fp32": 4.3}, {"int8": 1.7, "fp32": 2.7}
    ),
    Measured("bench-full.json", "avx2", {"int8": 2.7, "fp32": 2.0}, {"int8": 1.8, "fp32": 2.7}),
)
"""The fastest first."""


def examine(tritonserver: Path | None = None) -> list[Finding]:
    """Look at everything; takes as long as a Triton takes to start.

    Args:
        tritonserver: the executable; None as `serve` finds it.
    """
    return [
        _python(),
        _packages(),
        _cores(),
        instructions(processor()),
        memory(available_memory()),
        shared_memory(SHARED_MEMORY),
        triton(tritonserver),
    ]


def can_serve(findings: Sequence[Finding]) -> bool:
    """Whether nothing that was found keeps a service from running."""
    return all(finding.verdict is not Verdict.ERROR for finding in findings)


def expected(cpu: Processor) -> Measured | None:
    """What was measured on the machine that is most like one with this processor, if any is."""
    return next((each for each in MEASURED if each.instructions in cpu.instructions), None)


def _python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    least, below = _SUPPORTED_PYTHONS
    if least <= sys.version_info < below:
        return Finding("python", found)
    return Finding("python", found, Verdict.ERROR, "install Python 3.10, 3.11 or 3.12")


def _packages() -> Finding:
    versions = {name: _version(name) for name in (*_NEEDED_PACKAGES, *_EXPORT_PACKAGES)}
    found = ", ".join(f"{name} {number or 'missing'}" for name, number in versions.items())
    if not all(versions[name] for name in _NEEDED_PACKAGES):
        advice = "pip install 'captionserve-server[service]'"
        return Finding("packages", found, Verdict.ERROR, advice)
    if not all(versions.values()):
        advice = "serves, but exports no checkpoint: pip install 'captionserve-server[export]'"
        return Finding("packages", found, Verdict.WARNING, advice)
    return Finding("packages", found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> Finding:
    machine, usable = os.cpu_count() or 1, available_cores()
    found = f"{usable} of the machine's {machine}"
    if usable == machine:
        return Finding("cores", found)
    return Finding("cores", f"{found}, by affinity and the quotas of control groups")


def instructions(cpu: Processor) -> Finding:
    """Judge a processor by what it multiplies with."""
    found = (
        f"{cpu.name}, {platform.machine()}: {', '.join(cpu.instructions) or 'none of those known'}"
    )
    if "avx2" not in cpu.instructions:
        advice = "without AVX2 nothing has been measured; expect it to be slow"
        return Finding("processor", found, Verdict.WARNING, advice)
    return Finding("processor", found)


def memory(usable: int) -> Finding:
    """Judge memory by what services took that were measured.

    Args:
        usable: bytes that this process may take.
    """
    gibibytes = usable / _GIBIBYTE
    found = f"{gibibytes:.1f} GiB"
    needed = {name: max(each.gibibytes[name] for each in MEASURED) for name in ("int8", "fp32")}
    if gibibytes < DEMO_GIBIBYTES:
        advice = f"the demo takes {DEMO_GIBIBYTES} GiB: give more"
        return Finding("memory", found, Verdict.ERROR, advice)
    if gibibytes < needed["int8"]:
        advice = f"enough for the demo; a full-size model takes {needed['int8']} GiB in int8"
        return Finding("memory", found, Verdict.WARNING, advice)
    if gibibytes < needed["fp32"]:
        advice = (
            f"a full-size model takes {needed['fp32']} GiB in fp32 and {needed['int8']} in int8: "
            "captionserve export --precision int8"
        )
        return Finding("memory", found, Verdict.WARNING, advice)
    return Finding("memory", found)


def shared_memory(folder: Path) -> Finding:
    """Judge where Triton hands requests to its models.

    Args:
        folder: /dev/shm.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        state = os.statvfs(folder)
    except OSError as error:
        advice = f"Triton cannot do without {folder}: mount it, writable"
        return Finding("shared memory", str(error.strerror), Verdict.ERROR, advice)
    free = state.f_bavail * state.f_frsize / _MEBIBYTE
    found = f"{free:.0f} MiB free in {folder}"
    advice = f"give it {SHARED_MEBIBYTES} MiB (docker run --shm-size {SHARED_MEBIBYTES}m)"
    if free < LEAST_SHARED_MEBIBYTES:
        return Finding("shared memory", found, Verdict.ERROR, f"Triton does not start: {advice}")
    if free < SHARED_MEBIBYTES:
        advice = f"large images fill it, and captions fail then: {advice}"
        return Finding("shared memory", found, Verdict.WARNING, advice)
    return Finding("shared memory", found)


def triton(tritonserver: Path | None) -> Finding:
    """Start Triton with one Python model, and end it.

    Args:
        tritonserver: the executable; None as `serve` finds it.
    """
    try:
        installation = find_triton(tritonserver)
    except TritonNotFoundError as error:
        return Finding("triton", "not found", Verdict.ERROR, str(error))
    begin = time.monotonic()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="captionserve-doctor-") as repository,
            closing(TritonLog(None)) as log,
        ):
            code = Path(repository, _PROBE, "1", "model.py")
            code.parent.mkdir(parents=True)
            code.write_text(_PROBE_MODEL)
            Path(repository, _PROBE, "config.pbtxt").write_text(_PROBE_CONFIG)
            with closing(PrivateFolder(installation, Path(repository))) as folder:
                process = TritonProcess(installation, folder, log, environment={})
                try:
                    asyncio.run(process.wait_ready(_TRITON_SECONDS))
                finally:
                    process.kill()
    except (NoPlainFolderError, TritonStartError, OSError) as error:
        found = f"{installation.binary} does not start"
        return Finding("triton", found, Verdict.ERROR, str(error))
    seconds = time.monotonic() - begin
    return Finding("triton", f"{installation.binary} started a Python model in {seconds:.1f} s")
