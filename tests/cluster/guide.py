"""The walk of ``docs/guides/kubernetes.md``: the commands that a reader runs, in the reader's order.

The rule: a chapter (``##``) whose title begins with a number is a step of the walk, and every ``sh``
block in it is run as it stands. Blocks of other chapters are for reading.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FROM_ELSEWHERE = "Images and charts"
"""The one step that depends on where its reader is, and that a test does in its own way.

It leaves values with our images in ``$WORK/images.yaml``, and KubeRay's chart in ``$WORK/kuberay-operator``.
"""
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "kubernetes.md"
_CHAPTER = re.compile(r"^## (?:(?P<number>\d+)\. )?(?P<title>.+)$")
_FENCE = re.compile(r"^```(?P<language>\w*)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        step: number of its chapter; ``None`` if the chapter is no step of the walk.
        title: of its chapter, without the number.
        line: of the page, of the block's first line; from 1.
    """

    step: int | None
    title: str
    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Step:
    """One chapter of the walk."""

    number: int
    title: str
    blocks: tuple[Block, ...]

    @property
    def script(self) -> str:
        """Its blocks, one after the other, as one shell runs them."""
        return "\n".join(block.text for block in self.blocks)


def blocks(page: str) -> list[Block]:
    """Every fenced block of a page, in order.

    Raises:
        ValueError: a fence that does not end.
    """
    found: list[Block] = []
    step, title = None, ""
    opened: tuple[str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is not None:
            if line == "```":
                found.append(Block(step, title, opened[0], "".join(lines), opened[1]))
                opened, lines = None, []
            else:
                lines.append(f"{line}\n")
        elif fence:
            opened = fence["language"], number + 1
        elif chapter := _CHAPTER.match(line):
            step = int(chapter["number"]) if chapter["number"] else None
            title = chapter["title"]
    if opened is not None:
        raise ValueError(f"the block in line {opened[1]} does not end")
    return found


def walk(page: str | None = None) -> list[Step]:
    """The steps of a page, by default of the guide, in their order.

    Raises:
        ValueError: they are not numbered 1, 2, 3 …, or a block does not end.
    """
    text = PAGE.read_text(encoding="utf-8") if page is None else page
    steps: dict[int, list[Block]] = {}
    for block in blocks(text):
        if block.step is not None and block.language == "sh":
            steps.setdefault(block.step, []).append(block)
    if list(steps) != list(range(1, len(steps) + 1)):
        raise ValueError(f"the chapters of the walk are numbered {list(steps)}, not one after the other")
    return [Step(number, found[0].title, tuple(found)) for number, found in steps.items()]


def step(title: str) -> Step:
    """The guide's step of this title, without its number.

    Raises:
        LookupError: there is none.
    """
    found = [one for one in walk() if one.title == title]
    if not found:
        raise LookupError(f"no step '{title}' in {PAGE.name}; there are {[one.title for one in walk()]}")
    return found[0]
