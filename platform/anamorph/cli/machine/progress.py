"""Progress for people: what is being done, and a bar for each replica that is being made."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from anamorph.wire.admin import OperationRead, OperationStatus


class Steps:
    """A list of steps that grows while it is shown; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._bars: dict[str, TaskID] = {}
        self._phases: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One more step has begun."""
        self._console.print(f"[cyan]→[/cyan] {text}", highlight=False)

    def report(self, operations: Mapping[str, OperationRead]) -> None:
        """Bring the bars up to date: one per tenant."""
        for tenant, operation in operations.items():
            self._show(f"{tenant} v{operation.version}", operation)

    def _show(self, name: str, operation: OperationRead) -> None:
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=1)
        done = 1.0 if operation.status is OperationStatus.SUCCEEDED else operation.progress
        text = f"{name}: {operation.phase}"
        self._progress.update(self._bars[name], completed=done, description=text)
        if not self._console.is_terminal and self._phases.get(name) != operation.phase:
            self._console.print(f"  {text}", highlight=False)
        self._phases[name] = operation.phase
