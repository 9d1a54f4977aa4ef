"""The service's use of a real Vault: moved ciphertexts, rotating KEKs, shredding, outages."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING

import pytest
from sqlmodel import select
from tests.keysvc.test_state_machine import explore
from tests.servers.process import free_port

from anamorph import errors
from anamorph.wire.admin import BackupCreate, OperationStatus
from anamorph.wire.states import State
from anamorph_keysvc.scope import WORKER
from anamorph_keysvc.service import backups, lifecycle, lookup, preparation, rotation, shredding
from anamorph_keysvc.service.rewrapping import Rewrapper
from anamorph_keysvc.tables import KeyVersion, Operation
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper
from anamorph_keysvc.wrapper import root_context

if TYPE_CHECKING:
    from tests.keysvc.conftest import World
    from tests.keysvc.vault.conftest import OnVault, Place
    from tests.servers.vault import VaultServer

    from anamorph_keysvc.homes import Home


pytestmark = pytest.mark.real


@pytest.fixture
def world(world: World, on_vault: OnVault) -> World:
    return on_vault(world)


def test_any_sequence_of_calls_keeps_the_invariants_on_vault(
    template: Home, open_homes: Callable[[Home], World], wrapper: VaultTransitWrapper
) -> None:
    """The state machine of the suite, every root wrapped and opened by Vault."""

    def opened(home: Home) -> World:
        world = open_homes(home)
        world.service = replace(world.service, wrapper=wrapper)
        return world

    explore(template, opened, 6)


def version_of(world: World, number: int, model: str = "chat") -> KeyVersion:
    with world.service.database.read(WORKER) as session:
        return lookup.version(session, "acme", model, number)


def shredding_of(world: World) -> Operation:
    with world.service.database.read(WORKER) as session:
        return session.exec(select(Operation).where(Operation.kind == "shred")).one()


def destroyed(world: World, number: int) -> None:
    """Take an ACTIVE version that a newer one has replaced to its end."""
    at = ("acme", "chat", number)
    world.clock.advance(60)
    world.do(lifecycle.retire, *at, None)
    world.do(lifecycle.destroy, *at, None)
    world.clock.advance(100)
    world.do(lifecycle.destroyed, *at, None)


def test_no_ciphertext_opens_in_another_row(world: World) -> None:
    """Between models, tenants and versions, whichever row it is put into: refused, every time."""
    rows = [("acme", "chat"), ("acme", "chat"), ("acme", "other"), ("globex", "chat")]
    for tenant, model in dict.fromkeys(rows):
        world.model(tenant, model)
    places = [(tenant, model, world.active(tenant, model)) for tenant, model in rows]
    columns = "row_version = row_version + 1, ciphertext = ?"
    kept = {
        place: world.sql(
            "SELECT ciphertext FROM key_version WHERE tenant = ? AND model = ? AND version = ?", *place
        )[0][0]
        for place in places
    }
    for source, target in permutations(places, 2):
        where = "tenant = ? AND model = ? AND version = ?"
        world.sql(f"UPDATE key_version SET {columns} WHERE {where}", kept[source], *target)
        with pytest.raises(errors.InvalidKey):
            world.release_to_client(*target)
        world.sql(f"UPDATE key_version SET {columns} WHERE {where}", kept[target], *target)
        world.release_to_client(*target)


def test_a_kek_rotates_and_is_followed_without_a_failed_release(
    world: World, wrapper: VaultTransitWrapper
) -> None:
    """Vault adds versions by itself; rows follow in batches while clients go on reading keys."""
    world.model()
    version = world.active()
    secret = world.release_to_client("acme", "chat", version).secret
    stop = threading.Event()

    def release() -> set[str | None]:
        found = set()
        while not stop.is_set():
            found.add(world.release_to_client("acme", "chat", version).secret)
        return found

    with ThreadPoolExecutor(4) as pool:
        releasing = [pool.submit(release) for _ in range(4)]
        try:
            for newest in range(2, 7):
                assert wrapper.rotate(world.kek()) == newest
                assert Rewrapper().go_on(world.service) == 1
                assert version_of(world, version).kek_version == newest
        finally:
            stop.set()
    assert all(one.result() == {secret} for one in releasing)


def test_a_destroyed_key_opens_from_no_backup_once_it_is_shredded(
    world: World, wrapper: VaultTransitWrapper
) -> None:
    """Not before everything that lives was rewrapped, verified, and backed up again."""
    world.model()
    first, second = world.active(), world.active()
    backup = version_of(world, first).ciphertext or b""
    context = root_context("acme", "chat", first)
    destroyed(world, first)
    shredding.shred_due(world.service)
    assert shredding_of(world).phase == shredding.AWAIT_BACKUP
    # The row is empty, but an old backup still opens.
    assert version_of(world, first).ciphertext is None
    assert len(wrapper.unwrap(world.kek(), backup, context)) == 32
    promised = version_of(world, first).destroy_complete_after
    world.clock.advance(1)
    world.do(backups.record, BackupCreate(taken_at=world.clock.now))
    shredding.shred_due(world.service)
    assert shredding_of(world).status is OperationStatus.SUCCEEDED
    with pytest.raises(errors.InvalidKey):
        wrapper.unwrap(world.kek(), backup, context)
    world.release_to_client("acme", "chat", second)
    done = version_of(world, first).destroy_complete_after
    assert promised is not None
    assert done is not None
    assert done < promised


def test_a_backup_from_before_the_rewrap_does_not_let_shredding_go_on(world: World) -> None:
    """It would be the only one left, and would open nothing."""
    world.model()
    first, _ = world.active(), world.active()
    world.do(backups.record, BackupCreate(taken_at=world.clock.now))
    destroyed(world, first)
    for _ in range(3):
        shredding.shred_due(world.service)
        world.clock.advance(120)
    assert shredding_of(world).phase == shredding.AWAIT_BACKUP


def test_a_survivor_that_does_not_open_stops_the_shredding(world: World) -> None:
    """Before anything is erased: somebody has to look at it first."""
    world.model()
    first, second = world.active(), world.active()
    world.sql(
        "UPDATE key_version SET row_version = row_version + 1, ciphertext = ? WHERE version = ?",
        b"vault:v1:" + b"QUJD" * 20,
        second,
    )
    destroyed(world, first)
    with pytest.raises(errors.InvalidKey):
        shredding.shred_due(world.service)
    assert shredding_of(world).status is OperationStatus.RUNNING
    assert shredding_of(world).phase == "rewrap"


def test_a_second_destruction_sends_the_shredding_back_to_its_start(world: World) -> None:
    """What was destroyed later lies under a version of the KEK that has to go as well."""
    world.model()
    versions = [world.active() for _ in range(3)]
    destroyed(world, versions[0])
    shredding.shred_due(world.service)
    floor = shredding_of(world).floor
    destroyed(world, versions[1])
    world.do(backups.record, BackupCreate(taken_at=world.clock.now))
    shredding.shred_due(world.service)
    again = shredding_of(world)
    assert again.phase == shredding.AWAIT_BACKUP
    assert again.floor is not None
    assert floor is not None
    assert again.floor > floor


def test_a_rotation_waits_for_a_sealed_vault_and_then_goes_on(
    world: World, vault_server: VaultServer
) -> None:
    """Accepted at once, without a key; whoever works first afterwards gives it one."""
    world.model()
    vault_server.seal()
    try:
        operation = world.do(rotation.rotate, "acme", "chat")
        preparation.prepare_at_once(world.service, operation.id)
        waiting = version_of(world, operation.version)
        assert (waiting.state, waiting.key_id, waiting.ciphertext) == (State.PENDING, None, None)
        with pytest.raises(errors.Conflict) as early:
            world.grant(operation.version)
        assert early.value.code == "key_pending"
    finally:
        vault_server.unseal()
    world.clock.advance(20)
    assert preparation.prepare_due(world.service) == 1
    assert version_of(world, operation.version).key_id is not None
    world.grant(operation.version)


def test_a_process_that_is_cut_off_leaves_the_work_to_others(world: World, place: Place) -> None:
    """It takes no lease and lengthens no backoff: whoever reaches Vault goes on at once."""
    world.model()
    operation = world.do(rotation.rotate, "acme", "chat")
    cut_off = VaultTransitWrapper(place.open(address=f"https://127.0.0.1:{free_port()}", deadline_s=0.5))
    for _ in range(5):
        with pytest.raises(errors.Unavailable):
            preparation.prepare_due(replace(world.service, wrapper=cut_off, name="cut-off"))
    assert preparation.prepare_due(world.service) == 1
    assert version_of(world, operation.version).key_id is not None


def test_one_of_many_workers_prepares_a_version(world: World) -> None:
    """A lease: the others find nothing to do, and exactly one root was ever drawn for it."""
    world.model()
    operation = world.do(rotation.rotate, "acme", "chat")
    services = [replace(world.service, name=f"process-{number}") for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda service: preparation.prepare(service, operation.id), services))
    prepared = [row for row in world.sql("SELECT action FROM audit") if row[0] == "prepare"]
    assert len(prepared) == 1
    assert world.release_to_job(world.holder(world.grant(operation.version)), "acme", "chat", 1).secret
