"""Grants and releases: who gets which bytes when, and that nobody else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, event

from anamorph import errors
from anamorph.keys import TenantKey, VocabKey
from anamorph.wire.admin import Failure, KeyVersionRead, Progress, Role
from anamorph.wire.states import State
from anamorph_keysvc.service import lifecycle

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

AT = ("acme", "chat")


async def version_of(world: World, version: int = 1) -> KeyVersionRead:
    async with world.client(Role.ADMIN) as admin:
        return await admin.get_version(*AT, version)


@pytest.fixture
def pending(world: World) -> World:
    world.model()
    world.rotate()
    return world


async def test_a_job_gets_the_root_once_and_reports_under_its_grant(pending: World) -> None:
    """Release, progress, stage; the released root is the one that the record's key id names."""
    async with pending.bearing(pending.grant(1)) as job:
        released = await job.release(*AT, 1, "materialize")
        key = TenantKey.from_root(released.material(), *AT, 1)
        assert (key.id, key.vocab_kcv) == (released.key_id, released.vocab_kcv)
        assert (await job.progress(*AT, 1, Progress(phase="fold", done=0.5))).progress == 0.5
        staged = await job.stage(*AT, 1, pending.artifact)
        assert (staged.state, staged.artifact) == (State.STAGED, pending.artifact)
        with pytest.raises(errors.Conflict):
            await job.release(*AT, 1, "materialize")


async def test_a_grant_releases_once(pending: World) -> None:
    """The second release under a grant is refused."""
    async with pending.bearing(pending.grant(1)) as job:
        await job.release(*AT, 1, "materialize")
        with pytest.raises(errors.Conflict) as refused:
            await job.release(*AT, 1, "materialize")
    assert refused.value.code == "grant_used"


async def test_a_grant_expires(pending: World) -> None:
    """After its time a grant releases nothing."""
    secret = pending.grant(1)
    pending.clock.advance(pending.service.limits.grant_ttl_s)
    async with pending.bearing(secret) as job:
        with pytest.raises(errors.Conflict) as refused:
            await job.release(*AT, 1, "materialize")
    assert refused.value.code == "grant_expired"


async def test_a_grant_in_use_outlives_its_expiry_for_the_report(pending: World) -> None:
    """A long materialisation may still be staged: expiry bounds the release only."""
    async with pending.bearing(pending.grant(1)) as job:
        await job.release(*AT, 1, "materialize")
        pending.clock.advance(10 * pending.service.limits.grant_ttl_s)
        assert (await job.stage(*AT, 1, pending.artifact)).state is State.STAGED


async def test_a_newer_grant_fences_every_call_of_the_older(pending: World) -> None:
    """After a new grant the old job can release, report, stage and fail nothing."""
    old, new = pending.grant(1), pending.grant(1)
    async with pending.bearing(old) as job:
        for call in (
            job.release(*AT, 1, "materialize"),
            job.progress(*AT, 1, Progress(phase="p", done=0.1)),
            job.stage(*AT, 1, pending.artifact),
            job.fail(*AT, 1, Failure(reason="r")),
        ):
            with pytest.raises(errors.Conflict) as refused:
                await call
            assert refused.value.code == "grant_void"
    async with pending.bearing(new) as job:
        assert (await job.release(*AT, 1, "materialize")).key_id


async def test_nothing_is_staged_under_a_grant_that_never_released(pending: World) -> None:
    """A replica of a key that was never handed out cannot be real."""
    async with pending.bearing(pending.grant(1)) as job:
        with pytest.raises(errors.Conflict) as refused:
            await job.stage(*AT, 1, pending.artifact)
    assert refused.value.code == "grant_unused"


async def test_staging_again_is_harmless_and_staging_another_replica_is_refused(pending: World) -> None:
    """The same report changes nothing, a different one does not overwrite."""
    async with pending.bearing(pending.grant(1)) as job:
        await job.release(*AT, 1, "materialize")
        first = await job.stage(*AT, 1, pending.artifact)
        assert await job.stage(*AT, 1, pending.artifact) == first
        with pytest.raises(errors.Conflict):
            await job.stage(*AT, 1, pending.artifact.model_copy(update={"replica": "file:///other"}))
    assert (await version_of(pending)).artifact == pending.artifact


async def test_a_job_cannot_fail_what_it_has_staged_but_the_platform_can(pending: World) -> None:
    """A grant speaks for MATERIALIZING only; a replica that fails verification is the operator's call."""
    async with pending.bearing(pending.grant(1)) as job:
        await job.release(*AT, 1, "materialize")
        await job.stage(*AT, 1, pending.artifact)
        with pytest.raises(errors.Conflict):
            await job.fail(*AT, 1, Failure(reason="late"))
    async with pending.client(Role.PLATFORM) as platform:
        assert (await platform.fail(*AT, 1, Failure(reason="wrong tokens"))).state is State.FAILED


async def test_a_client_gets_the_vocab_subkey_and_no_more(world: World) -> None:
    """What is released opens as the vocabulary key of the record, and is not the root."""
    world.model()
    version = world.active()
    async with world.client(Role.CLIENT) as client:
        released = await client.release(*AT, version, "client")
    secret = released.material()
    assert VocabKey(secret, released.key_id, released.vocab_kcv).id == released.key_id
    assert TenantKey.from_root(secret, *AT, version).id != released.key_id
    assert released.expires_at == world.clock.now + timedelta(seconds=world.policy.client_cache_ttl_s)
    assert released.vocab_size == 50


@contextmanager
def heard() -> Iterator[list[str]]:
    """The statements that any database is sent in the block."""
    statements: list[str] = []

    def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", hear)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", hear)


@pytest.mark.parametrize("database", [pytest.param("postgresql", marks=pytest.mark.real)], indirect=True)
async def test_a_kept_root_is_released_by_six_statements(world: World) -> None:
    """Every client asks for it: each exchange with the database more shows in its latency."""
    world.model()
    version = world.active()
    async with world.client(Role.CLIENT) as client:
        await client.release(*AT, version, "client")
        with heard() as statements:
            await client.release(*AT, version, "client")
    words = ("find_credential", "BEGIN; SELECT", "FROM key_version, model", "FROM tenant", "FROM audit")
    assert [word in sent for word, sent in zip(words, statements[:5], strict=True)] == [True] * 5
    assert [sent.split()[0] for sent in statements[5:]] == ["INSERT"]


@pytest.mark.parametrize(
    ("ends", "refusal"),
    [
        (["suspend"], errors.Forbidden),
        (["revoke"], errors.Gone),
        (["revoke", "destroy"], errors.Gone),
    ],
)
async def test_a_revocation_or_suspension_stops_releases_at_once(
    world: World, ends: list[str], refusal: type[errors.ServiceError]
) -> None:
    """The next release after the transition is refused."""
    world.model()
    version = world.active()
    async with world.client(Role.CLIENT) as client:
        await client.release(*AT, version, "client")
        for verb in ends:
            transition: Callable[..., object] = getattr(lifecycle, verb)
            world.do(transition, *AT, version, None)
        with pytest.raises(refusal):
            await client.release(*AT, version, "client")


async def test_each_release_is_audited_and_a_refused_one_is_not_a_release(world: World) -> None:
    """One ``release`` row per release, with who and why."""
    world.model()
    version = world.active()
    async with world.client(Role.ADMIN) as admin:
        await admin.release(*AT, version, "client")
        world.do(lifecycle.revoke, *AT, version, None)
        with pytest.raises(errors.Gone):
            await admin.release(*AT, version, "client")
        rows = [row for row in (await admin.audit("acme")).items if row.action == "release"]
    assert [row.detail["purpose"] for row in rows] == ["materialize", "client"]
    assert rows[1].actor.startswith("key:")
