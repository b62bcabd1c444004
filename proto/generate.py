"""Regenerate the Python code of the protobuf API: `python proto/generate.py [--check]`.

With --check nothing is written; the exit code is 1 when the committed code is out of date.
"""

from __future__ import annotations

import importlib.resources
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent
OUTPUT_ROOT = PROTO_ROOT.parent / "client" / "src"
PROTO_FILE = "captionserve/v1/caption.proto"
PLUGINS = ("python", "grpc_python", "mypy", "mypy_grpc")


def generate(output: Path) -> None:
    """Write the modules and type stubs of the API below `output`."""
    # protoc looks for its plugins on PATH; they lie beside the interpreter.
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))
    well_known_types = importlib.resources.files("grpc_tools") / "_proto"
    # google/rpc/status.proto comes with the package of its generated code.
    common_types = Path(status_pb2.__file__).parents[2]
    arguments = [f"-I{PROTO_ROOT}", f"-I{well_known_types}", f"-I{common_types}"]
    arguments += [f"--{plugin}_out={output}" for plugin in PLUGINS]
    arguments += [f"--{plugin}_opt=quiet" for plugin in ("mypy", "mypy_grpc")]
    if protoc.main(["protoc", *arguments, PROTO_FILE]) != 0:
        raise SystemExit("protoc failed")


def out_of_date() -> list[str]:
    """The generated files, relative to OUTPUT_ROOT, that differ from the committed ones."""
    with tempfile.TemporaryDirectory() as directory:
        fresh = Path(directory)
        generate(fresh)
        names = [path.relative_to(fresh) for path in sorted(fresh.rglob("*.py*"))]
        return [str(name) for name in names if not _same(fresh / name, OUTPUT_ROOT / name)]


def _same(fresh: Path, committed: Path) -> bool:
    return committed.is_file() and committed.read_bytes() == fresh.read_bytes()


def main(arguments: list[str]) -> int:
    """Generate, or check that there is nothing to generate."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"{__doc__}")
        return 2
    if not arguments:
        generate(OUTPUT_ROOT)
        return 0
    stale = out_of_date()
    for name in stale:
        sys.stderr.write(f"{name} is out of date; run python proto/generate.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
