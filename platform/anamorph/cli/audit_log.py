"""``anamorph audit-log``: read a tenant's audit log, keep it, and verify it.

Exit codes of ``verify``: 0 intact, 1 broken or forged, 2 wrong usage, 3 it could not be checked.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from anamorph.cli.admin import Connection, Tenant, connected
from anamorph.cli.audit_files import CheckpointsFound, export_log, read_checkpoints, read_log
from anamorph.cli.output import AsJson, readable, show, show_records
from anamorph.errors import AnamorphError, AuditRefused
from anamorph.wire.admin import AuditRead
from anamorph.wire.checkpoints import Verdict, read_public_keys, verify_log
from anamorph.wire.keyservice import everything

app = typer.Typer(help="Read a tenant's audit log, keep it, and verify it.", no_args_is_help=True)

BROKEN = 1
UNCHECKED = 3
_LOOK = "anamorph tenant list"
_COLUMNS = ("sequence", "at", "actor", "action", "subject", "detail")


@app.command("show")
@connected
def show_log(
    connection: Connection,
    tenant: Tenant,
    last: Annotated[int, typer.Option(min=1, help="How many rows, from the end.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show the last rows of a tenant's audit log; with a key of role auditor or admin."""
    with connection.keys(tenant, look=_LOOK) as keys:
        rows = deque(everything(keys.audit, tenant), maxlen=last)
    show_records(f"Audit log of {tenant}", rows, _COLUMNS, as_json=as_json, empty="no rows yet")


@app.command("export")
@connected
def export(
    connection: Connection,
    tenant: Tenant,
    out: Annotated[Path, typer.Option(help="JSON lines, one row each; continued if it is there already.")],
    as_json: AsJson = False,
) -> None:
    """Write the whole log to a file. Run again, it adds what is new; killed, it goes on where it was."""
    with connection.keys(tenant, look=_LOOK) as keys:
        done = export_log(keys, tenant, out)
    show({"file": str(out), "rows": done.rows, "new": done.new}, as_json=as_json)


@app.command()
@connected
def verify(
    connection: Connection,
    tenant: Tenant,
    file: Annotated[Path | None, typer.Option(help="An exported log; by default the service's own.")] = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="Folder or URL that the key service exports checkpoints to.")
    ] = None,
    public_keys: Annotated[
        Path | None, typer.Option(help="File with the public keys of checkpoints: the trust anchor.")
    ] = None,
    max_uncovered: Annotated[
        int | None, typer.Option(min=0, help="Broken if more rows than this are not covered yet.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find any edit, deletion, reordering or cut; say what no checkpoint covers yet."""
    if (checkpoints is None) != (public_keys is None):
        raise typer.BadParameter("--checkpoints and --public-keys go together: neither proves anything alone")
    anchor = Anchor(checkpoints, public_keys) if checkpoints and public_keys else None
    with _unchecked():
        verdict, damage = _verdict(connection, tenant, file, anchor)
    late = max_uncovered is not None and verdict.uncovered > max_uncovered
    intact = verdict.intact and damage is None and not late
    _print(tenant, verdict, damage, intact=intact, anchored=anchor is not None, as_json=as_json)
    raise typer.Exit(0 if intact else BROKEN)


@dataclass(frozen=True)
class Anchor:
    """Where checkpoints are, and the file with the keys that verify them."""

    checkpoints: str
    public_keys: Path


@contextmanager
def _unchecked() -> Iterator[None]:
    """Errors that are no verdict have an exit code of their own: silence must not pass for damage."""
    try:
        yield
    except (AnamorphError, OSError) as error:
        typer.echo(f"error: not checked: {error}", err=True)
        raise typer.Exit(UNCHECKED) from None


def _verdict(
    connection: Connection, tenant: str, file: Path | None, anchor: Anchor | None
) -> tuple[Verdict, str | None]:
    """The verdict, and what is wrong with the file where it is no log at all."""
    keys, found = {}, CheckpointsFound()
    if anchor is not None:
        keys = read_public_keys(anchor.public_keys.read_text("utf-8"))
        # Before the rows: a checkpoint taken in between would look like rows cut off.
        found = read_checkpoints(anchor.checkpoints, tenant)
    with _rows(connection, tenant, file) as rows:
        readable_rows = _Readable(rows)
        verdict = verify_log(readable_rows, found.good, keys, tenant)
    return replace(verdict, refused=(*found.refused, *verdict.refused)), readable_rows.damage


@contextmanager
def _rows(connection: Connection, tenant: str, file: Path | None) -> Iterator[Iterator[AuditRead]]:
    if file is not None:
        yield read_log(file)
        return
    with connection.keys(tenant, look=_LOOK) as keys:
        yield everything(keys.audit, tenant)


class _Readable:
    """Rows up to the first that cannot be read, and then what was wrong with it."""

    def __init__(self, rows: Iterator[AuditRead]) -> None:
        self._rows = rows
        self.damage: str | None = None

    def __iter__(self) -> Iterator[AuditRead]:
        try:
            yield from self._rows
        except AuditRefused as error:
            self.damage = str(error)


def _print(
    tenant: str, verdict: Verdict, damage: str | None, *, intact: bool, anchored: bool, as_json: bool
) -> None:
    if as_json:
        fields: dict[str, Any] = {"tenant": tenant, "intact": intact, "rows": verdict.head.sequence}
        fields |= {"covered": verdict.covered, "uncovered": verdict.uncovered, "damage": damage}
        fields["broken"] = asdict(verdict.broken) if verdict.broken else None
        fields["refused"] = [asdict(one) for one in verdict.refused]
        typer.echo(json.dumps(fields))
        return
    typer.echo(f"{'intact' if intact else 'BROKEN'}: {tenant}, {verdict.head.sequence} rows hold")
    for line in _findings(verdict, damage, anchored=anchored):
        typer.echo(f"  {readable(line)}")


def _findings(verdict: Verdict, damage: str | None, *, anchored: bool) -> Iterator[str]:
    if damage:
        yield damage
    elif verdict.broken:
        yield f"row {verdict.broken.sequence}: {verdict.broken.reason}"
    for one in verdict.refused:
        yield f"checkpoint {one.name}: {one.reason}"
    if not anchored:
        yield "no checkpoints were given: rows cut off the end, or a log rewritten whole, would not show;"
        yield "pass --checkpoints and --public-keys"
    elif verdict.uncovered:
        tail = f"{verdict.covered + 1} to {verdict.head.sequence} ({verdict.uncovered})"
        yield f"not covered by a checkpoint yet: rows {tail}"
    else:
        yield f"all rows are covered by checkpoints, the last at row {verdict.covered}"
