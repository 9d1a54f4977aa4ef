"""``vault check``: a running Vault against what ``vault setup`` makes, least privilege included.

Policies are judged by what they do: Vault is asked what each identity may do with each
path, and calls that must be refused are made. Each of them would change nothing if it
were not refused.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from anamorph.errors import AnamorphError, SetupError
from anamorph_keysvc.vault import roles
from anamorph_keysvc.vault.admin import Admin, ignores_namespaces
from anamorph_keysvc.vault.auth import Caller, Vault
from anamorph_keysvc.vault.login import lookup
from anamorph_keysvc.vault.policies import policies
from anamorph_keysvc.vault.settings import AUDIT_KEY, Identity, VaultSettings
from anamorph_keysvc.vault.setup import audit_files, key_faults
from anamorph_keysvc.vault.transport import Call
from anamorph_keysvc.vault.wrapper import KEK_TYPE
from anamorph_keysvc.wrapper import PLATFORM_KEK

Outcome = Literal["ok", "wrong", "not checked"]
SETUP: Final = "run 'anamorph-keysvc vault setup'"
_WORD: Final = b64encode(b"check").decode()
# What each identity may do below the mount, for any KEK; everything else is denied to all.
_MAY: Final[dict[Identity, dict[str, set[str]]]] = {
    Identity.ISSUER: {
        "keys/{kek}": {"update"},
        "keys/{kek}/rotate": {"update"},
        "encrypt/{kek}": {"update"},
        "sign/{audit}": {"update"},
        "keys/{audit}": {"read"},
    },
    Identity.RELEASER: {
        "keys/{kek}": {"read"},
        "decrypt/{kek}": {"update"},
        "rewrap/{kek}": {"update"},
        "keys/{audit}": {"read"},
    },
    Identity.SHREDDER: {
        "keys/{kek}": {"read"},
        "keys/{kek}/config": {"update"},
        "keys/{kek}/trim": {"update"},
        "keys/{audit}": {"read"},
    },
}
_BELOW_MOUNT: Final = (
    *("keys", "config/keys", "cache-config", "random", "wrapping_key", "restore", "restore/{kek}"),
    *("keys/{kek}", "keys/{kek}/config", "keys/{kek}/rotate", "keys/{kek}/trim", "keys/{kek}/import"),
    *("encrypt/{kek}", "decrypt/{kek}", "rewrap/{kek}", "sign/{kek}", "hmac/{kek}", "backup/{kek}"),
    *("export/encryption-key/{kek}", "export/hmac-key/{kek}", "datakey/plaintext/{kek}"),
    *("keys/{audit}", "keys/{audit}/config", "keys/{audit}/rotate", "keys/{audit}/trim"),
    *("sign/{audit}", "export/signing-key/{audit}", "backup/{audit}"),
)
_ELSEWHERE: Final = (
    *("sys/mounts", "sys/policies/acl/anamorph-issuer", "sys/auth", "sys/audit", "sys/seal", "sys/raw/core"),
    *(
        "sys/storage/raft/snapshot",
        "auth/token/create",
        "identity/entity",
        "cubbyhole/any",
        "secret/data/any",
    ),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``detail`` says what is wrong and what to do."""

    what: str
    outcome: Outcome
    detail: str = ""


def check(vault: Vault, admin: Admin | None = None) -> list[Finding]:
    """Look at everything; what cannot be looked at is a finding too.

    Args:
        vault: with a login for each identity.
        admin: a token with the policy ``anamorph-checker`` or more; without it, what only an
            administrator sees is not checked.

    Raises:
        Unavailable: Vault is sealed or does not answer.
    """
    found = [finding for caller in vault.callers for finding in _identity(vault.settings, caller)]
    if admin is None:
        return [*found, Finding("settings of Vault", "not checked", "name a token that may read them")]
    looks = (_namespace, _upsert, _audit, _policies, _roles, _keys)
    return [*found, *(finding for look in looks for finding in _guarded(look, admin, vault.settings))]


def _guarded(
    look: Callable[[Admin, VaultSettings], Iterator[Finding]], admin: Admin, settings: VaultSettings
) -> Iterator[Finding]:
    try:
        yield from look(admin, settings)
    except SetupError as error:
        yield Finding(look.__name__.strip("_"), "not checked", str(error))


def _identity(settings: VaultSettings, caller: Caller) -> Iterator[Finding]:
    name = caller.identity.value
    try:
        token = caller.must(lookup()).data
    except AnamorphError as error:
        if getattr(error, "code", "kms_denied") != "kms_denied":
            raise
        yield Finding(f"{name}: login", "wrong", str(error))
        return
    yield Finding(f"{name}: login", "ok")
    yield _judge(f"{name}: token", _token_faults(caller.identity, token), SETUP)
    yield _judge(f"{name}: capabilities", _surplus(settings, caller), SETUP)
    yield _judge(f"{name}: refused calls", _not_refused(settings, caller), SETUP)


def _token_faults(identity: Identity, token: Any) -> list[str]:
    faults = [] if token["policies"] == [identity.policy] else [f"its policies are {token['policies']}"]
    return faults if token["ttl"] else [*faults, "it never ends"]


def _surplus(settings: VaultSettings, caller: Caller) -> list[str]:
    """Where the identity may do more or less than it should, by Vault's own account."""
    names = {"kek": PLATFORM_KEK, "audit": AUDIT_KEY}
    below = {f"{settings.mount}/{path.format(**names)}": path for path in _BELOW_MOUNT}
    body = {"paths": [*below, *_ELSEWHERE]}
    call = Call("check", "POST", ("sys", "capabilities-self"), body, repeatable=True)
    data = caller.must(call).data
    may = _MAY[caller.identity]
    wanted = {path: may.get(pattern, {"deny"}) for path, pattern in below.items()}
    wanted |= {path: {"deny"} for path in _ELSEWHERE}
    wrong = [path for path, capabilities in wanted.items() if set(data[path]) != capabilities]
    return [f"{path}: {', '.join(data[path])}" for path in wrong]


def _not_refused(settings: VaultSettings, caller: Caller) -> list[str]:
    """Calls that Vault should have refused to this identity, and did not."""
    mount = tuple(settings.mount.split("/"))
    calls = [(path, body) for refused, path, body in _REFUSED if caller.identity in refused]
    done = [
        (path, body)
        for path, body in calls
        if caller.call(Call("check", "POST", (*mount, *path.split("/")), body)).status != 403
    ]
    return [f"{path} with {', '.join(body)}" for path, body in done]


_ALL: Final = tuple(Identity)
_NOT_ISSUER: Final = (Identity.RELEASER, Identity.SHREDDER)
_NOT_RELEASER: Final = (Identity.ISSUER, Identity.SHREDDER)
_KEY: Final = f"keys/{PLATFORM_KEK}"
_MADE: Final = {"type": KEK_TYPE, "derived": True}
# Harmless where allowed: making a key that exists changes nothing, and the settings are as they are.
_REFUSED: Final[tuple[tuple[tuple[Identity, ...], str, dict[str, Any]], ...]] = (
    (_ALL, _KEY, {**_MADE, "exportable": True}),
    (_ALL, _KEY, {**_MADE, "allow_plaintext_backup": True}),
    (_ALL, _KEY, {"type": KEK_TYPE, "derived": False}),
    (_ALL, _KEY, {"type": KEK_TYPE}),
    (_ALL, f"{_KEY}/config", {"deletion_allowed": False}),
    (_ALL, f"{_KEY}/config", {"exportable": False}),
    (_ALL, f"{_KEY}/config", {"allow_plaintext_backup": False}),
    (_NOT_RELEASER, f"decrypt/{PLATFORM_KEK}", {"ciphertext": "x", "context": _WORD}),
    (_NOT_RELEASER, f"rewrap/{PLATFORM_KEK}", {"batch_input": []}),
    (
        _NOT_ISSUER,
        f"encrypt/{PLATFORM_KEK}",
        {"plaintext": _WORD, "context": _WORD},
    ),
    (_NOT_ISSUER, f"sign/{AUDIT_KEY}", {"input": _WORD}),
)


def _namespace(admin: Admin, settings: VaultSettings) -> Iterator[Finding]:
    if settings.namespace:
        faults = ["this Vault ignores namespaces"] if ignores_namespaces(settings, admin.token) else []
        yield _judge(f"namespace {settings.namespace}", faults, "leave the setting 'namespace' out")


def _upsert(admin: Admin, settings: VaultSettings) -> Iterator[Finding]:
    found = admin.read(f"{settings.mount}/config/keys") or {}
    faults = [] if found.get("disable_upsert") is True else ["a misspelt name makes a key without derivation"]
    yield _judge("no keys by encrypting", faults, SETUP)


def _audit(admin: Admin, settings: VaultSettings) -> Iterator[Finding]:
    devices = admin.read("sys/audit", root=True) or {}
    written = audit_files(devices)
    missing = [f"none writes to {file}" for file in settings.setup.audit_files if file not in written]
    yield _judge("audit device", missing if devices else ["Vault keeps no log"], SETUP)


def _policies(admin: Admin, settings: VaultSettings) -> Iterator[Finding]:
    for name, text in policies(settings.mount).items():
        found = admin.read(f"sys/policies/acl/{name}")
        yield _judge(f"policy {name}", roles.differs(found, {"policy": text}), SETUP)


def _roles(admin: Admin, settings: VaultSettings) -> Iterator[Finding]:
    for identity, auth in roles.methods(settings).items():
        path = roles.role_path(identity, auth)
        wanted = roles.role_body(settings, identity, auth)
        yield _judge(f"role {path}", roles.differs(admin.read(path), wanted), SETUP)


def _keys(admin: Admin, settings: VaultSettings) -> Iterator[Finding]:
    names = admin.list(f"{settings.mount}/keys")
    for needed in {PLATFORM_KEK, AUDIT_KEY} - set(names):
        yield Finding(f"key {needed}", "wrong", f"it is missing: {SETUP}")
    for name in names:
        found = admin.read(f"{settings.mount}/keys/{name}") or {}
        remedy = "find out who made or changed it; its roots must move to a new KEK"
        yield _judge(f"key {name}", key_faults(found, audit=name == AUDIT_KEY), remedy)


def _judge(what: str, faults: list[str], remedy: str) -> Finding:
    return Finding(what, "wrong", f"{'; '.join(faults)}: {remedy}") if faults else Finding(what, "ok")
