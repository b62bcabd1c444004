"""What is asked of an image besides its whole, as command line options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer
from captionserve import Framing

from captionserve_server.cli.parameters import with_parameters
from captionserve_server.core.framing import MAX_REGIONS, RESIZES, Resize

_NUMBER = r"(\d{1,9})"
_REGION = re.compile(",".join([_NUMBER] * 4))
_TILES = re.compile(f"{_NUMBER}x{_NUMBER}")


def with_framing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say what of an image is captioned; it gets a `framing`.

    Args:
        command: a typer command with a parameter `framing` of type Framing.
    """
    parameters = [
        _parameter(
            "region",
            list[str] | None,
            "Caption this part, too: LEFT,TOP,RIGHT,BOTTOM in pixels of the upright image. May be "
            f"repeated; with the tiles, {MAX_REGIONS} at most.",
        ),
        _parameter("tiles", str | None, "Caption the cells of a grid, too: ROWSxCOLUMNS."),
        _parameter(
            "resize",
            Literal[RESIZES] | None,
            "How the image, and each part, gets the size that the model reads.",
        ),
    ]
    return with_parameters(command, "framing", parameters, _framing)


def _parameter(name: str, kind: Any, help: str) -> inspect.Parameter:
    option = typer.Option(f"--{name}", help=help, rich_help_panel="Image")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _framing(*, region: list[str] | None, tiles: str | None, resize: Resize | None) -> Framing:
    """What was asked for; of it only that, so that nothing stands for nothing."""
    framing = Framing()
    if region:
        framing["regions"] = [
            _numbers(_REGION, each, "--region", "LEFT,TOP,RIGHT,BOTTOM") for each in region
        ]
    if tiles is not None:
        framing["tiles"] = _numbers(_TILES, tiles, "--tiles", "ROWSxCOLUMNS")
    if resize is not None:
        framing["resize"] = resize
    return framing


def _numbers(form: re.Pattern[str], text: str, flag: str, wanted: str) -> tuple[int, ...]:
    found = form.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"must be {wanted}, is {text!r}", param_hint=flag)
    return tuple(map(int, found.groups()))
