"""What Kubernetes service accounts may do, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import permutations
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from anamorph.wire.admin import Role
from anamorph.wire.ids import Label

EVERY = "*"
_ACCOUNT = re.compile(r"\*|[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?|[a-z0-9][-.a-z0-9]{0,251}\*")


def _account(name: str) -> str:
    if not _ACCOUNT.fullmatch(name):
        raise ValueError("give a name, '*', or the beginning of names with one '*' at its end")
    return name


class Binding(BaseModel):
    """What a Kubernetes service account may do.

    ``service_account`` is its name; or ``*``, every one of the namespace that no other binding
    is about; or, with ``tenant_from="name"``, a beginning and ``*``, where the tenant is what the
    star stands for: ``materializer-*`` binds ``materializer-acme`` to ``acme``. So whoever may make
    service accounts in that namespace chooses their tenant.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    namespace: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
    service_account: Annotated[str, AfterValidator(_account)]
    tenant: Label | None = None
    tenant_from: Literal["name"] | None = None
    role: Role = Role.MATERIALIZER

    @model_validator(mode="after")
    def _consistent(self) -> Binding:
        if self.tenant_from is not None or self.beginning:
            self._check_named()
        elif (self.role is Role.PLATFORM) != (self.tenant is None):
            raise ValueError("every role but platform needs a tenant, and platform has none")
        if self.role is Role.PLATFORM and self.service_account == EVERY:
            raise ValueError("name the service account that gets the platform role")
        return self

    def _check_named(self) -> None:
        if self.tenant_from is None:
            raise ValueError(
                f"'{self.service_account}' stands for accounts of several tenants: set tenant_from = \"name\""
            )
        if not self.beginning:
            raise ValueError(
                "tenant_from = \"name\" needs a service_account that ends in one '*', such as materializer-*"
            )
        if self.tenant is not None:
            raise ValueError("give 'tenant' or 'tenant_from', not both")
        if self.role is Role.PLATFORM:
            raise ValueError("the platform role stands above tenants: it is never had by a tenant's name")

    @property
    def beginning(self) -> str:
        """What comes before the star of a name; empty for a whole name, and for ``*`` alone."""
        return self.service_account.removesuffix(EVERY) if self.service_account.endswith(EVERY) else ""


def refuse_overlaps(bindings: Iterable[Binding]) -> None:
    """Refuse beginnings of names that one account could have both, each with another tenant.

    Raises:
        ValueError: there are two such.
    """
    for one, other in permutations([binding for binding in bindings if binding.beginning], 2):
        if one.namespace == other.namespace and one.beginning.startswith(other.beginning):
            both = f"'{one.service_account}' and '{other.service_account}'"
            raise ValueError(f"an account could be of {both}, and so of two tenants")
