"""What a fold has to do, cut into files that processes can write apart from each other."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from anamorph.checkpoint.evaluate import Evaluator
from anamorph.checkpoint.reader import Checkpoint
from anamorph.checkpoint.writer import Shard, ShardWriter, lay_out, nbytes
from anamorph.errors import CheckpointError
from anamorph.keys import TenantKey
from anamorph.plan import Profile, TransformPlan, build_plan

Count = Callable[[int], None]  # bytes written since the last call


@dataclass(frozen=True)
class Work:
    """A base, the plan of one key for it, and the files to be written."""

    checkpoint: Checkpoint
    plan: TransformPlan
    shards: tuple[Shard, ...]

    def binding(self, key: TenantKey, digest: str) -> str:
        """One keyed value for everything that the bytes of the replica depend on."""
        layout = "".join(f"{shard.name} {shard.size}\n" for shard in self.shards)
        message = "\n".join([digest, hashlib.sha256(self.plan.canonical()).hexdigest(), layout])
        return hmac.new(key.subkey("fold"), message.encode("utf-8"), hashlib.sha256).hexdigest()


def prepare(base: Path, key: TenantKey, profile: Profile, max_shard_size: int) -> Work:
    """Open the base, build the plan, lay out the files; the same arguments give the same work.

    Raises:
        UnsupportedModel: no table covers the checkpoint.
        CheckpointError: a file cannot be read.
    """
    checkpoint = Checkpoint.open(base)
    plan = build_plan(
        checkpoint.config, checkpoint.tensors, key, profile, generation_config=checkpoint.generation_config
    )
    _check_duplicates(checkpoint, plan)
    return Work(checkpoint, plan, lay_out(plan.steps, max_shard_size))


def write_shards(folder: Path, shards: Iterable[Shard], evaluator: Evaluator, count: Count) -> None:
    """Write these files, one after the other; each has its name once it is complete."""
    for shard in shards:
        with ShardWriter(folder, shard) as writer:
            for step in shard.steps:
                for piece in evaluator.pieces(step):
                    writer.write(piece)
                    count(piece.nbytes)


def tensor_bytes(shards: Iterable[Shard]) -> int:
    """Bytes of the tensors in these files."""
    return sum(nbytes(step) for shard in shards for step in shard.steps)


def parted(shards: Sequence[Shard], of: int) -> tuple[tuple[Shard, ...], ...]:
    """``of`` parts of about equal bytes, each file in one; the same at every call, some perhaps empty."""
    parts: list[list[Shard]] = [[] for _ in range(of)]
    for shard in sorted(shards, key=lambda shard: (-shard.size, shard.name)):
        min(parts, key=tensor_bytes).append(shard)
    return tuple(map(tuple, parts))


def _check_duplicates(checkpoint: Checkpoint, plan: TransformPlan) -> None:
    for name, source in plan.duplicates.items():
        if not torch.equal(
            checkpoint.read(name).view(torch.uint8), checkpoint.read(source).view(torch.uint8)
        ):
            raise CheckpointError(f"'{name}' differs from '{source}', although the configuration ties them")
