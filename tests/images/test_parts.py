"""Each image's part of the sources, laid out as the Dockerfile does it, works alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.images import walk
from tests.images.conftest import IMAGES

import anamorph
import part

EXPORTS = {
    "keysvc": {"TenantKey"},
    "operator": set(),
    "materializer": {"TenantKey", "fold", "make_replica"},
    "compute": set(),
    "compute-vllm": set(),
    "client": {"TenantKey", "AsyncClient", "Client", "TokenCodec"},
}
"""Of the root package, beside the version and the common error."""


@pytest.fixture
def lay_out(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the project of an image, and says where."""

    def write(name: str) -> Path:
        part.write_project(IMAGES[name], tmp_path)
        return tmp_path

    return write


def walked(place: Path, without: set[str]) -> dict[str, Any]:
    """What a fresh interpreter finds there, in which the libraries of ``without`` are not installed."""
    environment = {**os.environ, "PYTHONPATH": str(place), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, walk.__file__, str(place), *sorted(without)]
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(IMAGES))
def test_part_works_alone(name: str, lay_out: Callable[[str], Path]) -> None:
    """Every module of the image can be imported with nothing else of ours there, and no library it bans."""
    place = lay_out(name)
    elsewhere = {package for package in part.FOLDERS if not (place / package).exists()}
    # This environment has no vLLM, and the modules that use it import it when they are called.
    found = walked(place, elsewhere | set(IMAGES[name].without))
    assert found["modules"]
    assert all(Path(file).is_relative_to(place) for file in found["modules"].values())
    assert set(found["exports"]) == EXPORTS[name] | {"AnamorphError", "__version__"}
    assert set(found["loaded"]) & set(IMAGES[name].without) == set()


@pytest.mark.slow
def test_a_missing_module_is_noticed(lay_out: Callable[[str], Path]) -> None:
    """The test above fails where an image lacks something that its modules import."""
    place = lay_out("keysvc")
    (place / "anamorph" / "wire" / "sealed.py").unlink()
    with pytest.raises(AssertionError, match=r"anamorph\.wire\.sealed"):
        walked(place, {"anamorph_operator"})


def test_commands_of_an_image_are_those_that_it_holds(lay_out: Callable[[str], Path]) -> None:
    """`anamorph --help` of a partial installation names no command that is not there."""
    place = lay_out("operator")
    command = [sys.executable, "-m", "anamorph.cli"]
    environment = {**os.environ, "PYTHONPATH": str(place), "COLUMNS": "120"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words], cwd=place, env=environment, capture_output=True, text=True, check=False
        )

    shown = run("--help").stdout
    assert "canary" in shown
    assert "rotate" not in shown.lower()
    assert run("canary", "watch", "--help").returncode == 0
    refused = run("key", "rotate")
    assert (refused.returncode, "No such command" in refused.stderr) == (2, True)


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_project_is_this_distribution(name: str, lay_out: Callable[[str], Path]) -> None:
    """Name and version are ours, and scripts and entry points lead to modules that are there."""
    place = lay_out(name)
    written = tomllib.loads((place / "pyproject.toml").read_text())
    project = written["project"]
    assert (project["name"], project["version"]) == ("anamorph", anamorph.__version__)
    points = {**project["scripts"], **project["entry-points"]["vllm.general_plugins"]}
    modules = [point.partition(":")[0].split(".") for point in points.values()]
    files = [place.joinpath(*names).with_suffix(".py") for names in modules]
    assert all(file.is_file() for file in files)
    assert set(project["scripts"]) == set(IMAGES[name].scripts)
    assert ("anamorph" in project["entry-points"]["vllm.general_plugins"]) == (IMAGES[name].zone == "compute")
    packages = written["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert all((place / package).is_dir() for package in packages)


def test_requirements_keep_their_time(tmp_path: Path) -> None:
    """The same list is the same file to a builder: its time never changes, and no layer is built anew."""
    lists = [tmp_path / "first.txt", tmp_path / "second.txt"]
    script = Path(part.__file__)
    for target in lists:
        subprocess.run([sys.executable, str(script), "requirements", "keysvc", str(target)], check=True)
    assert [target.stat().st_mtime for target in lists] == [0, 0]
    assert lists[0].read_text() == lists[1].read_text() != ""
