"""`captionserve bulk-ray` before Ray is needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from captionserve_server.bulk.outputs import OutputError
from captionserve_server.bulk.parts import Parts
from captionserve_server.cli.bulk_ray import _opened
from captionserve_server.cli.console import ExitCode
from captionserve_server.cli.main import app
from typer.testing import CliRunner


def test_the_extra_that_is_missing_is_named(tmp_path: Path) -> None:
    assert importlib.util.find_spec("ray") is None, "the tests' environment shall not have Ray"
    table = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a.png"]}), table)
    ended = CliRunner().invoke(app, ["bulk-ray", str(table), "--output", str(tmp_path / "out")])
    assert ended.exit_code == ExitCode.NOT_STARTED
    assert "captionserve-server[ray]" in ended.stderr


def test_parts_of_unknown_making_are_replaced_only_when_asked_for(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "out")
    parts.folder.mkdir()
    part = parts.folder / "part-0-0.parquet"
    part.touch()
    with pytest.raises(OutputError, match="--restart"):
        _opened(parts, restart=False)
    assert part.exists()
    _opened(parts, restart=True).close()
    assert not part.exists()
    _opened(parts, restart=False).close()
