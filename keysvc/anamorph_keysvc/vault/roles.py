"""How each identity's role is defined at the auth method that its settings choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anamorph.errors import SetupError
from anamorph_keysvc.vault.settings import (
    Approle,
    Identity,
    Jwt,
    JwtSetup,
    Kubernetes,
    KubernetesSetup,
    StaticToken,
    VaultSettings,
)

Method = Approle | Kubernetes | Jwt


def methods(settings: VaultSettings) -> dict[Identity, Method]:
    """The auth methods that have roles: all but static tokens."""
    chosen = {identity: settings.auth(identity) for identity in Identity}
    return {identity: auth for identity, auth in chosen.items() if not isinstance(auth, StaticToken)}


def role_path(identity: Identity, auth: Method) -> str:
    """Where the role is."""
    return f"auth/{auth.mount}/role/{auth.role or identity.policy}"


def role_body(settings: VaultSettings, identity: Identity, auth: Method) -> dict[str, Any]:
    """What the role says, in the form in which Vault reads it back."""
    token = {
        "token_policies": [identity.policy],
        # Vault's default policy would let it see and store much that it does not need.
        "token_no_default_policy": True,
        "token_ttl": settings.setup.token_ttl_s,
        "token_max_ttl": settings.setup.token_max_ttl_s,
        "token_num_uses": 0,
    }
    match auth:
        case Approle():
            ttl = settings.setup.secret_id_ttl_s
            return token | {"bind_secret_id": True, "secret_id_ttl": ttl, "secret_id_num_uses": 0}
        case Kubernetes():
            return token | _service_accounts(kubernetes_setup(settings))
        case Jwt():
            return token | _claims(jwt_setup(settings))


def config_body(settings: VaultSettings, auth: Method) -> dict[str, Any]:
    """What the auth method itself is told; nothing for AppRole."""
    match auth:
        case Approle():
            return {}
        case Kubernetes():
            setup = kubernetes_setup(settings)
            ca = {"kubernetes_ca_cert": _text(setup.ca_file)} if setup.ca_file else {}
            return {"kubernetes_host": setup.host, **ca}
        case Jwt():
            return _keys(jwt_setup(settings))


def kubernetes_setup(settings: VaultSettings) -> KubernetesSetup:
    """The section [setup.kubernetes]. SetupError where it is missing."""
    return settings.setup.kubernetes or _missing("kubernetes")


def jwt_setup(settings: VaultSettings) -> JwtSetup:
    """The section [setup.jwt]. SetupError where it is missing."""
    return settings.setup.jwt or _missing("jwt")


def differs(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> list[str]:
    """The names whose values are not as wanted; all where nothing is there.

    The order in lists means nothing, and what Vault leaves out is empty, zero or false.
    """
    held = found or {}
    other = [name for name, value in wanted.items() if _plain(held.get(name)) != _plain(value)]
    return list(wanted) if found is None else other


def _service_accounts(setup: KubernetesSetup) -> dict[str, Any]:
    return {
        "bound_service_account_names": list(setup.service_accounts),
        "bound_service_account_namespaces": list(setup.namespaces),
        "audience": setup.audience or "",
    }


def _claims(setup: JwtSetup) -> dict[str, Any]:
    bound = {"bound_audiences": [setup.audience], "bound_subject": setup.subject}
    return {"role_type": "jwt", "user_claim": "sub", **bound}


def _keys(setup: JwtSetup) -> dict[str, Any]:
    source: dict[str, Any] = {"jwks_url": setup.jwks_url} if setup.jwks_url else {}
    if setup.public_keys:
        source["jwt_validation_pubkeys"] = [_text(file) for file in setup.public_keys]
    return {"bound_issuer": setup.issuer, **source}


def _text(file: Any) -> str:
    try:
        return str(file.read_text()).strip()
    except OSError as error:
        raise SetupError(f"{file} cannot be read: {error.strerror}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        value = sorted(map(_plain, value))
    return (value.strip() if isinstance(value, str) else value) or None


def _missing(section: str) -> Any:
    raise SetupError(f"the settings log in by {section} but have no section [setup.{section}]")
