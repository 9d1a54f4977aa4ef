"""What each role's process really loads, which import-linter cannot see.

Each test imports every module of a role in a fresh interpreter and reads
``sys.modules`` afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HEAVY = frozenset({"torch", "ray", "transformers", "vllm"})
# NumPy, cryptography, pydantic and what these three load themselves.
LIGHT = frozenset(
    {"numpy", "cryptography", "_cffi_backend", "_openssl", "pydantic", "pydantic_core"}
    | {"annotated_types", "typing_extensions", "typing_inspection"}
)
BELOW_PLAN = frozenset({"errors", "wire", "keys", "models"})


@dataclass(frozen=True)
class Role:
    """A package, the parts of ``anamorph`` it may load, and what it must not (or may only) load besides."""

    package: str
    ours: frozenset[str]
    never: frozenset[str] = HEAVY
    only: frozenset[str] | None = None


ROLES = [
    Role("anamorph.errors", frozenset(), only=frozenset()),
    Role("anamorph.wire", frozenset({"errors"})),
    Role("anamorph.telemetry", frozenset({"errors"})),
    Role("anamorph.keys", frozenset({"errors", "wire"}), only=LIGHT),
    Role("anamorph.models", frozenset({"errors", "wire", "telemetry"}), only=LIGHT),
    Role("anamorph.plan", BELOW_PLAN, only=LIGHT),
    Role("anamorph.replica", frozenset({"errors", "wire", "telemetry"})),
    Role("anamorph.canary", frozenset({"errors", "wire", "telemetry"})),
    Role("anamorph.client", BELOW_PLAN | {"telemetry"}, never=frozenset({"torch", "ray", "vllm"})),
    Role("anamorph_keysvc", frozenset({"errors", "wire", "telemetry", "keys"})),
    Role("anamorph_operator", frozenset({"errors", "wire", "telemetry", "replica", "canary", "serve"})),
    Role("anamorph.serve", frozenset({"errors", "wire", "telemetry", "replica"}), never=frozenset({"vllm"})),
    Role("anamorph.checkpoint", BELOW_PLAN | {"telemetry", "plan"}, never=frozenset({"ray", "vllm"})),
]


def modules_below(package: str, sources: dict[str, Path]) -> Iterator[str]:
    top, *rest = package.split(".")
    base = sources[top].joinpath(*rest)
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    for file in files:
        parts = file.relative_to(sources[top]).with_suffix("").parts
        if parts[-1] != "__main__" and "migrations" not in parts:  # those are run by Alembic, never imported
            yield ".".join([top, *(part for part in parts if part != "__init__")])


def loaded_by(modules: list[str]) -> set[str]:
    """Names in ``sys.modules`` after importing ``modules``, less what the interpreter starts with."""
    code = (
        "import importlib, json, sys; before = set(sys.modules);"
        "[importlib.import_module(name) for name in json.loads(sys.argv[1])];"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    command = [sys.executable, "-c", code, json.dumps(modules)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def third_party(loaded: set[str]) -> set[str]:
    top = {name.partition(".")[0] for name in loaded}
    ours = {"anamorph", "anamorph_keysvc", "anamorph_operator"}
    return {name for name in top - ours - sys.stdlib_module_names if not name.startswith("_sysconfigdata")}


def parts_of_ours(loaded: set[str]) -> set[str]:
    return {name.split(".")[1] for name in loaded if name.startswith("anamorph.")}


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.package)
def test_role_loads_only_what_it_may(role: Role, sources: dict[str, Path]) -> None:
    """All modules of the role together load no banned package and no banned part of our own."""
    modules = list(modules_below(role.package, sources))
    loaded = loaded_by(modules)
    own = {role.package.split(".")[1]} if "." in role.package else set()
    assert parts_of_ours(loaded) - own <= role.ours
    assert third_party(loaded) & role.never == set()
    assert role.only is None or third_party(loaded) <= role.only


def test_root_package_loads_nothing() -> None:
    """``import anamorph`` loads no other module of ours and no third-party package."""
    loaded = loaded_by(["anamorph"])
    assert parts_of_ours(loaded) == set()
    assert third_party(loaded) == set()


def test_lazy_key_export_loads_keys_only() -> None:
    """``anamorph.TenantKey`` loads what keys need, and no part above them."""
    loaded = loaded_by(["anamorph.keys"])
    code = "import sys, anamorph; anamorph.TenantKey; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert parts_of_ours(set(result.stdout.split())) == parts_of_ours(loaded) == {"errors", "keys", "wire"}


def test_the_measurement_sees_a_heavy_import() -> None:
    """A module that loads NumPy shows up: an empty answer of the tests above means something."""
    assert "numpy" in third_party(loaded_by(["numpy"]))
