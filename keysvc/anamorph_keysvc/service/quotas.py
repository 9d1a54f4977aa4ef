"""How many objects a tenant may have, and how much of the compute zone its models may ask for.

Over a quota is 409 and not 429: waiting does not help, something has to be deleted, or
the quota raised. A client that repeats 429 by itself would repeat for nothing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError
from sqlmodel import col, func, select

from anamorph import errors
from anamorph.wire.admin import Serving, TenantQuota, TenantQuotaPatch
from anamorph.wire.states import LIVING, ONGOING
from anamorph_keysvc import audit
from anamorph_keysvc.service import lookup
from anamorph_keysvc.service.work import Work
from anamorph_keysvc.tables import ApiKey, KeyVersion, Model, Tenant, Webhook

Counted = Literal["models", "api_keys", "webhooks", "versions"]


def of(tenant: Tenant) -> TenantQuota:
    """A tenant's quota; what is not set for it has its default."""
    return TenantQuota.model_validate(tenant.quota)


def update(work: Work, tenant: str, patch: TenantQuotaPatch) -> TenantQuota:
    """Change some fields of a quota. What is over a lower one stays; it only does not grow.

    Raises:
        Unprocessable: a number outside its bounds.
    """
    row = lookup.tenant(work.session, tenant)
    changes = patch.model_dump(exclude_unset=True)
    merged = {name: most for name, most in {**row.quota, **changes}.items() if most is not None}
    try:
        quota = TenantQuota.model_validate(merged)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise errors.Unprocessable(first["msg"], code="invalid_quota", param=str(first["loc"][0])) from None
    row.quota = merged
    work.session.add(row)
    work.record(tenant, "quota.update", tenant, **changes)
    return quota


def check(work: Work, tenant: str, what: Counted) -> None:
    """Refuse the object that this transaction has just added, if it is one too many.

    Called last: the tenant's other writers wait from then on, so that two of them cannot
    both take the last place.

    Raises:
        Conflict: over the quota.
    """
    audit.take_turn(work.session, tenant)
    most: int = getattr(of(lookup.tenant(work.session, tenant)), what)
    if work.session.exec(_counting(tenant, what)).one() > most:
        raise errors.Conflict(
            f"this tenant's quota is {most} {what.replace('_', ' ')}: delete one or have the quota raised",
            code="quota_exceeded",
        )


Asked = Mapping[str, float]
"""How much of each quota a model asks for."""


def asked(work: Work, tenant: str) -> dict[str, Asked]:
    """What each model of a tenant asks for: by its record, or a version that is not over, if that is more."""
    records = select(Model.id, Model.serving).where(Model.tenant == tenant)
    kept = select(KeyVersion.model, KeyVersion.settings).where(
        KeyVersion.tenant == tenant, lookup.has_state(*ONGOING)
    )
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for model, serving in work.session.exec(records):
        found[model] |= _asks(serving)
    for model, settings in work.session.exec(kept):
        if settings is not None:
            found[model] |= _asks(settings["serving"])
    return dict(found)


def check_serving(work: Work, tenant: str, model: str, before: Asked | None = None) -> None:
    """Refuse the model that this transaction has added or changed, if with it all ask for too much.

    What adds nothing to a quota is admitted even if the others are over it. Called last, as ``check`` is.

    Args:
        work: the transaction.
        tenant: whose models.
        model: the one added or changed.
        before: what a changed one asked for.

    Raises:
        Conflict: over the quota.
    """
    audit.take_turn(work.session, tenant)
    quota, now = of(lookup.tenant(work.session, tenant)), asked(work, tenant)
    for name, share in now[model].items():
        most, total = getattr(quota, name), sum(one.get(name, 0) for one in now.values())
        if most is not None and share > (before or {}).get(name, 0) and total > most:
            raise errors.Conflict(_too_much(name, most, total), code="quota_exceeded")


def _asks(record: Mapping[str, Any]) -> Any:
    """The most of each quota that one version takes; as a ``Counter``, whose ``|`` is the larger of each."""
    return Counter(_shares(Serving.model_validate(record)))


def _shares(serving: Serving) -> dict[str, float]:
    replicas = serving.autoscaling.max_replicas
    concurrent = serving.max_concurrent * replicas
    if serving.placement == "dedicated":
        ranks = serving.tensor_parallel * serving.pipeline_parallel * replicas
        return {"devices": ranks * max(1, serving.num_gpus), "concurrent": concurrent}
    rate = math.inf if serving.tokens_per_s is None else serving.tokens_per_s
    # Its pool's process is no tenant's; but who comes first says how many GPUs that takes.
    devices = serving.num_gpus
    return {"devices": devices, "concurrent": concurrent, "weight": serving.weight, "tokens_per_s": rate}


def _too_much(name: str, most: int, total: float) -> str:
    if total == math.inf:
        return (
            f"this tenant's quota is {most} tokens_per_s, and not all of its models in pools have a bound:"
            " give the model tokens_per_s within it, or have the quota raised"
        )
    return (
        f"this tenant's quota is {most} {name}, and its models would ask for {total:.15g} together"
        f" ({_MEANING[name]}): ask for less or have the quota raised"
    )


_MEANING = {
    "devices": "tensor_parallel x pipeline_parallel x max_replicas x num_gpus of each",
    "concurrent": "max_concurrent x max_replicas of each",
    "weight": "of those in pools",
    "tokens_per_s": "of those in pools",
}


def _counting(tenant: str, what: Counted) -> Any:
    if what == "models":
        return select(func.count(col(Model.id))).where(Model.tenant == tenant)
    if what == "webhooks":
        return select(func.count(col(Webhook.id))).where(Webhook.tenant == tenant)
    if what == "api_keys":
        unrevoked = col(ApiKey.revoked_at).is_(None)
        return select(func.count(col(ApiKey.id))).where(ApiKey.tenant == tenant, unrevoked)
    living = col(KeyVersion.state).in_(LIVING)
    return select(func.count(col(KeyVersion.version))).where(KeyVersion.tenant == tenant, living)
