"""``anamorph audit-log``: a log that is shown, exported in pieces, and verified against checkpoints."""

from __future__ import annotations

import json
import stat
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import fsspec
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anamorph.cli.audit_files import export_log, read_checkpoints, read_log
from anamorph.errors import AuditRefused, Unavailable
from anamorph.wire.admin import AuditRead, Page, RotationPolicyPatch
from anamorph.wire.audit import START, Checkpoint, checkpoint_of, next_row
from anamorph.wire.checkpoints import SignedCheckpoint, encode, object_name, signed_bytes
from anamorph.wire.keyservice import KeyService

Run = Callable[..., CompletedProcess[str]]

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def chain(count: int, actor: str = "ann") -> list[AuditRead]:
    head, rows = START, []
    for number in range(count):
        row = next_row(
            head, tenant="acme", at=NOON, actor=actor, action="rotate", subject="s", detail={"n": number}
        )
        rows.append(row)
        head = checkpoint_of(row)
    return rows


def signed(head: Checkpoint, tenant: str = "acme") -> SignedCheckpoint:
    signature = b64encode(KEY.sign(signed_bytes(tenant, head, NOON))).decode()
    return SignedCheckpoint(
        tenant=tenant,
        sequence=head.sequence,
        digest=head.digest,
        at=NOON,
        key_version=1,
        signature=signature,
    )


class Kept:
    """An exported log in a file, with checkpoints in a folder and the keys to verify them."""

    def __init__(self, folder: Path, anamorph: Run) -> None:
        self.file, self.checkpoints, self.public_keys = folder / "log", folder / "kept", folder / "keys.json"
        public = b64encode(KEY.public_key().public_bytes_raw()).decode()
        self.public_keys.write_text(json.dumps({"keys": {"1": public}}))
        self.checkpoints.mkdir()
        self._run = anamorph

    def write(self, rows: list[AuditRead]) -> None:
        self.file.write_text("".join(f"{row.model_dump_json()}\n" for row in rows))

    def keep(self, *checkpoints: SignedCheckpoint) -> None:
        for one in checkpoints:
            path = self.checkpoints / object_name(one.tenant, one.sequence)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode(one))

    def verify(self, *options: object) -> CompletedProcess[str]:
        anchor = ("--checkpoints", self.checkpoints, "--public-keys", self.public_keys)
        return self._run("audit-log", "verify", "acme", "--file", self.file, *anchor, *options)


@pytest.fixture
def kept(tmp_path: Path, anamorph: Run) -> Kept:
    return Kept(tmp_path, anamorph)


def test_an_intact_log_says_which_tail_is_not_covered(kept: Kept) -> None:
    """Exit code 0, with what a later checkpoint has yet to confirm."""
    rows = chain(5)
    kept.write(rows)
    kept.keep(signed(checkpoint_of(rows[1])), signed(checkpoint_of(rows[2])))
    done = kept.verify()
    assert done.returncode == 0
    assert "intact: acme, 5 rows" in done.stdout
    assert "rows 4 to 5 (2)" in done.stdout
    assert kept.verify("--max-uncovered", 1).returncode == 1


def test_a_log_that_is_covered_says_so(kept: Kept) -> None:
    """For programs as one object."""
    rows = chain(3)
    kept.write(rows)
    kept.keep(signed(checkpoint_of(rows[2])))
    done = kept.verify("--json", "--max-uncovered", 0)
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert (found["intact"], found["rows"], found["covered"], found["uncovered"]) == (True, 3, 3, 0)


DAMAGE: dict[str, Callable[[list[AuditRead]], list[AuditRead]]] = {
    "edited": lambda rows: [rows[0], rows[1].model_copy(update={"actor": "mallory"}), *rows[2:]],
    "deleted": lambda rows: [rows[0], *rows[2:]],
    "reordered": lambda rows: [rows[0], rows[2], rows[1], *rows[3:]],
    "cut off": lambda rows: rows[:1],
    "computed anew": lambda rows: rows[:1] + chain(len(rows), "mallory")[1:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_broken_log_is_exit_code_1(
    kept: Kept, damage: Callable[[list[AuditRead]], list[AuditRead]]
) -> None:
    """And the first row at which it does not hold is named."""
    rows = chain(4)
    kept.write(damage(rows))
    kept.keep(signed(checkpoint_of(rows[3])))
    done = kept.verify()
    assert done.returncode == 1
    assert "BROKEN: acme, 1 rows hold" in done.stdout
    assert "row 2: " in done.stdout


@pytest.mark.parametrize("tail", ["{", '{"tenant": "acme"}\n', "\n", "\x1b[2J\n"])
def test_a_file_that_is_no_log_is_broken_at_its_line(kept: Kept, tail: str) -> None:
    """Damage that leaves no row is damage, not an error of ours."""
    kept.write(chain(2))
    with kept.file.open("a") as file:
        file.write(tail)
    done = kept.verify()
    assert done.returncode == 1
    assert "line 3 of the file is no whole row" in done.stdout


def test_forged_checkpoints_are_named(kept: Kept) -> None:
    """Unsigned, renamed, another tenant's, or garbage: exit code 1, each with its name."""
    rows = chain(4)
    kept.write(rows)
    forged = signed(checkpoint_of(rows[0])).model_copy(update={"signature": b64encode(bytes(64)).decode()})
    kept.keep(forged)
    folder = kept.checkpoints / "acme"
    (folder / "renamed.json").write_bytes(encode(signed(checkpoint_of(rows[1]))))
    (folder / "garbage.json").write_bytes(b"\xff")
    done = kept.verify("--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    names = sorted(one["name"].removeprefix("acme/") for one in found["refused"])
    assert names == sorted(["garbage.json", "renamed.json", object_name("acme", 1).removeprefix("acme/")])
    assert (found["intact"], found["covered"], found["broken"]) == (False, 0, None)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda kept: kept.file.unlink(), "No such file"),
        (lambda kept: kept.checkpoints.rmdir(), "there is no folder"),
        (lambda kept: kept.public_keys.write_text("{}"), "no file of public keys"),
    ],
    ids=["no log", "no checkpoints", "no keys"],
)
def test_what_cannot_be_checked_is_exit_code_3(
    kept: Kept, break_it: Callable[[Kept], object], says: str
) -> None:
    """Neither intact nor broken: a job that watches must not take one for the other."""
    kept.write(chain(1))
    break_it(kept)
    done = kept.verify()
    assert (done.returncode, done.stdout) == (3, "")
    assert says in done.stderr


def test_an_anchor_is_whole(kept: Kept, anamorph: Run) -> None:
    """Checkpoints without the keys to verify them are wrong usage."""
    done = anamorph("audit-log", "verify", "acme", "--file", kept.file, "--checkpoints", kept.checkpoints)
    assert done.returncode == 2


def test_without_checkpoints_it_says_what_was_not_checked(kept: Kept, anamorph: Run) -> None:
    """An intact chain alone does not show what was cut off its end."""
    kept.write(chain(2))
    done = anamorph("audit-log", "verify", "acme", "--file", kept.file)
    assert done.returncode == 0
    assert "would not show" in done.stdout


def test_checkpoints_are_read_from_an_object_store() -> None:
    """By URL, of the one tenant."""
    rows = chain(300)
    filesystem, root = fsspec.core.url_to_fs("memory://kept")
    for one in [*(signed(checkpoint_of(row)) for row in rows), signed(checkpoint_of(rows[0]), "globex")]:
        filesystem.pipe_file(f"{root}/{object_name(one.tenant, one.sequence)}", encode(one))
    found = read_checkpoints("memory://kept", "acme")
    assert [one.sequence for one in found.good] == list(range(1, 301))
    assert read_checkpoints("memory://kept", "initech").good == ()


class Pages:
    """A log as a service lists it, two rows to a page; it can grow, and stop answering after some pages."""

    def __init__(self, rows: list[AuditRead]) -> None:
        self.rows = rows
        self.asked: list[str | None] = []
        self.left = 10**6

    def answer(self, request: httpx.Request) -> httpx.Response:
        if self.left == 0:
            raise httpx.ConnectError("killed here")
        self.left -= 1
        page = request.url.params.get("page")
        self.asked.append(page)
        start = int(page or 0)
        more = str(start + 2) if start + 2 < len(self.rows) else None
        answer = Page[AuditRead](items=self.rows[start : start + 2], next_page=more)
        return httpx.Response(200, text=answer.model_dump_json())

    def export(self, path: Path) -> int:
        transport = httpx.MockTransport(self.answer)
        with KeyService("http://keysvc", transport=transport, sleep=lambda _: None) as keys:
            return export_log(keys, "acme", path).new


def test_an_export_goes_on_where_it_was(tmp_path: Path) -> None:
    """What is there is not fetched again but for the last page, and rows that came since are added."""
    rows, path = chain(9), tmp_path / "log"
    pages = Pages(rows[:5])
    assert pages.export(path) == 5
    assert pages.export(path) == 0
    pages.rows = rows
    pages.asked.clear()
    assert pages.export(path) == 4
    assert pages.asked == ["4", "6", "8"]
    assert list(read_log(path)) == rows
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("pages_before", range(5))
@pytest.mark.parametrize("cut", [0, 1, 40])
def test_an_export_that_is_killed_is_made_up_for(tmp_path: Path, pages_before: int, cut: int) -> None:
    """After any page, with a line half written: the next run gives the same file."""
    rows, path = chain(9), tmp_path / "log"
    pages = Pages(rows)
    pages.left = pages_before
    with pytest.raises(Unavailable):
        pages.export(path)
    path.write_bytes(path.read_bytes()[: -cut or None])
    pages.left = 9
    pages.export(path)
    assert list(read_log(path)) == rows


@pytest.mark.parametrize("now", [chain(9, "mallory"), chain(9)[:3], []], ids=["other", "shorter", "empty"])
def test_an_export_never_mixes_two_logs(tmp_path: Path, now: list[AuditRead]) -> None:
    """A service whose log is not the one in the file is refused, and the file stays as it was."""
    path = tmp_path / "log"
    Pages(chain(6)).export(path)
    before = path.read_bytes()
    with pytest.raises(AuditRefused, match="not the one in the file"):
        Pages(now).export(path)
    assert path.read_bytes() == before


def test_an_export_without_its_place_begins_again_and_skips(tmp_path: Path) -> None:
    """The file beside the export is a convenience: without it, or with nonsense in it, nothing is lost."""
    rows, path = chain(5), tmp_path / "log"
    Pages(rows[:3]).export(path)
    path.with_name("log.page").unlink()
    assert Pages(rows).export(path) == 2
    assert list(read_log(path)) == rows


@pytest.mark.real
def test_the_log_of_a_service_is_shown_exported_and_verified(shell: Any, tmp_path: Path) -> None:
    """Over several pages of the real service; its file and its API give the same verdict."""
    shell.model()
    for _ in range(50):
        for grace_s in (1000, 1001):
            shell.admin.update_policy(shell.tenant, "chat", RotationPolicyPatch(grace_s=grace_s))
    shown = shell.json("audit-log", "show", shell.tenant, "--last", 3)["items"]
    assert [row["action"] for row in shown] == ["policy.update"] * 3
    out = tmp_path / "log"
    rows = shell.json("audit-log", "export", shell.tenant, "--out", out)["rows"]
    assert rows > 100  # a page holds a hundred
    (tmp_path / "log.page").write_text("nonsense\n")
    assert shell.json("audit-log", "export", shell.tenant, "--out", out) == {
        "file": str(out),
        "rows": rows,
        "new": 0,
    }
    by_api = shell.json("audit-log", "verify", shell.tenant)
    assert by_api == shell.json("audit-log", "verify", shell.tenant, "--file", out)
    assert (by_api["intact"], by_api["rows"], by_api["uncovered"]) == (True, rows, rows)


@pytest.mark.real
def test_a_service_that_refuses_is_not_a_verdict(shell: Any, tmp_path: Path) -> None:
    """A void key is exit code 3."""
    key = tmp_path / "void.key"
    key.touch(0o600)
    key.write_text("amk_nobody-knows-this-key")
    done = shell("audit-log", "verify", shell.tenant, key=key, code=3)
    assert "not checked" in done.stderr
