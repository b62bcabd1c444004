"""Lint the API with buf, and hold it to what was tagged: `python proto/lint.py [TAG]`.

With a tag, changes that would break callers of that version are refused; additions are not. buf
reads imports from its own workspace only, so that what google.rpc has is put beside the API, in a
folder for the time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from google.rpc import status_pb2

PROTO_ROOT = Path(__file__).resolve().parent
API = Path("captionserve", "v1", "caption.proto")
IMPORTED = "status.proto"
BUF = Path(sys.executable).parent / "buf"


def workspace(folder: Path, api: bytes) -> Path:
    """A folder with this state of the API, its settings, and what it imports."""
    for path, content in (
        (API, api),
        (Path("buf.yaml"), (PROTO_ROOT / "buf.yaml").read_bytes()),
        (
            Path("google", "rpc", IMPORTED),
            Path(status_pb2.__file__).with_name(IMPORTED).read_bytes(),
        ),
    ):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


def tagged(tag: str) -> bytes:
    """The API as it was tagged."""
    found = subprocess.run(
        ["git", "show", f"{tag}:proto/{API.as_posix()}"],
        cwd=PROTO_ROOT,
        capture_output=True,
        check=True,
    )
    return found.stdout


def buf(*arguments: str, folder: Path) -> int:
    """The exit code of buf, of our own files alone."""
    command = [str(BUF), *arguments, "--path", API.parts[0]]
    return subprocess.run(command, cwd=folder, check=False).returncode


def main(arguments: list[str]) -> int:
    """Lint, and compare with a tag if one is given."""
    with tempfile.TemporaryDirectory() as directory:
        present = workspace(Path(directory, "present"), (PROTO_ROOT / API).read_bytes())
        failed = buf("lint", folder=present)
        if arguments:
            former = workspace(Path(directory, "former"), tagged(arguments[0]))
            failed |= buf("breaking", "--against", str(former), folder=present)
        return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
