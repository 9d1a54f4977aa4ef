"""The implementation against the committed vectors, and the vectors against a second implementation."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anamorph.errors import InvalidId, InvalidKey, KeyMismatch
from anamorph.keys import Stream, TenantKey, VocabKey, encode_context
from anamorph.wire.ids import KeyId

VECTORS = Path(__file__).parents[1] / "vectors"
REFUSALS = (InvalidKey, InvalidId, KeyMismatch)


def key_of(vector: dict[str, Any]) -> TenantKey:
    root = bytes.fromhex(vector["root"])
    return TenantKey.from_root(root, vector["tenant"], vector["model"], vector["version"])


def verify(folder: Path) -> subprocess.CompletedProcess[str]:
    # -I and -S leave the standard library: no project, no NumPy, no site-packages.
    command = [sys.executable, "-I", "-S", str(VECTORS / "verify_keys.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("index", range(3))
def test_identity(vectors: dict[str, Any], index: int) -> None:
    """Subkeys, check values, key id, public key and signature are those of the vectors."""
    vector = vectors["keys"][index]
    key = key_of(vector)
    message, signature = (bytes.fromhex(vector["signature"][part]) for part in ("message", "signature"))
    assert {space: key.subkey(space).hex() for space in vector["subkeys"]} == vector["subkeys"]
    assert (key.id, key.kcv, key.vocab_kcv) == (vector["key_id"], vector["kcv"], vector["vocab_kcv"])
    assert key.public_key().hex() == vector["public_key"]
    assert key.sign(message) == signature
    context = encode_context(key.tenant, key.model, str(key.version), "vocab")
    assert context.hex() == vector["vocab_info"]


def step_holds(stream: Stream, step: dict[str, Any], tolerance: float) -> bool:
    value = getattr(stream, step["draw"])(step["n"])
    if "sha256" in step:
        return hashlib.sha256(value.astype("<u4").tobytes()).hexdigest() == str(step["sha256"])
    if step["draw"] in {"normals", "orthogonal"}:
        return bool(np.allclose(value, step["value"], rtol=0, atol=tolerance))
    scale = 2**53 if step["draw"] == "uniforms" else 1
    return [int(x * scale) for x in value.tolist()] == [int(x) for x in step["value"]]


@pytest.mark.parametrize("index", range(3))
def test_draws(vectors: dict[str, Any], index: int) -> None:
    """Every draw comes out as in the vectors: exactly, normals and orthogonals to the tolerance."""
    vector = vectors["keys"][index]
    key = key_of(vector)
    for sequence in vector["draws"]:
        stream = Stream(key.subkey(sequence["space"]))
        assert all(step_holds(stream, step, vectors["tolerance"]) for step in sequence["steps"]), sequence


@pytest.mark.parametrize("index", range(3))
def test_valid_key_files(vectors: dict[str, Any], index: int, tmp_path: Path) -> None:
    """The key file of each vector loads as that key, and saving writes the same bytes."""
    vector = vectors["keys"][index]
    path = tmp_path / "key.json"
    path.write_text(vector["key_file"])
    path.chmod(0o400)
    key = TenantKey.load(path)
    key.save(tmp_path / "again.json")
    assert key == key_of(vector)
    assert (tmp_path / "again.json").read_text() == vector["key_file"]


def test_invalid_roots(invalid: dict[str, Any]) -> None:
    """A root of any other length than 32 bytes is refused."""
    for case in invalid["roots"]:
        with pytest.raises(InvalidKey):
            TenantKey.from_root(bytes.fromhex(case["root"]), "acme", "m", 1)


def test_invalid_ids(invalid: dict[str, Any]) -> None:
    """Tenant, model and version outside the grammar are refused."""
    for case in invalid["ids"]:
        with pytest.raises(InvalidId):
            TenantKey.from_root(bytes(32), case["tenant"], case["model"], case["version"])


def test_invalid_key_ids(invalid: dict[str, Any]) -> None:
    """Text that is no key id does not parse as one."""
    for case in invalid["key_ids"]:
        with pytest.raises(InvalidId):
            KeyId.parse(case["key_id"])


def test_invalid_vocab_keys(invalid: dict[str, Any]) -> None:
    """A vocabulary key is refused unless secret, key id and check value belong together."""
    for case in invalid["vocab_keys"]:
        with pytest.raises(REFUSALS):
            VocabKey(bytes.fromhex(case["secret"]), case["key_id"], case["vocab_kcv"])


def test_invalid_key_files(invalid: dict[str, Any], tmp_path: Path) -> None:
    """Every malformed, inconsistent or widely readable key file of the vectors is refused."""
    for number, case in enumerate(invalid["key_files"]):
        path = tmp_path / f"{number}.json"
        path.write_bytes(base64.b64decode(case["content"]))
        path.chmod(int(case["mode"], 8))
        with pytest.raises(InvalidKey, match=f"{number}.json"):
            TenantKey.load(path)


def test_second_implementation_agrees() -> None:
    """Plain Python without project or NumPy reproduces every valid vector and refuses every invalid one."""
    result = verify(VECTORS)
    assert (result.returncode, result.stderr) == (0, "")
    assert "0 faults" in result.stdout


ALTERATIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "kcv": ("kcv", lambda value: value[::-1]),
    "public key": ("public_key", lambda value: value[::-1]),
    "subkey": ("subkeys", lambda value: {**value, "vocab": "00" * 32}),
    "draw": ("draws", lambda value: [{**value[0], "steps": [{**value[0]["steps"][0], "n": 8}]}]),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_second_implementation_can_disagree(vectors: dict[str, Any], alteration: str, tmp_path: Path) -> None:
    """The verifier reports an altered vector: its agreement is not empty."""
    field, alter = ALTERATIONS[alteration]
    short = {**vectors["keys"][0], "draws": vectors["keys"][0]["draws"][:1]}
    altered = {**vectors, "keys": [{**short, field: alter(short[field])}]}
    (tmp_path / "keys.json").write_text(json.dumps(altered))
    shutil.copy(VECTORS / "keys_invalid.json", tmp_path)
    result = verify(tmp_path)
    assert result.returncode == 1
    assert "1 faults" in result.stdout


def test_second_implementation_finds_acceptable_invalids(vectors: dict[str, Any], tmp_path: Path) -> None:
    """The verifier reports an invalid vector that should have been accepted."""
    good = base64.b64encode(vectors["keys"][0]["key_file"].encode()).decode()
    cases: dict[str, list[Any]] = {"roots": [], "ids": [], "key_ids": [], "vocab_keys": []}
    invalid = {**cases, "key_files": [{"why": "fine", "content": good, "mode": "0600"}]}
    (tmp_path / "keys.json").write_text(json.dumps({**vectors, "keys": []}))
    (tmp_path / "keys_invalid.json").write_text(json.dumps(invalid))
    assert "key_files: accepted although fine" in verify(tmp_path).stdout
