"""`captionserve playground`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from captionserve_server.cli.captioners import (
    local_captioner,
    refusals_as_wrong_usage,
    refuse_what_needs_a_service,
)
from captionserve_server.cli.console import messages
from captionserve_server.cli.service_options import (
    DEFAULT_TARGET,
    ServiceOptions,
    with_service_options,
)
from captionserve_server.settings import host_and_port, is_loopback

if TYPE_CHECKING:
    from captionserve_server.playground.captioners import Captioner


@with_service_options(DEFAULT_TARGET)
def playground(
    context: typer.Context,
    *,
    service: ServiceOptions,
    local: Annotated[
        Path | None,
        typer.Option(help="Model repository to caption with here, instead of a service."),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            help="HOST:PORT of the page; port 0 is any. On another host than this machine's own "
            "loopback, whoever reaches it may caption with this command's token.",
            envvar="CAPTIONSERVE_PLAYGROUND_LISTEN",
        ),
    ] = "127.0.0.1:9080",
    host_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name that leads to the page, such as that of a proxy before it; by others than "
            "these, localhost and this machine's it is not given. May be repeated.",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds allowed for each image.", min=0.001)] = 60,
) -> None:
    """Serve a web page that captions images and shows how their captions came about."""
    try:
        from captionserve_server.playground import run
        from captionserve_server.playground.app import Bounds, playground_app
        from captionserve_server.playground.captioners import Local, Served
        from captionserve_server.playground.security import own_names
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"{error.name} is missing; the page comes with captionserve-server[playground]"
        ) from error
    if local is not None:
        refuse_what_needs_a_service(context)
    try:
        host, _, port = host_and_port(listen).rpartition(":")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--listen") from error
    host = host.strip("[]")

    with ExitStack() as stack:
        listener = stack.enter_context(run.listening(host, int(port)))
        here: Captioner | None = None
        if local is not None:
            here = Local(stack.enter_context(local_captioner(local)), str(local))
        else:
            # What the client would not take is said here; the page's own is made in its event loop.
            with refusals_as_wrong_usage():
                service.client(timeout).close()

        @asynccontextmanager
        async def opened() -> AsyncIterator[Captioner]:
            if here is not None:
                yield here
                return
            async with service.async_client(timeout) as client:
                yield Served(client, service.only_target)

        names = own_names(host, host_name or ())
        app = playground_app(opened, names, Bounds(caption_seconds=timeout))
        where = run.address(listener)

        def announce() -> None:
            messages.print(f"the playground is on http://{where}")
            if not is_loopback(listen):
                messages.print(
                    f"whoever reaches {where} sees the page and may caption with it: without "
                    "encryption, and as the caller that this command's token or certificate names"
                )

        run.run(app, listener, announce)
