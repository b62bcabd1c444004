"""The file of tokens, and the command that keeps it."""

from __future__ import annotations

import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from captionserve_server.gateway.tokens import (
    TokenFileError,
    Tokens,
    create_token,
    read_tokens,
    revoke_tokens,
)


def test_a_token_is_known_until_it_is_revoked(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    first, second = create_token(path, "alice"), create_token(path, "bob")
    tokens = read_tokens(path)
    assert [tokens.name_of(each) for each in (first, second, "other", "")] == [
        "alice",
        "bob",
        None,
        None,
    ]
    assert revoke_tokens(path, "alice") == 1
    assert revoke_tokens(path, "alice") == 0
    assert [read_tokens(path).name_of(each) for each in (first, second)] == [None, "bob"]


def test_a_token_is_not_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    token = create_token(path, "alice")
    assert token not in path.read_text()
    assert token.removeprefix("cst_") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_name_may_have_several_while_they_are_rotated(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    tokens = [create_token(path, "alice") for _ in range(3)]
    known = read_tokens(path)
    assert {known.name_of(token) for token in tokens} == {"alice"}
    assert revoke_tokens(path, "alice", keep_newest=True) == 2
    assert [read_tokens(path).name_of(token) for token in tokens] == [None, None, "alice"]
    assert revoke_tokens(path, "alice") == 1


def test_tokens_made_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: create_token(path, f"n{number}"), range(16)))
    known = read_tokens(path)
    assert [known.name_of(token) for token in made] == [f"n{number}" for number in range(16)]


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "é", "-a", 65 * "a", "a/b"])
def test_a_name_is_one_that_logs_can_show(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a name has"):
        create_token(tmp_path / "tokens", name)


@pytest.mark.parametrize("line", ["alice", "alice xyz", f"a b {64 * '0'}", f"alice {63 * '0'}"])
def test_a_wrong_line_is_named_and_not_shown(line: str) -> None:
    with pytest.raises(TokenFileError, match="line 2") as raised:
        Tokens.parse(f"# comment\n{line}\n")
    assert line not in str(raised.value)


def test_the_command_prints_the_token_last_and_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, "-m", "captionserve_server.cli.main", "token"),
                *(*arguments, "--tokens", str(path)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    created = run("create", "alice")
    assert created.returncode == 0, created.stderr
    token = created.stdout.split()[-1]
    assert read_tokens(path).name_of(token) == "alice"
    listed = run("list")
    assert listed.stdout.split() == ["alice", "1"]
    assert token not in listed.stdout
    assert run("revoke", "alice").returncode == 0
    assert run("revoke", "alice").returncode == 2
    assert read_tokens(path).stored == []
