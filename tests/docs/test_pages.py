from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *TOP])
LINK = re.compile(r"(?<!\\)\]\((?P<target>[^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    text = FENCED.sub("", page.read_text())
    return [target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Anchors of headings as GitHub and MkDocs make them."""
    headings = re.findall(
        r"^#+ (.+)$", FENCED.sub(lambda found: found[0].strip("`"), page.read_text()), re.MULTILINE
    )
    return {
        re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that exists, and its anchor a heading there."""
    for target in links(page):
        path, _, anchor = target.partition("#")
        leads_to = (page.parent / path).resolve() if path else page
        assert leads_to.exists(), target
        assert not anchor or anchor in anchors(leads_to), target


def test_docs_stay_inside() -> None:
    """Pages of the site link only to pages of the site, which is what MkDocs can publish."""
    docs = ROOT / "docs"
    outside = [
        (page.name, target)
        for page in docs.rglob("*.md")
        for target in links(page)
        if target.partition("#")[0] and docs not in (page.parent / target.partition("#")[0]).resolve().parents
    ]
    assert outside == []


def test_every_page_is_in_the_navigation() -> None:
    """No page of the site is left out of its navigation."""
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"^ +- (\S+\.md)$", text, re.MULTILINE))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


def test_readme_shows_a_result_early() -> None:
    """The README's first result stands within its first screen."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("```") for line in lines[:18])
    assert "make demo" in "\n".join(lines[:18])


def test_readme_has_its_order() -> None:
    """What it is, what it protects and what it does not, two commands, the flow; then the rest."""
    text = (ROOT / "README.md").read_text()
    order = ["Anamorph serves", "**T1**", "**broken**", "make demo\nmake test", "flow.svg", "\n## "]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["README.md", "docs/threat-model.md", "SECURITY.md"])
def test_every_adversary_is_named(name: str) -> None:
    """Where security is spoken of, all five adversaries are, and that T3 breaks it is said outright."""
    text = (ROOT / name).read_text()
    assert [who for who in ("T1", "T2", "T3", "T4", "T5") if who not in text] == []
    assert "broken" in text.lower()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_boast(page: Path) -> None:
    """No page calls it unbreakable, secure without an adversary, or homomorphic."""
    words = (
        "unbreakable",
        "military",
        "provably secure",
        "perfect secrecy",
        "n! keys",
        "homomorphic",
        "zero-knowledge",
    )
    assert [word for word in words if word in page.read_text().lower()] == []


def test_pictures_are_drawings() -> None:
    """Pictures of the documentation are well-formed SVG with a title, a description, and no script."""
    pictures = list((ROOT / "docs").rglob("*.svg"))
    assert pictures
    for picture in pictures:
        root = ET.parse(picture).getroot()
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert {"title", "desc"} <= tags
        assert "script" not in tags


def test_makefile_help() -> None:
    """`make help` lists every target with what it does, and works before anything is set up."""
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    assert listed >= {"demo", "test", "lint", "bench", "docs", "clean", "setup"}


def test_old_python_is_refused(tmp_path: Path) -> None:
    """An interpreter that is too old is named as the trouble, before anything is made."""
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_newest_python_is_found(tmp_path: Path) -> None:
    """A shim that only fails is passed over, and the newest interpreter that works is taken."""
    for name, status in (("python3.14", 127), ("python3.13", 0)):
        shim = tmp_path / name
        shim.write_text(f"#!/bin/sh\nexit {status}\n")
        shim.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    chosen = subprocess.run(
        ["make", "-s", "--eval", "show: ; @echo $(PYTHON)", "show"],
        cwd=ROOT,
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert chosen.stdout.strip() == str(tmp_path / "python3.13")


def skipped(path: Path, reason: str) -> subprocess.CompletedProcess[str]:
    skip = f'<skipped type="pytest.skip" message="{reason}"/>'
    case = f'<testcase classname="a" name="b">{skip}</testcase>'
    path.write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    script = [sys.executable, str(ROOT / ".ci" / "skipped.py"), str(path)]
    return subprocess.run(script, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("reason", "status"), [("needs a GPU", 0), ("ray is not installed", 1), ("", 1)])
def test_ci_fails_on_skips(tmp_path: Path, reason: str, status: int) -> None:
    """Continuous integration fails for a test that was skipped for anything but a missing accelerator."""
    done = skipped(tmp_path / "junit.xml", reason)
    assert done.returncode == status
    assert "a::b" in done.stdout
