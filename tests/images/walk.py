"""Run inside an image, or where its files are laid out: imports every module of ours, says what it found.

Prints one JSON object: the modules, where each came from, the exports of the root package that resolve,
the version, and the libraries that were loaded. Nothing but the standard library is needed beside ours.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

OURS = ("anamorph", "anamorph_keysvc", "anamorph_operator")
NOT_IMPORTED = ("__main__", "migrations")
"""Modules that are only ever run: by Python, and by Alembic."""


def modules(place: Path) -> Iterator[str]:
    """Names of all modules of ours below ``place``."""
    for package in OURS:
        for path in sorted((place / package).rglob("*.py")):
            names = path.relative_to(place).with_suffix("").parts
            if not set(names) & set(NOT_IMPORTED):
                yield ".".join(names).removesuffix(".__init__")


def export(name: str) -> bool:
    """Whether the root package gives this name; where its home is not held, it cannot."""
    import anamorph

    try:
        return getattr(anamorph, name) is not None
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "anamorph":
            raise
        return False


def main(place: Path, without: list[str]) -> None:
    """Import everything; a library of ``without`` counts as one that is not installed."""
    sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type]  # None: import machinery's own word
    named = list(modules(place))
    found = {name: importlib.import_module(name).__file__ for name in named}
    import anamorph

    loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
    answer = {
        "modules": found,
        "exports": [name for name in anamorph.__all__ if export(name)],
        "version": metadata.version("anamorph"),
        "loaded": sorted(loaded),
    }
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
