"""``anamorph tenant|model|key|policy`` against a real key service: what they do, ask and say."""

from __future__ import annotations

import json
import os
import pty
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from anamorph.errors import Conflict
from anamorph.wire.admin import (
    Activation,
    KeyVersionRead,
    Materialized,
    OperationRead,
    Probe,
    RotationPolicyPatch,
)
from anamorph.wire.keyservice import KeyService
from anamorph.wire.states import State

pytestmark = pytest.mark.real

ARTIFACT = Materialized(
    replica="file:///replica", manifest_sha256="0" * 64, probe=Probe(prompts=((1, 2),), expected=((3,),))
)


def eventually(ready: Any, timeout_s: float = 30) -> Any:
    """The first true answer of ``ready``; what a service does by itself takes a moment."""
    end = time.monotonic() + timeout_s
    while not (answer := ready()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return answer


def serve(shell: Any, version: int = 1) -> None:
    """Do the operator's part for a version in PENDING, until it is ACTIVE."""
    at = (shell.tenant, "chat", version)
    eventually(lambda: shell.platform.get_version(*at).key_id)
    with KeyService(shell.url, shell.platform.materialize(*at).secret) as job:
        job.release(*at, "materialize")
        job.stage(*at, ARTIFACT)
    shell.platform.activate(*at, Activation(endpoint="http://engine"))


def state(shell: Any, version: int = 1) -> State:
    found: KeyVersionRead = shell.admin.get_version(shell.tenant, "chat", version)
    return found.state


def test_a_tenant_is_created_listed_and_shown(shell: Any) -> None:
    """By the platform; the same id again is an error that names the list."""
    other = f"{shell.tenant}-b"
    made = shell.json("tenant", "create", other, "--display-name", "B \x1b[31m", key=shell.platform_key)
    assert made["id"] == other
    assert other in [one["id"] for one in shell.json("tenant", "list", key=shell.platform_key)["items"]]
    shown = shell("tenant", "show", other, key=shell.platform_key).stdout
    assert other in shown
    assert "\x1b" not in shown + shell("tenant", "list", key=shell.platform_key).stdout
    again = shell("tenant", "create", other, key=shell.platform_key, code=1)
    assert "anamorph tenant list" in again.stderr


def test_the_platform_sets_a_quota_and_its_tenant_reads_it(shell: Any) -> None:
    """By name; `default` takes a field back. What is no field or number is refused before it is sent."""
    change = ("tenant", "quota", "set", shell.tenant)
    made = shell.json(*change, "devices=300", "tokens_per_s=5000", key=shell.platform_key)
    assert (made["devices"], made["tokens_per_s"]) == (300, 5000)
    assert shell.json("tenant", "quota", "show", shell.tenant) == made
    back = shell.json(*change, "devices=default", "tokens_per_s=default", key=shell.platform_key)
    assert (back["devices"], back["tokens_per_s"]) == (200, None)
    for wrong in ("gpus=3", "devices", "devices=5m", "devices=1.5"):
        assert "devices" in shell(*change, wrong, code=2).stderr
    assert "error: " in shell(*change, "devices=300", code=1).stderr


def test_an_api_key_is_shown_once(shell: Any) -> None:
    """The secret is in the answer to its creation, works, and is in no list."""
    made = shell.json("tenant", "api-key", "create", shell.tenant, "--name", "ops", "--role", "auditor")
    with KeyService(shell.url, made["secret"]) as auditor:
        assert auditor.audit(shell.tenant).items
    listed = shell("tenant", "api-key", "list", shell.tenant).stdout
    assert made["id"] in listed
    assert made["secret"] not in listed


def test_an_api_key_is_written_to_a_private_file(shell: Any, tmp_path: Path) -> None:
    """0600, not printed, good for `--api-key-file`; an existing file is not overwritten, and no key made."""
    out = tmp_path / "ops.key"
    command = ("tenant", "api-key", "create", shell.tenant, "--name", "o", "--role", "rotator", "--out", out)
    done = shell(*command)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert out.read_text().strip() not in done.stdout + done.stderr
    shell("model", "list", shell.tenant, key=out)
    before = out.read_text()
    count = len(shell.admin.list_api_keys(shell.tenant).items)
    assert "exists" in shell(*command, code=1).stderr
    assert out.read_text() == before
    assert len(shell.admin.list_api_keys(shell.tenant).items) == count


def test_a_key_file_that_gets_no_key_is_taken_away(shell: Any, tmp_path: Path) -> None:
    """A refused creation leaves no empty file behind."""
    out = tmp_path / "none.key"
    options = ("--name", "o", "--role", "platform", "--out", out)
    done = shell("tenant", "api-key", "create", shell.tenant, *options, code=1)
    assert done.stderr.startswith("error: ")
    assert not out.exists()


def test_revoking_an_api_key_needs_a_yes(shell: Any) -> None:
    """Without a terminal it is refused, exit code 2, and the key works on."""
    made = shell.json("tenant", "api-key", "create", shell.tenant, "--name", "x", "--role", "client")
    refused = shell("tenant", "api-key", "revoke", shell.tenant, made["id"], code=2, stdin=f"{made['id']}\n")
    assert "--yes" in refused.stderr
    with KeyService(shell.url, made["secret"]) as client:
        assert client.list_models(shell.tenant).items == []
        revoked = shell.json("tenant", "api-key", "revoke", shell.tenant, made["id"], "--yes")
        assert revoked["revoked_at"] is not None


def test_a_model_is_created_listed_and_shown(shell: Any) -> None:
    """With its policy; a wrong value is wrong usage."""
    options = ("--base", "/base", "--vocab-size", 64, "--context-length", 32, "--dtype", "bfloat16")
    shell("model", "create", shell.tenant, "chat", *options)
    [listed] = shell.json("model", "list", shell.tenant)["items"]
    assert (listed["id"], listed["dtype"]) == ("chat", "bfloat16")
    assert "policy grace s" in shell("model", "show", shell.tenant, "chat").stdout
    wrong = shell("model", "create", shell.tenant, "more", *options, "--profile", "rot13", code=2)
    assert "--profile" in wrong.stderr


def test_how_a_model_is_served_is_chosen_when_it_is_made(shell: Any) -> None:
    """Kept as said; what does not go together is refused, by the name of its option where there is one."""
    options = ("--base", "/base", "--vocab-size", 64, "--context-length", 32)
    sleeping = ("--min-replicas", 0, "--idle", "15m", "--tensor-parallel", 2)
    shell("model", "create", shell.tenant, "chat", *options, *sleeping)
    pooled = ("--placement", "shared", "--pool", "small", "--weight", 2)
    shell("model", "create", shell.tenant, "more", *options, *pooled)
    chat, more = (shell.json("model", "show", shell.tenant, name)["serving"] for name in ("chat", "more"))
    assert (chat["autoscaling"]["min_replicas"], chat["autoscaling"]["idle_s"]) == (0, 900)
    assert (chat["tensor_parallel"], chat["placement"], chat["pool"]) == (2, "dedicated", None)
    assert (more["placement"], more["pool"], more["weight"]) == ("shared", "small", 2)
    create = ("model", "create", shell.tenant, "none", *options)
    assert "needs a pool" in shell(*create, "--placement", "shared", code=2).stderr
    assert "--max-replicas" in shell(*create, "--max-replicas", 0, code=2).stderr
    assert "--idle" in shell(*create, "--idle", "soon", code=2).stderr


def test_a_model_is_changed_and_says_when_that_counts(shell: Any) -> None:
    """Field by field; serving keeps what is not named. What is no field is refused before it is sent."""
    digest = f"sha256:{'0' * 64}"
    options = ("--base", "/base", "--vocab-size", 64, "--context-length", 32, "--base-digest", digest)
    shell("model", "create", shell.tenant, "chat", *options, "--max-concurrent", 3, "--idle", "15m")
    update = ("model", "update", shell.tenant, "chat")
    said = shell(*update, "dtype=float32", "tensor_parallel=2", "min_replicas=0").stdout
    assert f"next rotation: anamorph key rotate {shell.tenant} chat" in said
    served = shell.json("model", "show", shell.tenant, "chat")
    assert (served["dtype"], served["base_digest"]) == ("float32", digest)
    assert (served["serving"]["tensor_parallel"], served["serving"]["max_concurrent"]) == (2, 3)
    scaling = served["serving"]["autoscaling"]
    assert (scaling["min_replicas"], scaling["idle_s"]) == (0, 900)
    assert "base_digest" in shell(*update, "base=/other", code=1).stderr
    changed = shell.json(*update, "base=/other", "base_digest=off")
    assert (changed["base"], changed["base_digest"]) == ("/other", None)
    for wrong in ("vocab_size=9", "profile=permute", "base", "context_length=x", "max_replicas=0"):
        assert wrong.partition("=")[0] in shell(*update, wrong, code=2).stderr
    assert shell.json("model", "show", shell.tenant, "chat") == changed


def test_lists_that_are_empty_say_what_to_do(shell: Any) -> None:
    """The next command, instead of an empty table."""
    assert f"anamorph model create {shell.tenant}" in shell("model", "list", shell.tenant).stdout
    shell.model()
    assert f"anamorph key rotate {shell.tenant} chat" in shell("key", "list", shell.tenant, "chat").stdout
    assert "anamorph key rotate" in shell("key", "operation", "list", shell.tenant).stdout


def test_a_policy_is_shown_and_changed(shell: Any) -> None:
    """Durations with units, `off` for none, and what is not named stays."""
    shell.model()
    at = (shell.tenant, "chat")
    changed = shell.json("policy", "set", *at, "period_s=30d", "token_budget=9", "grace_s=20m")
    assert (changed["period_s"], changed["token_budget"], changed["grace_s"]) == (2592000, 9, 1200)
    assert shell.json("policy", "set", *at, "period_s=off")["period_s"] is None
    shown = shell.json("policy", "show", *at)
    assert (shown["period_s"], shown["token_budget"]) == (None, 9)


@pytest.mark.parametrize(
    ("change", "code"),
    [("grace=1", 2), ("grace_s", 2), ("grace_s=soon", 2), ("token_budget=5m", 2), ("grace_s=1", 1)],
)
def test_a_policy_that_cannot_be_is_refused(shell: Any, change: str, code: int) -> None:
    """By the command where it is no value, by the service where it is none that holds; nothing changes."""
    shell.model()
    shell("policy", "set", shell.tenant, "chat", change, code=code)
    assert shell.json("policy", "show", shell.tenant, "chat")["grace_s"] == 900


def test_the_life_of_a_version(shell: Any) -> None:
    """Rotate, suspend, resume, replace, destroy, restore; states as the service keeps them."""
    shell.model()
    at = (shell.tenant, "chat", 1)
    patch = {"client_cache_ttl_s": 1, "longest_request_s": 1, "clock_skew_s": 0, "propagation_s": 0}
    shell.admin.update_policy(*at[:2], RotationPolicyPatch(grace_s=2, **patch))
    assert shell.json("key", "rotate", *at[:2])["version"] == 1
    serve(shell)
    assert shell.json("key", "suspend", *at)["state"] == "SUSPENDED"
    assert shell.json("key", "resume", *at)["state"] == "ACTIVE"
    shell("key", "rotate", *at[:2])
    serve(shell, 2)
    eventually(lambda: retired(shell))
    assert shell.json("key", "destroy", *at, "--yes")["state"] == "DESTROY_SCHEDULED"
    assert shell.json("key", "restore", *at)["state"] == "RETIRED"
    listed = shell.json("key", "list", *at[:2])["items"]
    assert [one["state"] for one in listed] == ["RETIRED", "ACTIVE"]


def retired(shell: Any) -> bool:
    try:
        shell.platform.retire(shell.tenant, "chat", 1)
    except Conflict:
        return False
    return True


def test_a_version_is_activated_by_hand(shell: Any) -> None:
    """One that is not staged is refused with the command that shows where it stands."""
    shell.model()
    shell("key", "rotate", shell.tenant, "chat")
    done = shell("key", "activate", shell.tenant, "chat", 1, "--endpoint", "http://engine", code=1)
    assert f"anamorph key list {shell.tenant} chat" in done.stderr


@pytest.mark.parametrize("verb", ["revoke", "destroy"])
def test_what_destroys_needs_a_yes(shell: Any, verb: str) -> None:
    """Without a terminal nobody can type the name: exit code 2, and nothing happens."""
    shell.model()
    shell("key", "rotate", shell.tenant, "chat")
    name = f"{shell.tenant}/chat/v1"
    refused = shell("key", verb, shell.tenant, "chat", 1, code=2, stdin=f"{name}\n")
    assert name in refused.stderr
    assert state(shell) is State.PENDING


@pytest.mark.parametrize(("typed", "code", "after"), [("NAME", 0, "COMPROMISED"), ("y", 1, "PENDING")])
def test_on_a_terminal_the_name_is_typed(shell: Any, typed: str, code: int, after: str) -> None:
    """The very name, not any yes."""
    shell.model()
    shell("key", "rotate", shell.tenant, "chat")
    answer = typed.replace("NAME", f"{shell.tenant}/chat/v1")
    connection = ("--keysvc", shell.url, "--api-key-file", str(shell.admin_key))
    assert on_terminal(("key", "revoke", shell.tenant, "chat", "1", *connection), answer) == code
    assert state(shell) == after


def on_terminal(arguments: tuple[str, ...], answer: str) -> int:
    """Exit code of a command whose standard input is a terminal on which ``answer`` is typed."""
    ours, its = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        command = [sys.executable, "-m", "anamorph.cli", *arguments]
        return subprocess.run(command, stdin=its, capture_output=True, check=False, timeout=60).returncode
    finally:
        os.close(ours)
        os.close(its)


def test_waiting_for_a_rotation_ends_with_it(shell: Any) -> None:
    """`--wait` returns once the version is ACTIVE, with the operation's end."""
    shell.model()
    with beside(lambda: serve(shell, running(shell).version or 0)):
        ended = shell.json("key", "rotate", shell.tenant, "chat", "--wait", "--timeout", 60)
    assert ended["status"] == "succeeded"
    assert state(shell) is State.ACTIVE


def test_waiting_for_a_rotation_that_is_cancelled_fails(shell: Any) -> None:
    """Exit code 1, and why."""
    shell.model()
    with beside(lambda: shell("key", "operation", "cancel", shell.tenant, running(shell).id)):
        done = shell("key", "rotate", shell.tenant, "chat", "--wait", "--timeout", 60, code=1)
    assert "cancelled" in done.stderr
    [operation] = shell.json("key", "operation", "list", shell.tenant)["items"]
    shown = shell.json("key", "operation", "show", shell.tenant, operation["id"])
    assert shown["status"] == "cancelled"


def running(shell: Any) -> OperationRead:
    found = eventually(lambda: shell.admin.list_operations(shell.tenant).items)
    operation: OperationRead = found[0]
    return operation


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """Do ``work`` while the block runs, and fail if it does."""
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(work)
        yield
        doing.result()


def test_waiting_has_an_end(shell: Any) -> None:
    """A rotation that takes longer goes on, and the message says how to follow it."""
    shell.model()
    done = shell("key", "rotate", shell.tenant, "chat", "--wait", "--timeout", 1, code=1)
    assert f"anamorph key operation show {shell.tenant} op_" in done.stderr
    assert state(shell) is State.PENDING


def test_a_second_rotation_names_the_first(shell: Any) -> None:
    """The conflict says which operation to wait for, and how to see it."""
    shell.model()
    first = shell.json("key", "rotate", shell.tenant, "chat")
    second = shell("key", "rotate", shell.tenant, "chat", code=1)
    assert first["id"] in second.stderr
    assert f"anamorph key operation list {shell.tenant}" in second.stderr


def test_a_version_is_shown_for_people_and_programs(shell: Any) -> None:
    """The same version; two of three names are wrong usage."""
    shell.model()
    shell("key", "rotate", shell.tenant, "chat")
    at = (shell.tenant, "chat", 1)
    prepared = eventually(lambda: shell.platform.get_version(*at).key_id)
    assert prepared in shell("key", "show", *at).stdout
    assert json.loads(shell("key", "show", *at, "--json").stdout)["key_id"] == prepared
    shell("key", "show", *at[:2], code=2)


def test_a_version_without_a_key_id_is_being_prepared() -> None:
    """People are told why it is missing; programs see that it is absent."""
    from anamorph.cli.key import PREPARING, _prepared

    fields: dict[str, Any] = {"tenant": "acme", "model": "chat", "version": 1, "state": "PENDING"}
    times = {"created_at": "2030-01-01T00:00:00Z", "updated_at": "2030-01-01T00:00:00Z"}
    version = KeyVersionRead.model_validate({**fields, **times, "row_version": 1})
    assert _prepared(version).key_id == PREPARING == "being prepared"
