"""Whose tokens the key service takes, and what they may do. File paths only, never a secret."""

from __future__ import annotations

import ipaddress
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from anamorph.wire.admin import Role
from anamorph.wire.ids import Label
from anamorph_keysvc.identity.bindings import Binding, refuse_overlaps

# What our own inference tokens say: worthless here, whatever the settings are.
INFERENCE_ISSUER, INFERENCE_AUDIENCE = "anamorph", "inference"
_MOUNTED = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# An audience of the API server's own: with it, any pod's default token would be good here.
_API_SERVER_AUDIENCES = ("kubernetes.default", "https://kubernetes.default")

# Asymmetric only: with HS… a public key would be the secret, and "none" needs no key at all.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


def _absolute_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"https", "http"} or not parts.hostname:
        raise ValueError("give an https:// URL")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError("a URL here holds no user, password or fragment")
    return url


def _audience(value: str) -> str:
    if value == INFERENCE_AUDIENCE:
        raise ValueError(
            f"'{INFERENCE_AUDIENCE}' is the audience of inference tokens, which are never taken here"
        )
    return value


def _as_path(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Url = Annotated[str, AfterValidator(_absolute_url)]
Audience = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_audience)]
# A claim's name, or the path to it: ["realm_access", "roles"].
Claim = Annotated[tuple[str, ...], BeforeValidator(_as_path), Field(min_length=1, max_length=8)]


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_private(url: str) -> bool:
    """Whether a URL's host is an address, or ``localhost``, that the internet does not route to."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def may_fetch(url: str, *, development: bool) -> bool:
    """Whether a URL is one to send anything to: https, or http to this machine while developing."""
    try:
        _absolute_url(url)
    except ValueError:
        return False
    return url.startswith("https://") or (development and is_loopback(url))


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OidcSettings(_Frozen):
    """One OIDC issuer, and what its tokens may do.

    ``roles`` maps values of the roles claim to roles: of several, the first in the order written
    here counts. The tenant is fixed, or read from a claim: an issuer with a claim speaks for
    every tenant, so a customer's own issuer has its tenant fixed. Times in seconds.
    """

    name: Label
    issuer: Url
    audiences: tuple[Audience, ...] = Field(min_length=1)
    algorithms: tuple[Algorithm, ...] = Field(default=("RS256",), min_length=1)
    jwks_url: Url | None = None
    """Where its keys are; None: where its discovery document says."""
    ca_file: Path | None = None
    """Whom to trust as its certificate authority; None: the usual ones."""
    tenant: Label | None = None
    tenant_claim: Claim | None = None
    roles_claim: Claim
    roles: dict[str, Role] = Field(min_length=1)
    leeway_s: float = Field(default=30, ge=0, le=120)
    keys_ttl_s: float = Field(default=300, ge=1, le=3600)
    keys_stale_s: float = Field(default=3600, ge=0, le=86400)
    """How long keys are still good, after their TTL, while the issuer does not answer."""
    refresh_interval_s: float = Field(default=10, ge=1, le=300)
    """At most one fetch of the keys in this time, whatever callers send."""
    timeout_s: float = Field(default=2, gt=0, le=10)

    @model_validator(mode="after")
    def _consistent(self) -> OidcSettings:
        platform = Role.PLATFORM in self.roles.values()
        if self.tenant is not None and self.tenant_claim is not None:
            raise ValueError("give 'tenant' or 'tenant_claim', not both")
        if self.tenant is not None and platform:
            raise ValueError(
                "an issuer of one tenant cannot give the platform role, which stands above tenants"
            )
        if self.tenant is None and self.tenant_claim is None and set(self.roles.values()) != {Role.PLATFORM}:
            raise ValueError("give 'tenant', or 'tenant_claim' where the token names it")
        return self

    def urls(self) -> list[str]:
        """Every URL that it is configured with."""
        return [self.issuer, *([self.jwks_url] if self.jwks_url else [])]


class KubernetesSettings(_Frozen):
    """The cluster whose service accounts may call; its API server reviews their tokens.

    Our own service account needs the ClusterRole ``system:auth-delegator``. Times in seconds.
    """

    api_server: Url | None = None
    """None: the cluster that this process runs in."""
    ca_file: Path = _MOUNTED / "ca.crt"
    token_file: Path = _MOUNTED / "token"
    issuer: str | None = None
    """The ``iss`` of its tokens; None: any that no OIDC issuer has."""
    audiences: tuple[Audience, ...] = Field(min_length=1)
    bindings: tuple[Binding, ...] = Field(min_length=1)
    cache_s: float = Field(default=30, ge=0, le=60)
    """How long a review is remembered: as long may a deleted service account still call."""
    timeout_s: float = Field(default=2, gt=0, le=10)
    concurrency: int = Field(default=8, ge=1, le=64)

    @model_validator(mode="after")
    def _consistent(self) -> KubernetesSettings:
        for audience in self.audiences:
            if audience == "api" or audience.startswith(_API_SERVER_AUDIENCES):
                raise ValueError(
                    f"'{audience}' is the API server's audience: choose one of the key service's own"
                )
        _refuse_twice("binding", ((binding.namespace, binding.service_account) for binding in self.bindings))
        refuse_overlaps(self.bindings)
        return self

    def url(self) -> str:
        """The API server's URL; in a pod, from the variables that the cluster sets.

        Raises:
            ValueError: none is configured, and this process runs in no pod.
        """
        if self.api_server is not None:
            return self.api_server.rstrip("/")
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
        if not host or not port:
            raise ValueError("this process runs in no Kubernetes pod: set 'api_server'")
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


class IdentitySettings(BaseSettings):
    """Whose tokens are taken, beside API keys: nobody's, unless configured.

    ``development`` admits http to this machine.
    """

    model_config = SettingsConfigDict(env_prefix="ANAMORPH_KEYSVC_IDENTITY_", frozen=True, extra="forbid")

    oidc: tuple[OidcSettings, ...] = ()
    kubernetes: KubernetesSettings | None = None
    development: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> IdentitySettings:
        _refuse_twice("name", (issuer.name for issuer in self.oidc))
        _refuse_twice("issuer", self.issuers())
        if INFERENCE_ISSUER in self.issuers():
            raise ValueError(
                f"'{INFERENCE_ISSUER}' is the issuer of inference tokens, which are never taken here"
            )
        for url in self._urls():
            if not may_fetch(url, development=self.development):
                raise ValueError(f"{url} is not https")
        return self

    def issuers(self) -> list[str]:
        """Every ``iss`` that is configured."""
        kubernetes = self.kubernetes.issuer if self.kubernetes else None
        return [*(issuer.issuer for issuer in self.oidc), *([kubernetes] if kubernetes else [])]

    def _urls(self) -> list[str]:
        kubernetes = self.kubernetes.api_server if self.kubernetes else None
        return [
            *(url for issuer in self.oidc for url in issuer.urls()),
            *([kubernetes] if kubernetes else []),
        ]


def _refuse_twice(what: str, values: Iterable[object]) -> None:
    twice = [value for value, times in Counter(values).items() if times > 1]
    if twice:
        raise ValueError(f"the {what} {twice[0]} is there twice")
