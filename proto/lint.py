"""Lint the API with buf, and hold it to the newest release: `python proto/lint.py`.

Changes that would break callers of the newest tag (v0.1 and later) are refused; additions are not.
buf reads imports from its own workspace only, so that what google.rpc has is put beside the API, in
a folder for the time.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from google.rpc import status_pb2

PROTO_ROOT = Path(__file__).resolve().parent
API = Path("captionserve", "v1", "caption.proto")
IMPORTED = "status.proto"
BUF = Path(sysconfig.get_path("scripts"), "buf")


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


def git(*arguments: str) -> bytes | None:
    """What git answers; None where it has nothing to say."""
    done = subprocess.run(["git", *arguments], cwd=PROTO_ROOT, capture_output=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def buf(*arguments: str, folder: Path) -> int:
    """The exit code of buf."""
    return subprocess.run([str(BUF), *arguments], cwd=folder, check=False).returncode


def main() -> int:
    """Lint, and compare with the newest release if there is one."""
    with tempfile.TemporaryDirectory() as directory:
        present = workspace(Path(directory, "present"), (PROTO_ROOT / API).read_bytes())
        failed = buf("lint", "--path", API.parts[0], folder=present)
        tag = git("describe", "--tags", "--abbrev=0", "--match", "v*")
        released = tag and git("show", f"{tag.decode()}:proto/{API.as_posix()}")
        if released:
            former = workspace(Path(directory, "former"), released)
            failed |= buf("breaking", "--against", str(former), folder=present)
        else:
            sys.stderr.write("no release is tagged: the API is not compared with one\n")
        return failed


if __name__ == "__main__":
    sys.exit(main())
