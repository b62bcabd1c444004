"""The documentation names what exists: files, pages, commands, their flags, make's targets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from captionserve_server.cli.main import app
from typer.core import TyperGroup

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ]
)
COMMANDS = typer.main.get_command(app)
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_link_leads_to_a_file(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        target = (page.parent / link).resolve()
        assert target.exists(), link
        if page.is_relative_to(DOCS):  # What the site has is docs/ alone.
            assert target.is_relative_to(DOCS), link


def test_every_page_is_in_the_sites_contents() -> None:
    in_contents = set(_leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    # The contents of the decisions are a page of their own.
    decisions = set(LINK.findall((DOCS / "adr" / "README.md").read_text()))
    assert there - in_contents == {f"adr/{name}" for name in decisions}


def _leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for each in nav.values():
            yield from _leaves(each)
    elif isinstance(nav, list):
        for each in nav:
            yield from _leaves(each)


def command_lines(page: Path) -> list[list[str]]:
    """The commands in the indented blocks of a page, as words."""
    text = FENCE.sub("", page.read_text()).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    # Prose in a list is indented as well, but does not begin with a command.
    return [
        shlex.split(line, comments=True)
        for line in lines
        if re.match(r"(\.venv/bin/)?(captionserve|make) [a-z]", line)
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if command_lines(page)], ids=named)
def test_a_command_line_can_be_typed(page: Path) -> None:
    for program, *words in command_lines(page):
        if program.endswith("make"):
            targets = [word for word in words if re.fullmatch("[a-z][a-z-]*", word)]
            assert set(targets) <= TARGETS, targets
            continue
        command = COMMANDS
        while isinstance(command, TyperGroup):
            assert words[0] in command.commands, words[0]
            command = command.commands[words.pop(0)]
        flags = {flag for parameter in command.params for flag in parameter.opts}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= flags | {"--help"}, f"{command.name}: {used - flags}"
