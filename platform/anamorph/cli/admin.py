"""How the admin commands reach the key service, what they ask before harm, and what they advise after errors.

A command decorated with ``connected`` takes a ``Connection`` first, and with it the options
``--keysvc``, ``--api-key-file`` and ``--home``. An API key is never an argument: other users
of the machine see those.
"""

from __future__ import annotations

import inspect
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec
from urllib.parse import urlsplit

import typer

from anamorph import errors
from anamorph.cli.machine.home import Home, HomeOption
from anamorph.errors import ServiceError, SetupError
from anamorph.wire.admin import Role
from anamorph.wire.credential import MOST_BYTES, TOKEN
from anamorph.wire.ids import check_label
from anamorph.wire.keyservice import KeyService

URL_VARIABLE = "ANAMORPH_KEYSVC_URL"
KEY_VARIABLE = "ANAMORPH_API_KEY_FILE"
_ANSWERED_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

P = ParamSpec("P")


def _label(value: str | None) -> str | None:
    try:
        return value if value is None else check_label(value)
    except errors.InvalidId as error:
        raise typer.BadParameter(str(error)) from None


def _answered(value: str) -> str:
    if not _ANSWERED_ID.fullmatch(value):
        raise typer.BadParameter("an id as the key service gave it: letters, digits, '_' and '-'")
    return value


Tenant = Annotated[str, typer.Argument(callback=_label, help="Tenant id.")]
Model = Annotated[str, typer.Argument(callback=_label, help="Model id.")]
Version = Annotated[int, typer.Argument(min=1, help="Number of the key version.")]
AnsweredId = Annotated[str, typer.Argument(metavar="ID", callback=_answered, help="Id from the list.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; needed where nobody can answer.")]

_Keysvc = Annotated[str | None, typer.Option("--keysvc", envvar=URL_VARIABLE, help="URL of the key service.")]
_ApiKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", envvar=KEY_VARIABLE, help="0600 file with the API key.")
]
_OPTIONS: dict[str, Any] = {"keysvc": _Keysvc, "api_key_file": _ApiKeyFile, "home": HomeOption}


@dataclass(frozen=True)
class Connection:
    """Where the key service is and whose key to show it; what is absent comes from the home of ``up``."""

    keysvc: str | None = None
    api_key_file: Path | None = None
    home: Path | None = None

    @contextmanager
    def keys(self, tenant: str | None = None, *, look: str) -> Iterator[KeyService]:
        """The key service for a block of calls.

        Args:
            tenant: in the home of ``up``, its admin's key is used; the platform's if absent.
            look: the command that shows what there is, advised after an error.

        Raises:
            SetupError: no key service is known, or the key's file is not fit.
            ServiceError: as the block raised it, with advice.
        """
        url, key_file = self._places(tenant)
        with KeyService(url, read_api_key(key_file)) as keys:
            try:
                yield keys
            except ServiceError as error:
                raise advised(error, look) from None

    def _places(self, tenant: str | None) -> tuple[str, Path]:
        if self.keysvc is not None:
            if self.api_key_file is None:
                # A home's keys are for the home's own service.
                raise SetupError(f"--keysvc needs --api-key-file (or {KEY_VARIABLE}) with it")
            return _checked(self.keysvc), self.api_key_file
        home = Home.at(self.home)
        state = home.load()
        if state is None or not state.ready:
            raise SetupError(
                f"which key service? Pass --keysvc and --api-key-file, set {URL_VARIABLE} and {KEY_VARIABLE},"
                " or start one on this machine: anamorph up"
            )
        return state.urls["keysvc"], self.api_key_file or _home_key(home, tenant)


def connected(command: Callable[Concatenate[Connection, P], None]) -> Callable[..., None]:
    """Give a command the connection's options; it gets the ``Connection`` they make as first argument."""

    @wraps(command)
    def run(*, keysvc: str | None, api_key_file: Path | None, home: Path | None, **values: Any) -> None:
        connection: Any = command  # the parameters after the first are passed by name
        connection(Connection(keysvc, api_key_file, home), **values)

    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in _OPTIONS.items()
    ]
    parameters = [*(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own), *added]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None:
        raise SetupError("--keysvc is a URL such as https://keys.example:8400, without credentials")
    return url


def _home_key(home: Home, tenant: str | None) -> Path:
    own = home.api_key(tenant, Role.ADMIN) if tenant else home.platform_key
    return own if own.exists() else home.platform_key


def read_api_key(path: Path) -> str:
    """The API key, or the token of an OIDC issuer or a service account, in a file that is its owner's alone.

    Raises:
        SetupError: missing, open to others, or neither key nor token.
    """
    try:
        # Non-blocking: a FIFO in a key's place must be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise SetupError(
            f"{path} is missing; make a key: anamorph tenant api-key create TENANT --role admin --out {path}"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise SetupError(f"{path} is not a regular file")
        if status.st_mode & 0o077:
            raise SetupError(f"{path} is open to other users; run: chmod 600 {path}")
        key = file.read(MOST_BYTES + 2).strip()
    if not TOKEN.fullmatch(key):
        raise SetupError(f"{path} holds no API key")
    return key.decode("ascii")


def advised(error: ServiceError, look: str) -> ServiceError:
    """The same error, and what to do next."""
    return type(error)(
        f"{error}; {_advice(error, look)}",
        code=error.code,
        param=error.param,
        retry_after=error.retry_after,
    )


def _advice(error: ServiceError, look: str) -> str:
    match error:
        case errors.Unauthenticated():
            return "is --api-key-file the right one? A new key: anamorph tenant api-key create"
        case errors.Forbidden():
            return "use the key of another role: anamorph tenant api-key list shows which there are"
        case errors.TooManyRequests() | errors.Unavailable() if error.retry_after:
            return f"try again in {error.retry_after:.0f} s"
        case errors.Unavailable():
            return "check --keysvc, or see what runs on this machine: anamorph status"
        case errors.BadRequest() | errors.Unprocessable() | errors.TooLarge():
            return "see the command's --help"
        case errors.NotFound() | errors.Conflict() | errors.Gone() | errors.PreconditionFailed():
            return f"see what there is: {look}"
        case _:
            return "the key service's log says more"


def confirm(warning: str, name: str, *, yes: bool) -> None:
    """Let a person type ``name`` before something is destroyed; ``yes`` stands for that.

    Raises:
        typer.Exit: 2 without a terminal and without ``--yes``, 1 if something else was typed.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        typer.echo(f"error: {warning}; nobody can be asked here: add --yes", err=True)
        raise typer.Exit(2)
    typer.echo(f"{warning}.", err=True)
    if typer.prompt(f"Type {name} to go on", default="", show_default=False, err=True) != name:
        typer.echo("error: not confirmed; nothing was changed", err=True)
        raise typer.Exit(1)
