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
    proto.write_text(proto.read_text().replace("string text = 1;", "string utterance = 1;"))
    done = run_generate(tmp_path / "proto" / "generate.py", "--check")
    assert done.returncode == 1
    assert "caption_pb2.py is out of date" in done.stderr


def test_buf_formats_it_so() -> None:
    buf = shutil.which("buf", path=sysconfig.get_path("scripts"))
    assert buf is not None, "install buf-bin"
    done = subprocess.run(
        [buf, "format", "--diff", "--exit-code"],
        cwd=PROTO_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A checkout whose present API has been tagged as v0.1; its API."""
    shutil.copytree(PROTO_ROOT, tmp_path / "proto")
    for command in (
        ("init", "--quiet"),
        ("add", "."),
        ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "release"),
        ("tag", "v0.1"),
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path / "proto" / "captionserve" / "v1" / "caption.proto"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("message Drain {}", "message Drain {}\n\n// New.\nmessage New {}", None),
        ("message Drain {}", "message Drain {\n  // Why.\n  string reason = 1;\n}", None),
        ("int64 version = 1;", "int32 version = 1;", "changed type"),
        ("rpc GetModels(GetModelsRequest)", "rpc Models(GetModelsRequest)", "GetModels"),
        ("  // The item's.\n  string id = 1;\n", "", "deleted"),
        ("message Window {", "message window {", "Window"),
    ],
    ids=["message", "field", "type", "method", "deletion", "lint"],
)
def test_what_was_released_stays_true_and_is_added_to(
    old: str, new: str, said: str | None, released: Path
) -> None:
    text = released.read_text()
    assert old in text
    released.write_text(text.replace(old, new, 1))
    done = run_generate(released.parents[2] / "lint.py")
    if said is None:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode != 0
        assert said in done.stdout + done.stderr
