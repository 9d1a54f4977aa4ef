"""What ``helm test`` asks, against a real key service and endpoints."""

from __future__ import annotations

import pytest
from tests.client.stack import Stack
from tests.helm.scripts import script

from anamorph.client import Client


def test_a_rotation_changes_key_and_wire(stack: Stack) -> None:
    """Each answer is of the version that is ACTIVE then; an engine that is no model is found out."""
    check, prompt, answers = script("check"), list(range(16)), []
    for _ in range(2):
        with Client(stack.keysvc_url, stack.api_key, stack.tenant, stack.model) as client:
            answers.append(check.ask(client, prompt))
        stack.rotate()
    first, second = answers
    assert (first.key_id.split(".")[2], second.key_id.split(".")[2]) == ("v1", "v2")
    assert first.wire != second.wire
    assert len(first.plain) == len(second.plain) == check.TOKENS
    with pytest.raises(SystemExit, match="answers differ"):
        check.compare(first, second)
