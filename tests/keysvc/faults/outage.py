"""What callers see while Vault is away, and afterwards: the same for every way in which it can be away."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.keysvc.faults.calls import Outcome, ask, at_once, slowest, until
from tests.keysvc.faults.site import MODEL, Owner

from anamorph.wire.states import State

if TYPE_CHECKING:
    from tests.servers.production import KeyServiceProcess

Record = Callable[[str, object], None]


def ready(process: KeyServiceProcess) -> Outcome:
    return ask(process, "GET", "/readyz")


def begin(owner: Owner, process: KeyServiceProcess, opener: KeyServiceProcess) -> int:
    """A version in service whose root ``opener`` has opened and ``process`` has not."""
    version = owner.active()
    assert owner.release(opener, version).status == 200
    assert _token(owner, process).status == 200
    return version


def endure(owner: Owner, version: int, process: KeyServiceProcess, opener: KeyServiceProcess) -> float:
    """Calls of all kinds while Vault is away; how many seconds the slowest took.

    What needs no Vault is done, what needs it ends in a problem or in success, and nothing is
    released past a revoke that another process took.
    """
    ended = at_once(
        {
            "rotate": lambda: ask(process, "POST", f"{owner.keys_path}:rotate", owner.admin, key="rotate-2"),
            "cached": lambda: owner.release(opener, version),
            "uncached": lambda: owner.release(process, version),
            "token": lambda: _token(owner, process),
            "list": lambda: ask(process, "GET", owner.keys_path, owner.admin),
            "model": lambda: ask(
                process,
                "POST",
                f"/v1/tenants/{owner.tenant}/models",
                owner.admin,
                {"id": "other", "base": "b", "vocab_size": 9, "context_length": 9},
            ),
            "live": lambda: ask(process, "GET", "/livez"),
            "ready": lambda: ready(process),
        }
    )
    wanted = {"rotate": 202, "cached": 200, "token": 200, "list": 200, "model": 201, "live": 200}
    assert {name: ended[name].status for name in wanted} == wanted
    assert ended["uncached"].as_promised, ended
    assert ended["ready"].as_promised, ended
    # The root stays in the other process' memory, and is of no use there.
    revoked, refused = owner.act(process, version, "revoke"), owner.release(opener, version)
    assert (revoked.status, refused.status) == (200, 410)
    return slowest([*ended.values(), revoked, refused], ended["live"])


def recover(owner: Owner, version: int, process: KeyServiceProcess) -> float:
    """The rotation that was accepted goes on to the end; after how many seconds it had its key."""
    took = prepared(owner, version + 1, process)
    again = ask(process, "POST", f"{owner.keys_path}:rotate", owner.admin, key="rotate-2")
    assert (again.status, again.body["version"]) == (202, version + 1)
    with owner.keys() as keys:
        owner.stage(version + 1)
        owner.activate(version + 1)
        assert keys.get_version(*owner.at, version).state is State.COMPROMISED
    assert owner.release(process, version + 1).status == 200
    until(lambda: ready(process).status == 200)
    return took


def prepared(owner: Owner, version: int, process: KeyServiceProcess) -> float:
    """Wait until a version has its key; after how many seconds."""
    with owner.keys(process) as keys:
        return until(lambda: keys.get_version(*owner.at, version).key_id is not None)


def _token(owner: Owner, process: KeyServiceProcess) -> Outcome:
    return ask(process, "POST", f"/v1/tenants/{owner.tenant}/models/{MODEL}/inference-tokens", owner.client)
