"""A second implementation of docs/spec/audit.md, which checks the vectors beside it.

    python tests/vectors/verify_audit.py [folder]

Plain Python, standard library only, nothing of the project. Exits 1 on any disagreement.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def quoted(text: str) -> str:
    characters = (ESCAPES.get(c) or (f"\\u{ord(c):04x}" if ord(c) < 32 else c) for c in text)
    return '"' + "".join(characters) + '"'


def canonical(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        units = {name: list(memoryview(name.encode("utf-16-le")).cast("H")) for name in value}
        members = (
            f"{quoted(name)}:{canonical(value[name])}" for name in sorted(value, key=units.__getitem__)
        )
        return "{" + ",".join(members) + "}"
    return str(int(value))


def moment(text: str) -> str:
    at = datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond:06d}Z"


def digest(row: Row) -> str:
    covered = {name: value for name, value in row.items() if name != "digest"} | {"at": moment(row["at"])}
    return hashlib.sha256(b"anamorph-audit/1\n" + canonical(covered).encode()).hexdigest()


def first_bad(rows: list[Row], tenant: str, until: dict[str, Any] | None) -> int | None:
    previous = "0" * 64
    for number, row in enumerate(rows, start=1):
        place = (row["tenant"], row["sequence"], row["previous"])
        if place != (tenant, number, previous) or row["digest"] != digest(row):
            return number
        if until and until["sequence"] == number and until["digest"] != row["digest"]:
            return number
        previous = row["digest"]
    return len(rows) + 1 if until and len(rows) < until["sequence"] else None


def edited(rows: list[Row], edits: list[list[Any]]) -> list[Row]:
    rows = copy.deepcopy(rows)
    for verb, index, *rest in edits:
        if verb == "set":
            rows[index][rest[0]] = rest[1]
        elif verb == "delete":
            del rows[index]
        elif verb == "insert":
            rows.insert(index, rest[0])
        else:
            rows[index], rows[rest[0]] = rows[rest[0]], rows[index]
    return rows


def faults(document: dict[str, Any]) -> Iterator[str]:
    rows, tenant = document["rows"], document["tenant"]
    if (found := first_bad(rows, tenant, document["head"])) is not None:
        yield f"the whole chain breaks at {found}"
    for case in document["broken"]:
        found = first_bad(edited(rows, case["edits"]), tenant, case.get("until"))
        if found != case["first"]:
            yield f"{case['why']}: found {found}, expected {case['first']}"


def main(folder: Path) -> int:
    document = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    found = list(faults(document))
    print(*found, f"{len(document['broken'])} broken chains: {len(found)} faults", sep="\n")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
