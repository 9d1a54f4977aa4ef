"""What a client decides, without doing it: generators that ask for steps and get their results.

``Client`` and ``AsyncClient`` perform the same steps, one blocking and one
awaiting; an error of a step is thrown into the generator. So the rules below (which
key, when to renew, what to do after an error) are written once and know no network.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

from anamorph import errors
from anamorph.client.codec import TokenCodec
from anamorph.client.exchange import Options, Prompt, encrypt_request
from anamorph.client.keycache import After, Held, Holder, Lease
from anamorph.wire.admin import InferenceTokenRead, KeyVersionRead, ModelRead, Page, ReleaseRead
from anamorph.wire.states import State

T = TypeVar("T")

# Moves to another key version in one request: more than one rotation during it is already rare.
MAX_MOVES = 3
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_RENEWAL_PAUSE_S = 10.0
_TOKEN_MARGIN_S = 60.0
_FETCH_S = 10.0


@dataclass(frozen=True)
class Access:
    """All that one request needs."""

    lease: Lease
    token: str = field(repr=False)


@dataclass(frozen=True)
class Stale:
    """What has just been refused, and must not be taken from what is held."""

    lease: Lease | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Ask:
    """Call the key service: ``call`` gets the client, its answer (awaited if need be) is the result."""

    call: Callable[[Any], Any]


@dataclass(frozen=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Alone:
    """Run a plan while no other request of this client runs one: the single flight.

    Whoever has not had its turn after ``within`` seconds gives up with ``waited``.
    """

    plan: Plan[Any]
    within: float


@dataclass(frozen=True)
class Send:
    """Send a request to the inference endpoint; the result is the answer, or its opened stream."""

    lease: Lease
    token: str = field(repr=False)
    request: dict[str, Any] = field(repr=False)


def waited() -> errors.Unavailable:
    """What a request ends in that has waited too long for those before it."""
    return errors.Unavailable("the key service does not answer in time", code="timeout", retry_after=1)


Step: TypeAlias = Ask | Pause | Alone | Send
Plan: TypeAlias = Generator[Step, Any, T]


class Session:
    """The state of a client: what it holds, and the plans over it.

    Args:
        tenant, model: whose model to use.
        clock: seconds since the epoch.
        after: timer, see ``keycache``.
        jitter: a number in [0, 1), fresh at each call.
        retry_for: seconds over which a request may be repeated.
    """

    def __init__(
        self,
        tenant: str,
        model: str,
        *,
        clock: Callable[[], float],
        after: After,
        jitter: Callable[[], float],
        retry_for: float,
    ) -> None:
        self._tenant, self._model = tenant, model
        self._clock, self._jitter, self._retry_for = clock, jitter, retry_for
        self._leases: Holder[Lease] = Holder(clock, after)
        self._tokens: Holder[str] = Holder(clock, after)

    def close(self) -> None:
        """Forget key and token."""
        self._leases.drop()
        self._tokens.drop()

    def lease(self) -> Plan[Lease]:
        """The key version to use now."""
        lease: Lease = yield Alone(
            self._hold(self._leases, None, self._fetch_lease), max(_FETCH_S, self._retry_for)
        )
        return lease

    def request(self, prompt: Prompt, options: Options) -> Plan[tuple[Any, Lease]]:
        """Send a request under the right key: the answer, and the lease that decrypts it."""
        retry = _Retry(self._clock() + self._retry_for, self._clock, self._jitter)
        stale = Stale()
        while True:
            try:
                access: Access = yield Alone(self._access(stale), retry.turn())
            except (errors.Unavailable, errors.TooManyRequests) as error:
                yield Pause(retry.pause(error))
                continue
            retry.use(access, stale)
            body = encrypt_request(access.lease.codec, prompt, options)
            try:
                answer = yield Send(access.lease, access.token, body)
            except (errors.ServiceError, errors.StreamInterrupted) as error:
                stale, pause = retry.after(error, access)
                if pause:
                    yield Pause(pause)
            else:
                return answer, access.lease

    def _access(self, stale: Stale) -> Plan[Access]:
        lease = yield from self._hold(self._leases, stale.lease, self._fetch_lease)
        token = yield from self._hold(self._tokens, stale.token, self._fetch_token)
        return Access(lease, token)

    def _hold(self, holder: Holder[T], stale: T | None, fetch: Callable[[], Plan[Held[T]]]) -> Plan[T]:
        """What is held, unless it is ``stale`` or due; then a fresh one."""
        held = holder.get()
        usable = held is not None and (stale is None or held.value is not stale)
        if held is not None and usable and self._clock() < held.renew_at:
            return held.value
        try:
            fresh = yield from fetch()
        except (errors.Unavailable, errors.TooManyRequests):
            held = holder.get()
            if held is None or not usable:
                raise
            fresh = replace(held, renew_at=self._clock() + _RENEWAL_PAUSE_S)
        holder.put(fresh)
        return fresh.value

    def _fetch_lease(self) -> Plan[Held[Lease]]:
        # The time is taken before the key leaves the service, so it is never held too long.
        asked = self._clock()
        model: ModelRead = yield Ask(lambda keys: keys.get_model(self._tenant, self._model))
        version = yield from self._active()
        release: ReleaseRead = yield Ask(
            lambda keys: keys.release(self._tenant, self._model, version.version, "client")
        )
        codec = TokenCodec(release, model.vocab_size, key_id=version.key_id, vocab_kcv=version.vocab_kcv)
        if version.endpoint is None:
            raise errors.Unavailable(f"version {version.version} has no endpoint yet", code="no_endpoint")
        lease = Lease(codec, version.endpoint, model, version.version)
        end = min(release.expires_at.timestamp(), asked + model.policy.client_cache_ttl_s)
        return Held(lease, end, asked + (end - asked) / 2)

    def _active(self) -> Plan[KeyVersionRead]:
        page: str | None = None
        while True:
            call = partial(_list_versions, tenant=self._tenant, model=self._model, page=page)
            answer: Page[KeyVersionRead] = yield Ask(call)
            for version in answer.items:
                if version.state is State.ACTIVE:
                    return version
            page = answer.next_page
            if page is None:
                raise errors.Conflict(
                    f"model {self._model} has no ACTIVE key version; rotate it, or wait until it is served",
                    code="no_active_version",
                )

    def _fetch_token(self) -> Plan[Held[str]]:
        asked = self._clock()
        answer: InferenceTokenRead = yield Ask(lambda keys: keys.inference_token(self._tenant, self._model))
        end = answer.expires_at.timestamp()
        return Held(answer.token, end, end - min(_TOKEN_MARGIN_S, (end - asked) / 2))


def _list_versions(keys: Any, *, tenant: str, model: str, page: str | None) -> Any:
    return keys.list_versions(tenant, model, page=page)


class _Retry:
    """How often and how long one request is repeated."""

    def __init__(self, deadline: float, clock: Callable[[], float], jitter: Callable[[], float]) -> None:
        self._deadline, self._clock, self._jitter = deadline, clock, jitter
        self._moves = self._pauses = 0
        self._error: errors.AnamorphError | None = None

    def after(
        self, error: errors.ServiceError | errors.StreamInterrupted, access: Access
    ) -> tuple[Stale, float]:
        """What of ``access`` is stale after ``error``, and how long to wait; raises ``error`` to give up."""
        self._error = error
        if isinstance(error, errors.Conflict | errors.Gone | errors.NotFound):
            self._count_move(error)
            return Stale(lease=access.lease), 0.0
        if isinstance(error, errors.Unauthenticated):
            self._count_move(error)
            return Stale(token=access.token), 0.0
        if isinstance(error, errors.TooManyRequests | errors.Unavailable | errors.StreamInterrupted):
            return Stale(), self.pause(error)
        raise error

    def use(self, access: Access, stale: Stale) -> None:
        """Give up if what was fetched anew is what has just been refused."""
        fresh, old = access.lease, stale.lease
        if old and self._error and (fresh.key_id, fresh.endpoint) == (old.key_id, old.endpoint):
            raise self._error

    def turn(self) -> float:
        """Seconds to wait for one's turn: until the deadline, but as long as one fetch may take."""
        return max(_FETCH_S, self._deadline - self._clock())

    def pause(self, error: errors.AnamorphError) -> float:
        """Seconds to wait before the next attempt; raises ``error`` where the deadline comes first."""
        backoff: float = min(_FIRST_PAUSE_S * 2**self._pauses, _LONGEST_PAUSE_S) * (0.5 + self._jitter() / 2)
        asked = error.retry_after if isinstance(error, errors.ServiceError) else None
        seconds = max(backoff, asked or 0.0)
        if self._clock() + seconds > self._deadline:
            raise error
        self._pauses += 1
        return seconds

    def _count_move(self, error: errors.AnamorphError) -> None:
        self._moves += 1
        if self._moves > MAX_MOVES:
            raise error
