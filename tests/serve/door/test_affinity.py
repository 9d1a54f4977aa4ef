"""Sessions of prompts: alike where a cache could be shared, and nowhere else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anamorph.serve.applications.scaling import options
from anamorph.serve.door.affinity import PREFIX_IDS, Affinity
from anamorph.wire.admin import Autoscaling

BEGINNING = list(range(PREFIX_IDS))
KEY, OTHER = "acme.smol.v1.0123456789abcdef", "acme.smol.v2.0123456789abcdef"


def body(prompt: Any) -> bytes:
    return json.dumps({"prompt": prompt}).encode()


def test_one_beginning_under_one_key_is_one_session() -> None:
    """Whatever follows; another beginning or another key id is another session."""
    affinity = Affinity()
    session = affinity.session(KEY, body([*BEGINNING, 5]))
    assert session == affinity.session(KEY, body([*BEGINNING, 6, 7]))
    assert session == affinity.session(KEY, body([[*BEGINNING, 8], [1]]))
    others = {affinity.session(OTHER, body(BEGINNING)), affinity.session(KEY, body([9, *BEGINNING[1:]]))}
    assert len({session, *others}) == 3


def test_a_session_tells_nobody_which_prompts_are_alike() -> None:
    """Its name is under a secret of the process."""
    assert Affinity().session(KEY, body(BEGINNING)) != Affinity().session(KEY, body(BEGINNING))


@pytest.mark.parametrize(
    "odd", [b"", b"{", b"[]", body("text"), body([]), body([[]]), body(BEGINNING[:-1]), body([True] * 40)]
)
def test_what_has_no_beginning_to_share_goes_anywhere(odd: bytes) -> None:
    """Short prompts share no block, and what is malformed the engine refuses."""
    assert Affinity().session(KEY, odd) == ""


def test_scaling_is_what_ray_is_told() -> None:
    """One replica as ever; else Ray's own autoscaling, without the option that undoes it at each push."""
    assert options(Autoscaling()) == {"num_replicas": 1}
    told = options(Autoscaling(min_replicas=0, max_replicas=1, idle_s=60))
    assert "request_router_config" not in told
    config = told["autoscaling_config"]
    assert (config["min_replicas"], config["max_replicas"]) == (0, 1)
    assert config["look_back_period_s"] + config["downscale_delay_s"] == 60
    assert "initial_replicas" not in config
    several = options(Autoscaling(min_replicas=1, max_replicas=4))
    assert several["request_router_config"]["request_router_kwargs"] == {"num_fallback_replicas": 3}
