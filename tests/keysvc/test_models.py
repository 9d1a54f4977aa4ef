"""Changing a model's record: what may change, what keeps standing, who wins, and what it costs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError
from sqlmodel import select

from anamorph import errors
from anamorph.wire.admin import (
    ModelCreate,
    ModelPatch,
    ModelRead,
    ModelSettings,
    Role,
    RotationPolicyPatch,
    Serving,
    TenantQuotaPatch,
)
from anamorph_keysvc.scope import PLATFORM
from anamorph_keysvc.service import lifecycle, lookup, quotas, tenants
from anamorph_keysvc.tables import Audit

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

AT = ("acme", "chat")
PATH = "/v1/tenants/acme/models/chat"
DIGEST, OTHER = f"sha256:{'0' * 64}", f"sha256:{'1' * 64}"


def change(world: World, expected: int | None = None, **fields: Any) -> ModelRead:
    return world.do(tenants.update_model, *AT, expected, ModelPatch.model_validate(fields))


def issued(read: ModelRead) -> ModelSettings:
    """What a version keeps of its model's record."""
    return ModelSettings(**{name: getattr(read, name) for name in ModelSettings.model_fields})


def test_what_may_change_is_what_a_version_keeps() -> None:
    """A field that could change without a version keeping it would change under what runs."""
    assert set(ModelPatch.model_fields) == set(ModelSettings.model_fields)
    assert set(ModelPatch.model_fields) < set(ModelCreate.model_fields)


async def test_fields_change_one_by_one(world: World) -> None:
    """What is not named stays; ``serving`` is replaced as a whole; null takes a digest away."""
    world.model()
    async with world.client(Role.ADMIN) as keys:
        before = await keys.get_model(*AT)
        await keys.update_model(*AT, ModelPatch(base="hf://org/new", base_digest=DIGEST, engine="vllm"))
        await keys.update_model(*AT, ModelPatch(serving=Serving(tensor_parallel=4, max_concurrent=2)))
        await keys.update_model(*AT, ModelPatch(serving=Serving(tensor_parallel=2)))
        after = await keys.update_model(*AT, ModelPatch(base_digest=None, context_length=9, dtype="float32"))
        assert after == await keys.get_model(*AT)
    changed = {"base": "hf://org/new", "engine": "vllm", "dtype": "float32", "context_length": 9}
    served = {"serving": Serving(tensor_parallel=2), "row_version": before.row_version + 4}
    assert after == before.model_copy(update=changed | served)


async def test_the_operator_does_all_that_a_resource_asks_for(world: World) -> None:
    """The platform makes a model, changes it and its policy, and ends its versions."""
    world.model("acme", "other")
    async with world.client(Role.PLATFORM) as keys:
        body = ModelCreate(id="chat", base="b", base_digest=DIGEST, vocab_size=9, context_length=9)
        assert (await keys.create_model("acme", body)).base_digest == DIGEST
        await keys.update_model(*AT, ModelPatch(base="c", base_digest=OTHER))
        assert (await keys.update_policy(*AT, RotationPolicyPatch(period_s=3600))).period_s == 3600
        assert (await keys.get_policy(*AT)).period_s == 3600
        version = (await keys.rotate(*AT)).version
        await keys.revoke(*AT, version)
        await keys.destroy(*AT, version)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"vocab_size": 9},
        {"profile": "permute"},
        {"tokenizer_digest": DIGEST},
        {"chat_template_digest": None},
        {"policy": {}},
        {"id": "other"},
        {"row_version": 9},
        {"base": None},
        {"base": ""},
        {"serving": None},
        {"serving": {"placement": "shared"}},
        {"engine": "none"},
        {"base_digest": "sha256:0"},
        {"context_length": 0},
        {"context_length": True},
        {"dtype": "auto", "nonsense": 1},
    ],
)
async def test_what_is_no_change_is_refused(world: World, fields: dict[str, Any]) -> None:
    """Nothing, what clients hold keys and tokenizers for, and what is no value: 422, and no trace."""
    world.model()
    with pytest.raises(ValidationError):
        ModelPatch.model_validate(fields)
    async with world.http(world.secret(Role.ADMIN)) as http:
        before = (await http.get(PATH)).json()
        answer = await http.patch(PATH, json=fields)
        assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
        assert (await http.get(PATH)).json() == before


async def test_an_etag_guards_a_change(world: World) -> None:
    """What was read, changed and sent back is refused if anything of it changed meanwhile, a rotation too."""
    world.model()
    async with world.http(world.secret(Role.ADMIN)) as http:
        read = await http.get(PATH)
        stale = {"If-Match": read.headers["etag"]}
        assert stale["If-Match"] == f'"{read.json()["row_version"]}"'
        first = await http.patch(PATH, json={"dtype": "float32"}, headers=stale)
        assert (first.status_code, first.json()["dtype"]) == (200, "float32")
        again = await http.patch(PATH, json={"dtype": "auto"}, headers=stale)
        assert (again.status_code, again.json()["code"]) == (412, "precondition_failed")
        fresh = {"If-Match": first.headers["etag"]}
        world.rotate()
        assert (await http.patch(PATH, json={"dtype": "auto"}, headers=fresh)).status_code == 412
        any_ = await http.patch(PATH, json={"dtype": "auto"}, headers={"If-Match": "*"})
        assert (any_.status_code, any_.headers["etag"]) == (200, f'"{any_.json()["row_version"]}"')


async def test_the_etag_grows_with_each_change_and_only_then(world: World) -> None:
    """The policy is part of the record; a change to what it is already is none."""
    world.model()
    async with world.client(Role.ADMIN) as keys:
        start = (await keys.get_model(*AT)).row_version
        await keys.update_policy(*AT, RotationPolicyPatch(period_s=3600))
        assert (await keys.get_model(*AT)).row_version == start + 1
        same = await keys.update_model(*AT, ModelPatch(dtype="auto"), if_match=start + 1)
        assert same.row_version == start + 1
        with pytest.raises(errors.PreconditionFailed):
            await keys.update_model(*AT, ModelPatch(dtype="float32"), if_match=start)


async def test_a_change_under_one_key_is_done_once(world: World) -> None:
    """The answer is repeated, although its If-Match no longer holds; another change under the key is 422."""
    world.model()
    async with world.http(world.secret(Role.ADMIN)) as http:
        etag = (await http.get(PATH)).headers["etag"]
        once = {"Idempotency-Key": "k1", "If-Match": etag}
        first = await http.patch(PATH, json={"dtype": "float32"}, headers=once)
        await http.patch(PATH, json={"dtype": "bfloat16"})
        again = await http.patch(PATH, json={"dtype": "float32"}, headers=once)
        assert (again.status_code, again.json(), again.headers["etag"]) == (
            200,
            first.json(),
            first.headers["etag"],
        )
        assert (await http.get(PATH)).json()["dtype"] == "bfloat16"
        assert (await http.patch(PATH, json={"dtype": "auto"}, headers=once)).status_code == 422


def test_a_version_keeps_what_it_was_issued_under(world: World) -> None:
    """Through all that becomes of it; the next one has the change."""
    world.model()
    with world.service.database.read(PLATFORM) as session:
        before = lookup.model_read(lookup.model(session, *AT))
    first = world.active()
    after = change(world, base="hf://org/new", base_digest=DIGEST, serving={"tensor_parallel": 2})
    second = world.active()
    world.do(lifecycle.suspend, *AT, second, None)
    with world.service.database.read(PLATFORM) as session:
        kept = [lookup.version_read(lookup.version(session, *AT, n)) for n in (first, second)]
    assert [version.settings for version in kept] == [issued(before), issued(after)]


def test_another_base_needs_its_own_digest(world: World) -> None:
    """The old one would refuse every fold; null says that any base is meant."""
    world.model()
    change(world, base_digest=DIGEST)
    with pytest.raises(errors.Unprocessable) as caught:
        change(world, base="file:///new")
    assert (caught.value.code, caught.value.param) == ("base_digest_needed", "base_digest")
    assert change(world, base="file:///base", dtype="float32").base_digest == DIGEST
    assert change(world, base="file:///new", base_digest=OTHER).base_digest == OTHER
    assert change(world, base="file:///newer", base_digest=None).base_digest is None
    assert change(world, base="file:///newest").base == "file:///newest"


def test_a_change_is_one_row_of_the_audit_log(world: World) -> None:
    """With the fields that were given, nothing else; a refused one leaves none."""
    world.model()
    change(world, base="file:///new", base_digest=None, serving={"tensor_parallel": 2})
    with pytest.raises(errors.PreconditionFailed):
        change(world, 999, dtype="float32")
    with world.service.database.read(PLATFORM) as session:
        [row] = session.exec(select(Audit).where(Audit.action == "model.update"))
        detail = dict(row.detail)
        assert (row.tenant, row.subject, row.actor) == ("acme", "chat", "test")
    assert Serving.model_validate(json.loads(detail.pop("serving"))) == Serving(tensor_parallel=2)
    assert detail == {"base": "file:///new", "base_digest": None}


# Quotas.


def quota(world: World, **most: int) -> None:
    world.do(quotas.update, "acme", TenantQuotaPatch.model_validate(most))


def over(world: World, **fields: Any) -> None:
    with pytest.raises(errors.Conflict) as caught:
        change(world, **fields)
    assert caught.value.code == "quota_exceeded"


def test_a_change_is_held_to_the_quota_as_a_new_model_is(world: World) -> None:
    """Together with the tenant's other models; what asks for no more than before is admitted."""
    world.model()
    world.model("acme", "other")
    quota(world, devices=4)
    over(world, serving={"tensor_parallel": 4})
    change(world, serving={"tensor_parallel": 3})
    quota(world, devices=1)
    over(world, serving={"tensor_parallel": 4})
    change(world, dtype="float32", serving={"tensor_parallel": 3})
    change(world, serving={"tensor_parallel": 2})


def test_a_smaller_record_frees_nothing_that_is_still_served(world: World) -> None:
    """Else a tenant could shrink the record of what runs, and ask for the same devices once more."""
    world.model()
    quota(world, devices=4)
    change(world, serving={"tensor_parallel": 4})
    large = world.active()
    change(world, serving={})
    other = ModelCreate(id="other", base="b", vocab_size=9, context_length=9)
    with pytest.raises(errors.Conflict) as caught:
        world.do(tenants.create_model, "acme", other)
    assert caught.value.code == "quota_exceeded"
    world.active()
    world.clock.advance(100)
    world.do(lifecycle.retire, *AT, large, None)
    world.do(tenants.create_model, "acme", other)
