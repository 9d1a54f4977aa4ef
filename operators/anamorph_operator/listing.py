"""What a turn reads from the key service: what it can act on, never what is past.

Versions that have ended are as many as there have ever been rotations. The operator needs one
of them only while something of it stands, or while it is due to be destroyed; of the others the
door knows by the model's last version (``DoorState.ended``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from anamorph import errors
from anamorph.wire.admin import KeyVersionRead, ModelRead
from anamorph.wire.keyservice import AsyncKeyService, aeverything
from anamorph.wire.serving import EngineSettings, PoolState
from anamorph.wire.states import ONGOING
from anamorph_operator.state import Application, Deployed, Ref

# The most that the key service gives at a time.
PAGE = 500


async def all_models(keys: AsyncKeyService) -> tuple[ModelRead, ...]:
    """Every model."""
    return tuple([model async for model in aeverything(partial(keys.all_models, limit=PAGE))])


async def current_versions(keys: AsyncKeyService) -> tuple[KeyVersionRead, ...]:
    """Versions that are being made or may be served, and those that are due to be destroyed."""
    ongoing = aeverything(partial(keys.all_versions, states=ONGOING, limit=PAGE))
    due = aeverything(partial(keys.all_versions, due=True, limit=PAGE))
    return tuple([version async for version in ongoing] + [version async for version in due])


async def standing_versions(
    keys: AsyncKeyService, listed: Iterable[KeyVersionRead], deployed: Mapping[str, Deployed]
) -> tuple[KeyVersionRead, ...]:
    """Versions of which something stands though they are not among ``listed``: they have just ended.

    One that the key service does not know is left out.
    """
    known = {Ref.of(version) for version in listed}
    found = [await _version(keys, ref) for ref in sorted(standing(deployed) - known)]
    return tuple(version for version in found if version is not None)


async def _version(keys: AsyncKeyService, ref: Ref) -> KeyVersionRead | None:
    try:
        return await keys.get_version(ref.tenant, ref.model, ref.version)
    except errors.NotFound:
        return None


def standing(deployed: Mapping[str, Deployed]) -> set[Ref]:
    """Every version that has an application or a place in a pool, whatever their status."""
    applications = (app.application for app in deployed.values())
    return {ref for application in applications if application is not None for ref in _served(application)}


def _served(application: Application) -> Iterator[Ref]:
    settings, state = application.settings, application.state
    if isinstance(state, PoolState):
        yield from (Ref(member.tenant, member.model, member.version) for member in state.members)
    elif isinstance(settings, EngineSettings) and settings.protection != "plaintext":
        yield Ref(settings.tenant, settings.model, settings.version)
