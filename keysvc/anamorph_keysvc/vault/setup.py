"""``vault setup``: everything the key service needs of a Vault, made where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from anamorph.errors import SetupError
from anamorph_keysvc.vault import roles
from anamorph_keysvc.vault.admin import Admin, Body, ignores_namespaces
from anamorph_keysvc.vault.policies import policies
from anamorph_keysvc.vault.settings import AUDIT_KEY, Approle, VaultSettings
from anamorph_keysvc.vault.wrapper import kek_body, unsound
from anamorph_keysvc.wrapper import PLATFORM_KEK

AUDIT_DEVICE = "anamorph"
_AUDIT_KEY_BODY = {"type": "ed25519"}


@dataclass(frozen=True)
class Done:
    """One thing that is as it should be now; ``changed``: because it was made or corrected."""

    what: str
    changed: bool


def setup(admin: Admin, settings: VaultSettings) -> list[Done]:
    """Make or correct all that is missing; doing it again changes nothing.

    Raises:
        SetupError: the token may not do it, the namespace is not in force, something else has a
            name of ours, or a file that the settings name is missing.
        Unavailable: Vault does not answer, or is sealed; what was done stays, so run it again.
    """
    if settings.namespace and ignores_namespaces(settings, admin.token):
        raise SetupError("this Vault ignores namespaces: leave the setting 'namespace' out")
    # First the log of what follows.
    steps = (_audit, _mount, _policies, _auth, _roles, _keys)
    return [done for step in steps for done in step(admin, settings)]


def _audit(admin: Admin, settings: VaultSettings) -> Iterator[Done]:
    devices = admin.read("sys/audit", root=True) or {}
    written = audit_files(devices)
    if written and not settings.setup.audit_files:
        yield Done("file audit device (one is there)", changed=False)
        return
    names = (f"{AUDIT_DEVICE}-{number}" if number > 1 else AUDIT_DEVICE for number in count(1))
    free = (name for name in names if f"{name}/" not in devices)
    for file in settings.setup.audit_files or ("stdout",):
        if file not in written:
            body = {"type": "file", "options": {"file_path": file}}
            admin.write(f"sys/audit/{next(free)}", body, method="PUT", root=True)
        yield Done(f"file audit device {file}", file not in written)


def audit_files(devices: Body) -> set[str]:
    """The files that audit devices, as Vault describes them, write to."""
    return {
        (device.get("options") or {}).get("file_path", "")
        for device in devices.values()
        if device.get("type") == "file"
    }


def _mount(admin: Admin, settings: VaultSettings) -> Iterator[Done]:
    mount = settings.mount
    found = admin.read(f"sys/mounts/{mount}")
    if found is None:
        admin.write(f"sys/mounts/{mount}", {"type": "transit", "description": "KEKs of Anamorph"})
    elif found["type"] != "transit":
        raise SetupError(f"{mount} is a mount of type {found['type']}: choose another 'mount'")
    yield Done(f"transit mount {mount}", found is None)
    yield _ensure(admin, f"{mount}/config/keys", {"disable_upsert": True}, "no keys by encrypting")


def _policies(admin: Admin, settings: VaultSettings) -> Iterator[Done]:
    for name, text in policies(settings.mount).items():
        path = f"sys/policies/acl/{name}"
        yield _ensure(admin, path, {"policy": text}, f"policy {name}", method="PUT")


def _auth(admin: Admin, settings: VaultSettings) -> Iterator[Done]:
    by_mount = {auth.mount: auth for auth in roles.methods(settings).values()}
    for mount, auth in by_mount.items():
        found = admin.read(f"sys/auth/{mount}")
        if found is None:
            admin.write(f"sys/auth/{mount}", {"type": auth.method})
        elif found["type"] != auth.method:
            raise SetupError(f"auth/{mount} is of type {found['type']}, not {auth.method}")
        yield Done(f"auth method {auth.method} at {mount}", found is None)
        if body := roles.config_body(settings, auth):
            yield _ensure(admin, f"auth/{mount}/config", body, f"configuration of {mount}")


def _roles(admin: Admin, settings: VaultSettings) -> Iterator[Done]:
    for identity, auth in roles.methods(settings).items():
        path, body = roles.role_path(identity, auth), roles.role_body(settings, identity, auth)
        yield _ensure(admin, path, body, f"role {path}")
        if isinstance(auth, Approle):
            yield _ensure(admin, f"{path}/role-id", {"role_id": auth.role_id}, f"role id of {path}")


def _keys(admin: Admin, settings: VaultSettings) -> Iterator[Done]:
    yield _key(admin, f"{settings.mount}/keys/{PLATFORM_KEK}", kek_body(settings.auto_rotate_h))
    yield _key(admin, f"{settings.mount}/keys/{AUDIT_KEY}", _AUDIT_KEY_BODY)


def _key(admin: Admin, path: str, body: Body) -> Done:
    found = admin.read(path)
    if found is None:
        admin.write(path, body)
    elif faults := key_faults(found, audit=body is _AUDIT_KEY_BODY):
        # A key's kind cannot be changed, and what is under it would be lost with it.
        raise SetupError(f"{path} is no key of ours ({', '.join(faults)}): move it or choose another 'mount'")
    return Done(f"key {path} ({body['type']})", found is None)


def key_faults(found: Body, *, audit: bool) -> list[str]:
    """What is wrong with a key on our mount, as Vault describes it; ``audit``: the one that signs."""
    if not audit:
        return unsound(found)
    wanted = {"type": "ed25519", "exportable": False, "deletion_allowed": False, "derived": False}
    wanted["allow_plaintext_backup"] = False
    return [f"{name} is {found.get(name)}" for name in roles.differs(found, wanted)]


def _ensure(admin: Admin, path: str, body: Body, what: str, *, method: str = "POST") -> Done:
    changed = bool(roles.differs(admin.read(path), body))
    if changed:
        admin.write(path, body, method=method)
    return Done(what, changed)
