"""Where what images hold runs: in environments that docker/install made, or in containers.

The same tests are asked of both. A place knows the images by name, "server" and "edge"; the edge
image is also who calls a service. Commands and variables name files as {name}; each place has its
own path for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.faults.served import wait_until

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 300.0
# What `docker stop` waits before it kills.
END_SECONDS = 60

Answer = subprocess.CompletedProcess[str]
Files = Mapping[str, Path]


class Served(Protocol):
    """A service that runs.

    Attributes:
        target: where callers find it.
    """

    target: str

    def inside(self, *command: str) -> Answer:
        """Run a command beside the service, with its settings."""

    def call(self, *command: str, files: Files) -> Answer:
        """Run a command of the edge image where the service can be reached."""

    def end(self) -> int:
        """Ask it to end, as with SIGTERM; its exit code."""


class Place(Protocol):
    """Where what images hold runs."""

    def run(self, image: str, *command: str, files: Files) -> Answer:
        """Run a command of an image."""

    def serve(self, files: Files, variables: Mapping[str, str]) -> AbstractContextManager[Served]:
        """Start the server image's service, wait until it is healthy, and end it on leaving."""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Answer:
    """A command with what it prints; whether it succeeded is for the caller to say."""
    return subprocess.run(
        command,
        env=None if environment is None else {**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


@dataclass
class Environments:
    """Virtual environments of the images' contents, by the images' names."""

    folders: Mapping[str, Path]
    scratch: Path

    def run(self, image: str, *command: str, files: Files) -> Answer:
        program, *arguments = _named(command, files)
        folder = self.folders[image] / "bin"
        return run([str(folder / program), *arguments])

    @contextlib.contextmanager
    def serve(self, files: Files, variables: Mapping[str, str]) -> Iterator[Served]:
        ready_file, log = self.scratch / f"{uuid.uuid4()}.json", self.scratch / "log"
        settings = {
            "CAPTIONSERVE_MODEL_REPOSITORY": "{models}",
            "CAPTIONSERVE_READY_FILE": str(ready_file),
            **dict.fromkeys(("CAPTIONSERVE_LISTEN", "CAPTIONSERVE_HEALTH_LISTEN"), "127.0.0.1:0"),
            **variables,
        }
        settings = dict(zip(settings, _named(settings.values(), files), strict=True))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [self.folders["server"] / "bin" / "captionserve", "serve"],
                env={**os.environ, **settings},
                stdout=output,
                stderr=output,
            )
        try:
            wait_until(lambda: ready_file.exists() or process.poll() is not None, WAIT_SECONDS)
            assert process.poll() is None, log.read_text(errors="replace")
            report = json.loads(ready_file.read_text())
            yield _ServedHere(self, report["grpc"], report["health"], process)
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            finally:
                process.kill()


@dataclass
class _ServedHere:
    place: Environments
    target: str
    health: str
    process: subprocess.Popen[bytes]

    def inside(self, *command: str) -> Answer:
        program, *arguments = command
        path = self.place.folders["server"] / "bin" / program
        return run([str(path), *arguments], {"CAPTIONSERVE_HEALTH_LISTEN": self.health})

    def call(self, *command: str, files: Files) -> Answer:
        return self.place.run("edge", *command, files=files)

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(END_SECONDS)


def docker(*arguments: str, check: bool = True) -> Answer:
    """Docker's command line."""
    answer = run(["docker", *arguments])
    assert answer.returncode == 0 or not check, answer.stderr
    return answer


def has_engine() -> bool:
    """Whether a Docker engine answers here."""
    return shutil.which("docker") is not None and docker("info", check=False).returncode == 0


# As docker/compose.yaml has them, and docs/deploying.md says from what.
SHARED_MEMORY_BYTES = 256 * 2**20
BOUNDS = {
    "CAPTIONSERVE_MAX_MESSAGE_MEGABYTES": "16",
    "CAPTIONSERVE_MAX_REQUEST_MEGABYTES": "96",
    "CAPTIONSERVE_DECODE_MEGABYTES": "256",
}

# As the manifests have it: nothing may be written, nobody reached, and nothing gained.
HARDENED = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    # Programs run from there: the stub of Triton's Python models.
    *("--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777,size=256m"),
)


@dataclass
class Containers:
    """Containers of the images, each without a network of its own.

    Attributes:
        tag: that of the images.
        options: more of `docker run`, for the service.
        network: what commands of the images see: nothing, or what a service sees.
    """

    tag: str
    options: Sequence[str] = field(default=("--memory", "2g", "--memory-swap", "2g"))
    network: str = "none"

    def image(self, name: str) -> str:
        return f"captionserve-{name}:{self.tag}"

    def run(self, image: str, *command: str, files: Files) -> Answer:
        program, *arguments = _named(command, _paths(files))
        return docker(
            *("run", "--rm", "--network", self.network, *HARDENED, *_mounts(files)),
            *("--entrypoint", program, self.image(image), *arguments),
            check=False,
        )

    @contextlib.contextmanager
    def serve(self, files: Files, variables: Mapping[str, str]) -> Iterator[ServedInContainer]:
        with self.started(files, variables) as served:
            served.wait_healthy()
            yield served

    @contextlib.contextmanager
    def started(
        self, files: Files, variables: Mapping[str, str], *arguments: str
    ) -> Iterator[ServedInContainer]:
        """A service that need not be healthy yet; arguments come in place of the image's own."""
        name = f"captionserve-test-{uuid.uuid4()}"
        settings = [f"--env={name}={value}" for name, value in variables.items()]
        docker(
            *("run", "--detach", "--name", name, "--network", "none"),
            *("--shm-size", str(SHARED_MEMORY_BYTES), *HARDENED, *self.options),
            *(*_mounts(files), *_named(settings, _paths(files)), self.image("server"), *arguments),
        )
        try:
            yield ServedInContainer(self, name)
        finally:
            docker("rm", "--force", "--volumes", name)


@dataclass
class ServedInContainer:
    """A service in a container, which only containers that join it can reach."""

    place: Containers
    name: str
    target: str = "127.0.0.1:9000"

    def inside(self, *command: str) -> Answer:
        return docker("exec", self.name, *command, check=False)

    def call(self, *command: str, files: Files) -> Answer:
        beside = Containers(self.place.tag, network=f"container:{self.name}")
        return beside.run("edge", *command, files=files)

    def end(self) -> int:
        docker("stop", "--time", str(END_SECONDS), self.name)
        return int(self.inspect("{{.State.ExitCode}}"))

    def inspect(self, template: str) -> str:
        return docker("inspect", "--format", template, self.name).stdout.strip()

    def log(self) -> str:
        return docker("logs", self.name).stderr

    def wait_healthy(self) -> None:
        """Until the image's own HEALTHCHECK says so."""
        wait_until(lambda: self.inspect("{{.State.Health.Status}}") != "starting", WAIT_SECONDS)
        state = self.inspect("{{.State.Status}} {{.State.Health.Status}}")
        assert state == "running healthy", self.log()


def _named(words: Iterable[str], files: Mapping[str, Path]) -> list[str]:
    """Words with the paths in place of {name}; other braces are left as they are."""
    named = []
    for word in words:
        for name, path in files.items():
            word = word.replace(f"{{{name}}}", str(path))
        named.append(word)
    return named


def _paths(files: Files) -> Files:
    """Where the files are in a container."""
    return {name: Path("/", name) for name in files}


def _mounts(files: Files) -> list[str]:
    return [f"--volume={path}:/{name}:ro" for name, path in files.items()]
