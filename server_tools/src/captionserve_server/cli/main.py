"""The `captionserve` command: puts the subcommands together and turns errors into sentences."""

from __future__ import annotations

import sys

import typer
from captionserve import CaptionError

from captionserve_server.cli.bench import bench
from captionserve_server.cli.bulk_ray import bulk_ray
from captionserve_server.cli.calibrate import calibrate
from captionserve_server.cli.caption import caption
from captionserve_server.cli.console import ExitCode, messages
from captionserve_server.cli.demo import demo
from captionserve_server.cli.doctor import doctor
from captionserve_server.cli.evaluate import evaluate
from captionserve_server.cli.export import export, make_checkpoint
from captionserve_server.cli.health import health
from captionserve_server.cli.load import load
from captionserve_server.cli.playground import playground
from captionserve_server.cli.serve import reload, serve
from captionserve_server.cli.token import token
from captionserve_server.export.errors import UnsupportedCheckpointError
from captionserve_server.serving.installation import TritonNotFoundError
from captionserve_server.serving.launch import LaunchError
from captionserve_server.serving.service import NoModelRepositoryError
from captionserve_server.serving.supervisor import TritonEndedError
from captionserve_server.serving.triton_process import TritonStartError
from captionserve_server.tracing import TracingNotInstalledError

app = typer.Typer(
    name="captionserve",
    help="Export, serve and use image captioners.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(token, name="token")
for command in (
    export,
    serve,
    reload,
    health,
    caption,
    playground,
    bulk_ray,
    evaluate,
    calibrate,
    make_checkpoint,
    demo,
    doctor,
    bench,
    load,
):
    app.command()(command)

# Errors that a person can act on; anything else is ours and keeps its stack trace.
_EXIT_CODES: dict[type[Exception], ExitCode] = {
    UnsupportedCheckpointError: ExitCode.UNSUPPORTED,
    TritonNotFoundError: ExitCode.NOT_STARTED,
    TritonStartError: ExitCode.NOT_STARTED,
    NoModelRepositoryError: ExitCode.NOT_STARTED,
    LaunchError: ExitCode.NOT_STARTED,
    TracingNotInstalledError: ExitCode.NOT_STARTED,
    TritonEndedError: ExitCode.FAILED,
    CaptionError: ExitCode.CALL_FAILED,
    OSError: ExitCode.FAILED,
}


def main() -> None:
    """Run the command line; the process ends with an ExitCode."""
    try:
        app()
    except tuple(_EXIT_CODES) as error:
        code = next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))
        messages.print(f"error: {error}", markup=False)
        sys.exit(code)


if __name__ == "__main__":
    main()
