"""What the images hold, at work: in environments made as they are made, and in containers.

Containers need a Docker engine and images that have been built: `make images`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest
from captionserve_server.bench.images import bench_images
from captionserve_server.gateway.tokens import create_token

from tests.certificates import CertificateFiles
from tests.conftest import DEMO, DEMO_FOLDER, Repositories
from tests.deploy.locks import BASE, locked_versions
from tests.deploy.places import (
    BOUNDS,
    END_SECONDS,
    ROOT,
    SHARED_MEMORY_BYTES,
    Containers,
    Environments,
    Files,
    Place,
    ServedInContainer,
    docker,
    has_engine,
    run,
)
from tests.faults.served import wait_until

logger = logging.getLogger(__name__)

PYTHON = "python3.11"
IMAGES = ("server", "edge")
OURS = {"captionserve", "captionserve-server"}
# What only export, training or building needs; and what the base has no need of.
UNWANTED_PROGRAMS = ("gcc", "cc", "g++", "make", "git", "curl")
PICTURE = "penguin.jpg"
CAPTION = json.loads((DEMO_FOLDER / "images" / "captions.json").read_text())[PICTURE]


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Environments:
    """Both images' contents, installed by the images' own script."""
    if not os.environ.get("TEST_WHEELS"):
        pytest.skip("they are installed by `make test-wheels`")
    if shutil.which(PYTHON) is None:
        pytest.skip(f"docker/install needs {PYTHON}")
    folder = tmp_path_factory.mktemp("images")
    for image in IMAGES:
        made = run([str(ROOT / "docker" / "install"), image, str(folder / image)])
        assert made.returncode == 0, made.stderr
    return Environments({image: folder / image for image in IMAGES}, folder)


@pytest.fixture(scope="session")
def containers(request: pytest.FixtureRequest) -> Containers:
    """The images that `make images` has built."""
    tag = request.config.getoption("--images")
    if not tag:
        pytest.skip("images are built and tested by `make images`")
    if not has_engine():
        pytest.skip("needs a Docker engine")
    return Containers(tag)


@pytest.fixture(scope="session", params=["environment", "container"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each place in turn."""
    found: Place = request.getfixturevalue(f"{request.param}s")
    return found


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A certificate with its authority, the tokens' file, and the only token."""
    folder = tmp_path_factory.mktemp("secrets")
    made = CertificateFiles(folder)
    (folder / "token").write_text(create_token(made.tokens, "caller"))
    for path in folder.iterdir():
        path.chmod(0o644)  # The container's user is another, whom nobody here knows.
    return {
        "certificate": made.certificate,
        "key": made.key,
        "ca": made.ca,
        "tokens": made.tokens,
        "token": folder / "token",
    }


@pytest.fixture(scope="session")
def files(model_repository: Repositories, secrets: Files) -> Files:
    """What a service is given, and a picture."""
    picture = DEMO_FOLDER / "images" / PICTURE
    return {"models": model_repository(DEMO), "picture": picture, **secrets}


SECURED = {
    "CAPTIONSERVE_TLS_CERTIFICATE": "{certificate}",
    "CAPTIONSERVE_TLS_KEY": "{key}",
    "CAPTIONSERVE_TOKENS": "{tokens}",
}


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_installed_is_what_the_lock_names(place: Place, image: str) -> None:
    code = (
        "import importlib.metadata, json, re\n"
        "found = importlib.metadata.distributions()\n"
        "name = lambda each: re.sub('[-_.]+', '-', each.name).lower()\n"
        "print(json.dumps({name(each): each.version for each in found}))"
    )
    installed = json.loads(place.run(image, "python", "-c", code, files={}).stdout)
    ours = {name: installed.pop(name) for name in OURS}
    assert installed == locked_versions(image)
    assert len(set(ours.values())) == 1


@pytest.mark.parametrize("image", IMAGES)
def test_every_package_has_its_notice(place: Place, image: str) -> None:
    code = (
        "import importlib.metadata, pathlib, sys\n"
        "folder = pathlib.Path(sys.prefix, 'share/doc/captionserve')\n"
        "notice = (folder / 'NOTICE').read_text()\n"
        "for each in importlib.metadata.distributions():\n"
        "    name = f'{each.name}-{each.version}'\n"
        "    texts = list((folder / 'licences' / name).rglob('*'))\n"
        "    if not texts or f'licences/{name}/' not in notice: print(name)"
    )
    answer = place.run(image, "python", "-c", code, files={})
    assert (answer.returncode, answer.stdout) == (0, ""), answer.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_no_bytecode_is_left_to_write(place: Place, image: str) -> None:
    code = (
        "import importlib.util, pathlib, sysconfig\n"
        "site = pathlib.Path(sysconfig.get_path('purelib'))\n"
        "for each in site.rglob('*.py'):\n"
        "    if not pathlib.Path(importlib.util.cache_from_source(each)).exists(): print(each)"
    )
    answer = place.run(image, "python", "-c", code, files={})
    assert (answer.returncode, answer.stdout) == (0, ""), answer.stderr


def test_the_edge_image_captions_a_file(place: Place, files: Files) -> None:
    command = ("captionserve", "caption", "{picture}", "--local", "{models}", "--json")
    answer = place.run("edge", *command, files=files)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)[0]["captions"][0]["text"] == CAPTION


def test_a_service_with_tls_and_tokens_captions_and_ends(place: Place, files: Files) -> None:
    with place.serve(files, SECURED) as served:
        health = served.inside("captionserve", "health")
        assert (health.returncode, health.stdout) == (0, "SERVING\n"), health.stderr
        command = ("captionserve", "caption", "{picture}", "--target", served.target, "--json")
        known = ("--tls-ca", "{ca}", "--token-file", "{token}")

        answer = served.call(*command, *known, files=files)
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout)[0]["captions"][0]["text"] == CAPTION
        stranger = served.call(*command, "--tls-ca", "{ca}", files=files)
        assert json.loads(stranger.stdout)[0]["error"]["code"] == "UNAUTHENTICATED"

        assert served.end() == 0


@pytest.fixture(scope="module")
def contained(containers: Containers, files: Files) -> Iterator[ServedInContainer]:
    """A healthy service in a container, for tests that leave it as it is."""
    with containers.serve(files, SECURED) as served:
        yield served


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_adds_one_folder_to_its_base(containers: Containers, image: str) -> None:
    template = "{{json .RootFS.Layers}}"
    base = json.loads(docker("image", "inspect", "--format", template, BASE).stdout)
    layers = json.loads(
        docker("image", "inspect", "--format", template, containers.image(image)).stdout
    )
    assert layers[: len(base)] == base
    # The working directory, which the base has, and the environment.
    assert len(layers) - len(base) <= 2
    looking = "for each in $0 $@; do command -v $each; done; ls -d /build /root/.cache"
    found = containers.run(image, "sh", "-c", looking, *UNWANTED_PROGRAMS, files={})
    assert found.stdout == ""


def test_labels_say_what_an_image_is(containers: Containers) -> None:
    for image in IMAGES:
        said = docker(
            *("image", "inspect", "--format", "{{json .Config.Labels}}", containers.image(image))
        )
        labels = {
            name.removeprefix("org.opencontainers.image."): value
            for name, value in json.loads(said.stdout).items()
        }
        assert labels["title"] == f"captionserve-{image}"
        assert labels["version"] == containers.tag
        assert labels["licenses"] == "Apache-2.0"
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["revision"])
        assert labels["base.name"] == BASE
        assert set(labels) >= {"source", "description"}


def test_no_process_of_it_is_roots(contained: ServedInContainer) -> None:
    # Of every process in the container, the real, effective, saved and file system user.
    seen = contained.inside("sh", "-c", "cat /proc/[0-9]*/status").stdout
    users = {word for line in seen.splitlines() if line.startswith("Uid:") for word in line.split()}
    assert users == {"Uid:", "10001"}


def test_only_temporary_folders_can_be_written(contained: ServedInContainer) -> None:
    for folder, writable in {"/tmp": True, "/dev/shm": True, "/opt/captionserve": False}.items():
        made = contained.inside("touch", f"{folder}/file")
        assert (made.returncode == 0) == writable, made.stderr
    assert contained.inside("rm", "/tmp/file", "/dev/shm/file").returncode == 0
    # Not only because the files are another's.
    mounts = contained.inside("cat", "/proc/mounts").stdout.splitlines()
    (root,) = [line.split()[3] for line in mounts if line.split()[1] == "/"]
    assert "ro" in root.split(",")


def test_shared_memory_is_as_large_as_said(contained: ServedInContainer) -> None:
    size = contained.inside("stat", "--file-system", "--format", "%S %b", "/dev/shm").stdout
    block, blocks = map(int, size.split())
    assert block * blocks == SHARED_MEMORY_BYTES
    assert shared_bytes(contained) < SHARED_MEMORY_BYTES


def test_it_has_no_network_but_itself(contained: ServedInContainer) -> None:
    assert contained.inside("ls", "/sys/class/net").stdout.split() == ["lo"]


def test_a_container_ends_although_asked_while_python_starts(
    containers: Containers, files: Files
) -> None:
    with containers.started(files, SECURED) as served:
        began = time.monotonic()
        assert served.end() in (0, 128 + signal.SIGTERM)
        assert time.monotonic() - began < END_SECONDS / 2


def test_nobody_at_the_health_port_is_unhealthy(containers: Containers) -> None:
    soon = ("--health-interval=1s", "--health-start-period=1ms", "--health-retries=1")
    asleep = replace(containers, options=(*soon, "--entrypoint", "sleep"))
    with asleep.started({}, {}, "120") as container:
        wait_until(lambda: container.inspect("{{.State.Health.Status}}") == "unhealthy")


def test_full_size_int8_at_concurrency_16_fits_two_gigabytes(
    request: pytest.FixtureRequest, containers: Containers, secrets: Files, tmp_path: Path
) -> None:
    """As the limit of its memory, and as what its processes hold by their own account."""
    repository = request.config.getoption("--full-size-repository")
    if repository is None:
        pytest.skip("a full-size model is served by `make images-full-size`")
    tmp_path.chmod(0o755)  # As the secrets: it is another user who reads.
    for number, file in enumerate(bench_images(64)):
        (tmp_path / f"{number}.jpg").write_bytes(file)
    files = {
        **secrets,
        "models": repository.resolve(),
        "pictures": tmp_path,
        "callers": Path(__file__).with_name("callers.py"),
    }
    with containers.serve(files, SECURED | BOUNDS) as served, ThreadPoolExecutor() as pool:
        command = ("python", "{callers}", served.target, "{ca}", "{token}", "{pictures}")
        calling = pool.submit(served.call, *command, files=files)
        most = shared = 0
        while not wait([calling], timeout=1).done:
            most = max(most, proportional_bytes(served))
            shared = max(shared, shared_bytes(served))
        assert calling.result().returncode == 0, calling.result().stderr
        report = json.loads(calling.result().stdout)
        peak = int(served.inside("sh", "-c", PEAK).stdout)
        restarts = served.inside("python", "-c", RESTARTS).stdout
        assert served.end() == 0
        killed = served.inspect("{{.State.OOMKilled}}")
    figures = {"PSS": most, "control group": peak, "/dev/shm": shared}
    logger.info(
        "%s; at most %s", report, {name: f"{n / 2**20:.0f} MiB" for name, n in figures.items()}
    )
    assert report["calls"] == report["captions"] == 2 * 64
    assert killed == "false"
    assert float(restarts) == 0
    assert most < 2 * 2**30


# The control group's own account, which counts cached files as well; version 2, else 1.
PEAK = "cd /sys/fs/cgroup; cat memory.peak 2>/dev/null || cat memory/memory.max_usage_in_bytes"
RESTARTS = (
    "import re, urllib.request\n"
    "said = urllib.request.urlopen('http://127.0.0.1:9002/metrics').read().decode()\n"
    "print(re.search(r'^captionserve_restarts_total (\\S+)$', said, re.MULTILINE)[1])"
)


def proportional_bytes(served: ServedInContainer) -> int:
    """Memory of all processes in the container, what they share counted once."""
    said = served.inside("sh", "-c", "cat /proc/[0-9]*/smaps_rollup").stdout
    return sum(int(line.split()[1]) for line in said.splitlines() if line.startswith("Pss:")) * 1024


def shared_bytes(served: ServedInContainer) -> int:
    """What lies in the container's /dev/shm."""
    said = served.inside("du", "--summarize", "--block-size=1", "/dev/shm").stdout
    return int(said.split()[0])
