"""``anamorph``: one thin module per command, imported when its command is called.

A command parses, calls one function and prints. Its module defines ``app``, a Typer
application, or a function with the command's name. Exit codes: 0 done, 1 an error
(one line on standard error says what to do), 2 wrong usage.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import typer
from typer.core import TyperGroup

from anamorph.errors import AnamorphError


@dataclass(frozen=True)
class Entry:
    """A command as ``--help`` shows it, before its module is imported.

    Args:
        help: one line.
        module: under ``anamorph.cli``.
        extra: the extra of this distribution that the command needs.
        hidden: left out of the help; called by programs.
    """

    help: str
    module: str
    extra: str | None = None
    hidden: bool = False


COMMANDS = {
    "up": Entry("Start the whole system on this machine and leave it running.", "up", "demo"),
    "down": Entry("Stop what `up` started.", "down", "demo"),
    "status": Entry("Show what runs, and the state of every key version.", "status", "demo"),
    "chat": Entry("Talk to a served model through the local proxy.", "chat", "demo"),
    "demo": Entry("Show the whole product working with a real model, then clean up.", "demo", "demo"),
    "tenant": Entry("Create tenants and their API keys.", "tenant"),
    "model": Entry("Register a tenant's models.", "model", "client"),
    "key": Entry("Rotate, suspend, revoke, destroy key versions; make and show key files.", "key"),
    "policy": Entry("Show or change when keys are rotated.", "policy"),
    "audit-log": Entry("Show, export or verify a tenant's audit log.", "audit_log", "keysvc"),
    "base": Entry("Copy a plaintext model into an object store; show its digest.", "base", "materialize"),
    "fold": Entry("Make an encrypted replica of a model.", "fold", "materialize"),
    "replica": Entry("Check a replica against its trust anchor.", "replica", "materialize"),
    "proxy": Entry("Serve the OpenAI API on this machine for an encrypted model.", "proxy", "client"),
    "overhead": Entry("What does encryption cost? Measure now, or read what the canary found.", "overhead"),
    "capacity": Entry("Show what the cluster has left, and whether a model fits.", "capacity"),
    "canary": Entry("Measure encrypted against plaintext serving, continuously.", "canary"),
    "materialize": Entry("Run one materialisation job.", "materialize", "materialize", hidden=True),
    "parts": Entry("Materialise in parts, one job for each.", "parts", "materialize", hidden=True),
}


class LazyCommands(TyperGroup):
    """Shows placeholders in the help, and imports the one command that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As in Typer, but with the real command in the placeholder's stead."""
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else placeholder, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error that is foreseen is one line and exit code 1, without a traceback."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (AnamorphError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "anamorph":
                raise
            extra = COMMANDS[ctx.invoked_subcommand].extra or "demo"
            remedy = f"pip install 'anamorph[{extra}]'"
            typer.echo(f"error: this command needs the package {error.name}: {remedy}", err=True)
        raise typer.Exit(1)


app = typer.Typer(
    name="anamorph",
    cls=LazyCommands,
    help="Serve models on GPUs you do not own, in your own secret coordinates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def load(name: str) -> Any:
    """Import a command's module and build the command."""
    module = import_module(f"anamorph.cli.{COMMANDS[name].module}")
    commands = getattr(module, "app", None)
    if commands is None:
        commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        commands.command(name)(getattr(module, name))
    return typer.main.get_command(commands)


def _placeholder() -> None:
    raise NotImplementedError("replaced by the real command before it is called")


for _name, _entry in COMMANDS.items():
    # A container image holds the commands of its role and no others.
    if find_spec(f"anamorph.cli.{_entry.module}") is not None:
        app.command(_name, help=_entry.help, hidden=_entry.hidden)(_placeholder)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and stop.", is_eager=True),
) -> None:
    if version:
        import anamorph

        typer.echo(f"anamorph {anamorph.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the ``anamorph`` script and of ``python -m anamorph.cli``."""
    app(prog_name="anamorph", args=sys.argv[1:])
