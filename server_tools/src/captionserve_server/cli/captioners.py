"""Who captions many images for a command: services, or a model repository in its own process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from captionserve import Framing

from captionserve_server.bulk.captioners import Captioner, Local, Service
from captionserve_server.cli.service_options import ServiceOptions
from captionserve_server.runtime.cores import available_cores

if TYPE_CHECKING:
    from captionserve_server.local import LocalCaptioner

# Options that say something to a service, or about one.
_SERVICE_ONLY = (
    *(field.name for field in dataclasses.fields(ServiceOptions)),
    *("timeout", "bypass_cache"),
)


@contextmanager
def captioners(
    service: ServiceOptions,
    framing: Framing,
    local: Path | None,
    timeout: float,
    cores: int | None = None,
) -> Iterator[Sequence[Captioner]]:
    """Those that the options ask for, until the end of the block.

    Args:
        service: the services, where there is no `local`.
        framing: how images are resized.
        local: the model repository.
        timeout: seconds that a service has for each image.
        cores: that a model here may keep busy; None for all there are.

    Raises:
        ValueError: as ServiceOptions.clients.
    """
    with ExitStack() as stack:
        if local is None:
            clients = service.clients(timeout)
            yield [Service(stack.enter_context(client), framing) for client in clients]
        else:
            # With all cores ONNX Runtime knows best, as it keeps threads on their cores.
            threads = 0 if cores is None or cores >= available_cores() else cores
            yield [Local(stack.enter_context(local_captioner(local, threads)), framing)]


def local_captioner(folder: Path, threads: int = 0) -> LocalCaptioner:
    """The captioner of a model repository."""
    # ONNX Runtime takes a while to import, and who asks a service does not need it.
    from captionserve_server.local import LocalCaptioner

    return LocalCaptioner(folder, threads=threads)


def refuse_what_needs_a_service(context: typer.Context) -> None:
    """Refuse options that go with a service, where --local was given."""
    for name in _SERVICE_ONLY:
        source = context.get_parameter_source(name)
        # A target in the environment is for other calls.
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            raise typer.BadParameter("cannot be combined with --local", param_hint=flag)


@contextmanager
def refusals_as_wrong_usage() -> Iterator[None]:
    """Tell a person which value the client would not take, such as an endless timeout."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
