"""Who may import whom: the contracts hold, cover everything, and can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VIOLATIONS = {
    "platform/anamorph/wire/ids.py": "import anamorph.keys",
    "platform/anamorph/keys/draw.py": "import torch",
    "platform/anamorph/client/__init__.py": "import torch",
    "platform/anamorph/replica/__init__.py": "from anamorph import TenantKey",
    "platform/anamorph/serve/slots/__init__.py": "import anamorph.serve.door",
    "keysvc/anamorph_keysvc/__init__.py": "import anamorph.plan",
    "operators/anamorph_operator/__init__.py": "import anamorph.client",
    "operators/anamorph_operator/reconciler.py": "import anamorph_operator.kubernetes.api, kopf, kubernetes",
}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(folder / top) for top in ("platform", "keysvc", "operators")]
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
    arguments = ["--no-cache", "--no-logo", "--config", str(folder / "pyproject.toml")]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def layers_of(pyproject: dict[str, Any]) -> list[set[str]]:
    contract = next(c for c in pyproject["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return [set(re.findall(r"[\w.]+", line)) for line in contract["layers"]]


def parts(sources: dict[str, Path]) -> set[str]:
    entries = sources["anamorph"].iterdir()
    names = {entry.stem for entry in entries if entry.suffix == ".py" or (entry / "__init__.py").exists()}
    return {f"anamorph.{name}" for name in names - {"__init__"}}


@pytest.mark.slow
def test_contracts_hold(root: Path) -> None:
    """The import rules of the architecture hold over the three import roots."""
    result = lint_imports(root)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_contracts_can_fail(root: Path, pyproject: dict[str, Any], tmp_path: Path) -> None:
    """One forbidden import of each kind breaks every one of the contracts."""
    for name in ("platform", "keysvc", "operators"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    for file, line in VIOLATIONS.items():
        path = tmp_path / file
        path.write_text(f"{path.read_text()}\n{line}\n")
    result = lint_imports(tmp_path)
    broken = re.findall(r"^(.+) BROKEN\b", result.stdout, flags=re.MULTILINE)
    assert sorted(broken) == sorted(c["name"] for c in pyproject["tool"]["importlinter"]["contracts"])


def test_every_part_stands_in_the_layers(pyproject: dict[str, Any], sources: dict[str, Path]) -> None:
    """A new part of the platform has to take its place in the layers before it can be committed."""
    listed = set().union(*layers_of(pyproject))
    assert parts(sources) <= listed


def test_key_service_ban_names_everything_else(pyproject: dict[str, Any], sources: dict[str, Path]) -> None:
    """The key service's ban lists every part but the four that it may use."""
    contracts = pyproject["tool"]["importlinter"]["contracts"]
    ban = next(
        set(c["forbidden_modules"]) for c in contracts if c.get("source_modules") == ["anamorph_keysvc"]
    )
    allowed = {f"anamorph.{name}" for name in ("keys", "wire", "telemetry", "errors")}
    assert parts(sources) - allowed == ban


def test_heavy_ban_names_everything_else(pyproject: dict[str, Any], sources: dict[str, Path]) -> None:
    """torch, ray, transformers and vllm are banned from every part but the five that need some of them."""
    contracts = pyproject["tool"]["importlinter"]["contracts"]
    bans = [set(c["source_modules"]) for c in contracts if "vllm" in c.get("forbidden_modules", [])]
    free = {f"anamorph.{name}" for name in ("checkpoint", "serve", "pipeline", "audit", "cli")}
    assert set().union(*bans) - {"anamorph_keysvc", "anamorph_operator"} == parts(sources) - free
