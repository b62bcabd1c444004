"""Write docs/options.md from what core/options.py says of each option.

usage: python docs/generate_options.py [--check]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from captionserve_server.core.options import OPTIONS, DecodingOptions

PAGE = Path(__file__).resolve().parent / "options.md"
_HEAD = """# Decoding options

Names, meanings and defaults are those of transformers' GenerationConfig; a checkpoint's own
defaults come before these. Types are JSON's, as the tensor OPTIONS has them. `make generate` writes
this page.

| option | type | range | default | what it does |
|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return _HEAD + "".join(
        f"| {' | '.join(_row(field))} |\n" for field in dataclasses.fields(DecodingOptions)
    )


def _row(field: dataclasses.Field[object]) -> tuple[str, ...]:
    option = OPTIONS[field.name]
    kind, limits = option.wanted(), [option.range()]
    if option.max_characters is not None:
        limits.append(f"at most {option.max_characters} characters")
    if option.max_items is not None:
        kind = f"list of {kind}"
        limits.insert(0, f"at most {option.max_items}")
    default = "any" if field.default is None else f"`{json.dumps(field.default)}`"
    return f"`{field.name}`", kind, ", ".join(filter(None, limits)), default, option.help


def main(arguments: list[str]) -> int:
    """Write the page, or check that it is up to date."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"{__doc__}")
        return 2
    if not arguments:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        sys.stderr.write("docs/options.md is out of date; run python docs/generate_options.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
