"""How many objects a tenant may have.

Over a quota is 409 and not 429: waiting does not help, something has to be deleted, or
the quota raised. A client that repeats 429 by itself would repeat for nothing.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError
from sqlmodel import col, func, select

from anamorph import errors
from anamorph.wire.admin import TenantQuota, TenantQuotaPatch
from anamorph.wire.states import LIVING
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
