"""The decoding options as command line options, derived from what core/options.py says of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from captionserve import GenerationOptions

from captionserve_server.cli.parameters import with_parameters
from captionserve_server.core.options import OPTIONS, Option


def with_decoding_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each decoding option; it gets them all as `options`.

    Args:
        command: a typer command with a parameter `options` of type GenerationOptions.
    """
    parameters = [_parameter(name) for name in OPTIONS]
    return with_parameters(command, "options", parameters, _options)


def _parameter(name: str) -> inspect.Parameter:
    said = OPTIONS[name]
    flags = [] if said.flag is None else [said.flag]
    notes = [said.help, said.range() and f"Range: {said.range()}."]
    if said.max_items is not None:
        notes.append("May be repeated.")
    option = typer.Option(
        *flags,
        help=" ".join(filter(None, notes)),
        rich_help_panel="Decoding",
        callback=_sendable if said.kind is int else None,
    )
    # What is a word beside true and false is typed as text.
    kind: Any = str if said.words else said.kind
    if said.max_items is not None:
        kind = list[kind]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _sendable(parameter: typer.CallbackParam, value: Any) -> Any:
    """Integers that the API can hold; which of them are out of range is the service's to tell."""
    most = OPTIONS[str(parameter.name)].most or 0
    bits = 32 if most < 2**31 else 64
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if each is not None and not -(2 ** (bits - 1)) <= each < 2 ** (bits - 1):
            raise typer.BadParameter(f"must be an integer of at most {bits} bits")
    return value


def _options(**given: Any) -> GenerationOptions:
    # An option that may be repeated is an empty list where it was not given.
    values = {name: None if value == [] else value for name, value in given.items()}
    for name, said in OPTIONS.items():
        if said.words and values[name] is not None:
            values[name] = _meaning(name, said, values[name])
    return GenerationOptions(**values)


def _meaning(name: str, said: Option, text: Any) -> bool | str:
    """What a word means; true and false too where these are values of the option."""
    meanings: dict[str, bool | str] = {"true": True, "false": False} if said.kind is bool else {}
    meanings |= {word: word for word in said.words}
    if text not in meanings:
        flag = said.flag or "--" + name.replace("_", "-")
        *others, last = meanings
        raise typer.BadParameter(f"must be {', '.join(others)} or {last}", param_hint=flag)
    return meanings[text]
