"""`captionserve caption`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, cast

import typer
from captionserve import CaptionClient, CaptionError, CaptionResult, GenerationOptions
from rich.progress import track

from captionserve_server.cli.console import ExitCode, messages, output, print_json


def caption(
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...")],
    target: Annotated[
        str, typer.Option(help="HOST:PORT of the service.", envvar="CAPTIONSERVE_TARGET")
    ] = "127.0.0.1:9000",
    num_beams: Annotated[int | None, typer.Option(help="Beams; 1 is greedy search.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens, the start token included.")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Exponent of the length that divides the score.")
    ] = None,
    early_stopping: Annotated[
        str | None, typer.Option(help="When beam search stops: true, false or never.")
    ] = None,
    num_return_sequences: Annotated[
        int | None, typer.Option(help="Captions to return, best first.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds allowed for each image.", min=0.001)] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Caption image files with a running service."""
    options = GenerationOptions(
        num_beams=num_beams,
        max_length=max_length,
        length_penalty=length_penalty,
        early_stopping=_early_stopping(early_stopping),
        num_return_sequences=num_return_sequences,
    )
    answers: list[dict[str, object]] = []
    with CaptionClient(target, timeout=timeout) as client:
        for image in _with_progress(images):
            answer = _answer(client, image, options)
            answers.append(answer)
            if not as_json:
                _print(answer)
    if as_json:
        print_json(answers)
    if any("error" in answer for answer in answers):
        raise typer.Exit(ExitCode.CALL_FAILED)


def _early_stopping(text: str | None) -> bool | Literal["never"] | None:
    values = {None: None, "true": True, "false": False, "never": "never"}
    if text not in values:
        raise typer.BadParameter("must be true, false or never", param_hint="--early-stopping")
    return cast('bool | Literal["never"] | None', values[text])


def _with_progress(images: list[Path]) -> Iterable[Path]:
    """The images, with a progress bar for a person who waits for several."""
    return track(images, "captioning", console=messages, transient=True, disable=len(images) == 1)


def _answer(client: CaptionClient, image: Path, options: GenerationOptions) -> dict[str, object]:
    """One image's captions or its error; one bad image must not end the others."""
    try:
        return {"image": str(image), "captions": captions_as_json(client.caption(image, options))}
    except CaptionError as error:
        problem = {"code": error.code.name, "reason": error.reason, "message": error.message}
        return {"image": str(image), "error": problem}
    except OSError as error:
        problem = {"code": "NOT_SENT", "reason": "UNREADABLE", "message": error.strerror or ""}
        return {"image": str(image), "error": problem}


def captions_as_json(result: CaptionResult) -> list[dict[str, object]]:
    """A result's captions as JSON values."""
    return [
        {
            "text": found.text,
            "score": found.score,
            "token_ids": list(found.token_ids),
            "token_logprobs": list(found.token_logprobs),
            "finish_reason": found.finish_reason.value,
        }
        for found in result.captions
    ]


def _print(answer: dict[str, object]) -> None:
    if "error" in answer:
        error = cast("dict[str, str]", answer["error"])
        messages.print(f"{answer['image']}: {error['reason']}: {error['message']}", markup=False)
        return
    for found in cast("list[dict[str, object]]", answer["captions"]):
        output.print(f"{answer['image']}: {found['text']} ({found['score']:.3f})", markup=False)
