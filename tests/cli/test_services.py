"""``anamorph proxy`` and ``anamorph overhead``: what they refuse before anything is served or measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def api_key(tmp_path: Path) -> Path:
    path = tmp_path / "api.key"
    path.write_text("secret-of-the-tenant\n")
    return path


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--model", "chat=tok", "--host", "0.0.0.0"), 1, "loopback"),
        (("--model", "chat"), 2, "NAME=FOLDER"),
        ((), 2, "--model"),
    ],
)
def test_a_proxy_that_may_not_run_says_why(
    anamorph: Run, api_key: Path, options: tuple[str, ...], code: int, says: str
) -> None:
    """Plaintext never leaves this machine, and a model is never guessed."""
    fixed = ("--keysvc", "http://127.0.0.1:9", "--tenant", "acme", "--api-key-file", api_key)
    done = anamorph("proxy", *fixed, *options)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret-of-the-tenant" not in done.stderr + done.stdout


@pytest.mark.real
def test_an_overhead_needs_an_active_version(
    anamorph: Run, service: Any, materializing: Any, tmp_path: Path
) -> None:
    """Without one there is nothing to measure, and the answer is not a number."""
    (tmp_path / "platform.key").write_text(service.platform)
    done = anamorph(
        "overhead",
        *("--keysvc", service.url, "--key-file", tmp_path / "platform.key"),
        *("--serve-url", "http://127.0.0.1:9", "--tenant", materializing.tenant, "--model", "chat"),
    )
    assert done.returncode == 1
    assert "is active" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--keysvc", "http://127.0.0.1:9"), "together"),
        (("--prometheus", "http://127.0.0.1:9"), "Prometheus does not answer"),
        (("--prometheus", "http://127.0.0.1:9", "--plot"), "need a measurement"),
        (("--home", "nowhere"), "anamorph up"),
    ],
)
def test_an_overhead_that_cannot_be_said(
    anamorph: Run, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    """Where there is nothing to ask, the answer says what is missing, and is not a number."""
    done = anamorph("overhead", *(str(tmp_path / one) if one == "nowhere" else one for one in options))
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stdout == ""


def test_a_canary_takes_baselines_by_name(anamorph: Run, api_key: Path) -> None:
    """A baseline that is not named as it must be ends the command before anything is sent."""
    fixed = ("--keysvc", "http://127.0.0.1:9", "--key-file", api_key, "--serve-url", "http://127.0.0.1:9")
    done = anamorph("canary", "watch", *fixed, "--baseline", "smol")
    assert done.returncode == 1
    assert "MODEL=NAME" in done.stderr
