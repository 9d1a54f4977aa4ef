"""What images may hold: the table against import rules, sources and Dockerfiles. Nothing is built."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from typing import Any

import grimp
import pytest
from tests.images.conftest import IMAGES, ROOT, dockerfile

import part

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARTS = ("keys", "plan", "checkpoint", "pipeline", "client")
each_image = pytest.mark.parametrize("name", sorted(IMAGES))


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        *part.FOLDERS, include_external_packages=False, exclude_type_checking_imports=True, cache_dir=None
    )


def entries(image: part.Image) -> set[str]:
    """Modules that something outside of ours begins with: scripts, and what is reached by name."""
    scripts = {PROJECT["project"]["scripts"][name].partition(":")[0] for name in image.scripts}
    named = scripts | set(image.imported)
    return {module for module in graph().modules for name in named if f"{module}.".startswith(f"{name}.")}


def reached(image: part.Image) -> set[str]:
    """All modules that the entries import, at once or when called, and the packages above them."""
    todo, seen = entries(image), set[str]()
    while todo:
        module = todo.pop()
        seen.add(module)
        above = {module.rpartition(".")[0]} if "." in module else set()
        todo |= (graph().find_modules_directly_imported_by(module) | above) - seen
    return seen


def forbidden(role: str) -> set[str]:
    """What the import rules forbid the role; what they allow one module of it, it must hold."""
    contracts: list[dict[str, Any]] = PROJECT["tool"]["importlinter"]["contracts"]
    bans = [
        contract["forbidden_modules"]
        for contract in contracts
        if role in contract.get("source_modules", []) and not contract.get("ignore_imports")
    ]
    return {name for ban in bans for name in ban}


def modules(image: part.Image) -> set[str]:
    """Every module that the image holds, packages above held ones included."""
    paths = [target.with_suffix("") for _, target in part.files(image) if target.suffix == ".py"]
    return {".".join(path.parts).removesuffix(".__init__") for path in paths}


def names(lines: Iterable[str]) -> set[str]:
    return {re.split(r"[\[<>=!~]", line)[0].lower() for line in lines}


@each_image
def test_image_obeys_the_import_rules_of_its_role(name: str) -> None:
    """No module that the role may not reach lies in its image, and no library either."""
    image, banned = IMAGES[name], forbidden(IMAGES[name].role)
    ours = {ban for ban in banned if ban.partition(".")[0] in part.FOLDERS}
    assert [module for module in modules(image) for ban in ours if f"{module}.".startswith(f"{ban}.")] == []
    # vLLM is what the image of that name is for.
    assert banned - ours <= set(image.without)


@each_image
def test_image_holds_what_its_entries_reach(name: str) -> None:
    """Whatever an entry point imports, now or later, is there."""
    assert reached(IMAGES[name]) - modules(IMAGES[name]) == set()


@each_image
def test_image_holds_nothing_else(name: str) -> None:
    """Each name of the table is reached from an entry point: what nobody calls is left out."""
    needed = reached(IMAGES[name])
    unused = [
        held
        for held in IMAGES[name].holds
        if not any(f"{module}.".startswith(f"{held}.") for module in needed)
    ]
    assert unused == []


@pytest.mark.parametrize("name", sorted(name for name in IMAGES if IMAGES[name].zone == "compute"))
def test_compute_zone_has_no_code_of_keys(name: str) -> None:
    """The architecture's sentence about the compute zone, and about the two services of the control zone."""
    never = {f"anamorph.{name}" for name in PARTS} | {"anamorph_keysvc", "anamorph_operator"}
    assert modules(IMAGES[name]) & never == set()


@each_image
def test_control_and_tenant_do_not_serve(name: str) -> None:
    """Engines and door are in images of the compute zone alone; the operator has its arithmetic of places."""
    held = {module for module in modules(IMAGES[name]) if module.startswith("anamorph.serve.")}
    arithmetic = {f"anamorph.serve.{name}" for name in ("cluster", "cluster.placement", "cluster.sizing")}
    assert IMAGES[name].zone == "compute" or held <= arithmetic


@each_image
def test_required_libraries_are_allowed(name: str) -> None:
    """An image asks for no library that it must be without."""
    image = IMAGES[name]
    assert names(part.requirements(image, PROJECT["project"])) & set(image.without) == set()


@each_image
def test_dockerfile_keeps_the_rules(name: str) -> None:
    """The builder chooses BASE; the last stage has no pip and no compiler, and is not run as root."""
    text = dockerfile(name).read_text()
    *_, last = re.split(r"^FROM .*$", text, flags=re.MULTILINE)
    assert "\nARG BASE=" in text
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) <= {
        "${BASE}",
        *re.findall(r" AS (\w+)$", text, re.MULTILINE),
    }
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["65532:65532"]
    assert f"part.py project {name} part" in text
    assert re.search(r"\bpip\b|\bgcc\b|build-essential", last) is None


@each_image
def test_entry_point_is_the_roles(name: str) -> None:
    """An image starts one of its own scripts, or Ray where Ray is what it is for."""
    [entry] = re.findall(r"^ENTRYPOINT (.*)$", dockerfile(name).read_text(), re.MULTILINE)
    [command] = json.loads(entry)
    assert command in IMAGES[name].scripts or (command, IMAGES[name].zone) == ("ray", "compute")


def test_unknown_fields_of_the_table_are_refused(tmp_path: Any) -> None:
    """A misspelt field is an error and not an image that holds less, or more, than was meant."""
    table = tmp_path / "images.toml"
    table.write_text((ROOT / "platform/images/images.toml").read_text().replace("without =", "witout ="))
    with pytest.raises(TypeError, match="witout"):
        part.images(table)


def test_unknown_names_in_the_table_are_refused() -> None:
    """A package that has been renamed is noticed when the image is built."""
    image = part.Image("", "control", "", (), ("anamorph.kesy",), (), (), ())
    with pytest.raises(FileNotFoundError, match=r"anamorph\.kesy"):
        list(part.files(image))
