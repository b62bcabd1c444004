"""The settings as command line options, derived from what settings.py says of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from captionserve_server.cli.parameters import with_parameters
from captionserve_server.settings import VARIABLE_PREFIX, Settings


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting; it gets them all as `settings`.

    Args:
        command: a typer command with a parameter `settings` of type Settings.
    """
    return with_parameters(
        command, "settings", [_parameter(name) for name in Settings.model_fields], _settings
    )


def flag(name: str) -> str:
    """A setting's flag."""
    return f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    """A setting's environment variable."""
    return f"{VARIABLE_PREFIX}{name.upper()}"


def _parameter(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    notes = [field.description, f"[env var: {variable(name)}]"]
    if field.is_required():
        notes.append("[required]")
    elif field.default is not None:
        notes.append(f"[default: {field.default}]")
    # Texts, except for switches: what they must be is checked in one place, with the variables.
    kind: Any = bool if field.annotation is bool else str
    option = typer.Option(help=" ".join(filter(None, notes)), show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _settings(**given: Any) -> Settings:
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # Of several settings together; it names them.
            raise typer.BadParameter(message) from error
        name = str(first["loc"][0])
        hint = flag(name) if given.get(name) is not None else f"{flag(name)} or {variable(name)}"
        raise typer.BadParameter(message, param_hint=hint) from error
