"""`captionserve caption`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from captionserve import (
    Caption,
    CaptionClient,
    CaptionError,
    CaptionResult,
    GenerationOptions,
)
from rich.progress import track

from captionserve_server.bulk.captioners import Captioner, Local, Service
from captionserve_server.cli.bulk import BulkOptions, caption_many, with_bulk_options
from captionserve_server.cli.console import ExitCode, messages, output, print_json
from captionserve_server.cli.decoding_options import with_decoding_options
from captionserve_server.cli.service_options import (
    DEFAULT_TARGET,
    ServiceOptions,
    with_service_options,
)

if TYPE_CHECKING:
    from captionserve_server.local import LocalCaptioner

Answer = dict[str, object]
"""What is printed of one image, as JSON values."""
Outcome = CaptionResult | Exception
"""What became of one image."""

# Options that say something to a service, or about one.
_SERVICE_ONLY = (
    *(field.name for field in dataclasses.fields(ServiceOptions)),
    *("timeout", "bypass_cache", "stream"),
)


@with_decoding_options
@with_service_options(DEFAULT_TARGET)
@with_bulk_options
def caption(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Image files; with --output or --sidecar also folders, globs, tables (.csv, "
            ".jsonl, .parquet), tar shards, data sets on disk, and lists (.txt, or - for standard "
            "input).",
            metavar="SOURCE...",
        ),
    ],
    *,
    options: GenerationOptions,
    service: ServiceOptions,
    bulk: BulkOptions | None,
    local: Annotated[
        Path | None,
        typer.Option(help="Model repository to caption with here, instead of a service."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds allowed for each image.", min=0.001)] = 30,
    bypass_cache: Annotated[
        bool, typer.Option("--bypass-cache", help="Have every answer computed anew.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print words as they become certain.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Caption image files with a running service, or with a model repository in this process."""
    if stream and as_json:
        raise typer.BadParameter("cannot be combined with --json", param_hint="--stream")
    if local is not None:
        _refuse_what_needs_a_service(context)
    if bulk is not None:
        if stream or bypass_cache:
            raise typer.BadParameter("--stream and --bypass-cache are for single images")
        with _refusals_as_wrong_usage(), ExitStack() as stack:
            captioners = _captioners(stack, service, local, timeout)
            raise typer.Exit(caption_many(sources, captioners, options, bulk, as_json=as_json))
    images = list(map(Path, sources))
    collected: list[Answer] = []
    with _refusals_as_wrong_usage(), ExitStack() as stack:
        if local is not None:
            answers = _answers(images, _local_outcomes(stack, images, options, local))
        else:
            client = stack.enter_context(service.client(timeout))
            if stream:
                answers = (_stream(client, image, options) for image in images)
            else:
                outcomes = _served_outcomes(client, images, options, bypass_cache=bypass_cache)
                answers = _answers(images, outcomes)
        for answer in _with_progress(answers, len(images), quiet=stream):
            collected.append(answer)
            if not (as_json or stream):
                _print(answer)
    if as_json:
        print_json(collected)
    if any("error" in answer for answer in collected):
        raise typer.Exit(ExitCode.CALL_FAILED)


def _refuse_what_needs_a_service(context: typer.Context) -> None:
    for name in _SERVICE_ONLY:
        source = context.get_parameter_source(name)
        # A target in the environment is for other calls.
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            raise typer.BadParameter("cannot be combined with --local", param_hint=flag)


@contextmanager
def _refusals_as_wrong_usage() -> Iterator[None]:
    """Tell a person which value the client would not take, such as an endless timeout."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _with_progress(answers: Iterator[Answer], total: int, *, quiet: bool) -> Iterable[Answer]:
    """The answers, with a progress bar for a person who waits for several."""
    disable = quiet or total == 1
    return track(answers, "captioning", total, console=messages, transient=True, disable=disable)


def _answers(images: Sequence[Path], outcomes: Iterator[Outcome]) -> Iterator[Answer]:
    """Each image's captions or its error; one bad image must not end the others."""
    for image, outcome in zip(images, outcomes, strict=True):
        if isinstance(outcome, CaptionResult):
            captions = captions_as_json(outcome)
            yield {"image": str(image), "cached": outcome.cached, "captions": captions}
        else:
            yield _problem(image, outcome)


def _captioners(
    stack: ExitStack, service: ServiceOptions, local: Path | None, timeout: float
) -> list[Captioner]:
    """Who captions many images, until the stack is left."""
    if local is None:
        clients = service.clients(timeout)
        return [Service(stack.enter_context(client)) for client in clients]
    return [Local(stack.enter_context(_local_captioner(local)))]


def _local_captioner(folder: Path) -> LocalCaptioner:
    # ONNX Runtime takes a while to import, and nothing else here needs it.
    from captionserve_server.local import LocalCaptioner

    return LocalCaptioner(folder)


def _local_outcomes(
    stack: ExitStack, images: Sequence[Path], options: GenerationOptions, folder: Path
) -> Iterator[Outcome]:
    from captionserve_server.bulk.local_outcomes import local_outcomes

    outcomes = local_outcomes(stack.enter_context(_local_captioner(folder)), images, options)
    return _until_refused(outcomes, len(images))


def _served_outcomes(
    client: CaptionClient,
    images: Sequence[Path],
    options: GenerationOptions,
    *,
    bypass_cache: bool,
) -> Iterator[Outcome]:
    outcomes = client.caption_many(images, options, bypass_cache=bypass_cache)
    found = (cast("Outcome", outcome.result or outcome.error) for outcome in outcomes)
    return _until_refused(found, len(images))


def _until_refused(outcomes: Iterator[Outcome], count: int) -> Iterator[Outcome]:
    """The outcomes; where none comes any more, such as with a token of nobody, the error."""
    for done in range(count):
        try:
            outcome = next(outcomes)
        except CaptionError as error:
            yield from [error] * (count - done)
            return
        yield outcome


def _stream(client: CaptionClient, image: Path, options: GenerationOptions) -> Answer:
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


def _problem(image: Path, error: Exception) -> Answer:
    if isinstance(error, CaptionError):
        problem = {"code": error.code.name, "reason": error.reason, "message": error.message}
    else:
        said = error.strerror if isinstance(error, OSError) else None
        problem = {"code": "NOT_SENT", "reason": "UNREADABLE", "message": said or ""}
    return {"image": str(image), "error": problem}


def captions_as_json(result: CaptionResult) -> list[dict[str, object]]:
    """A result's captions as JSON values."""
    return [_caption_as_json(found) for found in result.captions]


def _caption_as_json(found: Caption) -> Answer:
    values: Answer = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    values["finish_reason"] = found.finish_reason.value
    values["words"] = [_without_none(dataclasses.asdict(word)) for word in found.words]
    values["review_reasons"] = [reason.value for reason in found.review_reasons]
    if found.attention is not None:
        tokens = range(len(found.token_ids))
        values["attention"] = [found.attention.grid(token) for token in tokens]
    return _without_none(values)


def _without_none(values: Answer) -> Answer:
    """Without what was not asked for."""
    return {name: value for name, value in values.items() if value is not None}


def _print(answer: Answer) -> None:
    if "error" in answer:
        error = cast("dict[str, str]", answer["error"])
        messages.print(f"{answer['image']}: {error['reason']}: {error['message']}", markup=False)
        return
    for found in cast("list[dict[str, object]]", answer["captions"]):
        doubts = ", ".join(cast("list[str]", found["review_reasons"]))
        review = f" needs review: {doubts}" if found["needs_review"] else ""
        output.print(
            f"{answer['image']}: {found['text']} ({found['score']:.3f}){review}", markup=False
        )
