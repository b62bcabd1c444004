"""`captionserve caption`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from captionserve import (
    Caption,
    CaptionClient,
    CaptionError,
    CaptionResult,
    CaptionUpdate,
    DescribedRegion,
    Framing,
    GenerationOptions,
)
from captionserve._alt_text import DEFAULT_MAX_CHARS
from rich.progress import track

from captionserve_server.cli.bulk import (
    BulkOptions,
    caption_many,
    refuse_parts,
    with_bulk_options,
)
from captionserve_server.cli.captioners import (
    captioners,
    local_captioner,
    refusals_as_wrong_usage,
    refuse_what_needs_a_service,
)
from captionserve_server.cli.console import ExitCode, messages, output, print_json
from captionserve_server.cli.decoding_options import with_decoding_options
from captionserve_server.cli.framing_options import with_framing_options
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
Asked = tuple[Iterator[Iterator[CaptionUpdate]], Iterator[Outcome]]
"""Of each image its words as they become certain, and what became of it; what is not read is not
asked."""


@with_decoding_options
@with_framing_options
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
    framing: Framing,
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
    alt_text: Annotated[
        bool, typer.Option("--alt-text", help="Give captions as drafts of alt text.")
    ] = False,
    alt_text_chars: Annotated[
        int | None,
        typer.Option(help=f"Characters of an alt text at most; else {DEFAULT_MAX_CHARS}.", min=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Caption image files with a running service, or with a model repository in this process."""
    if stream and (as_json or alt_text):
        raise typer.BadParameter(
            "cannot be combined with --json or --alt-text", param_hint="--stream"
        )
    if alt_text_chars is not None and not alt_text:
        raise typer.BadParameter("goes with --alt-text", param_hint="--alt-text-chars")
    max_chars = (alt_text_chars or DEFAULT_MAX_CHARS) if alt_text else None
    if local is not None:
        refuse_what_needs_a_service(context)
    if bulk is not None:
        if stream or bypass_cache:
            raise typer.BadParameter("--stream and --bypass-cache are for single images")
        refuse_parts(framing)
        bulk = dataclasses.replace(bulk, alt_text_chars=max_chars)
        with refusals_as_wrong_usage(), captioners(service, framing, local, timeout) as who:
            raise typer.Exit(
                caption_many(
                    sources, who, options, bulk, resize=framing.get("resize"), as_json=as_json
                )
            )
    images = list(map(Path, sources))
    collected: list[Answer] = []
    with refusals_as_wrong_usage(), ExitStack() as stack:
        if local is not None:
            captioner = stack.enter_context(local_captioner(local))
            updates, outcomes = _local(captioner, images, options, framing)
        else:
            client = stack.enter_context(service.client(timeout))
            updates, outcomes = _served(client, images, options, framing, bypass_cache=bypass_cache)
        answers = _answers(images, outcomes, max_chars)
        if stream:
            answers = (_print_words(*each) for each in zip(images, updates, strict=True))
        for answer in _with_progress(answers, len(images), quiet=stream):
            collected.append(answer)
            if not (as_json or stream):
                _print(answer)
    if as_json:
        print_json(collected)
    if any("error" in answer for answer in collected):
        raise typer.Exit(ExitCode.CALL_FAILED)


def _with_progress(answers: Iterator[Answer], total: int, *, quiet: bool) -> Iterable[Answer]:
    """The answers, with a progress bar for a person who waits for several."""
    disable = quiet or total == 1
    return track(answers, "captioning", total, console=messages, transient=True, disable=disable)


def _answers(
    images: Sequence[Path], outcomes: Iterator[Outcome], alt_text_chars: int | None
) -> Iterator[Answer]:
    """Each image's captions or its error; one bad image must not end the others.

    Args:
        images: the files.
        outcomes: of each of them.
        alt_text_chars: how long an alt text may be; None for none.
    """
    for image, outcome in zip(images, outcomes, strict=True):
        if isinstance(outcome, CaptionResult):
            answer: Answer = {"image": str(image), "cached": outcome.cached}
            if alt_text_chars is not None:
                alt_text = outcome.alt_text(alt_text_chars, file_name=image)
                answer["alt_text"] = dataclasses.asdict(alt_text)
            yield {**answer, **_described_as_json(outcome)}
        else:
            yield _problem(image, outcome)


def _local(
    captioner: LocalCaptioner,
    images: Sequence[Path],
    options: GenerationOptions,
    framing: Framing,
) -> Asked:
    from captionserve_server.bulk.local_outcomes import local_outcomes, local_updates

    return (
        (local_updates(captioner, image, options, framing) for image in images),
        _until_refused(local_outcomes(captioner, images, options, framing), len(images)),
    )


def _served(
    client: CaptionClient,
    images: Sequence[Path],
    options: GenerationOptions,
    framing: Framing,
    *,
    bypass_cache: bool,
) -> Asked:
    outcomes = client.caption_many(images, options, bypass_cache=bypass_cache, **framing)
    found = (cast("Outcome", outcome.result or outcome.error) for outcome in outcomes)
    return (
        (client.caption_stream(image, options, **framing) for image in images),
        _until_refused(found, len(images)),
    )


def _until_refused(outcomes: Iterator[Outcome], count: int) -> Iterator[Outcome]:
    """The outcomes; where none comes any more, such as with a token of nobody, the error."""
    for done in range(count):
        try:
            outcome = next(outcomes)
        except CaptionError as error:
            yield from [error] * (count - done)
            return
        yield outcome


def _print_words(image: Path, updates: Iterator[CaptionUpdate]) -> Answer:
    """Print one image's words as they come, then its parts' captions; its error if it has one."""
    text = f"{image}: "
    regions: list[Answer] = []
    try:
        for update in updates:
            output.print(text + update.text, end="", markup=False)
            text = ""
            if update.result is not None:
                regions = list(map(_region_as_json, update.result.regions))
    except (CaptionError, OSError) as error:
        if not text:
            output.print()
        problem = _problem(image, error)
        _print(problem)
        return problem
    output.print()
    _print_regions(image, regions)
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


def _described_as_json(result: CaptionResult) -> Answer:
    """A result's captions, and what else was asked for: parts, search and stages."""
    described: Answer = {"captions": captions_as_json(result)}
    if result.regions:
        described["regions"] = list(map(_region_as_json, result.regions))
    if result.beams is not None:
        described["beams"] = dataclasses.asdict(result.beams)
    if result.stages:
        described["stages"] = {stage.name: stage.milliseconds for stage in result.stages}
    return described


def _region_as_json(region: DescribedRegion) -> Answer:
    return {"box": region.box, "captions": list(map(_caption_as_json, region.captions))}


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
    if "alt_text" in answer:
        _print_alt_text(answer["image"], cast("dict[str, Any]", answer["alt_text"]))
    else:
        _print_captions(answer["image"], answer["captions"])
    _print_regions(answer["image"], answer.get("regions", []))


def _print_alt_text(image: object, alt_text: dict[str, Any]) -> None:
    output.print(f"{image}: {alt_text['text']}", markup=False)
    for warning in alt_text["warnings"]:
        messages.print(f"{image}: warning: {warning.replace('_', ' ')}", markup=False)


def _print_regions(image: object, regions: object) -> None:
    for region in cast("list[Answer]", regions):
        left, top, right, bottom = cast("tuple[int, ...]", region["box"])
        _print_captions(f"{image} [{left},{top},{right},{bottom}]", region["captions"])


def _print_captions(name: object, captions: object) -> None:
    for found in cast("list[Answer]", captions):
        doubts = ", ".join(cast("list[str]", found["review_reasons"]))
        review = f" needs review: {doubts}" if found["needs_review"] else ""
        output.print(f"{name}: {found['text']} ({found['score']:.3f}){review}", markup=False)
