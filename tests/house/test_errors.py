"""The exception tree: its drawing, its classes and the table of statuses say the same."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from anamorph import errors
from anamorph.wire import problems

BRANCH = re.compile(r"[├└]── (\w+)(?: (\d{3}))?")


def drawn() -> Iterator[tuple[str, str, str | None]]:
    """(class, its base, HTTP status) of every branch drawn in the module's docstring."""
    above = {0: "AnamorphError"}
    for line in (errors.__doc__ or "").splitlines():
        branches = list(BRANCH.finditer(line))
        for branch in branches:
            depth = branches[0].start() // 4  # a second column hangs from the same base
            above[depth] = branch[1]
            yield branch[1], above[depth - 1], branch[2]


def defined() -> dict[str, type[errors.AnamorphError]]:
    members = inspect.getmembers(errors, inspect.isclass)
    return {name: member for name, member in members if issubclass(member, errors.AnamorphError)}


def test_tree_is_the_classes() -> None:
    """Every class is drawn once, under its base, and nothing is drawn that does not exist."""
    pairs = [("AnamorphError", "Exception"), *((name, base) for name, base, _ in drawn())]
    classes = [(name, cls.__bases__[0].__name__) for name, cls in defined().items()]
    assert sorted(pairs) == sorted(classes)


def test_drawn_statuses_are_the_table() -> None:
    """The statuses in the drawing are those of the one table between status and exception."""
    statuses = {int(status): name for name, _, status in drawn() if status}
    assert statuses == {status: cls.__name__ for status, cls in problems.STATUS.items()}


def test_every_service_error_has_a_status() -> None:
    """Each kind of service error is answered with a status of its own."""
    kinds = {cls for cls in defined().values() if issubclass(cls, errors.ServiceError)}
    assert kinds - {errors.ServiceError} == set(problems.STATUS.values())


def test_every_error_explains_itself() -> None:
    """Each class says in its docstring what it means."""
    assert all(cls.__doc__ for cls in defined().values())


def exceptions_defined_in(file: Path, names: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
            if bases & names and not node.name.startswith("_"):
                yield f"{file.name}:{node.name}"


def test_no_public_exception_elsewhere(sources: dict[str, Path]) -> None:
    """Every public exception of the product is defined in ``errors.py``."""
    names = {*defined(), "Exception", "BaseException", "ValueError", "RuntimeError", "OSError", "TypeError"}
    files = [file for base in sources.values() for file in base.rglob("*.py") if file.name != "errors.py"]
    assert [found for file in files for found in exceptions_defined_in(file, names)] == []
