"""The members of a pool: who they are, who is open, and what the operator changes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp

from anamorph import telemetry
from anamorph.errors import AnamorphError, Forbidden, Gone, ReplicaRefused, ServiceError, StoreUnavailable
from anamorph.serve.asgi.answers import not_found, refusal
from anamorph.serve.slots.base import Backend
from anamorph.serve.slots.engine import SlotEngine
from anamorph.serve.slots.fairness import Limits
from anamorph.serve.slots.metrics import PoolMetrics
from anamorph.serve.slots.scheduler import Scheduler
from anamorph.serve.slots.seat import RETRY_OPENING_S, Seat
from anamorph.telemetry.guard import Value
from anamorph.telemetry.metrics import instruments
from anamorph.wire.ids import KeyId
from anamorph.wire.serving import PoolMember, PoolSettings, PoolState

_log = logging.getLogger("anamorph.serve.slots")


class Pool:
    """One engine and all its members; it lives on one event loop.

    Args:
        settings: of the pool.
        backend: its slots.
        observed: telemetry of this process.
        clock: seconds since the epoch, for tokens.
    """

    def __init__(
        self,
        settings: PoolSettings,
        backend: Backend,
        observed: telemetry.Telemetry,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._observed = observed
        self._clock = clock
        self._scheduler = Scheduler(settings.slots, settings.max_concurrent)
        metrics = PoolMetrics(observed.meter, settings.pool)
        self.engine = SlotEngine(backend, self._scheduler, metrics)
        self._seats: dict[str, Seat] = {}
        self._places: dict[tuple[str, str, int], Seat] = {}
        self._left: set[str] = set()  # key ids that the engine still has to forget
        self._settling = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._again: asyncio.TimerHandle | None = None
        metrics.observe(self)

    def app(self, tenant: str, model: str, version: int) -> ASGIApp:
        """The ASGI application of one member; for a stranger, one that answers 404."""
        return self._places.get((tenant, model, version)) or refusal(not_found())

    def reconfigure(self, state: PoolState) -> None:
        """Take over what the operator pushed: key states at once, new members once they are verified."""
        wanted = {member.key_id: member for member in state.members}
        for key_id, seat in list(self._seats.items()):
            if key_id not in wanted or _source(wanted[key_id]) != _source(seat.member):
                self._close(seat)
                del self._seats[key_id]
        for key_id, member in wanted.items():
            if key_id not in self._seats:
                self._seats[key_id] = Seat(self._settings, member, self._clock)
            self._seats[key_id].update(member, state.jwks)
            self._apply(self._seats[key_id])
        self._places = {_place(seat.member): seat for seat in self._seats.values()}
        self._settle_soon()

    def _apply(self, seat: Seat) -> None:
        member = seat.member
        if member.status == "gone":
            self._close(seat)
        elif seat.opened:
            self.engine.put(member.key_id, _limits(member))
            if member.status == "suspended":
                self.engine.end(member.key_id, _suspended(), running=False)

    def _close(self, seat: Seat) -> None:
        if seat.opened:
            seat.close()
            self.engine.end(seat.member.key_id, _gone())
            self._left.add(seat.member.key_id)

    def _settle_soon(self) -> None:
        task = asyncio.get_running_loop().create_task(self._settle())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self) -> None:
        """Forget who has left, then open who is new: one at a time, while the others are served."""
        tried: set[Seat] = set()
        async with self._settling:
            await self._forget_left()
            while unready := [seat for seat in self._seats.values() if seat.unready and seat not in tried]:
                # Who is waited for goes first: with many members the last one waits for minutes.
                seat = max(unready, key=lambda one: one.asked)
                tried.add(seat)
                await self._open(seat)
                await self._forget_left()

    async def _forget_left(self) -> None:
        while self._left:
            await self.engine.remove(self._left.pop(), _gone())

    async def _open(self, seat: Seat) -> None:
        member = seat.member
        try:
            _check_identity(member)
            opened = await asyncio.to_thread(self._backend.open, member)
        except (StoreUnavailable, OSError) as error:
            _log.warning("%s cannot be fetched now: %s", member.key_id, type(error).__name__)
            self._again = asyncio.get_running_loop().call_later(RETRY_OPENING_S, self._settle_soon)
        except AnamorphError as error:
            seat.refused = f"{type(error).__name__}: {error}"
            _log.error("%s is refused: %s", member.key_id, seat.refused)
        except Exception as error:  # noqa: BLE001 - one member's replica; the others go on
            seat.refused = type(error).__name__
            _log.error("%s cannot be opened: %s", member.key_id, seat.refused)
        else:
            self.engine.put(member.key_id, _limits(seat.member))
            seat.open(self.engine, opened, self._observed)
            # It may have left, or been revoked, while it was verified.
            if self._seats.get(member.key_id) is not seat or seat.member.status == "gone":
                self._close(seat)

    async def settled(self) -> None:
        """Wait until every member is open, refused or gone."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """End all sequences and free all memory."""
        if self._again is not None:
            self._again.cancel()
        for task in self._tasks:
            task.cancel()
        await self.engine.close()

    def waiting(self) -> Mapping[str, int]:
        """Queued sequences by key id, of those that have some."""
        return self._scheduler.waiting()

    def labels(self, key_id: str) -> Mapping[str, Value]:
        """Tenant and model of a key id as labels, bounded in number."""
        key = KeyId.parse(key_id)
        tenant, model = instruments(self._observed.meter, "server").label(key.tenant, key.model)
        return {telemetry.names.TENANT: tenant, telemetry.names.REQUEST_MODEL: model}

    def states(self) -> Counter[str]:
        """Members by state: serving, suspended, gone, opening, refused."""
        return Counter(seat.state() for seat in list(self._seats.values()))

    def resident_bytes(self) -> int:
        """Bytes of replicas in host memory, beyond the slots."""
        return self._backend.resident_bytes()


def _place(member: PoolMember) -> tuple[str, str, int]:
    return member.tenant, member.model, member.version


def _check_identity(member: PoolMember) -> None:
    key = KeyId.parse(member.key_id)
    if (key.tenant, key.model, key.version) != _place(member):
        raise ReplicaRefused("the key id is of another tenant, model or version than the member")


def _source(member: PoolMember) -> tuple[object, ...]:
    """What makes a member another one when it changes."""
    return (*_place(member), member.replica, member.public_key, member.manifest_sha256)


def _limits(member: PoolMember) -> Limits:
    return Limits(member.weight, member.max_concurrent, member.tokens_per_s)


def _gone() -> ServiceError:
    return Gone("this key version is no longer served; ask for the current one", code="key_gone")


def _suspended() -> ServiceError:
    return Forbidden("this key version is suspended; it may be resumed", code="suspended")
