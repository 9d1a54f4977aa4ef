"""Materialisations in parts: each index has a grant of its own, and only the finishing job stages."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError
from sqlmodel import col, select

from anamorph import errors
from anamorph.keys import TenantKey
from anamorph.wire.admin import Failure, GrantCreate, Progress, ReleaseRequest, Role
from anamorph.wire.states import State
from anamorph_keysvc.scope import scope_of
from anamorph_keysvc.service import lifecycle, materialization
from anamorph_keysvc.tables import Audit

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

AT = ("acme", "chat")
PARTS = 3


@pytest.fixture
def pending(world: World) -> World:
    world.model()
    world.rotate()
    return world


def grant(world: World, part: int | None = None, parts: int | None = PARTS) -> str:
    wanted = GrantCreate(parts=parts, part=part)
    return world.do(materialization.materialize, *AT, 1, None, wanted).secret


@pytest.fixture
def begun(pending: World) -> World:
    """A materialisation in three parts."""
    grant(pending)
    return pending


def rows(world: World, *actions: str) -> list[dict[str, object]]:
    with world.service.database.read(scope_of("acme")) as session:
        found = session.exec(select(Audit).order_by(col(Audit.sequence)))
        return [{"action": row.action, **row.detail} for row in found if row.action in actions]


async def refusal(world: World, token: str, part: int | None) -> str | None:
    async with world.bearing(token) as job:
        with pytest.raises(errors.Conflict) as refused:
            await job.release(*AT, 1, "materialize", part=part)
    return refused.value.code


async def test_every_job_gets_the_root_by_a_grant_of_its_own(begun: World) -> None:
    """Three parts and the one that finishes, in any order; all hold the key of the record."""
    finish = grant(begun)
    ids = set()
    for part, token in [*((part, grant(begun, part)) for part in (2, 0, 1)), (None, finish)]:
        async with begun.bearing(token) as job:
            released = await job.release(*AT, 1, "materialize", part=part)
            ids.add(TenantKey.from_root(released.material(), *AT, 1).id)
        assert await refusal(begun, token, part) == "grant_used"
    assert ids == {released.key_id}
    async with begun.bearing(finish) as job:
        assert (await job.stage(*AT, 1, begun.artifact)).state is State.STAGED


@pytest.mark.parametrize("stated", [0, 2, 7, None])
async def test_a_parts_grant_releases_for_its_own_index_only(begun: World, stated: int | None) -> None:
    """Asked for under another index, or as the finishing job, it refuses by name and stays good."""
    token = grant(begun, 1)
    async with begun.bearing(token) as job:
        with pytest.raises(errors.Conflict, match="for part 1 of 3, not for") as refused:
            await job.release(*AT, 1, "materialize", part=stated)
        assert refused.value.code == "grant_part"
        assert (await job.release(*AT, 1, "materialize", part=1)).key_id


@pytest.mark.parametrize("parts", [None, PARTS])
async def test_the_finishing_jobs_grant_folds_no_part(pending: World, parts: int | None) -> None:
    """Nor does the one of a materialisation in a single piece."""
    token = grant(pending, parts=parts)
    for part in (0, PARTS):
        assert await refusal(pending, token, part) == "grant_part"


async def test_a_part_started_again_gets_a_new_grant_and_disturbs_nobody(begun: World) -> None:
    """The old grant of that index is void in every call; the other indices' and the finisher's are not."""
    finish, old, other = grant(begun), grant(begun, 0), grant(begun, 1)
    async with begun.bearing(old) as job:
        await job.release(*AT, 1, "materialize", part=0)
    new = grant(begun, 0)
    async with begun.bearing(old) as job:
        for call in (
            job.release(*AT, 1, "materialize", part=0),
            job.progress(*AT, 1, Progress(phase="fold", done=0.1)),
            job.fail(*AT, 1, Failure(reason="r")),
        ):
            with pytest.raises(errors.Conflict) as refused:
                await call
            assert refused.value.code == "grant_void"
    for token, part in ((new, 0), (other, 1), (finish, None)):
        async with begun.bearing(token) as job:
            assert (await job.release(*AT, 1, "materialize", part=part)).key_id


async def test_a_materialisation_begun_anew_voids_every_grant(begun: World) -> None:
    """Whether in as many parts, in others or in a single piece: nobody of before has a say."""
    for parts in (PARTS, 2, None):
        part = grant(begun, 0)
        grant(begun, parts=parts)
        assert await refusal(begun, part, 0) == "grant_void"
        grant(begun)


@pytest.mark.parametrize(("parts", "named"), [(2, "in 3 parts, not in 2"), (4, "in 3 parts, not in 4")])
def test_a_part_of_another_division_is_refused(begun: World, parts: int, named: str) -> None:
    """A job that was told another number of parts would leave some of the work to nobody."""
    with pytest.raises(errors.Conflict, match=named) as refused:
        grant(begun, 1, parts)
    assert refused.value.code == "other_parts"


def test_a_part_of_a_single_piece_is_refused(pending: World) -> None:
    """A whole materialisation has no parts to join."""
    grant(pending, parts=None)
    with pytest.raises(errors.Conflict, match="in a single piece"):
        grant(pending, 0)


def test_a_part_begins_nothing(pending: World) -> None:
    """In how many parts is said once, by whoever begins; in PENDING a part is refused."""
    with pytest.raises(errors.Conflict) as refused:
        grant(pending, 0)
    assert refused.value.code == "not_begun"


async def test_no_part_is_given_out_once_the_replica_is_staged(begun: World) -> None:
    """A pod that comes late is told that it is over."""
    async with begun.bearing(grant(begun)) as job:
        await job.release(*AT, 1, "materialize")
        await job.stage(*AT, 1, begun.artifact)
    with pytest.raises(errors.Conflict) as refused:
        grant(begun, 0)
    assert refused.value.code == "wrong_state"


async def test_a_part_stages_nothing_but_may_fail(begun: World) -> None:
    """One part of a replica is none; what cannot be folded cannot be in any part."""
    async with begun.bearing(grant(begun, 2)) as job:
        await job.release(*AT, 1, "materialize", part=2)
        with pytest.raises(errors.Conflict, match="part 2 of 3") as refused:
            await job.stage(*AT, 1, begun.artifact)
        assert refused.value.code == "grant_part"
        assert (await job.fail(*AT, 1, Failure(reason="no table"))).state is State.FAILED
    assert rows(begun, "fail")[0]["part"] == 2


async def test_progress_is_that_of_all_parts(begun: World) -> None:
    """A third of one of three parts is a ninth; a part that is started again begins at nothing."""
    seen = []
    for part, done in ((0, 1.0), (1, 0.5), (1, 0.0)):
        async with begun.bearing(grant(begun, part)) as job:
            seen.append((await job.progress(*AT, 1, Progress(phase="fold", done=done))).progress)
    assert seen == pytest.approx([1 / 3, 1 / 2, 1 / 3])


async def test_the_audit_log_names_the_index(begun: World) -> None:
    """Who began in how many parts, each grant, each one in the place of another, each release."""
    for part in (1, 1):
        token = grant(begun, part)
    async with begun.bearing(token) as job:
        released = await job.release(*AT, 1, "materialize", part=1)
    kept = rows(begun, "materialize", "grant", "grant.renew", "release")
    assert [(row["action"], row["parts"], row.get("part")) for row in kept] == [
        ("materialize", PARTS, None),
        ("grant", PARTS, 1),
        ("grant.renew", PARTS, 1),
        ("release", PARTS, 1),
    ]
    assert str(released.secret) not in str(kept)


@pytest.mark.parametrize("role", [Role.ADMIN, Role.CLIENT, Role.ROTATOR, Role.AUDITOR])
async def test_only_the_materialiser_gets_the_grant_of_a_part(begun: World, role: Role) -> None:
    """Every other role of the tenant is refused; the tenant's materialiser is not."""
    async with begun.client(role) as stranger:
        with pytest.raises(errors.Forbidden):
            await stranger.materialize(*AT, 1, parts=PARTS, part=0)
    async with begun.client(Role.MATERIALIZER) as pod:
        assert (await pod.materialize(*AT, 1, parts=PARTS, part=0)).secret


@pytest.mark.parametrize(
    "body", [{"parts": 2, "part": 2}, {"parts": 2, "part": -1}, {"part": 0}, {"parts": 0}]
)
async def test_an_index_outside_the_parts_is_refused(begun: World, body: dict[str, int]) -> None:
    """422 that names the field, before any grant is void."""
    token = grant(begun, 0)
    async with begun.http(begun.secret(Role.MATERIALIZER)) as http:
        answer = await http.post("/v1/tenants/acme/models/chat/keys/1:materialize", json=body)
    assert answer.status_code == 422
    assert "part" in answer.text
    with pytest.raises(ValidationError):
        GrantCreate.model_validate(body)
    async with begun.bearing(token) as job:
        assert (await job.release(*AT, 1, "materialize", part=0)).key_id


def test_a_client_has_no_part() -> None:
    """The vocabulary subkey is not folded in parts."""
    with pytest.raises(ValidationError, match="materialisation"):
        ReleaseRequest(purpose="client", part=0)


@pytest.mark.parametrize("part", [None, 1])
def test_of_many_releases_at_once_under_one_grant_one_gets_the_root(begun: World, part: int | None) -> None:
    """Read before the version is held, a grant would look unused to all of them."""
    holder = begun.holder(grant(begun, part))
    start = Barrier(8)

    def ask(_: int) -> str | None:
        start.wait()
        try:
            return begun.release_to_job(holder, *AT, 1, part).key_id
        except errors.Conflict as refused:
            return refused.code

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert answers.count("grant_used") == 7
    assert len(rows(begun, "release")) == 1


def test_a_revoked_version_releases_no_part(begun: World) -> None:
    """A revoke reaches every index at once."""
    holders = [begun.holder(grant(begun, part)) for part in range(PARTS)]
    begun.do(lifecycle.revoke, *AT, 1, None)
    for part, holder in enumerate(holders):
        with pytest.raises(errors.Conflict):
            begun.release_to_job(holder, *AT, 1, part)
