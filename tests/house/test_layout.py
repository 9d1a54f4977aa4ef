"""Traps of a folder called ``platform`` and of tests without packages."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("folder", ["platform", "keysvc", "operators", "tests"])
def test_top_folders_are_no_packages(root: Path, folder: str) -> None:
    """No top folder holds an ``__init__.py``: it would hide a module of the same name."""
    assert (root / folder).is_dir()
    assert not (root / folder / "__init__.py").exists()


def test_no_test_folder_is_a_package(root: Path) -> None:
    """No folder of tests is a package, at any depth."""
    assert list((root / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("module", ["platform", "operator"])
def test_standard_library_is_not_shadowed(root: Path, module: str) -> None:
    """From the repository root, ``import platform`` gives the standard library's."""
    code = f"import {module}; print({module}.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert Path(result.stdout.strip()).parent == Path(sysconfig.get_path("stdlib"))


def test_pytest_runs_in_importlib_mode(pytestconfig: pytest.Config) -> None:
    """This very run imports test files by path and puts no test folder on ``sys.path``."""
    assert pytestconfig.getoption("importmode") == "importlib"
    assert not [entry for entry in sys.path if Path(entry).is_relative_to(Path(__file__).parents[1])]


def test_warnings_are_errors(pyproject: dict[str, Any]) -> None:
    """Every warning fails a test unless it is listed with its reason."""
    assert pyproject["tool"]["pytest"]["ini_options"]["filterwarnings"][0] == "error"


def test_wheel_holds_the_three_import_roots(
    pyproject: dict[str, Any], root: Path, sources: dict[str, Path]
) -> None:
    """The distribution is built from exactly the three import roots."""
    packages = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(root / package for package in packages) == sorted(sources.values())
    assert all((folder / "py.typed").exists() for folder in sources.values())
