"""What the locks in docker/ name: packages, and the base of the images."""

from __future__ import annotations

import re

from tests.deploy.places import ROOT

_LINE = re.compile(r"^([a-z0-9-]+)==(\S+) \\$", re.MULTILINE)


def lock_text(name: str) -> str:
    return (ROOT / "docker" / "requirements" / f"{name}.txt").read_text()


def versions_in(text: str) -> dict[str, str]:
    """The version of each package, by its normal name."""
    return dict(_LINE.findall(text))


def locked_versions(name: str) -> dict[str, str]:
    return versions_in(lock_text(name))


def _base() -> str:
    (line,) = re.findall(r"^BASE=(.*)$", (ROOT / "docker" / "base.lock").read_text(), re.MULTILINE)
    return str(line)


BASE = _base()
