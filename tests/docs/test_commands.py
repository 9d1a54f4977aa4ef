"""Commands and snippets of the documentation are run, page by page, as a reader would.

Two commands are not run from here: `make test` and `make demo`. The first is running now
(continuous integration calls it on a clean clone), and the second's work is tested step
by step in the tests of `anamorph demo`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    ]
)
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)

SYSTEM = ("anamorph up", "anamorph status", "anamorph chat", "anamorph down")
"""What runs the whole system: these have a test of their own."""
ON_A_CLUSTER = ROOT / "docs" / "guides" / "kubernetes.md"
"""A walk that `make test-cluster` takes; what can be known of it without a cluster is in test_walk.py."""
ELSEWHERE = ("make ", ". .venv/bin/activate", *SYSTEM)
"""What `test_page_runs` leaves out; see above."""


@dataclass(frozen=True)
class Block:
    language: str
    body: str


def blocks(page: Path) -> list[Block]:
    return [Block(found["language"], found["body"]) for found in FENCE.finditer(page.read_text())]


def commands(block: Block) -> list[str]:
    """The commands of a `sh` block, or those after `$ ` in a `console` block."""
    text = block.body.replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if block.language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return lines if block.language == "sh" else []


def all_of(page: Path) -> list[str]:
    return [command for block in blocks(page) for command in commands(block)]


def all_commands() -> list[tuple[Path, str]]:
    return [(page, command) for page in PAGES for command in all_of(page)]


def runnable(page: Path) -> list[Block]:
    """Blocks of a page that these tests run, in order, without what is run elsewhere.

    Design notes sketch code that does not exist yet; theirs is read, not run.
    """
    if page == ON_A_CLUSTER:
        return []
    kept = []
    for block in blocks(page):
        if block.language == "python" and page.parent.name != "design":
            kept.append(block)
        here = [command for command in commands(block) if not command.startswith(ELSEWHERE)]
        if here and block.language == "sh":
            kept.append(Block("sh", "\n".join(here)))
        elif here:
            kept.append(block)
    return kept


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint of a few kilobytes, as the pages' `$BASE`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def reader(home: Path) -> dict[str, str]:
    """The environment of a reader whose home is `home` and who activated the virtual environment.

    The cache is the real one: a model is not downloaded for every test.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name != "XDG_DATA_HOME"}
    return {**kept, "HOME": str(home), "XDG_CACHE_HOME": cache, "PATH": path}


def run(block: Block, folder: Path, base: Path) -> None:
    """Run one block as a reader would, in `folder`; a `console` block must print what it shows."""
    environment = {**reader(folder), "BASE": str(base)}
    if block.language == "python":
        argv = [sys.executable, "-c", block.body]
    else:
        # A `console` block may show a command that fails; a `sh` block may not.
        argv = ["bash", "-c" if block.language == "console" else "-ec", "\n".join(commands(block))]
    done = subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    printed = done.stdout + done.stderr
    if block.language == "console":
        for line in block.body.splitlines():
            assert line.startswith("$ ") or line in printed, f"{block.body}\nprinted\n{printed}"
    else:
        assert done.returncode == 0, f"{block.body}\nprinted\n{printed}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_page_runs(page: Path, base: Path, tmp_path: Path) -> None:
    """A reader who runs a page from top to bottom gets what it shows."""
    for block in runnable(page):
        run(block, tmp_path, base)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(900)
def test_quickstart_system(short_home: Path) -> None:
    """The quickstart's `up`, `status`, `chat` and `down` do what the page says, with the real model."""
    wanted = [command for command in all_of(ROOT / "docs" / "quickstart.md") if command.startswith(SYSTEM)]
    assert [command.split()[1] for command in wanted] == ["up", "status", "chat", "down"]
    try:
        printed = {command.split()[1]: system(command, short_home) for command in wanted}
    finally:
        system("anamorph down", short_home)
    assert "http://127.0.0.1" in printed["up"]
    assert "ACTIVE" in printed["status"]
    assert "Paris" in printed["chat"]
    assert "processes left: 0" in printed["down"]


@pytest.fixture
def short_home() -> Iterator[Path]:
    """A home with a short path: Ray's sockets lie below it, and their names are limited."""
    with tempfile.TemporaryDirectory(prefix="an-") as folder:
        yield Path(folder)


def system(command: str, home: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=home, env=reader(home), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_make_targets_exist() -> None:
    """Every `make` target that a page names is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    named = {command.split()[1] for _, command in all_commands() if command.startswith("make ")}
    assert named >= {"demo", "test"}
    assert {target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_commands_exist() -> None:
    """Every `anamorph` command that a page names is one; those run elsewhere included."""
    from anamorph.cli.main import COMMANDS

    named = {command.split()[1] for _, command in all_commands() if command.startswith("anamorph ")}
    assert named - COMMANDS.keys() == set()


def test_settings_in_toml_can_be_read() -> None:
    """What people copy into a file is at least of its language."""
    shown = [block.body for page in PAGES for block in blocks(page) if block.language == "toml"]
    assert shown
    assert all(tomllib.loads(text) for text in shown)


def test_blocks_say_what_they_are() -> None:
    """A fence names its language, and shell is `sh` or `console`: nothing runnable hides from these tests."""
    known = {"sh", "console", "python", "text", "json", "http", "yaml", "toml", "mermaid"}
    strange = [(page.name, block.language) for page in PAGES for block in blocks(page)]
    assert [(name, language) for name, language in strange if language not in known] == []
