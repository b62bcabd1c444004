"""`captionserve caption`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

import typer
from captionserve import Caption, CaptionClient, CaptionError, CaptionResult, GenerationOptions
from rich.progress import track

from captionserve_server.cli.console import ExitCode, messages, output, print_json
from captionserve_server.cli.decoding_options import with_decoding_options


@with_decoding_options
def caption(
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...")],
    *,
    options: GenerationOptions,
    target: Annotated[
        str, typer.Option(help="HOST:PORT of the service.", envvar="CAPTIONSERVE_TARGET")
    ] = "127.0.0.1:9000",
    timeout: Annotated[float, typer.Option(help="Seconds allowed for each image.", min=0.001)] = 30,
    bypass_cache: Annotated[
        bool, typer.Option("--bypass-cache", help="Have every answer computed anew.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print words as they become certain.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Caption image files with a running service."""
    if stream and as_json:
        raise typer.BadParameter("cannot be combined with --json", param_hint="--stream")
    answers: list[dict[str, object]] = []
    with _refusals_as_wrong_usage(), CaptionClient(target, timeout=timeout) as client:
        for image in _with_progress(images, quiet=stream):
            if stream:
                answers.append(_stream(client, image, options))
                continue
            answers.append(_answer(client, image, options, bypass_cache=bypass_cache))
            if not as_json:
                _print(answers[-1])
    if as_json:
        print_json(answers)
    if any("error" in answer for answer in answers):
        raise typer.Exit(ExitCode.CALL_FAILED)


@contextmanager
def _refusals_as_wrong_usage() -> Iterator[None]:
    """Tell a person which value the client would not send, such as a number that is too large."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _with_progress(images: list[Path], *, quiet: bool) -> Iterable[Path]:
    """The images, with a progress bar for a person who waits for several."""
    disable = quiet or len(images) == 1
    return track(images, "captioning", console=messages, transient=True, disable=disable)


def _answer(
    client: CaptionClient, image: Path, options: GenerationOptions, *, bypass_cache: bool
) -> dict[str, object]:
    """One image's captions or its error; one bad image must not end the others."""
    try:
        result = client.caption(image, options, bypass_cache=bypass_cache)
    except (CaptionError, OSError) as error:
        return _problem(image, error)
    return {
        "image": str(image),
        "cached": result.cached,
        "captions": captions_as_json(result),
    }


def _stream(client: CaptionClient, image: Path, options: GenerationOptions) -> dict[str, object]:
    """Print one image's words as they come; its error where it has one."""
    text = f"{image}: "
    try:
        for update in client.caption_stream(image, options):
            output.print(text + update.text, end="", markup=False)
            text = ""
    except (CaptionError, OSError) as error:
        if not text:
            output.print()
        problem = _problem(image, error)
        _print(problem)
        return problem
    output.print()
    return {"image": str(image)}


def _problem(image: Path, error: CaptionError | OSError) -> dict[str, object]:
    if isinstance(error, CaptionError):
        problem = {"code": error.code.name, "reason": error.reason, "message": error.message}
    else:
        problem = {"code": "NOT_SENT", "reason": "UNREADABLE", "message": error.strerror or ""}
    return {"image": str(image), "error": problem}


def captions_as_json(result: CaptionResult) -> list[dict[str, object]]:
    """A result's captions as JSON values."""
    return [_caption_as_json(found) for found in result.captions]


def _caption_as_json(found: Caption) -> dict[str, object]:
    values: dict[str, object] = {
        field.name: getattr(found, field.name) for field in dataclasses.fields(found)
    }
    values["finish_reason"] = found.finish_reason.value
    if found.attention is None:
        del values["attention"]
    else:
        tokens = range(len(found.token_ids))
        values["attention"] = [found.attention.grid(token) for token in tokens]
    return values


def _print(answer: dict[str, object]) -> None:
    if "error" in answer:
        error = cast("dict[str, str]", answer["error"])
        messages.print(f"{answer['image']}: {error['reason']}: {error['message']}", markup=False)
        return
    for found in cast("list[dict[str, object]]", answer["captions"]):
        output.print(f"{answer['image']}: {found['text']} ({found['score']:.3f})", markup=False)
