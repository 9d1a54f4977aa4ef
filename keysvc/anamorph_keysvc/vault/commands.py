"""``anamorph-keysvc vault setup|check``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anamorph_keysvc.vault import check as checks
from anamorph_keysvc.vault import setup as setups
from anamorph_keysvc.vault.admin import Admin
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.settings import VaultSettings, load, read_secret
from anamorph_keysvc.vault.transport import Transport

vault_cli = typer.Typer(no_args_is_help=True, help="HashiCorp Vault as key-management service.")

SettingsOption = Annotated[Path, typer.Option("--settings", help="TOML file of the Vault settings")]
TokenOption = Annotated[
    Path | None, typer.Option("--token-file", help="file with an administrator's token; else it is asked for")
]
CheckerOption = Annotated[
    Path | None, typer.Option("--token-file", help="file with a token of the policy anamorph-checker")
]
JsonOption = Annotated[bool, typer.Option("--json", help="for programs")]
# One person at a terminal waits longer than a request may.
_PATIENCE = {"deadline_s": 30, "connect_timeout_s": 5, "read_timeout_s": 30}


@vault_cli.command()
def setup(settings: SettingsOption, token_file: TokenOption = None, as_json: JsonOption = False) -> None:
    """Make mount, policies, roles, audit devices and keys where they are missing; correct what differs."""
    chosen = load(settings)
    token = read_secret(token_file, "a token") if token_file else typer.prompt("Token", hide_input=True)
    with _admin(chosen, token) as admin:
        done = setups.setup(admin, chosen)
    rows = [(item.what, "made" if item.changed else "was there") for item in done]
    _show([asdict(item) for item in done], rows, as_json=as_json)


@vault_cli.command()
def check(settings: SettingsOption, token_file: CheckerOption = None, as_json: JsonOption = False) -> None:
    """Compare a running Vault with what setup makes; exit code 1 if something is wrong."""
    chosen = load(settings)
    with ExitStack() as ends:
        vault = Vault.open(chosen.model_copy(update=_PATIENCE))
        ends.callback(vault.close)
        token = read_secret(token_file, "a token") if token_file else None
        admin = ends.enter_context(_admin(chosen, token)) if token else None
        found = checks.check(vault, admin)
    rows = [(item.what, item.outcome, item.detail) for item in found]
    _show([asdict(item) for item in found], rows, as_json=as_json)
    if any(item.outcome == "wrong" for item in found):
        raise typer.Exit(1)


@contextmanager
def _admin(settings: VaultSettings, token: str) -> Iterator[Admin]:
    transport = Transport(settings.model_copy(update=_PATIENCE))
    try:
        yield Admin(transport, token)
    finally:
        transport.close()


def _show(items: list[dict[str, Any]], rows: Iterable[tuple[str, ...]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(items, indent=2))
        return
    table = Table(box=None, show_header=False)
    for row in rows:
        table.add_row(*map(Text, row))  # as Text: brackets in a message are no markup
    Console().print(table)
