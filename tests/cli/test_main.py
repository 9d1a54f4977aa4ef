"""The command line as a whole: help, errors, exit codes, what is imported when."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from anamorph import __version__
from anamorph.cli.main import COMMANDS, app, load

HEAVY = ("torch", "transformers", "ray", "numpy", "fastapi", "httpx", "anamorph.keys")


def test_help_lists_every_public_command() -> None:
    """One line for each; commands for programs only are left out."""
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
    for name, entry in COMMANDS.items():
        assert (entry.help in shown) != entry.hidden, name


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """Help is quick because no command's module is loaded for it."""
    code = (
        "import sys; from typer.testing import CliRunner; from anamorph.cli.main import app;"
        f"assert CliRunner().invoke(app, {arguments}).exit_code == 0;"
        f"print([name for name in {HEAVY} if name in sys.modules],"
        " [name for name in sys.modules if name.startswith('anamorph.cli.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['anamorph.cli.main']"


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if importlib.util.find_spec(f"anamorph.cli.{COMMANDS[name].module}")]
)
def test_every_command_has_help(name: str) -> None:
    """Every module in the table loads, and its command explains itself."""
    assert load(name).help
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_every_command_has_a_module() -> None:
    """The table names no module that is not there."""
    missing = [n for n, e in COMMANDS.items() if importlib.util.find_spec(f"anamorph.cli.{e.module}") is None]
    assert missing == []


def test_the_version_is_the_distributions() -> None:
    """``--version`` prints it and stops."""
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, f"anamorph {__version__}")


def test_a_mistyped_command_is_wrong_usage() -> None:
    """Exit code 2, and a suggestion."""
    result = CliRunner().invoke(app, ["replca"])
    assert result.exit_code == 2
    assert "replica" in result.output


def test_a_missing_package_names_the_extra() -> None:
    """Without torch, `fold` says what to install, in one line."""
    code = (
        "import sys; sys.modules['torch'] = None; from anamorph.cli.main import main;"
        "sys.argv = ['anamorph', 'fold', 'base', 'out', '--key', 'key']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: this command needs the package torch: pip install 'anamorph[materialize]'\n"
