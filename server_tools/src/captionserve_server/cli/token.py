"""`captionserve token`: who may call a service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from captionserve_server.cli.console import messages, output
from captionserve_server.gateway.tokens import create_token, read_tokens, revoke_tokens

token = typer.Typer(help="Tokens of those who may call a service.", no_args_is_help=True)

TokensFile = Annotated[
    Path, typer.Option(help="File that keeps the tokens' hashes.", envvar="CAPTIONSERVE_TOKENS")
]
Name = Annotated[str, typer.Argument(help="Who calls with it.")]


@token.command()
def create(name: Name, tokens: TokensFile) -> None:
    """Make a token and print it; it is kept nowhere else, and cannot be shown again."""
    try:
        made = create_token(tokens, name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
    output.print(made, markup=False)


@token.command()
def revoke(
    name: Name,
    tokens: TokensFile,
    keep_newest: Annotated[
        bool, typer.Option("--keep-newest", help="But the one that was created last stays.")
    ] = False,
) -> None:
    """Refuse all tokens of a name from now on."""
    count = revoke_tokens(tokens, name, keep_newest=keep_newest)
    if not count and not keep_newest:
        raise typer.BadParameter("there is no token of that name", param_hint="NAME")
    messages.print(f"revoked {count}")


@token.command("list")
def list_names(tokens: TokensFile) -> None:
    """Print the names that have tokens, and how many each."""
    names = [each.name for each in read_tokens(tokens).stored]
    for name in sorted(set(names)):
        output.print(name, names.count(name), markup=False)
