"""Imports point one way, and serving never needs what only export needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import captionserve
import captionserve_server
import pytest

CLIENT = Path(captionserve.__file__).parent
SERVER = Path(captionserve_server.__file__).parent

# Package or module of the server to those of ours that it may import beside itself and core.
ALLOWED = {
    "core": set(),
    "runtime": set(),
    "export": {"runtime"},
    "triton": {"runtime", "tracing"},
    "local": {"captionserve", "runtime"},
    "settings": set(),
    "tracing": set(),
    "gateway": {"captionserve", "settings", "tracing", "triton"},
    "serving": {"gateway", "export", "runtime", "settings", "tracing", "triton"},
    "bulk": {"captionserve", "gateway", "local"},
    "playground": {"captionserve", "bulk", "local"},
    "demo": set(),
    "evaluation": {"demo", "local", "runtime"},
    "bench": {
        "captionserve",
        "runtime",
        "triton",
        "local",
        "serving",
        "export",
        "demo",
        "evaluation",
        "bulk",
    },
    "cli": {
        "captionserve",
        "runtime",
        "gateway",
        "serving",
        "bulk",
        "playground",
        "settings",
        "tracing",
        "export",
        "local",
        "demo",
        "evaluation",
        "bench",
    },
}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def ours(module: str) -> str | None:
    """The package of ours that a module belongs to: `captionserve`, or one of the server's."""
    parts = module.split(".")
    if parts[0] == "captionserve":
        return "captionserve"
    if parts[0] == "captionserve_server" and len(parts) > 1:
        return parts[1]
    return None


def test_the_client_imports_nothing_of_the_server() -> None:
    for path in CLIENT.rglob("*.py"):
        assert all(ours(module) in {None, "captionserve"} for module in imported_modules(path)), (
            path
        )


@pytest.mark.parametrize("package", ALLOWED)
def test_server_packages_import_only_what_they_may(package: str) -> None:
    allowed = ALLOWED[package] | {package, "core", None}
    for path in [*SERVER.glob(f"{package}.py"), *(SERVER / package).rglob("*.py")]:
        found = {ours(module) for module in imported_modules(path)}
        assert found <= allowed, f"{path} imports {found - allowed}"


def test_every_package_has_its_rule() -> None:
    packages = {path.parent.name for path in SERVER.glob("*/__init__.py")}
    modules = {path.stem for path in SERVER.glob("*.py")} - {"__init__"}
    assert packages | modules == set(ALLOWED)


@pytest.mark.parametrize(
    "module",
    [
        "captionserve_server.cli.main",
        "captionserve_server.core.engine.engine_thread",
        "captionserve_server.runtime.open_graph",
        "captionserve",
    ],
)
def test_serving_needs_neither_torch_nor_transformers(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'onnx')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_edge_mode_imports_no_client_until_it_is_needed() -> None:
    code = (
        "import sys, captionserve_server.local\n"
        "sys.exit(any(name in sys.modules for name in ('captionserve', 'grpc')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_client_needs_neither_numpy_nor_pillow() -> None:
    code = (
        "import sys, captionserve\n"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'PIL', 'captionserve_server')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
