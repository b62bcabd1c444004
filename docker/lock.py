"""Write docker/requirements/*.txt: everything that an image installs, each file by its hash.

usage: python docker/lock.py PIP_COMPILE [--upgrade]

What is wanted is read from the installed packages' metadata, which `make setup` keeps in step with
both pyproject.toml files; constraints.txt says which versions, as for the tests. PIP_COMPILE is
that of pip-tools, under the Python version of the images: what it finds is found for that one.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

DOCKER = Path(__file__).resolve().parent
REQUIREMENTS = DOCKER / "requirements"
SERVER = "captionserve-server"
# Built from the checkout, so never taken from an index, whatever it has under these names.
OURS = {SERVER, "captionserve"}

# The extras of captionserve-server in each image; that of the edge is all but Triton.
IMAGES: dict[str, tuple[str, ...]] = {
    "server": ("service", "embedded", "tracing"),
    "edge": ("service",),
}
PYTHON_VERSION = "3.11"
_HEAD = "# Written by `make lock-images`; docker/lock.py says from what.\n"


def wanted(extras: tuple[str, ...], package: str = SERVER) -> Iterator[Requirement]:
    """What a package of ours needs with some extras, our other package's needs in its place."""
    for line in requires(package) or ():
        requirement = Requirement(line)
        if not _applies(requirement, extras):
            continue
        if requirement.name in OURS:
            yield from wanted(tuple(requirement.extras), requirement.name)
        else:
            requirement.marker = None
            yield requirement


def _applies(requirement: Requirement, extras: tuple[str, ...]) -> bool:
    marker = requirement.marker
    version = {"python_version": PYTHON_VERSION, "python_full_version": f"{PYTHON_VERSION}.0"}
    return marker is None or any(
        marker.evaluate({**version, "extra": extra}) for extra in ("", *extras)
    )


def main(arguments: list[str]) -> int:
    """Write the locks of the images, of what builds them, and of the tools around them."""
    if not arguments or arguments[1:] not in ([], ["--upgrade"]):
        sys.stderr.write(f"{__doc__}")
        return 2
    for image, extras in IMAGES.items():
        lines = sorted({str(requirement) for requirement in wanted(extras)})
        _lock(arguments, image, "\n".join(lines))
    for name in ("build", "tools"):
        _lock(arguments, name, (REQUIREMENTS / f"{name}.in").read_text())
    return 0


def _lock(pip_compile: list[str], name: str, requirements: str) -> None:
    output = REQUIREMENTS / f"{name}.txt"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"{name}.in")
        source.write_text(requirements)
        # With the lock of before as its output file, it keeps the versions that still fit.
        # Neither an index nor where wheels lie on this machine may get into the file.
        subprocess.run(
            [
                *(*pip_compile, "--quiet", "--generate-hashes", "--strip-extras", "--allow-unsafe"),
                *("--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"),
                *("--no-emit-trusted-host", "--no-emit-options"),
                *("--constraint", str(DOCKER.parent / "constraints.txt")),
                *("--output-file", str(output), str(source)),
            ],
            check=True,
        )
    # One Python and one system: markers say nothing here, and whoever downloads may have another.
    locked = re.sub(r" ; .*(?= \\\n)", "", output.read_text().removeprefix(_HEAD))
    output.write_text(_HEAD + locked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
