"""Refuse a release whose images could be other ones tomorrow, and say all that is missing.

usage: python docker/release_check.py

Digests in manifests are what `make lint-deploy RELEASE=1` looks at.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_VERSION = re.compile(r'^version = "(.+)"$', re.MULTILINE)


def refusals(root: Path) -> list[str]:
    """Why the checkout cannot be released; empty when it can."""
    return [*_base(root), *_versions(root)]


def _base(root: Path) -> Iterator[str]:
    text = (root / "docker" / "base.lock").read_text()
    found = re.search(r"^BASE=[^@\s]+@(\S+)$", text, re.MULTILINE)
    if found is None or not _DIGEST.fullmatch(found[1]):
        yield "docker/base.lock has no digest of the base: run `make pin-base`"


def _versions(root: Path) -> Iterator[str]:
    said = {
        name: _VERSION.findall((root / name / "pyproject.toml").read_text())
        for name in ("client", "server_tools")
    }
    if said["client"] != said["server_tools"]:
        yield f"the versions of client and server_tools differ: {said}"
        return
    (version,) = said["client"]
    changes = (root / "CHANGELOG.md").read_text()
    headings = re.findall(rf"^## {re.escape(version)}\b.*$", changes, re.MULTILINE)
    if not headings or "unreleased" in headings[0]:
        yield f"CHANGELOG.md does not have {version} as released"


def main() -> int:
    """Print what is missing; 1 if anything is."""
    missing = refusals(ROOT)
    for line in missing:
        sys.stderr.write(f"refused: {line}\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
