"""A service's settings from the command line and the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from captionserve_server.cli.main import app
from captionserve_server.cli.settings_options import flag, variable
from captionserve_server.settings import Settings
from typer.testing import CliRunner, Result


def serve(folder: Path, *arguments: str, **variables: str) -> Result:
    command = ["serve", "--model-repository", str(folder), *arguments]
    return CliRunner().invoke(app, command, env={**variables, "COLUMNS": "200"})


def test_what_holds_is_printed_whole_and_starts_nothing(tmp_path: Path) -> None:
    printed = json.loads(serve(tmp_path, "--print-config").stdout)
    assert set(printed) == set(Settings.model_fields)
    assert printed["model_repository"] == str(tmp_path)
    assert printed["window"] == Settings.model_fields["window"].default


def test_a_flag_prevails_over_its_variable(tmp_path: Path) -> None:
    variables = {variable("window"): "7", variable("insecure"): "true"}
    given = ("--print-config", "--window", "9")
    printed = json.loads(serve(tmp_path, *given, **variables).stdout)
    assert printed["window"] == 9
    assert printed["insecure"] is True
    assert json.loads(serve(tmp_path, "--print-config", **variables).stdout)["window"] == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("listen", "0.0.0.0:9000"),
        ("listen", "9000"),
        ("threads", "-1"),
        ("threads", "many"),
        ("tls_key", "key.pem"),
        ("log_format", "xml"),
        ("model_repository", "nowhere"),
    ],
)
def test_what_cannot_be_is_a_sentence_with_its_flag(name: str, value: str, tmp_path: Path) -> None:
    by_flag = serve(tmp_path, flag(name), value)
    assert by_flag.exit_code == 2
    assert flag(name) in by_flag.output
    assert "Traceback" not in by_flag.output
    if name != "model_repository":  # Which has a flag here in any case.
        by_variable = serve(tmp_path, **{variable(name): value})
        assert by_variable.exit_code == 2
        assert flag(name) in by_variable.output
