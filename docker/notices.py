"""Collect the licence notices of what is installed in the environment that runs this.

usage: python docker/notices.py APACHE_LICENCE FOLDER

FOLDER/NOTICE lists every distribution with its licence and what its wheel bundles of others;
FOLDER/licences has the notices that the wheels bring. Some wheels under the Apache licence bring no
text: it is given once, as APACHE_LICENCE. Any other distribution without a notice is an error, so
that an update cannot lose one unseen.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackagePath, distributions
from pathlib import Path

_NOTICE_NAME = re.compile(r"(licen[cs]e|copying|notice|third-?party)", re.IGNORECASE)
_PROGRAM_SUFFIXES = {".py", ".pyc", ".pyi", ".so", ".json", ".xml"}
_HEAD = """captionserve, and what is installed with it

captionserve is licensed under Apache-2.0. The packages below are licensed as they say themselves;
the notices that they bring lie in licences/. The packages of the Debian system around them have
theirs in /usr/share/doc/*/copyright.
"""


class MissingNoticeError(RuntimeError):
    """A distribution brings no notice and names no licence whose text is at hand."""


def collect(apache: Path, folder: Path) -> None:
    """Write FOLDER.

    Raises:
        MissingNoticeError: if a distribution's notice is missing.
    """
    sections = [_HEAD]
    for found in sorted(distributions(), key=lambda each: each.name.lower()):
        target = folder / "licences" / f"{found.name}-{found.version}"
        notices = sorted(_copied(found, target))
        if not notices:
            if "apache" not in licence_of(found).lower():
                raise MissingNoticeError(f"{found.name} {found.version} brings no licence notice")
            target.mkdir(parents=True)
            shutil.copy(apache, target / "LICENSE")
            notices = ["LICENSE"]
        sections.append(_section(found, notices))
    (folder / "NOTICE").write_text("\n".join(sections))


def licence_of(found: Distribution) -> str:
    """The licence that a distribution names, in one line."""
    stated = _metadata(found, "License-Expression") + _metadata(found, "License")
    classified = [
        each.rpartition(" :: ")[2]
        for each in _metadata(found, "Classifier")
        if each.startswith("License")
    ]
    # Some put the whole text where its name is wanted.
    short = [each.strip() for each in stated if each.strip() and "\n" not in each.strip()]
    return short[0] if short else ", ".join(classified) or "see its notice"


def _metadata(found: Distribution, key: str) -> list[str]:
    return [str(each) for each in found.metadata.get_all(key) or ()]


def _section(found: Distribution, notices: list[str]) -> str:
    lines = [f"{found.name} {found.version}", f"    licence: {licence_of(found)}"]
    lines += [f"    notice: licences/{found.name}-{found.version}/{each}" for each in notices]
    bundled = sorted({each.name for each in found.files or () if _is_bundled(each)})
    if bundled:
        lines.append(f"    bundles libraries of others: {', '.join(bundled)}")
    return "\n".join(lines) + "\n"


def _is_bundled(path: PackagePath) -> bool:
    # Where auditwheel puts the libraries that it copies into a wheel.
    return path.parts[0].endswith(".libs") and Path(path.locate()).exists()


def _copied(found: Distribution, target: Path) -> Iterator[str]:
    """Copy a distribution's notices; their paths within the target."""
    for path in found.files or ():
        if path.suffix in _PROGRAM_SUFFIXES or not _NOTICE_NAME.match(path.name):
            continue
        parts = path.parts
        if parts[0].endswith(".dist-info"):
            parts = parts[2:] if parts[1] in {"licenses", "license_files"} else parts[1:]
        name = Path(*parts)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.locate(), target / name)
        yield str(name)


def main(arguments: list[str]) -> int:
    """Collect them; 1 if one is missing."""
    if len(arguments) != 2:
        sys.stderr.write(f"{__doc__}")
        return 2
    try:
        collect(*map(Path, arguments))
    except MissingNoticeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
