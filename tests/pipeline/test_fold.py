"""From key and base to a signed replica that stock transformers runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from anamorph.errors import CheckpointError, ReplicaExists, ReplicaRefused, UnsupportedModel
from anamorph.keys import TenantKey
from anamorph.pipeline import fold
from anamorph.replica import MANIFEST, keyed_tag, verify


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def greedy(model: Any, prompts: torch.Tensor, tokens: int = 12) -> torch.Tensor:
    answer: torch.Tensor = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return answer[:, prompts.shape[1] :]


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
prompts = torch.tensor(json.loads(sys.argv[2]))
how = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)
assert not [name for name in sys.modules if name.startswith("anamorph")]
print(json.dumps(tokens[:, prompts.shape[1] :].tolist()))
"""


def stock_greedy(folder: Path, prompts: torch.Tensor) -> torch.Tensor:
    """As ``greedy``, by a process that has loaded nothing of ours."""
    command = [sys.executable, "-c", STOCK, str(folder), json.dumps(prompts.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["rotate", "permute"])
def test_stock_transformers_generates_the_right_ids(
    base: Path, key: TenantKey, tmp_path: Path, profile: Any
) -> None:
    """Encrypt the prompt, generate with nothing of ours loaded, decrypt: the base's greedy answer."""
    fold(base, tmp_path / "out", key, profile)
    image = torch.from_numpy(key.vocab_key().permutation(97))
    prompts = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(1))
    expected = greedy(load(base), prompts)
    answer = stock_greedy(tmp_path / "out", image[prompts])
    assert torch.equal(image.argsort()[answer], expected)
    assert not torch.equal(answer, expected)


def test_what_is_folded_is_a_replica(base: Path, key: TenantKey, tmp_path: Path) -> None:
    """It verifies under its key, and its manifest says what was done."""
    manifest = fold(base, tmp_path / "out", key)
    assert verify(tmp_path / "out", key.public_key(), key_id=key.id) == manifest
    assert (manifest.profile, manifest.table, manifest.added) == ("rotate", "llama/1", ("lm_head.weight",))
    assert (manifest.kcv, manifest.vocab_kcv) == (key.kcv, key.vocab_kcv)


def test_a_replica_does_not_name_its_base(base: Path, key: TenantKey, tmp_path: Path) -> None:
    """Neither the base's path nor an unkeyed digest of it occurs in any file."""
    from anamorph.checkpoint import Checkpoint

    manifest = fold(base, tmp_path / "out", key)
    digest = Checkpoint.open(base).digest().removeprefix("sha256:")
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"secret-base-name" not in content
    assert digest.encode() not in content
    assert manifest.base_tag == keyed_tag(key.subkey("plan"), bytes.fromhex(digest))


def test_two_tenants_replicas_share_no_bytes_of_identity(base: Path, key: TenantKey, tmp_path: Path) -> None:
    """Tags, weights and special ids of one base differ from key to key."""
    other = TenantKey.from_root(b"o" * 32, "globex", "tiny", 1)
    ours, theirs = fold(base, tmp_path / "ours", key), fold(base, tmp_path / "theirs", other)
    assert ours.base_tag != theirs.base_tag
    assert ours.plan_tag != theirs.plan_tag
    assert set(ours.files["model.safetensors"].chunks).isdisjoint(theirs.files["model.safetensors"].chunks)


def test_the_same_fold_gives_the_same_bytes(base: Path, key: TenantKey, tmp_path: Path) -> None:
    """A replica is a function of base, key and profile: it can be made again and pinned by digest."""
    first, second = (fold(base, tmp_path / name, key) for name in ("first", "second"))
    assert first.sha256() == second.sha256()


def test_shards_are_as_small_as_asked(base: Path, key: TenantKey, tmp_path: Path) -> None:
    """A sharded replica has an index and loads like any other."""
    manifest = fold(base, tmp_path / "out", key, max_shard_size=20_000)
    shards = [name for name in manifest.files if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in manifest.files
    load(tmp_path / "out")


def test_progress_runs_from_nothing_to_all(base: Path, key: TenantKey, tmp_path: Path) -> None:
    """Phases come in order, and the fold's share grows to one."""
    seen: list[tuple[str, float]] = []
    fold(base, tmp_path / "out", key, progress=lambda phase, done: seen.append((phase, done)))
    shares = [done for phase, done in seen if phase == "fold"]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert seen[-1][0] == "manifest"


def test_an_existing_folder_is_left_alone(base: Path, key: TenantKey, tmp_path: Path) -> None:
    """Folding never overwrites."""
    (tmp_path / "out").mkdir()
    with pytest.raises(ReplicaExists):
        fold(base, tmp_path / "out", key)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_base_that_runs_code_gives_a_replica_that_does_not(
    base: Path, key: TenantKey, tmp_path: Path
) -> None:
    """``auto_map`` is refused or stripped; it never reaches a replica."""
    import json

    odd = Path(shutil.copytree(base, tmp_path / "odd"))
    config = json.loads((odd / "config.json").read_text()) | {"auto_map": {"AutoModel": "m.M"}}
    (odd / "config.json").write_text(json.dumps(config))
    try:
        fold(odd, tmp_path / "out", key)
    except UnsupportedModel:
        assert not (tmp_path / "out").exists()
    else:
        assert b"auto_map" not in (tmp_path / "out" / "config.json").read_bytes()


def test_a_broken_base_leaves_nothing(base: Path, key: TenantKey, tmp_path: Path) -> None:
    """A truncated shard is an error, and no folder bears the replica's name."""
    bad = Path(shutil.copytree(base, tmp_path / "bad"))
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        fold(bad, tmp_path / "out", key)
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}


def test_no_folder_appears_without_its_manifest(
    base: Path, key: TenantKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When signing fails at the very end, nothing is published."""

    def broken(_self: TenantKey, _message: bytes) -> bytes:
        raise RuntimeError("no signature today")

    monkeypatch.setattr(TenantKey, "sign", broken)
    with pytest.raises(RuntimeError, match="no signature"):
        fold(base, tmp_path / "out", key)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [MANIFEST, "config.json", "generation_config.json", "model.safetensors"])
def test_one_flipped_byte_of_a_real_replica_is_refused(
    base: Path, key: TenantKey, tmp_path: Path, name: str
) -> None:
    """What transformers would load without complaint, verification refuses."""
    fold(base, tmp_path / "out", key)
    data = bytearray((tmp_path / "out" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "out" / name).write_bytes(data)
    with pytest.raises(ReplicaRefused):
        verify(tmp_path / "out", key.public_key())
