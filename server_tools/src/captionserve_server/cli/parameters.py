"""Groups of command line options that are said once and given to several commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def with_parameters(
    command: Callable[..., None],
    name: str,
    parameters: Sequence[inspect.Parameter],
    make: Callable[..., Any],
) -> Callable[..., None]:
    """A typer command with a group of options in the place of one parameter.

    Args:
        command: has a parameter `name`.
        name: which one the group is given as.
        parameters: the group, keyword-only.
        make: makes of the group's values, by name, what the command is given.
    """
    signature = inspect.signature(command, eval_str=True)
    all_parameters = [
        *(each for each in signature.parameters.values() if each.name != name),
        *parameters,
    ]

    @functools.wraps(command)
    def collected(**arguments: Any) -> None:
        values = {each.name: arguments.pop(each.name) for each in parameters}
        command(**arguments, **{name: make(**values)})

    described: Any = collected
    described.__signature__ = signature.replace(parameters=all_parameters)
    described.__annotations__ = {each.name: each.annotation for each in all_parameters}
    return collected
