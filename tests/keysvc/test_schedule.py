"""When a version is due: by period and token budget, with jitter, never later than the policy says."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from anamorph.wire.admin import LONGEST_S, RotationPolicy
from anamorph_keysvc.service import schedule

SINCE = datetime(2030, 1, 1, tzinfo=UTC)


def drawing(number: int) -> Callable[[int], bytes]:
    return lambda size: number.to_bytes(4, "big")[:size]


@given(
    period=st.integers(60, LONGEST_S),
    budget=st.integers(1, 2**53 - 1),
    jitter=st.floats(0, 0.5),
    drawn=st.integers(0, 2**32 - 1),
)
def test_jitter_only_ever_brings_a_rotation_forward(
    period: int, budget: int, jitter: float, drawn: int
) -> None:
    """Up to the given fraction of period and budget, and by nothing without jitter."""
    policy = RotationPolicy(period_s=period, token_budget=budget, jitter=jitter)
    due = schedule.of(drawing(drawn), policy, SINCE)
    earliest = SINCE + timedelta(seconds=period * (1 - jitter))
    assert earliest - timedelta(milliseconds=1) <= due["rotate_at"] <= SINCE + timedelta(seconds=period)
    assert max(1, int(budget * (1 - jitter)) - 1) <= due["token_limit"] <= budget


def test_without_jitter_the_policy_is_kept_to_the_second() -> None:
    """What people set by hand is what they get."""
    policy = RotationPolicy(period_s=3600, token_budget=1000, jitter=0)
    due = schedule.of(drawing(2**32 - 1), policy, SINCE)
    assert due == {"rotate_at": SINCE + timedelta(hours=1), "token_limit": 1000}


def test_what_the_policy_does_not_ask_for_is_never_due() -> None:
    """No period, no date; no budget, no limit."""
    assert schedule.of(drawing(0), RotationPolicy(), SINCE) == {"rotate_at": None, "token_limit": None}


def test_two_versions_seldom_fall_due_together() -> None:
    """That is what jitter is for: a thousand tenants of one policy spread over its fraction."""
    policy = RotationPolicy(period_s=10_000, jitter=0.1)
    dates = {schedule.of(drawing(step * 2**22), policy, SINCE)["rotate_at"] for step in range(1000)}
    assert len(dates) == 1000
    assert max(dates) - min(dates) > timedelta(seconds=900)
