"""`captionserve export` and `captionserve make-checkpoint`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from captionserve_server.cli.console import ExitCode, messages, output, print_json, stages
from captionserve_server.export.precision import Precision
from captionserve_server.runtime.graph_format import GraphFormat


def export(
    checkpoint: Annotated[str, typer.Argument(help="Local folder or hub id.")],
    output_folder: Annotated[
        Path, typer.Option("--output", help="Model repository to write or to add to.")
    ],
    precision: Annotated[Precision, typer.Option(help="How weights are kept.")] = Precision.FP32,
    version: Annotated[int, typer.Option(min=1, help="Version number in every model.")] = 1,
    graph_format: Annotated[
        GraphFormat, typer.Option("--format", help="What the graphs are written as.")
    ] = GraphFormat.ONNX,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Rows and columns of the images that the model shall read, for which its position "
            "embeddings are interpolated; the checkpoint's own if none is given."
        ),
    ] = None,
    compare_images: Annotated[
        int,
        typer.Option(
            min=0, help="Scenes to caption in fp32 and in a lower precision, for comparison."
        ),
    ] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Export a checkpoint into a complete Triton model repository, checked against PyTorch."""
    # Imported here: PyTorch takes seconds to import, and serving does without it.
    from captionserve_server.export.image_size import UnsupportedImageSizeError
    from captionserve_server.export.logs import quiet_libraries
    from captionserve_server.export.repository import (
        OtherFormatError,
        UnsupportedFormatError,
        export_checkpoint,
    )
    from captionserve_server.export.verify import GraphMismatchError

    quiet_libraries()
    try:
        with stages("loading the checkpoint") as progress:
            report = export_checkpoint(
                checkpoint,
                output_folder,
                version=version,
                graph_format=graph_format,
                precision=precision,
                image_size=image_size,
                compare=_comparison(compare_images),
                progress=progress,
            )
    except (OtherFormatError, UnsupportedFormatError) as error:
        raise typer.BadParameter(str(error), param_hint="--format") from error
    except UnsupportedImageSizeError as error:
        raise typer.BadParameter(str(error), param_hint="--image-size") from error
    except FileExistsError as error:
        text = f"version {version} is there already"
        raise typer.BadParameter(text, param_hint="--version") from error
    except GraphMismatchError as error:
        messages.print(f"error: {error}; nothing was written", markup=False)
        raise typer.Exit(ExitCode.FAILED) from error
    if as_json:
        print_json(report.as_json())
        return
    output.print(
        f"exported version {report.version}, {report.bytes_on_disk / 1e6:.1f} MB; largest "
        f"difference from PyTorch: {report.verification.logprobs:.1e} in log-probabilities, "
        f"{report.verification.encoder_states:.1e} in encoder states"
    )
    if report.unknown_tokens:
        output.print(
            f"the tokenizer has {report.unknown_tokens} more tokens than the model; options whose "
            "text has one of them are refused"
        )
    if report.agreement:
        output.print(
            "of {images} held-out scenes of the demo, {same_captions:.1%} get the same caption as "
            "in fp32; CIDEr-D {cider_d:.2f}, where fp32 reaches {cider_d_of_fp32:.2f}".format_map(
                report.agreement
            )
        )


def _comparison(images: int) -> Callable[[Path, Path], dict[str, float]]:
    """What compares a lower precision's captions with those of fp32."""

    def compare(fp32: Path, quantised: Path) -> dict[str, float]:
        from captionserve_server.evaluation.agreement import caption_agreement

        return dataclasses.asdict(caption_agreement(fp32, quantised, images)) if images else {}

    return compare


def make_checkpoint(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a random-weight checkpoint of nlpconnect/vit-gpt2-image-captioning's exact shapes.

    For measuring speed and memory, which do not depend on the weights.
    """
    from captionserve_server.export.logs import quiet_libraries
    from captionserve_server.export.random_checkpoint import CheckpointShape
    from captionserve_server.export.random_checkpoint import make_checkpoint as write_checkpoint

    quiet_libraries()
    with stages("making random weights"):
        write_checkpoint(folder, CheckpointShape(), seed=seed)
    output.print(f"wrote a random checkpoint to {folder}")
