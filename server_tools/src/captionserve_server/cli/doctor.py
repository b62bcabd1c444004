"""`captionserve doctor`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from captionserve_server.cli.console import ExitCode, output, print_json, stages
from captionserve_server.cli.settings_options import variable
from captionserve_server.runtime.cores import available_cores
from captionserve_server.runtime.processor import processor
from captionserve_server.serving.doctor import (
    MEASURED_CORES,
    Measured,
    can_serve,
    examine,
    expected,
)


def doctor(
    tritonserver: Annotated[
        Path | None,
        typer.Option(
            help="The tritonserver to try; else as serve finds it.",
            envvar=variable("tritonserver"),
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at this machine: what a service needs of it, and what was measured on such a one.

    Exit code 0 where it can serve, else 1.
    """
    with stages("looking at the machine, and starting Triton"):
        findings = examine(tritonserver)
    measured, serves = expected(processor()), can_serve(findings)
    if as_json:
        print_json(
            {
                "can_serve": serves,
                "findings": [dataclasses.asdict(finding) for finding in findings],
                "measured": measured and {**dataclasses.asdict(measured), "cores": MEASURED_CORES},
            }
        )
    else:
        for finding in findings:
            line = f"{finding.verdict:<8}{finding.name:<15}{finding.found}"
            output.print(line, markup=False)
            if finding.advice:
                output.print(f"{'':<8}-> {finding.advice}", markup=False)
        output.print(_expectation(measured, available_cores()), markup=False)
        output.print("captionserve can serve here" if serves else "captionserve cannot serve here")
    if not serves:
        raise typer.Exit(ExitCode.FAILED)


def _expectation(measured: Measured | None, cores: int) -> str:
    """What to expect of a full-size model, in a sentence, and how far that can be relied on."""
    if measured is None:
        return "to expect: nothing was measured on such a processor; make bench measures yours"
    figures = ", ".join(
        f"{precision} {rate} images/s in {measured.gibibytes[precision]} GiB"
        for precision, rate in measured.images_per_second.items()
    )
    here = "" if cores == MEASURED_CORES else f"; {cores} have not been measured"
    return (
        f"to expect of a full-size model, 4 beams, 16 tokens, 16 calls at once: {figures}, as "
        f"measured on {MEASURED_CORES} cores with {measured.instructions}{here} "
        f"(docs/measurements/{measured.page})"
    )
