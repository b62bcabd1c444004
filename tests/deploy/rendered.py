"""The overlays, and the overlays with each further component, as kustomize makes them."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.deploy.objects import Manifests
from tests.deploy.tools import ROOT, run, said

KUBERNETES = ROOT / "docker" / "kubernetes"
OVERLAYS = ("dev", "cpu", "cpu-mtls")
# Components that no overlay has, with one that they can be added to.
ADDED = {"route": "cpu", "tracing": "cpu-mtls", "image-volume": "cpu"}
VARIANTS = (*OVERLAYS, *ADDED)


def rendered(variant: str) -> Manifests:
    """An overlay, or one with a component; the caller's own, to change as it likes."""
    return Manifests.parse(variant, text_of(variant))


@functools.cache
def text_of(variant: str) -> str:
    """What kustomize writes."""
    if variant in OVERLAYS:
        return _kustomized(KUBERNETES / "overlays" / variant)
    # As whoever adds a component writes it.
    with tempfile.TemporaryDirectory() as folder:
        overlay, component = (
            os.path.relpath(KUBERNETES / kind / name, Path(folder).resolve())
            for kind, name in (("overlays", ADDED[variant]), ("components", variant))
        )
        kustomization = {
            "namespace": "captionserve",
            "resources": [overlay],
            "components": [component],
        }
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return _kustomized(Path(folder))


def _kustomized(folder: Path) -> str:
    ended = run("kubectl", "kustomize", folder)
    if ended.returncode:
        pytest.fail(f"{folder.name} cannot be rendered: {said(ended)}")
    assert not ended.stderr, f"kustomize warns: {ended.stderr}"
    return ended.stdout
