"""Commands and snippets of the documentation are run, page by page, as a reader would.

Two kinds are run elsewhere: `make` targets by continuous integration itself, which
calls `make test` and `make lint` on a clean clone, and `make demo` by the release
check; and the commands that start the whole system, by the tests of `anamorph up`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
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

ELSEWHERE = (
    "make ",
    ". .venv/bin/activate",
    "anamorph up",
    "anamorph status",
    "anamorph chat",
    "anamorph down",
)
"""What these tests do not run again; see above."""


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


def all_commands() -> list[tuple[Path, str]]:
    return [(page, command) for page in PAGES for block in blocks(page) for command in commands(block)]


def runnable(page: Path) -> list[Block]:
    """Blocks of a page that these tests run, in order, without what is run elsewhere."""
    kept = []
    for block in blocks(page):
        if block.language == "python":
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


def run(block: Block, folder: Path, base: Path) -> None:
    """Run one block as a reader would, in `folder`; a `console` block must print what it shows."""
    environment = {
        **os.environ,
        "HOME": str(folder),
        "BASE": str(base),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
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


def test_blocks_say_what_they_are() -> None:
    """A fence names its language, and shell is `sh` or `console`: nothing runnable hides from these tests."""
    known = {"sh", "console", "python", "text", "json", "http", "yaml", "mermaid"}
    strange = [(page.name, block.language) for page in PAGES for block in blocks(page)]
    assert [(name, language) for name, language in strange if language not in known] == []
