"""The part of this distribution that one container image holds, as a project of its own.

Run by the Dockerfiles, with Python's standard library alone:

    python3 part.py requirements IMAGE FILE   write the libraries of the image, a line each
    python3 part.py project IMAGE FOLDER      write its sources and a ``pyproject.toml`` for them

What an image holds stands in ``images.toml`` beside this file. The project keeps the distribution's
name and version, so that ``importlib.metadata`` answers as ever, and has only the scripts and entry
points whose modules are there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("images.toml")
ROOT = Path(__file__).parents[2]
FOLDERS = {"anamorph": "platform", "anamorph_keysvc": "keysvc", "anamorph_operator": "operators"}
"""Import roots, and the folders of the repository that they lie in."""


@dataclass(frozen=True)
class Image:
    """One table of ``images.toml``, which explains the fields."""

    title: str
    zone: str
    role: str
    extras: tuple[str, ...]
    holds: tuple[str, ...]
    scripts: tuple[str, ...]
    imported: tuple[str, ...]
    without: tuple[str, ...]

    def covers(self, module: str) -> bool:
        """Whether a module is named in ``holds``, lies below a name there, or is a package above one."""
        return any(
            f"{module}.".startswith(f"{name}.") or f"{name}.".startswith(f"{module}.") for name in self.holds
        )


def images(table: Path = TABLE) -> dict[str, Image]:
    """Every image of the table.

    Raises:
        TypeError: a field is missing or unknown.
    """
    tables = tomllib.loads(table.read_text("utf-8"))
    return {name: _image(fields) for name, fields in tables.items()}


def _image(fields: Mapping[str, Any]) -> Image:
    typed: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Image(**typed)


def requirements(image: Image, project: Mapping[str, Any]) -> list[str]:
    """Libraries that every role needs, and those of the image's extras."""
    extras = project["optional-dependencies"]
    return sorted({*project["dependencies"], *(line for extra in image.extras for line in extras[extra])})


def files(image: Image, root: Path = ROOT) -> Iterator[tuple[Path, Path]]:
    """Each file of the image: where it lies, and its path below an import root's parent.

    A package above a held module is there with its ``__init__.py`` alone.

    Raises:
        FileNotFoundError: a name in ``holds`` is neither a package nor a module.
    """
    for name in image.holds:
        package, *below = name.split(".")
        top = root / FOLDERS[package]
        target = top.joinpath(package, *below)
        sources = _tree(target) if target.is_dir() else [target.with_suffix(".py")]
        above = [top.joinpath(package, *below[:depth], "__init__.py") for depth in range(len(below))]
        for source in [*above, top / package / "py.typed", *sources]:
            if not source.is_file():
                raise FileNotFoundError(f"images.toml names {name}, and there is no {source}")
            yield source, source.relative_to(top)


def _tree(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)


def write_project(image: Image, folder: Path, root: Path = ROOT) -> None:
    """Copy the image's files into a new folder and write the ``pyproject.toml`` that builds them."""
    for source, target in files(image, root):
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / target)
    shutil.copyfile(root / "LICENSE", folder / "LICENSE")
    whole = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    (folder / "pyproject.toml").write_text(_pyproject(image, whole), "utf-8")


def _pyproject(image: Image, whole: dict[str, Any]) -> str:
    project = whole["project"]
    kept = ("name", "version", "description", "license", "license-files", "requires-python")
    packages = sorted({name.partition(".")[0] for name in image.holds})
    tables = {
        "build-system": whole["build-system"],
        "project": {name: project[name] for name in kept} | {"dependencies": requirements(image, project)},
        "project.scripts": {name: project["scripts"][name] for name in image.scripts},
        "tool.hatch.build.targets.wheel": {"packages": packages},
    }
    for group, points in project["entry-points"].items():
        held = {name: point for name, point in points.items() if image.covers(point.partition(":")[0])}
        tables[f'project.entry-points."{group}"'] = held
    return "\n".join(_lines(tables))


def _lines(tables: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """The tables as TOML: strings and lists of strings are written as in JSON."""
    for heading, fields in tables.items():
        yield f"[{heading}]"
        yield from (f"{json.dumps(name)} = {json.dumps(value)}" for name, value in fields.items())


def main() -> None:
    """Write what the Dockerfile asks for."""
    parser = argparse.ArgumentParser(description="The part of Anamorph that one container image holds.")
    parser.add_argument("what", choices=["requirements", "project"])
    parser.add_argument("image", choices=sorted(images()))
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    image = images()[options.image]
    if options.what == "project":
        write_project(image, options.target)
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    options.target.write_text("".join(f"{line}\n" for line in requirements(image, project)), "utf-8")
    # Builders go by the time of a file: the same lines must not look new.
    os.utime(options.target, (0, 0))


if __name__ == "__main__":
    main()
