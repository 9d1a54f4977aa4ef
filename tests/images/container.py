"""One image's files and settings, and commands in it with a root file system that cannot be written."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

USER = "65532:65532"
# A mount namespace of its own: nothing of this is seen outside, and all of it is gone with the process.
READ_ONLY = """
mount --bind "$0" "$0"
mount -o remount,bind,ro "$0"
mount -t tmpfs -o mode=1777 tmp "$0/tmp"
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
exec chroot --userspec=%s "$0" env --ignore-environment "$@"
""".replace("%s", USER)


@dataclass(frozen=True)
class Container:
    """An image whose files lie, mounted, at ``root``; ``settings`` is its OCI configuration."""

    root: Path
    settings: dict[str, Any]

    @property
    def site(self) -> Path:
        """Where its libraries are."""
        [place] = self.root.glob("opt/anamorph/lib/python3.*/site-packages")
        return place

    @property
    def installed(self) -> dict[str, str]:
        """Distributions in it, and their versions."""
        found = metadata.distributions(path=[str(self.site)])
        return {re.sub(r"[-_.]+", "-", one.metadata["Name"].lower()): one.version for one in found}

    def run(self, *command: str, stdin: str = "", timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command as Kubernetes would: the image's user and settings, root read-only, /tmp a tmpfs."""
        inside = ["sh", "-ec", READ_ONLY, str(self.root), *self.settings["Env"], *command]
        return subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", *inside],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )


def exists(image: str) -> bool:
    """Whether the local store has it."""
    return _buildah("inspect", "--type", "image", image, check=False).returncode == 0


@contextmanager
def opened(image: str) -> Iterator[Container]:
    """Mount an image of the local store.

    Raises:
        AssertionError: there is no such image; nothing is pulled.
    """
    settings = json.loads(_buildah("inspect", "--type", "image", image).stdout)["OCIv1"]["config"]
    name = _buildah("from", "--pull-never", image).stdout.strip()
    try:
        yield Container(Path(_buildah("mount", name).stdout.strip()), settings)
    finally:
        _buildah("rm", name)


def _buildah(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["buildah", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stderr
    return done
