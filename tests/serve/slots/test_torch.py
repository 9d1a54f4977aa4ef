"""Slots that compute: encrypted replicas of one small model, each against its own expected tokens."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.serve.slots.conftest import Asked, Start, member
from transformers import LlamaConfig, LlamaForCausalLM

import anamorph
from anamorph.errors import MixedKeys, ReplicaRefused, SetupError
from anamorph.keys import TenantKey
from anamorph.replica import hold
from anamorph.serve.applications.pool import open_backend
from anamorph.serve.engines.base import Sampling
from anamorph.serve.engines.torch import PAGE
from anamorph.serve.slots.base import Job
from anamorph.serve.slots.files import Files
from anamorph.serve.slots.host import HostMemory
from anamorph.serve.slots.slot import TorchSlot
from anamorph.serve.slots.torch import TorchBackend
from anamorph.wire.serving import PoolMember, PoolSettings

VOCAB = 160
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 3,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.5,
    "tie_word_embeddings": True,
}
SIZES: dict[str, Any] = {
    "pool": "small",
    "engine": "torch",
    "dtype": "float32",
    "context_length": 400,
    "max_batch_tokens": 128,
    "num_blocks": 64,
    "max_concurrent": 4,
}


@dataclass(frozen=True)
class Tenant:
    """One tenant: his replica, and the ids that stand for the plaintext's."""

    member: PoolMember
    image: list[int]

    @property
    def name(self) -> str:
        return self.member.tenant

    @property
    def public_key(self) -> bytes:
        return b64decode(self.member.public_key or "")

    def encrypted(self, ids: list[int]) -> list[int]:
        return [self.image[token] for token in ids]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(base)  # in evaluation mode


def stored(tenant: Tenant) -> dict[str, torch.Tensor]:
    """The tensors of a tenant's replica, as safetensors reads them."""
    (weights,) = Path(tenant.member.replica).glob("*.safetensors")
    return load_file(weights)


def fold(base: Path, out: Path, name: str, profile: Any = "rotate") -> Tenant:
    key = TenantKey.generate(name, "smol", 1)
    manifest = anamorph.fold(base, out, key, profile)
    made = member(
        name,
        replica=str(out),
        key_id=key.id,
        public_key=b64encode(key.public_key()).decode(),
        manifest_sha256=manifest.sha256(),
    )
    return Tenant(made, key.vocab_key().permutation(VOCAB).tolist())


@pytest.fixture(scope="module")
def tenants(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Tenant]:
    place = tmp_path_factory.mktemp("replicas")
    return [fold(base, place / f"t{i}", f"t{i}") for i in range(30)]


def plain_prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, VOCAB) for _ in range(length)]


def stock(model: Any, prompt: list[int], n: int) -> list[int]:
    """What the plaintext base generates, end of text included."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)
    return [int(token) for token in out[0, len(prompt) :]]


async def ask(asked: Asked, tenant: Tenant, plain: list[int], n: int) -> list[int]:
    prompt = tenant.encrypted(plain)
    key_id = tenant.member.key_id
    answer = await asked.ask(tenant.name, key_id=key_id, prompt=prompt, max_tokens=n, temperature=0)
    assert answer.status == 200, answer.body
    return answer.ids


@pytest.mark.parametrize("slots", [1, 4])
async def test_every_tenant_gets_his_own_tokens(
    start: Start, model: Any, tenants: list[Tenant], slots: int
) -> None:
    """Thirty at once, by Zipf's law: what the plaintext computes, ids and end of text under each key."""
    asked, rng = start(slots=slots, **SIZES), random.Random(2)
    await asked.put(*(tenant.member for tenant in tenants))
    popular = rng.choices(tenants, [1 / rank for rank in range(1, 31)], k=40)

    async def one(tenant: Tenant, seed: int) -> None:
        plain, n = plain_prompt(rng.randint(1, 150), seed), rng.randint(1, 30)
        assert await ask(asked, tenant, plain, n) == tenant.encrypted(stock(model, plain, n))

    await asyncio.gather(*(one(tenant, seed) for seed, tenant in enumerate([*tenants, *popular])))


def opened(tenants: list[Tenant], **fields: Any) -> TorchBackend:
    backend = open_backend(PoolSettings.model_validate({**SIZES, "slots": 1, **fields}), threads=1)
    assert isinstance(backend, TorchBackend)
    for tenant in tenants:
        backend.open(tenant.member)
    return backend


@pytest.fixture
def backend(tenants: list[Tenant]) -> Iterator[TorchBackend]:
    made = opened(tenants[:2])
    yield made
    made.close()


def job(number: int, key_id: str, prompt: list[int], n: int = 1) -> Job:
    return Job(number, key_id, tuple(prompt), Sampling(n, temperature=0.0), frozenset())


def computed(slot: TorchSlot, one: Job) -> tuple[list[int], int]:
    """Tokens of one sequence, and how many of the prompt's were computed for them."""
    slot.add(one)
    ids: list[int] = []
    computed = 0
    while len(ids) < one.sampling.max_tokens:
        deliveries = slot.step()
        computed += slot._processor.inputs_and_outputs.num_q_tokens
        ids += [token.id for delivery in deliveries for token in delivery.tokens]
    return ids, computed


def test_identical_prompts_of_two_tenants_share_nothing(backend: TorchBackend, tenants: list[Tenant]) -> None:
    """The same ids, three pages of them: computed anew for the other key, and again for the first one."""
    ours, theirs = (tenant.member.key_id for tenant in tenants[:2])
    slot, prompt = backend.slot(0), plain_prompt(3 * PAGE + 5, seed=9)
    slot.load(ours)
    first, whole = computed(slot, job(1, ours, prompt, 3))
    again, rest = computed(slot, job(2, ours, prompt, 3))
    # Two of the three tokens are computed with, besides the prompt.
    assert (whole, rest, again) == (len(prompt) + 2, 5 + 2, first), "within one key a prefix is shared"
    slot.load(theirs)
    other, anew = computed(slot, job(3, theirs, prompt, 3))
    assert (anew, other != first) == (len(prompt) + 2, True)
    slot.load(ours)
    assert computed(slot, job(4, ours, prompt, 3)) == (first, len(prompt) + 2)


def test_a_step_with_a_foreign_request_fails_and_answers_nothing(
    backend: TorchBackend, tenants: list[Tenant]
) -> None:
    """By another key, and by an earlier time of the same key in the slot."""
    ours, theirs = (tenant.member.key_id for tenant in tenants[:2])
    slot = backend.slot(0)
    slot.load(ours)
    with pytest.raises(MixedKeys):
        slot.add(job(1, theirs, [5, 6]))
    slot.add(job(2, ours, [5, 6]))
    slot.key_id = theirs
    with pytest.raises(MixedKeys):
        slot.step()
    slot.load(ours)
    slot.add(job(3, ours, [5, 6]))
    slot._generation += 1
    with pytest.raises(MixedKeys):
        slot.step()


def test_a_swap_forgets_the_sequences_that_were_inside(backend: TorchBackend, tenants: list[Tenant]) -> None:
    """Also those that were cancelled, or given to the manager and never computed."""
    ours, theirs = (tenant.member.key_id for tenant in tenants[:2])
    slot = backend.slot(0)
    slot.load(ours)
    slot.add(job(1, ours, plain_prompt(200, seed=1), 5))
    slot.step()
    slot.add(job(2, ours, [5, 6], 5))
    slot.cancel(1)
    slot.load(theirs)
    assert slot.step() == []
    assert len(computed(slot, job(3, theirs, [5, 6], 2))[0]) == 2


def test_a_swap_replaces_every_tensor(backend: TorchBackend, tenants: list[Tenant]) -> None:
    """After it the module's state is the replica's files, bit by bit."""
    slot = backend.slot(0)
    for tenant in tenants[:2]:
        copied = slot.load(tenant.member.key_id)
        truth = stored(tenant)
        state = slot.model.state_dict()
        assert copied == sum(tensor.nbytes for tensor in truth.values())
        assert all(torch.equal(state[name], tensor) for name, tensor in truth.items())


async def test_a_member_of_another_shape_is_refused_by_name(
    start: Start, base: Path, tmp_path: Path, tenants: list[Tenant], model: Any
) -> None:
    """Tensors or options that differ are named; whoever fits is served."""
    config = {**CONFIG, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path / "small")
    small = fold(tmp_path / "small", tmp_path / "folded", "small")
    untied = fold(base, tmp_path / "permuted", "untied", "permute")
    asked = start(slots=1, **SIZES)
    await asked.put(tenants[0].member, small.member, untied.member)
    refused = await asked.ask("small", key_id=small.member.key_id, prompt=[5])
    assert "'num_hidden_layers'" in refused.error["message"]
    plain = plain_prompt(5, seed=3)
    assert await ask(asked, tenants[0], plain, 4) == tenants[0].encrypted(stock(model, plain, 4))


async def test_files_that_change_after_they_were_verified_are_not_served(
    start: Start, tmp_path: Path, tenants: list[Tenant], model: Any
) -> None:
    """The swap fails, that member's requests with it; the others go on."""
    folder = tmp_path / "copy"
    shutil.copytree(tenants[1].member.replica, folder)
    moved = Tenant(tenants[1].member.model_copy(update={"replica": str(folder)}), tenants[1].image)
    asked = start(slots=1, **SIZES)
    await asked.put(tenants[0].member, moved.member)
    (weights,) = folder.glob("*.safetensors")
    with weights.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    refused = await asked.ask(moved.name, key_id=moved.member.key_id, prompt=[5], max_tokens=1)
    assert refused.status == 503
    plain = plain_prompt(5, seed=4)
    assert await ask(asked, tenants[0], plain, 4) == tenants[0].encrypted(stock(model, plain, 4))
    assert asked.pool.engine.healthy()


def test_an_unsigned_member_is_refused(tenants: list[Tenant]) -> None:
    """Each by its own anchor."""
    foreign = tenants[0].member.model_copy(update={"public_key": tenants[1].member.public_key})
    with pytest.raises(ReplicaRefused):
        opened([]).open(foreign)


def test_stored_and_computed_types_may_differ(tenants: list[Tenant]) -> None:
    """Files in float32 fill slots in bfloat16: the copy converts, as loading does."""
    backend = opened(tenants[:2], dtype="bfloat16")
    for tenant in tenants[:2]:
        slot = backend.slot(0)
        slot.load(tenant.member.key_id)
        truth = stored(tenant)
        state = slot.model.state_dict()
        assert all(torch.equal(state[name], t.bfloat16()) for name, t in truth.items())
    backend.close()


def kept_copies(tenants: list[Tenant], limit: int) -> HostMemory:
    """As before a GPU, in memory that is not pinned."""
    host = HostMemory(limit, pinned=False)
    for tenant in tenants:
        host.add(tenant.member.key_id, hold(Path(tenant.member.replica), tenant.public_key))
    return host


def test_host_memory_is_bounded_and_least_recently_used_goes_first(tenants: list[Tenant]) -> None:
    """The bound holds after every use; a dropped replica comes back by itself; each has its own bytes."""
    size = sum(tensor.nbytes for tensor in stored(tenants[0]).values())
    host = kept_copies(tenants[:4], 2 * size + 1)
    keys = [tenant.member.key_id for tenant in tenants[:4]]
    targets = {name: torch.empty_like(tensor) for name, tensor in stored(tenants[0]).items()}
    for turn in (0, 1, 0, 2):
        assert host.copy_into(keys[turn], targets) == size
        assert all(torch.equal(targets[name], t) for name, t in stored(tenants[turn]).items())
        assert host.resident_bytes() <= 2 * size + 1
    host.drop(keys[1])  # it is the one that made room: nothing changes
    assert host.resident_bytes() == 2 * size
    host.drop(keys[0])
    host.forget(keys[2])
    assert host.resident_bytes() == 0
    host.copy_into(keys[1], targets)
    host.close()
    assert host.resident_bytes() == 0


def test_a_replica_larger_than_the_bound_is_held_alone(tenants: list[Tenant]) -> None:
    """Without room for two, one is there."""
    size = sum(tensor.nbytes for tensor in stored(tenants[0]).values())
    host = kept_copies(tenants[:2], 0)
    targets = {name: torch.empty_like(tensor) for name, tensor in stored(tenants[0]).items()}
    for tenant in tenants[:2]:
        host.copy_into(tenant.member.key_id, targets)
        assert host.resident_bytes() == size
    host.close()


def test_on_a_cpu_nothing_is_kept_beside_the_slots(backend: TorchBackend, tenants: list[Tenant]) -> None:
    """The files are the copy."""
    for tenant in tenants[:2]:
        backend.slot(0).load(tenant.member.key_id)
    assert backend.resident_bytes() == 0


def test_a_file_that_ends_early_is_an_error(tenants: list[Tenant], tmp_path: Path) -> None:
    """Cut after it was opened: no tensor is taken for read."""
    shutil.copytree(tenants[0].member.replica, tmp_path / "cut")
    (weights,) = (tmp_path / "cut").glob("*.safetensors")
    with Files(tmp_path / "cut") as files:
        os.truncate(weights, weights.stat().st_size - 1)
        with pytest.raises(SetupError, match="ends before"):
            files.read_into(files.empty())
    with pytest.raises(SetupError, match="cannot be read"):
        Files(tmp_path / "cut")


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    """A pool reads no other format."""
    with pytest.raises(SetupError, match="no safetensors"):
        Files(tmp_path)
