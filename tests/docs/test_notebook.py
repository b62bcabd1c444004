"""The notebook runs from top to bottom, against a real service, and shows what it says."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from captionserve_server.serving.ready import ReadyReport

from tests.conftest import DEMO, DEMO_FOLDER

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "captions.ipynb"
# Another environment than that of the tests, as its reader has: `make docs` makes it.
TOOLS = ROOT / ".venv" / "docs" / "bin"
CAPTION = json.loads((DEMO_FOLDER / "images" / "captions.json").read_text())["penguin.jpg"]


def test_it_runs(service: Callable[[str], ReadyReport], tmp_path: Path) -> None:
    program = TOOLS / "jupyter-execute"
    if not program.exists():
        pytest.skip("the notebook is executed by `make docs`")
    output = tmp_path / "executed.ipynb"
    done = subprocess.run(
        [str(program), f"--output={output}", str(NOTEBOOK)],
        env=os.environ
        | {"CAPTIONSERVE_TARGET": service(DEMO).grpc, "PATH": f"{TOOLS}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(output.read_text())["cells"]
    shown = [each for cell in cells for each in cell.get("outputs", [])]
    printed = "".join(text for each in shown for text in each.get("text", []))
    # Once as the best of several, once word by word.
    assert printed.replace("|", "").count(CAPTION) == 2
    assert sum("image/png" in each.get("data", {}) for each in shown) == 1
