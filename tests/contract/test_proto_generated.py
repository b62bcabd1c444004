"""The committed generated code is what the proto gives, and the proto keeps buf's rules."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PROTO_ROOT = Path(__file__).resolve().parents[2] / "proto"


def run_generate(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_generated_code_is_up_to_date() -> None:
    done = run_generate(PROTO_ROOT / "generate.py", "--check")
    assert done.returncode == 0, done.stderr


def test_the_check_notices_a_changed_proto(tmp_path: Path) -> None:
    shutil.copytree(PROTO_ROOT, tmp_path / "proto")
    committed = Path("client", "src", "captionserve", "v1")
    shutil.copytree(PROTO_ROOT.parent / committed, tmp_path / committed)
    proto = tmp_path / "proto" / "captionserve" / "v1" / "caption.proto"
    proto.write_text(proto.read_text().replace("string text = 1;", "string words = 1;"))
    done = run_generate(tmp_path / "proto" / "generate.py", "--check")
    assert done.returncode == 1
    assert "caption_pb2.py is out of date" in done.stderr


@pytest.mark.parametrize("command", [["lint"], ["format", "--diff", "--exit-code"]])
def test_buf_is_content(command: list[str]) -> None:
    buf = shutil.which("buf", path=sysconfig.get_path("scripts"))
    assert buf is not None, "install buf-bin"
    done = subprocess.run(
        [buf, *command], cwd=PROTO_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
