"""Roots under Vault: one derived, non-exportable transit key per tenant, its KEK.

The context goes into the derivation of the key that encrypts, so a ciphertext opens
for its own record only. Vault's associated data would bind as well, but its rewrap
ignores them: such a ciphertext could never move to a newer version of its KEK.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

from anamorph.errors import Conflict, InvalidKey, Unavailable
from anamorph_keysvc import deadline
from anamorph_keysvc.vault.auth import Caller, Vault
from anamorph_keysvc.vault.login import denied
from anamorph_keysvc.vault.transport import RETRY_AFTER_S, Call
from anamorph_keysvc.wrapper import Context

KEK_TYPE: Final = "aes256-gcm96"
BATCH: Final = 200
_FORMAT: Final = re.compile(rb"vault:v([1-9][0-9]{0,8}):[A-Za-z0-9+/]{4,1000000}={0,2}")


class VaultTransitWrapper:
    """``KeyWrapper`` on Vault's transit engine.

    A KEK that is missing is made, as ``kek_body`` says. Each method also raises
    ``Unavailable``: ``kms_sealed``, ``kms_unavailable``, ``kms_denied`` or ``timeout``; and
    ``InvalidId`` for a KEK's name outside the grammar, before anything is sent.
    """

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._known: set[str] = set()

    @property
    def production(self) -> bool:
        """As the settings say, which were held to it."""
        return self._vault.settings.production

    def wrap(self, kek: str, secret: bytes, context: Context) -> bytes:
        """``vault:vN:`` and base64."""
        body = {"plaintext": _base64(secret), "context": _base64(context.encode())}
        with self._in_time():
            self._ensure(kek)
            answer = self._vault.issuer.call(self._call("encrypt", ("encrypt", kek), body, repeatable=True))
        if not answer.ok:
            # Perhaps somebody removed the KEK: look again the next time.
            self._known.discard(kek)
            raise denied(self._vault.issuer.identity)
        return str(answer.data["ciphertext"]).encode()

    def unwrap(self, kek: str, ciphertext: bytes, context: Context) -> bytes:
        """The secret.

        Raises:
            InvalidKey: of another format (nothing is sent), altered, moved from another record, or of
                a version below the KEK's floor.
        """
        self.kek_version(ciphertext)
        body = {"ciphertext": ciphertext.decode(), "context": _base64(context.encode())}
        answer = self._vault.releaser.call(self._call("decrypt", ("decrypt", kek), body, repeatable=True))
        if answer.status == 400:
            raise _foreign()
        if not answer.ok:
            raise denied(self._vault.releaser.identity)
        return b64decode(answer.data["plaintext"])

    def rewrap(self, kek: str, items: Sequence[tuple[bytes, Context]]) -> list[bytes]:
        """In calls of at most 200; each has a deadline of its own unless one is set around them all.

        Raises:
            InvalidKey: some do not open; the message says which, counted from 0. Nothing has changed:
                the others' old ciphertexts open as before, and may be rewrapped without these.
        """
        for old, _ in items:
            self.kek_version(old)
        results = [result for part in _batches(items) for result in self._rewrap(kek, part)]
        bad = [str(place) for place, result in enumerate(results) if result is None]
        if bad:
            raise InvalidKey(f"{len(bad)} of {len(items)} wrapped keys do not open: {', '.join(bad[:20])}")
        return [result for result in results if result is not None]

    def kek_version(self, ciphertext: bytes) -> int:
        """The N in ``vault:vN:``. InvalidKey for another format."""
        match = _FORMAT.fullmatch(ciphertext)
        if match is None:
            raise _foreign()
        return int(match[1])

    def newest(self, kek: str) -> int:
        """The newest version of a KEK, 0 if there is none yet."""
        found = self._read(self._vault.releaser, kek)
        return int(found["latest_version"]) if found else 0

    def rotate(self, kek: str) -> int:
        """Add a version; its number. Not repeated by itself: the outcome may be unknown."""
        with self._in_time():
            rotated = self._vault.issuer.must(self._call("rotate", ("keys", kek, "rotate"), {}))
            # Not every server says it with the rotation.
            return int(rotated.data.get("latest_version") or self.newest(kek))

    def shred(self, kek: str, below: int) -> None:
        """Raise both floors, then trim. What was done before is not done again; each call has its deadline.

        Raises:
            Conflict: there is no version ``below`` yet, so nothing could be encrypted afterwards.
        """
        shredder = self._vault.shredder
        found = self._read(shredder, kek)
        if found is None or below < 1 or found["latest_version"] < below:
            raise Conflict(f"this KEK has no version {below}: rotate it first", code="kek_not_rotated")
        # The floor of encryption first: it may never lie below that of decryption.
        for floor in ("min_encryption_version", "min_decryption_version"):
            if found[floor] < below:
                shredder.must(self._call("config", ("keys", kek, "config"), {floor: below}))
        if found["min_available_version"] < below:
            shredder.must(self._call("trim", ("keys", kek, "trim"), {"min_available_version": below}))

    def check(self) -> None:
        """Return if Vault is unsealed and takes the tokens of all identities; no KEK is touched."""
        with self._in_time():
            for caller in self._vault.callers:
                caller.ready()

    def _in_time(self) -> AbstractContextManager[None]:
        """One deadline for several calls."""
        return deadline.within(self._vault.settings.deadline_s)

    def _ensure(self, kek: str) -> None:
        if kek in self._known:
            return
        found = self._read(self._vault.releaser, kek)
        if found is None:
            # Not repeated by itself; doing it twice changes nothing, and the caller may ask again.
            settings = self._vault.settings
            self._vault.issuer.must(self._call("create", ("keys", kek), kek_body(settings.auto_rotate_h)))
        elif faults := unsound(found):
            # Under an underived key, for example, every ciphertext would open in every record.
            raise Unavailable(
                f"a KEK is not as we make them ({', '.join(faults)}): run 'anamorph-keysvc vault check'",
                code="kms_denied",
                retry_after=RETRY_AFTER_S,
            )
        self._known.add(kek)

    def _read(self, caller: Caller, kek: str) -> Mapping[str, Any] | None:
        answer = caller.call(self._call("read", ("keys", kek), None, method="GET", repeatable=True))
        if answer.status == 404:
            return None
        if not answer.ok:
            raise denied(caller.identity)
        return answer.data

    def _rewrap(self, kek: str, items: Sequence[tuple[bytes, Context]]) -> Iterator[bytes | None]:
        batch = [{"ciphertext": old.decode(), "context": _base64(context.encode())} for old, context in items]
        asked = self._call("rewrap", ("rewrap", kek), {"batch_input": batch}, repeatable=True)
        answer = self._vault.releaser.call(asked)
        if answer.status == 400:
            raise _foreign()
        if not answer.ok:
            raise denied(self._vault.releaser.identity)
        for result in answer.data["batch_results"]:
            yield None if result.get("error") else result["ciphertext"].encode()

    def _call(
        self,
        operation: str,
        path: tuple[str, ...],
        body: Mapping[str, Any] | None,
        *,
        method: str = "POST",
        repeatable: bool = False,
    ) -> Call:
        mount = self._vault.settings.mount.split("/")
        return Call(operation, method, (*mount, *path), body, repeatable=repeatable)


def kek_body(auto_rotate_h: int) -> dict[str, Any]:
    """How a KEK is made: derived, and never to be exported, deleted or backed up in clear."""
    return {"type": KEK_TYPE, "derived": True, "auto_rotate_period": f"{auto_rotate_h}h"}


def unsound(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with a KEK as Vault describes it; nothing for one that ``kek_body`` made."""
    wanted = {
        "type": KEK_TYPE,
        "derived": True,
        "exportable": False,
        "deletion_allowed": False,
        "allow_plaintext_backup": False,
        "convergent_encryption": False,
        "imported_key": False,
    }
    # Older servers leave out what they do not know, such as whether a key was imported.
    return [f"{name} is {found[name]}" for name, value in wanted.items() if found.get(name, value) != value]


def _batches(items: Sequence[tuple[bytes, Context]]) -> Iterator[Sequence[tuple[bytes, Context]]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


def _foreign() -> InvalidKey:
    """One error for whatever does not open."""
    return InvalidKey("a wrapped key does not open for the record it is stored in")
