"""`captionserve load`: which rate of calls a service holds, and what becomes of more."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from captionserve_server.cli.console import ExitCode, messages, output, stages
from captionserve_server.cli.service_options import ServiceOptions, with_service_options

# Characters that the table needs, also where output goes to a file.
_LEAST_WIDTH = 160
_DOTS_PER_INCH = 110


@with_service_options(None)
def load(
    *,
    service: ServiceOptions,
    repository: Annotated[
        Path | None,
        typer.Option(help="Model repository to serve when no target is given.", file_okay=False),
    ] = None,
    replicas: Annotated[
        int, typer.Option(help="Services of it; the calls go to them in turn.", min=1)
    ] = 1,
    cores_each: Annotated[
        int | None,
        typer.Option(help="Cores that each of them is held to, others than the others.", min=1),
    ] = None,
    rates: Annotated[
        list[float] | None,
        typer.Option(
            help="Calls a second; may be repeated. By default a sweep: doubled until one is not "
            "held, then halfway between, until the knee is known to 5 %.",
            min=0.01,
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Seconds at each rate; a tenth of it is not counted.", min=1)
    ] = 20,
    deadline: Annotated[
        float, typer.Option(help="Seconds of each call, from when it is due.", min=0.001)
    ] = 10,
    p99_seconds: Annotated[
        float,
        typer.Option(
            help="A rate is held if 95 % of its calls are answered, and the 99th percentile of "
            "their latencies is no more than this.",
            min=0.001,
        ),
    ] = 1,
    connections: Annotated[
        int, typer.Option(help="Connections; calls take them in turn.", min=1)
    ] = 4,
    cached_share: Annotated[
        float,
        typer.Option(
            help="Share of the calls that may be answered from memory; all others are computed.",
            min=0,
            max=1,
        ),
    ] = 0,
    images: Annotated[int, typer.Option(help="Different images.", min=1)] = 16,
    num_beams: Annotated[int, typer.Option(help="Beams.", min=1)] = 4,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of every caption. By default they end by themselves.", min=1),
    ] = None,
    most_other_cores: Annotated[
        float | None,
        typer.Option(
            help="On a machine that others use as well: wait until they take no more cores than "
            "this, and measure a rate again during which they took more.",
            min=0,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the times at which calls come.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write every value to.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="PNG file to draw.")] = None,
) -> None:
    """Offer calls at rates that do not wait for answers, and find the highest that is held."""
    # Imported here: charts and facts of the machine need packages that serving does not.
    from captionserve_server.bench.load.calls import Service
    from captionserve_server.bench.load.chart import draw_chart
    from captionserve_server.bench.load.figures import Bounds
    from captionserve_server.bench.load.replicas import TooFewCoresError
    from captionserve_server.bench.load.report import Plan
    from captionserve_server.bench.load.run import load_test

    if bool(service.target) == (repository is not None):
        raise typer.BadParameter("one of the two is wanted", param_hint="--target, --repository")
    if repository is None and (
        replicas != 1 or cores_each is not None or most_other_cores is not None
    ):
        hint = "--replicas, --cores-each, --most-other-cores"
        raise typer.BadParameter("these are for --repository alone", param_hint=hint)
    if p99_seconds >= deadline:
        raise typer.BadParameter("must be less than --deadline", param_hint="--p99-seconds")
    options = {"num_beams": num_beams}
    if tokens is not None:
        # Lengths count the start token.
        options |= dict.fromkeys(("min_length", "max_length"), tokens + 1)
    # As Ctrl-C: the services that were started are ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plan = Plan(
        command=shlex.join(["captionserve", *sys.argv[1:]]),
        repository=repository,
        replicas=replicas,
        cores_each=cores_each,
        rates=tuple(rates or ()),
        seconds=seconds,
        deadline_seconds=deadline,
        bounds=Bounds(p99_seconds),
        connections=connections,
        cached_share=cached_share,
        images=images,
        options=options,
        seed=seed,
        most_other_cores=most_other_cores,
    )
    asked = None
    if service.target:
        asked = Service(service.only_target, service.tls, service.token())
    with stages("preparing") as progress:
        try:
            report = load_test(plan, asked, progress)
        except TooFewCoresError as error:
            raise typer.BadParameter(str(error), param_hint="--cores-each") from error
    output.width = max(output.width, _LEAST_WIDTH)
    output.print(report.as_tables())
    if json_file is not None:
        json_file.write_text(report.as_json())
    if chart is not None:
        draw_chart(report).savefig(chart, format="png", dpi=_DOTS_PER_INCH)
    knee = report.knee
    if knee.rate is None:
        messages.print("error: no rate was held")
        raise typer.Exit(ExitCode.FAILED)
    if knee.missed is not None and not knee.certain:
        messages.print("error: the generator was late, so the knee may be its own")
        raise typer.Exit(ExitCode.FAILED)
