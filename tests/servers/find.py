"""Where the programs of real servers are: the chosen folder, then PATH, then where Debian keeps them."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

FOLDER = "ANAMORPH_TEST_BIN"
KUBERAY = "ANAMORPH_TEST_KUBERAY"
DEBIAN = Path("/usr/lib/postgresql")
RELEASE = "its project's release"
# Which Debian package brings a program; all others come from their own projects' releases.
PACKAGES = {
    "ip": "iproute2",
    "initdb": "postgresql-15",
    "postgres": "postgresql-15",
    "pg_ctl": "postgresql-15",
    "pg_dump": "postgresql-client-15",
    "pg_restore": "postgresql-client-15",
    "psql": "postgresql-client-15",
    "promtool": "prometheus",
    "prometheus": "prometheus",
}


def binary(name: str) -> Path:
    """The program ``name``, absolute; the calling test is skipped, with the remedy, where there is none.

    In this order: the folder that ANAMORPH_TEST_BIN names, PATH, the newest PostgreSQL of Debian.
    """
    chosen = os.environ.get(FOLDER)
    path = os.pathsep.join([*([chosen] if chosen else []), os.environ.get("PATH", os.defpath), *_debian()])
    found = shutil.which(name, path=path)
    if found is None:
        package = PACKAGES.get(name)
        source = f"Debian package {package}" if package else RELEASE
        pytest.skip(f"needs {name}: install it ({source}) on PATH or in the folder that {FOLDER} names")
    return Path(found).absolute()


def kuberay_definition(kind: str) -> Path:
    """The file that defines one of KubeRay's resources; the calling test is skipped where it is not given.

    It lies in the folder ``crds`` of KubeRay's chart, whose folder ANAMORPH_TEST_KUBERAY names.
    """
    folder = os.environ.get(KUBERAY)
    path = Path(folder or "") / "crds" / f"ray.io_{kind}.yaml"
    if not folder or not path.is_file():
        pytest.skip(f"needs {path.name}: unpack KubeRay's chart, and name its folder in {KUBERAY}")
    return path


def _debian() -> list[str]:
    """PostgreSQL's folders, the newest release first: Debian keeps the server's programs off PATH."""
    numbered = [folder for folder in DEBIAN.glob("*/bin") if re.fullmatch(r"\d+", folder.parent.name)]
    return [str(folder) for folder in sorted(numbered, key=lambda f: int(f.parent.name), reverse=True)]
