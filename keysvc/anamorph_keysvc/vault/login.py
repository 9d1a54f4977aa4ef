"""How an identity gets a token: one function per auth method, each answering a fresh login."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from anamorph.errors import SetupError, Unavailable
from anamorph_keysvc.vault.settings import (
    Approle,
    Identity,
    Jwt,
    Kubernetes,
    StaticToken,
    VaultSettings,
    read_secret,
)
from anamorph_keysvc.vault.transport import RETRY_AFTER_S, Answer, Call, Transport


@dataclass(frozen=True)
class Granted:
    """A token as Vault gave it. ``ttl_s`` 0: without end. ``ours``: we made it, so we revoke it."""

    token: str = field(repr=False)
    ttl_s: float
    renewable: bool
    ours: bool = True


Login = Callable[[], Granted]


def login_of(settings: VaultSettings, identity: Identity, transport: Transport) -> Login:
    """The way in that the settings choose for an identity.

    What it answers raises ``Unavailable`` (``kms_denied`` where Vault refuses the login) and
    ``SetupError`` for a file that is missing or a wrapped secret id that somebody else opened.
    """
    auth = settings.auth(identity)
    match auth:
        case Approle():
            return _ApproleLogin(auth, identity, transport)
        case StaticToken():
            return lambda: _static(auth, identity, transport)
        case Kubernetes() | Jwt():
            return lambda: _by_jwt(auth, identity, transport)


def granted(auth: Mapping[str, Any]) -> Granted:
    """The ``auth`` part of an answer."""
    return Granted(auth["client_token"], auth["lease_duration"], bool(auth["renewable"]))


def denied(identity: Identity) -> Unavailable:
    """Vault does not let this identity do its work: somebody changed a role or a policy."""
    return Unavailable(
        f"Vault refuses the {identity.value}: run 'anamorph-keysvc vault check'",
        code="kms_denied",
        retry_after=RETRY_AFTER_S,
    )


def _by_jwt(auth: Kubernetes | Jwt, identity: Identity, transport: Transport) -> Granted:
    # Read each time: whoever writes the file replaces it before it expires.
    jwt = read_secret(auth.token_file, "a token")
    return _login(auth.mount, {"role": auth.role or identity.policy, "jwt": jwt}, identity, transport)


def _static(auth: StaticToken, identity: Identity, transport: Transport) -> Granted:
    token = read_secret(auth.token_file, "a token")
    answer = transport.call(lookup(), token)
    if not answer.ok:
        raise denied(identity)
    return Granted(token, answer.data["ttl"], bool(answer.data.get("renewable")), ours=False)


def lookup() -> Call:
    """What a token says of itself: refused once it has expired or was revoked."""
    return Call("lookup", "GET", ("auth", "token", "lookup-self"), repeatable=True)


class _ApproleLogin:
    """Opens the wrapped secret id once and keeps it in memory."""

    def __init__(self, auth: Approle, identity: Identity, transport: Transport) -> None:
        self._auth, self._identity, self._transport = auth, identity, transport
        self._opened: str | None = None
        self._secret_id: str | None = None

    def __call__(self) -> Granted:
        wrapping = read_secret(self._auth.wrapped_secret_id_file, "a wrapping token")
        if self._secret_id is None or wrapping != self._opened:
            self._secret_id = self._open(wrapping)
            self._opened = wrapping
        body = {"role_id": self._auth.role_id, "secret_id": self._secret_id}
        return _login(self._auth.mount, body, self._identity, self._transport)

    def _open(self, wrapping: str) -> str:
        asked = Call("unwrap", "POST", ("sys", "wrapping", "lookup"), {"token": wrapping}, repeatable=True)
        found = self._transport.call(asked, None)
        self._must(found)
        role = self._auth.role or self._identity.policy
        if found.data.get("creation_path") != f"auth/{self._auth.mount}/role/{role}/secret-id":
            raise SetupError(
                f"the token in {self._auth.wrapped_secret_id_file} wraps something else than a secret id of "
                f"role {role}: somebody may have put it there; find out who, then write a new one"
            )
        # Not repeated: whoever opens it second must hear of the first.
        opened = self._transport.call(Call("unwrap", "POST", ("sys", "wrapping", "unwrap")), wrapping)
        self._must(opened)
        return str(opened.data["secret_id"])

    def _must(self, answer: Answer) -> None:
        if not answer.ok:
            raise SetupError(
                f"the wrapped secret id in {self._auth.wrapped_secret_id_file} has expired or was opened "
                "before: if not by an earlier start of this service, somebody else holds it. Destroy the "
                f"secret ids of role {self._auth.role or self._identity.policy}, then write a fresh one"
            )


def _login(mount: str, body: Mapping[str, Any], identity: Identity, transport: Transport) -> Granted:
    # Repeatable: a login whose answer was lost leaves a token that ends with its TTL.
    path = ("auth", *mount.split("/"), "login")
    answer = transport.call(Call("login", "POST", path, body, repeatable=True), None)
    if not answer.ok:
        raise denied(identity)
    return granted(answer.body["auth"])
