"""How many objects a tenant may have, who decides it, and what counts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from anamorph import errors
from anamorph.wire.admin import (
    ApiKeyCreate,
    Autoscaling,
    ModelCreate,
    Role,
    Serving,
    TenantCreate,
    TenantQuota,
    TenantQuotaPatch,
)
from anamorph_keysvc.service import lifecycle, quotas, tenants

if TYPE_CHECKING:
    from tests.keysvc.conftest import World

AT = ("acme", "chat")


def model(number: int, **serving: object) -> ModelCreate:
    chosen = Serving.model_validate(serving)
    return ModelCreate(id=f"m{number}", base="b", vocab_size=9, context_length=9, serving=chosen)


def refused(world: World, act: object, *args: object) -> str | None:
    with pytest.raises(errors.Conflict) as caught:
        world.do(act, *args)  # type: ignore[arg-type]
    return caught.value.code


async def test_the_platform_sets_quotas_and_the_tenant_reads_them(world: World) -> None:
    """What is not set has its default; null goes back to it."""
    world.model()
    async with world.client(Role.PLATFORM) as keys, world.client(Role.ADMIN) as admin:
        assert await keys.get_quota("acme") == TenantQuota()
        changed = await keys.update_quota("acme", TenantQuotaPatch(models=3, webhooks=0))
        assert changed == TenantQuota(models=3, webhooks=0)
        assert await admin.get_quota("acme") == changed
        back = await keys.update_quota("acme", TenantQuotaPatch(models=None))
        assert back == TenantQuota(webhooks=0)
        with pytest.raises(errors.Forbidden):
            await admin.update_quota("acme", TenantQuotaPatch(models=1000))
        with pytest.raises(errors.NotFound):
            await keys.update_quota("nobody", TenantQuotaPatch(models=1))


@pytest.mark.parametrize("number", [-1, 10**9])
def test_a_quota_outside_its_bounds_is_refused(world: World, number: int) -> None:
    """And the old one stays."""
    world.model()
    with pytest.raises(errors.Unprocessable) as caught:
        world.do(quotas.update, "acme", TenantQuotaPatch(models=number))
    assert (caught.value.code, caught.value.param) == ("invalid_quota", "models")
    world.do(tenants.create_model, "acme", model(1))


def test_a_model_too_many_leaves_no_trace(world: World) -> None:
    """Neither the model nor a row of the audit log."""
    world.model()
    world.do(quotas.update, "acme", TenantQuotaPatch(models=2))
    world.do(tenants.create_model, "acme", model(1))
    assert refused(world, tenants.create_model, "acme", model(2)) == "quota_exceeded"
    world.do(quotas.update, "acme", TenantQuotaPatch(models=3))
    world.do(tenants.create_model, "acme", model(2))


def test_a_lower_quota_takes_nothing_away(world: World) -> None:
    """What is over it stays; there is just no more."""
    world.model()
    world.do(quotas.update, "acme", TenantQuotaPatch(models=0))
    assert world.rotate() == 1
    assert refused(world, tenants.create_model, "acme", model(1)) == "quota_exceeded"


def test_a_revoked_key_makes_room(world: World) -> None:
    """Revoked keys stay in the list for ever and do not count."""
    world.model()
    world.do(quotas.update, "acme", TenantQuotaPatch(api_keys=1))
    body = ApiKeyCreate(name="n", role=Role.CLIENT)
    made = world.do(tenants.create_api_key, "acme", body)
    assert refused(world, tenants.create_api_key, "acme", body) == "quota_exceeded"
    world.do(tenants.revoke_api_key, "acme", made.id)
    world.do(tenants.create_api_key, "acme", body)


def test_versions_count_until_they_are_to_be_destroyed(world: World) -> None:
    """Retired ones too: only their destruction makes room."""
    world.model()
    world.do(quotas.update, "acme", TenantQuotaPatch(versions=2))
    first = world.active()
    world.active()
    world.clock.advance(100)
    world.do(lifecycle.retire, *AT, first, None)
    with pytest.raises(errors.Conflict) as caught:
        world.rotate()
    assert caught.value.code == "quota_exceeded"
    world.do(lifecycle.destroy, *AT, first, None)
    assert world.rotate() == 3


def test_tenants_do_not_share_a_quota(world: World) -> None:
    """Each has its own."""
    world.model()
    world.model("globex")
    world.do(quotas.update, "acme", TenantQuotaPatch(models=1))
    assert refused(world, tenants.create_model, "acme", model(1)) == "quota_exceeded"
    world.do(tenants.create_model, "globex", model(1))


def test_many_at_once_get_exactly_the_quota(world: World) -> None:
    """Two cannot both take the last place."""
    world.model()
    world.do(quotas.update, "acme", TenantQuotaPatch(models=5))

    def create(number: int) -> bool:
        try:
            world.do(tenants.create_model, "acme", model(number))
        except errors.Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(16))) == 4


POOLED = {"placement": "shared", "pool": "small"}
SHARDED = {"tensor_parallel": 2, "pipeline_parallel": 3, "autoscaling": Autoscaling(max_replicas=2)}


@pytest.mark.parametrize(
    ("quota", "serving", "takes"),
    [
        ("devices", {}, 1),
        ("devices", SHARDED, 12),
        ("devices", {"tensor_parallel": 2, "num_gpus": 4}, 8),
        ("devices", {"tensor_parallel": 2, "num_gpus": 0.5}, 2),
        ("devices", {**POOLED, "num_gpus": 4}, 4),
        ("concurrent", {"max_concurrent": 5, "autoscaling": Autoscaling(max_replicas=3)}, 15),
        ("concurrent", {**POOLED, "max_concurrent": 5}, 5),
        ("weight", {**POOLED, "weight": 7}, 7),
        ("tokens_per_s", {**POOLED, "tokens_per_s": 9}, 9),
    ],
)
def test_what_a_model_asks_of_the_compute_zone_counts(
    world: World, quota: str, serving: dict[str, object], takes: int
) -> None:
    """Exactly its quota is admitted, one less is not; the message names quota, need and way out."""
    world.do(tenants.create_tenant, TenantCreate(id="acme"))
    world.do(quotas.update, "acme", TenantQuotaPatch.model_validate({quota: takes - 1}))
    with pytest.raises(
        errors.Conflict, match=rf"{takes - 1} {quota}.* {takes} .*have the quota raised"
    ) as no:
        world.do(tenants.create_model, "acme", model(1, **serving))
    assert no.value.code == "quota_exceeded"
    world.do(quotas.update, "acme", TenantQuotaPatch.model_validate({quota: takes}))
    world.do(tenants.create_model, "acme", model(1, **serving))


def test_all_models_of_a_tenant_count_together_and_others_do_not(world: World) -> None:
    """Whether they come first or last; another tenant's take nothing away."""
    for tenant in ("acme", "globex"):
        world.do(tenants.create_tenant, TenantCreate(id=tenant))
        world.do(quotas.update, tenant, TenantQuotaPatch(devices=5))
        world.do(tenants.create_model, tenant, model(1, tensor_parallel=3))
        world.do(tenants.create_model, tenant, model(2))
        assert refused(world, tenants.create_model, tenant, model(3, tensor_parallel=2)) == "quota_exceeded"
        world.do(tenants.create_model, tenant, model(3))


def test_what_adds_nothing_to_a_quota_is_not_refused_for_it(world: World) -> None:
    """A tenant over its devices still joins a pool, whose process is none of its own."""
    world.model()
    world.do(quotas.update, "acme", TenantQuotaPatch(devices=0, weight=2))
    assert refused(world, tenants.create_model, "acme", model(1)) == "quota_exceeded"
    world.do(tenants.create_model, "acme", model(1, **POOLED))


def test_a_quota_of_tokens_asks_every_model_in_a_pool_for_its_bound(world: World) -> None:
    """Without one it could take all; a model with an engine of its own has none and needs none."""
    world.model()
    world.do(quotas.update, "acme", TenantQuotaPatch(tokens_per_s=100))
    with pytest.raises(errors.Conflict, match="give the model tokens_per_s") as caught:
        world.do(tenants.create_model, "acme", model(1, **POOLED))
    assert caught.value.code == "quota_exceeded"
    world.do(tenants.create_model, "acme", model(1, **POOLED, tokens_per_s=60.5))
    assert (
        refused(world, tenants.create_model, "acme", model(2, **POOLED, tokens_per_s=40)) == "quota_exceeded"
    )
    world.do(tenants.create_model, "acme", model(2))


async def test_over_the_wire_it_is_a_problem_like_the_others(world: World) -> None:
    """409 with the quota's code and nothing left behind; by default one model may not take a cluster."""
    world.model()
    greedy = model(1, autoscaling=Autoscaling(max_replicas=1000))
    async with world.http(world.secret(Role.ADMIN)) as http:
        answer = await http.post("/v1/tenants/acme/models", json=greedy.model_dump(mode="json"))
        listed = await http.get("/v1/tenants/acme/models")
    assert (answer.status_code, answer.json()["code"]) == (409, "quota_exceeded")
    assert answer.headers["content-type"] == "application/problem+json"
    assert [one["id"] for one in listed.json()["items"]] == ["chat"]
