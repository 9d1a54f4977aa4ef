"""Fold: carry out a plan on a checkpoint, one tensor at a time, and publish the result at once."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from anamorph.checkpoint.evaluate import Evaluator
from anamorph.checkpoint.reader import CONFIG, GENERATION_CONFIG, Checkpoint
from anamorph.checkpoint.staging import refuse_existing, staged
from anamorph.checkpoint.writer import Shard, ShardWriter, lay_out, nbytes, write_index, write_json
from anamorph.errors import CheckpointError
from anamorph.keys import TenantKey
from anamorph.plan import Profile, TransformPlan, build_plan

MAX_SHARD_SIZE = 2**29
"""Bytes of a shard, unless the caller says otherwise."""

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class FoldReport:
    """What was folded; a manifest's keyed tags are made of ``base_digest`` and ``plan.canonical()``.

    Args:
        base_digest: ``sha256:…`` over the base's files. It names the base: keep it in the control zone.
        written: bytes of tensors in the replica.
        resumed: shards that an earlier, killed fold had finished.
    """

    plan: TransformPlan
    base_digest: str
    written: int
    resumed: int


Finish = Callable[[Path, FoldReport], None]


def fold(
    base: Path,
    out: Path,
    key: TenantKey,
    profile: Profile = "rotate",
    *,
    device: str = "cpu",
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> FoldReport:
    """Fold the checkpoint in ``base`` into a new folder ``out``.

    ``finish`` is called with the complete folder before it gets its name; what it adds
    (a manifest) is published with the rest, and an exception from it publishes nothing.
    A fold that was killed goes on from its last finished shard when it is called again
    in the same way, and ends with the same bytes.

    Raises:
        UnsupportedModel: no table covers the checkpoint.
        CheckpointError: a file cannot be read or written, or another process folds into ``out``.
        ReplicaExists: ``out`` exists.
    """
    base, out = Path(base), Path(out)
    refuse_existing(out)
    checkpoint = Checkpoint.open(base)
    plan = build_plan(
        checkpoint.config, checkpoint.tensors, key, profile, generation_config=checkpoint.generation_config
    )
    _check_duplicates(checkpoint, plan)
    shards = lay_out(plan.steps, max_shard_size)
    digest = checkpoint.digest()
    with staged(out, _binding(key, plan, digest, shards)) as folder:
        resumed = _finished(folder, shards)
        _write_shards(folder, shards, resumed, Evaluator(checkpoint, plan, device), progress or _silent)
        _write_configs(folder, plan, shards)
        report = FoldReport(plan, digest, sum(map(nbytes, plan.steps)), len(resumed))
        if finish is not None:
            finish(folder, report)
    return report


def _silent(done: int, total: int) -> None:
    del done, total


def _check_duplicates(checkpoint: Checkpoint, plan: TransformPlan) -> None:
    for name, source in plan.duplicates.items():
        if not torch.equal(
            checkpoint.read(name).view(torch.uint8), checkpoint.read(source).view(torch.uint8)
        ):
            raise CheckpointError(f"'{name}' differs from '{source}', although the configuration ties them")


def _binding(key: TenantKey, plan: TransformPlan, digest: str, shards: tuple[Shard, ...]) -> str:
    """One keyed value for everything that the bytes of the replica depend on."""
    layout = "".join(f"{shard.name} {shard.size}\n" for shard in shards)
    message = "\n".join([digest, hashlib.sha256(plan.canonical()).hexdigest(), layout])
    return hmac.new(key.subkey("fold"), message.encode("utf-8"), hashlib.sha256).hexdigest()


def _finished(folder: Path, shards: tuple[Shard, ...]) -> Mapping[str, Path]:
    """Complete shards of a killed fold; everything else it left is removed."""
    sizes = {shard.name: shard.size for shard in shards}
    finished = {}
    for path in folder.iterdir():
        if sizes.get(path.name) == path.stat().st_size:
            finished[path.name] = path
        else:
            path.unlink()
    return finished


def _write_shards(
    folder: Path,
    shards: tuple[Shard, ...],
    finished: Mapping[str, Path],
    evaluator: Evaluator,
    progress: Progress,
) -> None:
    total = sum(nbytes(step) for shard in shards for step in shard.steps)
    done = 0
    progress(done, total)
    for shard in shards:
        if shard.name in finished:
            done += sum(map(nbytes, shard.steps))
            progress(done, total)
            continue
        with ShardWriter(folder, shard) as writer:
            for step in shard.steps:
                for piece in evaluator.pieces(step):
                    writer.write(piece)
                    done += piece.nbytes
                    progress(done, total)


def _write_configs(folder: Path, plan: TransformPlan, shards: tuple[Shard, ...]) -> None:
    write_index(folder, shards)
    if plan.generation_config is not None:
        write_json(folder / GENERATION_CONFIG, plan.generation_config)
    write_json(folder / CONFIG, plan.config)
