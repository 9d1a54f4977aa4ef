"""Public names: every ``__all__`` is complete and true."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import anamorph

PUBLIC = {
    "AnamorphError",
    "AsyncClient",
    "Client",
    "TenantKey",
    "TokenCodec",
    "__version__",
    "fold",
    "make_replica",
}


def packages(sources: dict[str, Path]) -> Iterator[tuple[str, ast.Module]]:
    for top, base in sources.items():
        for file in sorted(base.rglob("__init__.py")):
            name = ".".join([top, *file.parent.relative_to(base).parts])
            yield name, ast.parse(file.read_text(encoding="utf-8"))


def imported(module: ast.Module) -> set[str]:
    """Public names that a package imports from our own code, at its top level or for type checkers."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anamorph"):
            found |= {alias.asname or alias.name for alias in node.names}
    return {name for name in found if not name.startswith("_")}


def declared(module: ast.Module) -> set[str] | None:
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def test_root_exports_the_public_interface() -> None:
    """The root package offers exactly the documented names, and ``dir`` shows them."""
    assert set(anamorph.__all__) == PUBLIC
    assert set(dir(anamorph)) >= PUBLIC


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_root_export_resolves(name: str) -> None:
    """Each name of the root package can be imported in a fresh interpreter."""
    code = f"from anamorph import {name}; assert {name} is not None"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as on any module."""
    with pytest.raises(AttributeError, match="no attribute 'TenantKeys'"):
        _ = anamorph.TenantKeys


def test_version_is_the_distributions() -> None:
    """``__version__`` is a version number, read from the installed distribution."""
    assert anamorph.__version__.count(".") == 2


def test_every_import_of_a_package_is_exported(sources: dict[str, Path]) -> None:
    """What an ``__init__.py`` imports of ours stands in its ``__all__``: nothing is public by accident."""
    missing = {
        name: imported(module) - (declared(module) or set())
        for name, module in packages(sources)
        if imported(module) - (declared(module) or set())
    }
    assert missing == {}


@pytest.mark.slow
def test_every_exported_name_exists(sources: dict[str, Path]) -> None:
    """Each name in a package's ``__all__`` is there: a star import of every package works."""
    names = [name for name, module in packages(sources) if declared(module)]
    assert len(names) > 5
    code = "".join(f"from {name} import *\n" for name in names)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
