"""Which service a command asks, how it knows it, and as whom; the same for all commands."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from captionserve import AsyncCaptionClient, CaptionClient, tls_credentials

from captionserve_server.cli.parameters import with_parameters

DEFAULT_TARGET = "127.0.0.1:9000"

_PANEL = "Service"


@dataclass(frozen=True)
class ServiceOptions:
    """The options as they were given.

    Attributes:
        target: each HOST:PORT; none where the command starts a service of its own.
        tls_ca: certificates that vouch for the service; with them TLS is spoken.
        tls_certificate: the caller's own, where the service asks for one.
        tls_key: its private key.
        token_file: holds the token that says who calls.
    """

    target: Sequence[str]
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None

    @property
    def tls(self) -> tuple[Path | None, Path | None, Path | None]:
        """What `tls_credentials` takes; all None where TLS is not spoken."""
        return self.tls_ca, self.tls_certificate, self.tls_key

    @property
    def only_target(self) -> str:
        """The service, where one is wanted."""
        if len(self.target) != 1:
            raise typer.BadParameter("one service is wanted", param_hint="--target")
        return self.target[0]

    def in_any_folder(self) -> ServiceOptions:
        """The same for a process that works in another folder."""
        files: dict[str, Any] = {
            name: value.absolute() for name, value in vars(self).items() if isinstance(value, Path)
        }
        return dataclasses.replace(self, **files)

    def token(self) -> str | None:
        """What says who calls; from a file, for others can read a process's flags."""
        return None if self.token_file is None else self.token_file.read_text().strip()

    def clients(self, timeout: float) -> list[CaptionClient]:
        """A client of each service; its calls take so many seconds at most.

        Raises:
            ValueError: if the client does not take the options, such as a certificate without key.
        """
        credentials = tls_credentials(*self.tls) if any(self.tls) else None
        token = self.token()
        return [
            CaptionClient(target, timeout=timeout, credentials=credentials, token=token)
            for target in self.target
        ]

    def async_client(self, timeout: float) -> AsyncCaptionClient:
        """The client of the only service for the event loop that runs; likewise."""
        credentials = tls_credentials(*self.tls) if any(self.tls) else None
        return AsyncCaptionClient(
            self.only_target, timeout=timeout, credentials=credentials, token=self.token()
        )

    def client(self, timeout: float) -> CaptionClient:
        """The client of the only service; likewise."""
        return dataclasses.replace(self, target=[self.only_target]).clients(timeout)[0]


def with_service_options(
    target: str | None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a typer command the options of a service; it gets them all as `service`.

    Args:
        target: whom it asks by default; None if it starts a service of its own then.
    """
    if target is None:
        to_ask = typer.Option(
            help="HOST:PORT of a running service; else one is started.", rich_help_panel=_PANEL
        )
    else:
        to_ask = typer.Option(
            help="HOST:PORT of the service; of many images several share the work.",
            envvar="CAPTIONSERVE_TARGET",
            rich_help_panel=_PANEL,
        )
    parameters = [
        _parameter("target", list[str], [target] if target else [], to_ask),
        _file("tls_ca", "Certificates that vouch for the service, PEM; TLS is spoken."),
        _file("tls_certificate", "The caller's own certificate, PEM, if the service asks for one."),
        _file("tls_key", "Its private key, PEM."),
        _file("token_file", "File with the token that says who calls."),
    ]

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        return with_parameters(command, "service", parameters, ServiceOptions)

    return decorated


def _file(name: str, help: str) -> inspect.Parameter:
    option = typer.Option(help=help, exists=True, dir_okay=False, rich_help_panel=_PANEL)
    return _parameter(name, Path | None, None, option)


def _parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
