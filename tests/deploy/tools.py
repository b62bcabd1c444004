"""The tools of `make lint-deploy`: programs of .venv/tools, and promtool."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_FOLDER = ROOT / ".venv" / "tools" / "bin"
# Set by `make lint-deploy`, where a tool that is missing is a failure.
_WANTED_VARIABLE = "LINT_DEPLOY"


def tool(name: str) -> str:
    """A tool's path; the test is skipped without it, or fails if all tools are wanted."""
    found = shutil.which(name, path=f"{_FOLDER}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        missing = f"{name} is not installed; `make lint-deploy` installs or names it"
        if os.environ.get(_WANTED_VARIABLE):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def run(
    name: str, *arguments: str | Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool in the checkout, and give back how it ended and what it said."""
    return subprocess.run(
        [tool(name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        timeout=120,
        check=False,
    )


def said(ended: subprocess.CompletedProcess[str]) -> str:
    """All that a tool printed."""
    return ended.stdout + ended.stderr
