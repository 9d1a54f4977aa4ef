"""The table of images, and where the Dockerfile of one is."""

from __future__ import annotations

from pathlib import Path

import part

ROOT = Path(__file__).parents[2]
IMAGES = part.images()


def dockerfile(name: str) -> Path:
    """Where the Makefile looks for it: under the zone, or beside the table."""
    places = (f"{name}/Dockerfile", f"{name}s/Dockerfile", f"platform/images/{name}.Dockerfile")
    [found] = [ROOT / place for place in places if (ROOT / place).exists()]
    return found
