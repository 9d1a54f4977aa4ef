"""Ranges, tensors and slices of a replica, each byte verified, from a folder and from an object store."""

from __future__ import annotations

import json
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from anamorph.errors import InvalidKey, ReplicaRefused
from anamorph.keys import TenantKey
from anamorph.replica import CHUNK, MANIFEST, Identity, RangedReplica, Store, Tensors, seal

FIRST, SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
RANDOM = np.random.default_rng(0)
STORED: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
    "big": RANDOM.standard_normal((900, 1300), dtype=np.float32),
    "cube": RANDOM.standard_normal((5, 6, 7)).astype(np.float16),
    "row": RANDOM.standard_normal(33),
    "one": np.array(3.5, dtype=np.float32),
    "none": np.zeros((0, 4), dtype=np.float32),
}

Reseal = Callable[[], None]


@pytest.fixture
def reseal(replica: Path, identity: Identity, key: TenantKey) -> Reseal:
    def again() -> None:
        (replica / MANIFEST).unlink()
        seal(replica, identity, key.sign)

    return again


@pytest.fixture
def tensors(replica: Path, reseal: Reseal) -> Path:
    """A replica with ``STORED`` in its second shard."""
    save_file(STORED, replica / SHARD, metadata={"format": "pt"})
    weights = {"a": FIRST, **dict.fromkeys(STORED, SHARD)}
    (replica / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    reseal()
    return replica


@contextmanager
def opened(place: Path | str, key: TenantKey, **pins: str) -> Iterator[RangedReplica]:
    with RangedReplica.open(place, key.public_key(), **pins) as found:
        yield found


def test_any_range_is_what_the_file_holds(tensors: Path, key: TenantKey) -> None:
    """Ranges within, across and at the borders of chunks, and empty ones."""
    content = (tensors / SHARD).read_bytes()
    borders = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, len(content) - 1, len(content)]
    with opened(tensors, key) as found:
        for start in borders:
            for stop in [border for border in borders if border >= start]:
                assert found.read(SHARD, start, stop) == content[start:stop]


def test_an_object_store_gives_the_same(tensors: Path, key: TenantKey) -> None:
    """By URL as by path."""
    url = Store(f"memory://{uuid.uuid4().hex}").publish(tensors, "acme/tiny/v1")
    with opened(url, key, key_id=key.id) as found:
        assert (
            found.read(SHARD, CHUNK - 5, CHUNK + 5) == (tensors / SHARD).read_bytes()[CHUNK - 5 : CHUNK + 5]
        )
        np.testing.assert_array_equal(Tensors(found).read("big").view(np.float32), STORED["big"])


@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [
        (SHARD, -1, 5),
        (SHARD, 5, 4),
        (SHARD, 0, 2**40),
        ("other.safetensors", 0, 1),
        ("../x", 0, 1),
        (MANIFEST, 0, 1),
    ],
)
def test_a_range_outside_is_refused(name: str, start: int, stop: int, tensors: Path, key: TenantKey) -> None:
    """Neither past the end, nor of a file that the manifest does not list."""
    with opened(tensors, key) as found, pytest.raises(ReplicaRefused):
        found.read(name, start, stop)


def test_a_damaged_chunk_is_refused_and_others_are_not(tensors: Path, key: TenantKey) -> None:
    """Each chunk stands for itself: what a range does not touch does not matter to it."""
    content = bytearray((tensors / SHARD).read_bytes())
    content[CHUNK + 3] ^= 1
    (tensors / SHARD).write_bytes(content)
    with opened(tensors, key) as found:
        assert found.read(SHARD, 0, CHUNK) == content[:CHUNK]
        with pytest.raises(ReplicaRefused, match=SHARD):
            found.read(SHARD, CHUNK, CHUNK + 1)


@pytest.mark.parametrize("change", ["shorter", "longer", "gone", "link"])
def test_a_file_of_another_length_or_kind_is_refused(change: str, tensors: Path, key: TenantKey) -> None:
    """The last chunk's length is part of what is checked; links are never followed."""
    path = tensors / SHARD
    content = path.read_bytes()
    with opened(tensors, key) as found:
        if change in ("shorter", "longer"):
            path.write_bytes(content[:-1] if change == "shorter" else content)
        else:
            path.unlink()
        if change == "link":
            (tensors.parent / "elsewhere").write_bytes(content)
            path.symlink_to(tensors.parent / "elsewhere")
        if change == "longer":
            with path.open("ab") as file:
                file.write(b"x")
            assert found.read(SHARD, len(content) - 9, len(content)) == content[-9:]
            return
        with pytest.raises(ReplicaRefused):
            found.read(SHARD, len(content) - 9, len(content))


def test_nothing_is_opened_without_trust(tensors: Path, key: TenantKey, other_key: TenantKey) -> None:
    """Anchor, key id and digest are checked before anything is read."""
    for anchor, pins in (
        (other_key.public_key(), {}),
        (key.public_key(), {"key_id": other_key.id}),
        (key.public_key(), {"manifest_sha256": "0" * 64}),
    ):
        with pytest.raises(ReplicaRefused), RangedReplica.open(tensors, anchor, **pins):
            pass
    with pytest.raises(InvalidKey), RangedReplica.open(tensors, b"short"):
        pass
    with pytest.raises(ReplicaRefused), RangedReplica.open(tensors.parent / "none", key.public_key()):
        pass


@pytest.mark.parametrize("name", STORED)
def test_a_tensor_is_what_safetensors_stored(name: str, tensors: Path, key: TenantKey) -> None:
    """Type, shape and bytes, of every rank and of none."""
    with opened(tensors, key) as source:
        found = Tensors(source)
        assert found.names() == sorted(["a", *STORED])
        assert found.find(name).shape == STORED[name].shape
        read = found.read(name).view(STORED[name].dtype)
        np.testing.assert_array_equal(read.reshape(STORED[name].shape), STORED[name])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_slice_is_numpys(data: st.DataObject, tensors: Path, key: TenantKey) -> None:
    """Any slices of step 1, of any leading axes, mean what they mean in NumPy."""
    name = data.draw(st.sampled_from(["big", "cube", "row", "none"]))
    bound = st.one_of(st.none(), st.integers(-9, 9))
    axes = data.draw(st.integers(0, STORED[name].ndim))
    index = tuple(slice(data.draw(bound), data.draw(bound)) for _ in range(axes))
    with opened(tensors, key) as source:
        found = Tensors(source).read(name, *index)
    wanted = STORED[name][index]
    assert found.tobytes() == wanted.tobytes()
    assert found.shape == (*wanted.shape[:-1], wanted.shape[-1] * wanted.itemsize)


def test_slices_that_mean_nothing_are_errors(tensors: Path, key: TenantKey) -> None:
    """Steps, and more slices than axes."""
    with opened(tensors, key) as source:
        for index in ((slice(None, None, 2),), (slice(None),) * 3):
            with pytest.raises(ValueError, match="step 1"):
                Tensors(source).read("big", *index)
        with pytest.raises(ReplicaRefused, match="no tensor"):
            Tensors(source).read("absent")


def test_a_single_file_needs_no_index(replica: Path, reseal: Reseal, key: TenantKey) -> None:
    """Without an index every shard's header is read."""
    (replica / INDEX).unlink()
    reseal()
    with opened(replica, key) as source:
        assert Tensors(source).names() == ["a", "b"]


def header(fields: dict[str, Any], data: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"b": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}


@pytest.mark.parametrize(
    "content",
    [
        header(entry(data_offsets=[0, 60])),
        header(entry(data_offsets=[4, 68])),
        header(entry(data_offsets=[-4, 60])),
        header(entry(data_offsets=[0])),
        header(entry(data_offsets=[0.0, 64])),
        header(entry(shape=[-4, -4])),
        header(entry(shape=[True, 16])),
        header(entry(shape=[2**40, 2**40], data_offsets=[0, 2**82])),
        header(entry(shape="44")),
        header(entry(dtype="I64")),
        header(entry(dtype=["F32"])),
        header({"b": 7}),
        header({"b": {}}),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(
    content: bytes, replica: Path, key: TenantKey, identity: Identity
) -> None:
    """Even signed: offsets outside of the file, lengths unlike the shape, types that no fold writes."""
    (replica / SHARD).write_bytes(content)
    (replica / MANIFEST).unlink()
    seal(replica, identity, key.sign)
    with opened(replica, key) as source, pytest.raises(ReplicaRefused):
        Tensors(source).find("b")


def test_a_header_that_grew_since_it_was_signed_is_refused(tensors: Path, key: TenantKey) -> None:
    """Its length is the first thing in the file, and covered like all else."""
    shutil.copy(tensors / SHARD, tensors.parent / "copy")
    content = bytearray((tensors / SHARD).read_bytes())
    content[:8] = struct.pack("<Q", 2**60)
    (tensors / SHARD).write_bytes(content)
    with opened(tensors, key) as source, pytest.raises(ReplicaRefused, match=SHARD):
        Tensors(source).find("big")
