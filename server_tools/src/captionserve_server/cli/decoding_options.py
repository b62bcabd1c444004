"""The decoding options as command line options, one table for every command that decodes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from captionserve import GenerationOptions

_EARLY_STOPPING: Mapping[str, bool | str] = {"true": True, "false": False, "never": "never"}

# Name in GenerationOptions: type on the command line, help, and the flag if it is another.
_TABLE: dict[str, tuple[Any, str, str | None]] = {
    "num_beams": (int, "Beams; 1 is greedy search.", None),
    "max_length": (int, "Most tokens, the start token included.", None),
    "min_length": (int, "Fewest tokens, the start token included.", None),
    "length_penalty": (float, "Exponent of the length that divides the score.", None),
    "early_stopping": (str, "When beam search stops: true, false or never.", None),
    "num_return_sequences": (int, "Captions to return, best first.", None),
    "do_sample": (bool, "Draw tokens.", None),
    "temperature": (float, "Divides the logits before drawing.", None),
    "top_k": (int, "Draw among so many of the likeliest tokens; 0 for all.", None),
    "top_p": (float, "Draw among tokens that together have this probability.", None),
    "min_p": (float, "Draw among tokens with this share of the likeliest one's.", None),
    "seed": (int, "Of the draws.", None),
    "num_beam_groups": (int, "Groups of beams that are kept apart.", None),
    "diversity_penalty": (float, "How far groups are kept apart.", None),
    "repetition_penalty": (float, "Above 1 makes tokens that occurred unlikelier.", None),
    "no_repeat_ngram_size": (int, "No n-gram of this many tokens twice; 0 is off.", None),
    "bad_words": (list[str], "Word that must not occur; may be repeated.", "--bad-word"),
    "force_words": (list[str], "Word that must occur; may be repeated.", "--force-word"),
    "prefix": (str, "Text with which captions begin.", None),
    "suppress_tokens": (
        list[int],
        "Token id that must not occur; may be repeated.",
        "--suppress-token",
    ),
    "output_attentions": (bool, "Put where each token looked into the JSON.", "--attention"),
    "allow_partial": (bool, "At the deadline, give the best so far.", "--allow-partial"),
}


def with_decoding_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each decoding option; it gets them all as `options`.

    Args:
        command: a typer command with a parameter `options` of type GenerationOptions.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [each for each in signature.parameters.values() if each.name != "options"]
    parameters = [*own, *(_parameter(name) for name in _TABLE)]

    @functools.wraps(command)
    def collected(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in _TABLE}
        command(**arguments, options=_options(given))

    described: Any = collected
    described.__signature__ = signature.replace(parameters=parameters)
    described.__annotations__ = {each.name: each.annotation for each in parameters}
    return collected


def _parameter(name: str) -> inspect.Parameter:
    kind, help_text, flag = _TABLE[name]
    flags = [] if flag is None else [flag]
    option = typer.Option(*flags, help=help_text, rich_help_panel="Decoding")
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _options(given: Mapping[str, Any]) -> GenerationOptions:
    # An option that may be repeated is an empty list where it was not given.
    values = {name: None if value == [] else value for name, value in given.items()}
    text = values["early_stopping"]
    if text is not None:
        if text not in _EARLY_STOPPING:
            raise typer.BadParameter("must be true, false or never", param_hint="--early-stopping")
        values["early_stopping"] = _EARLY_STOPPING[text]
    return GenerationOptions(**values)
