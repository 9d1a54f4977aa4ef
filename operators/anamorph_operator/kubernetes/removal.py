"""What is left of a model whose resource is being deleted, and one step nearer to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from anamorph import errors
from anamorph.wire.admin import KeyVersionRead
from anamorph.wire.keyservice import AsyncKeyService, aeverything
from anamorph_operator import listing
from anamorph_operator.kubernetes import intent
from anamorph_operator.kubernetes.assignment import owners
from anamorph_operator.kubernetes.carry import carry
from anamorph_operator.kubernetes.resources.objects import FORCE_DELETE, EncryptedModel
from anamorph_operator.kubernetes.view import View
from anamorph_operator.reconciler import Turn


class Remover:
    """Removes models, a step at each call."""

    def __init__(self, view: View, keys: AsyncKeyService) -> None:
        self._view = view
        self._keys = keys
        self._clean: dict[str, dict[str, Turn | None]] = {}

    async def step(self, resource: EncryptedModel) -> str | None:
        """Ask for the end of every version, and say what is left; ``None`` if nothing is.

        A resource that never was the model's own takes nothing of it along.

        Raises:
            ServiceError: the key service or the API server does not answer, or refuses.
        """
        if not self._owns(resource):
            return None
        versions = await self._versions(resource)
        todo = intent.removal(resource, versions)
        for step in todo:
            await carry(self._keys, step)
        if todo:
            self._view.wake()
            self._clean.pop(resource.metadata.uid, None)
            return f"{len(todo)} of {len(versions)} versions had not ended"
        return self._standing(resource)

    def _owns(self, resource: EncryptedModel) -> bool:
        owner = owners([*self._view.resources(), resource])[resource.key]
        same = owner.metadata.uid == resource.metadata.uid
        return same and self._view.bound(resource)

    async def _versions(self, resource: EncryptedModel) -> Sequence[KeyVersionRead]:
        try:
            return [version async for version in aeverything(self._keys.list_versions, *resource.key)]
        except errors.NotFound:
            return []

    def _standing(self, resource: EncryptedModel) -> str | None:
        """Applications that serve it; none only if two turns of each cluster in a row saw none.

        The first of them may have decided on one after it had looked.
        """
        listed = {one.serving_cluster for one in resource.status.versions} | {resource.spec.serving_cluster}
        turns = {name: self._view.turn(name) for name in sorted(self._view.reconcilers) if name in listed}
        for name, turn in turns.items():
            found = _serves(resource, turn)
            if found is not None:
                self._clean.pop(resource.metadata.uid, None)
                return f"on serving cluster {name}: {found}"
        before = self._clean.setdefault(resource.metadata.uid, dict(turns))
        if any(before.get(name) is turn for name, turn in turns.items()):
            return "its applications are gone; one more look"
        del self._clean[resource.metadata.uid]
        return None


def _serves(resource: EncryptedModel, turn: Turn | None) -> str | None:
    if turn is None or turn.observed.deployed is None:
        return "it does not answer"
    standing = sorted(
        ref.app for ref in listing.standing(turn.observed.deployed) if (ref.tenant, ref.model) == resource.key
    )
    return ", ".join(standing) or None


def forced(resource: EncryptedModel, deleted_at: datetime, now: datetime) -> str | None:
    """Why a deletion ends whatever is left, if it does."""
    if resource.metadata.annotations.get(FORCE_DELETE) == "true":
        return f"annotation {FORCE_DELETE}"
    deadline = resource.spec.deletion.deadline_seconds
    return f"after {deadline} s" if now >= deleted_at + timedelta(seconds=deadline) else None
