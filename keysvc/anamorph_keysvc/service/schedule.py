"""When a version is due to be replaced, drawn once from its policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from anamorph.wire.admin import RotationPolicy


def of(entropy: Callable[[int], bytes], policy: RotationPolicy, since: datetime) -> dict[str, Any]:
    """``rotate_at`` and ``token_limit`` of a version ACTIVE ``since`` then.

    Both lie up to ``policy.jitter`` of their length before what the policy says, never behind.
    """
    early = policy.jitter * int.from_bytes(entropy(4), "big") / 2**32
    period, budget = policy.period_s, policy.token_budget
    return {
        "rotate_at": None if period is None else since + timedelta(seconds=period * (1 - early)),
        "token_limit": None if budget is None else max(1, math.floor(budget * (1 - early))),
    }
