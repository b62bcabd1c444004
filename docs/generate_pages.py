"""Write docs/options.md and docs/settings.md from what the code says of each option and setting.

usage: python docs/generate_pages.py [--check]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import starmap
from pathlib import Path

from captionserve_server.cli.settings_options import flag, variable
from captionserve_server.core.options import OPTIONS, DecodingOptions
from captionserve_server.settings import Settings
from pydantic.fields import FieldInfo

DOCS = Path(__file__).resolve().parent
_OPTIONS_HEAD = """# Decoding options

Names, meanings and defaults are those of transformers' GenerationConfig; a checkpoint's own
defaults come before these. Types are JSON's, as the tensor OPTIONS has them. `make generate`
writes this page.

| option | type | range | default | what it does |
|---|---|---|---|---|
"""


_SETTINGS_HEAD = """# Settings of a service

Each is a flag of `captionserve serve` and an environment variable; the flag prevails.
`captionserve serve --print-config` prints what holds. `make generate` writes this page.

| flag | variable | default | what it does |
|---|---|---|---|
"""


def pages() -> dict[Path, str]:
    """The pages whole, by their paths."""
    options = map(_option, dataclasses.fields(DecodingOptions))
    settings = starmap(_setting, Settings.model_fields.items())
    return {
        DOCS / "options.md": _OPTIONS_HEAD + "".join(map(_row, options)),
        DOCS / "settings.md": _SETTINGS_HEAD + "".join(map(_row, settings)),
    }


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _setting(name: str, field: FieldInfo) -> tuple[str, ...]:
    if field.is_required():
        default = "required"
    else:
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
    return f"`{flag(name)}`", f"`{variable(name)}`", default, field.description or ""


def _option(field: dataclasses.Field[object]) -> tuple[str, ...]:
    option = OPTIONS[field.name]
    kind = option.wanted().removeprefix("an ").removeprefix("a ")
    limits = [option.range()]
    if option.max_characters is not None:
        limits.append(f"at most {option.max_characters} characters")
    if option.max_items is not None:
        kind = f"list of {kind}s"
        limits.insert(0, f"at most {option.max_items}")
    default = "any" if field.default is None else f"`{json.dumps(field.default)}`"
    return f"`{field.name}`", kind, ", ".join(filter(None, limits)), default, option.help


def main(arguments: list[str]) -> int:
    """Write the pages, or check that they are up to date."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"{__doc__}")
        return 2
    stale = 0
    for path, text in pages().items():
        if not arguments:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"docs/{path.name} is out of date; run make generate\n")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
