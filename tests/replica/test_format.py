"""The format is a promise: old replicas stay valid, and the specification is enough to check them."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anamorph.errors import ReplicaRefused
from anamorph.keys import TenantKey
from anamorph.replica import verify

HERE = Path(__file__).parent
SAMPLE = HERE / "samples" / "v1"
SAID: dict[str, Any] = json.loads((HERE / "samples" / "v1.json").read_text())


@pytest.fixture(scope="module")
def second() -> Callable[[str, str], int]:
    """``main`` of the second implementation."""
    spec = importlib.util.spec_from_file_location("second_verifier", HERE / "second_verifier.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[str, str], int] = module.main
    return main


def test_the_sample_of_format_1_verifies_forever() -> None:
    """Its bytes never change; neither may the answer."""
    anchor = b64decode(SAID["public_key"])
    manifest = verify(SAMPLE, anchor, key_id=SAID["key_id"], manifest_sha256=SAID["manifest_sha256"])
    assert manifest.added == ("lm_head.weight",)


def test_the_samples_key_still_has_its_public_key() -> None:
    """The signing key is derived today as it was when the sample was made."""
    key = TenantKey.from_root(bytes(range(32)), "acme", "sample", 1)
    assert (key.id, b64encode(key.public_key()).decode()) == (SAID["key_id"], SAID["public_key"])


def test_stock_transformers_still_runs_the_sample() -> None:
    """Greedy ids are those of the day it was made, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32)
    ids = list(SAID["prompt"])
    for _ in SAID["continuation"]:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[len(SAID["prompt"]) :] == SAID["continuation"]


def test_the_second_implementation_imports_nothing_of_the_first() -> None:
    """A second implementation that called the first would prove nothing."""
    assert "anamorph." not in (HERE / "second_verifier.py").read_text().replace("anamorph.json", "")


@pytest.mark.parametrize("place", ["sample", "replica"])
def test_a_second_implementation_accepts(
    second: Callable[[str, str], int], replica: Path, key: TenantKey, place: str
) -> None:
    """What we sign, an independent verifier accepts."""
    anchor = SAID["public_key"] if place == "sample" else b64encode(key.public_key()).decode()
    assert second(str(SAMPLE if place == "sample" else replica), anchor) == 0


@pytest.mark.parametrize("seed", range(40))
def test_both_implementations_refuse_the_same_damage(
    second: Callable[[str, str], int], tmp_path: Path, seed: int
) -> None:
    """A random bit, a missing, added or exchanged file: neither lets it pass."""
    chosen = random.Random(seed)
    folder = Path(shutil.copytree(SAMPLE, tmp_path / "damaged"))
    damage(folder, chosen)
    with pytest.raises(ReplicaRefused):
        verify(folder, b64decode(SAID["public_key"]))
    assert second(str(folder), SAID["public_key"]) == 1


def damage(folder: Path, chosen: random.Random) -> None:
    path, other = chosen.sample(sorted(folder.iterdir()), 2)
    kind = chosen.choice(["bit", "bit", "missing", "added", "exchanged"])
    if kind == "bit":
        data = bytearray(path.read_bytes())
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        path.write_bytes(data)
    elif kind == "missing":
        path.unlink()
    elif kind == "added":
        shutil.copy(path, folder / chosen.choice(["extra.safetensors", "tokenizer.json"]))
    else:
        path.write_bytes(other.read_bytes())
