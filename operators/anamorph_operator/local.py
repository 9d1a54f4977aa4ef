"""The driver for one machine: a job is a process, which gets its order with the grant in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anamorph.wire.admin import ModelRead
from anamorph.wire.keyservice import AsyncKeyService
from anamorph_operator.processes import Processes
from anamorph_operator.state import Job, Ref


@dataclass(frozen=True)
class Workplace:
    """What every order says alike.

    Args:
        keysvc: URL of the key service.
        store: folder or URL where replicas are published.
        scratch: folder for work in progress.
        allow_base: where bases may come from.
    """

    keysvc: str
    store: str
    scratch: Path
    allow_base: tuple[str, ...] = ()


class LocalJobs:
    """Materialisation jobs as processes of this machine; they end with it."""

    def __init__(self, place: Workplace, keys: AsyncKeyService, processes: Processes) -> None:
        self._place = place
        self._keys = keys
        self._processes = processes

    async def observe(self) -> Mapping[Ref, Job]:
        """Every job that this process has started, ended ones with their exit status."""
        return self._processes.observe()

    async def start(self, ref: Ref, model: ModelRead) -> None:
        """Ask for a grant, which voids an older one, and start a process with it.

        Raises:
            ServiceError: the version does not wait for a replica, or the key service is away.
        """
        grant = await self._keys.materialize(ref.tenant, ref.model, ref.version)
        order = {
            "keysvc": self._place.keysvc,
            "tenant": ref.tenant,
            "model": ref.model,
            "version": ref.version,
            "grant": grant.secret,
            "store": self._place.store,
            "scratch": str(self._place.scratch),
            "base": model.base,
            "profile": model.profile,
            "dtype": model.dtype,
            "allow_base": list(self._place.allow_base),
        }
        await self._processes.start(ref, order)

    async def stop(self, ref: Ref) -> None:
        """End a job with everything it started."""
        await self._processes.stop(ref)

    async def close(self) -> None:
        """End every job."""
        await self._processes.close()
