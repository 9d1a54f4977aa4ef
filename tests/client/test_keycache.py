"""What a client holds, and for how long."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import pytest

from anamorph.client.client import _thread_timer
from anamorph.client.keycache import Cancel, Held, Holder


class Time:
    """Clock and timer that move together when told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def clock(self) -> float:
        return self.now

    def after(self, seconds: float, do: Callable[[], None]) -> Cancel:
        entry = (self.now + seconds, do)
        self._due.append(entry)
        return lambda: self._due.remove(entry)

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        for entry in [entry for entry in self._due if entry[0] <= self.now]:
            self._due.remove(entry)
            entry[1]()

    @property
    def pending(self) -> int:
        return len(self._due)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def holder(time: Time) -> Holder[str]:
    return Holder(time.clock, time.after)


def test_it_is_held_until_its_end(time: Time, holder: Holder[str]) -> None:
    """Up to the hard end the value is there, and at the hard end it is not."""
    holder.put(Held("key", expires_at=10, renew_at=5))
    time.pass_(9.9)
    held = holder.get()
    assert held is not None
    assert held.value == "key"
    time.pass_(0.1)
    assert holder.get() is None


class Secret:
    """Something that can be watched going away."""


def test_it_is_dropped_though_nobody_asks(time: Time) -> None:
    """The bytes leave an idle client too: nothing refers to them after the end."""
    holder: Holder[Secret] = Holder(time.clock, time.after)
    secret = Secret()
    watched = weakref.ref(secret)
    holder.put(Held(secret, expires_at=10, renew_at=5))
    del secret
    assert watched() is not None
    time.pass_(10)
    assert watched() is None


def test_real_timers_keep_nothing_either() -> None:
    """The client's own timer lets go of what it dropped."""
    holder: Holder[Secret] = Holder(lambda: 0.0, _thread_timer)
    secret = Secret()
    watched = weakref.ref(secret)
    gone = threading.Event()
    weakref.finalize(secret, gone.set)
    holder.put(Held(secret, expires_at=0.01, renew_at=0))
    del secret
    assert gone.wait(30)
    assert watched() is None


def test_a_late_timer_changes_nothing(time: Time) -> None:
    """Where the timer is late, the clock decides."""
    holder: Holder[str] = Holder(time.clock, lambda _seconds, _do: lambda: None)
    holder.put(Held("key", expires_at=10, renew_at=5))
    time.now = 10
    assert holder.get() is None


def test_a_new_value_outlives_the_old_ones_end(time: Time, holder: Holder[str]) -> None:
    """The end of what was held before does not take what is held now."""
    holder.put(Held("old", expires_at=10, renew_at=5))
    holder.put(Held("new", expires_at=20, renew_at=15))
    time.pass_(12)
    held = holder.get()
    assert held is not None
    assert held.value == "new"
    assert time.pending == 1


def test_dropping_calls_the_timer_off(time: Time, holder: Holder[str]) -> None:
    """A closed client leaves no timer behind."""
    holder.put(Held("key", expires_at=10, renew_at=5))
    holder.drop()
    assert (holder.get(), time.pending) == (None, 0)


def test_what_is_held_does_not_show() -> None:
    """Neither a token nor a lease appears in the text of what holds it."""
    assert "secret" not in repr(Held("secret", 1, 1))
