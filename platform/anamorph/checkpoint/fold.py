"""Fold: carry out a plan on a checkpoint, one tensor at a time, and publish the result at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from anamorph.checkpoint.evaluate import Evaluator
from anamorph.checkpoint.reader import CONFIG, GENERATION_CONFIG
from anamorph.checkpoint.staging import gathered, joined, refuse_existing, staged
from anamorph.checkpoint.work import Count, parted, prepare, tensor_bytes, write_shards
from anamorph.checkpoint.workers import orders, write_by_workers
from anamorph.checkpoint.writer import Shard, write_index, write_json
from anamorph.errors import FoldInterrupted
from anamorph.keys import TenantKey
from anamorph.plan import Profile, TransformPlan

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
    workers: int = 1,
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> FoldReport:
    """Fold the checkpoint in ``base`` into a new folder ``out``.

    ``finish`` is called with the complete folder before it gets its name; what it adds
    (a manifest) is published with the rest, and an exception from it publishes nothing.
    A fold that was killed goes on from its last finished shard when it is called again
    in the same way, and ends with the same bytes. So it does with any number of ``workers``:
    processes that each write files of their own, as many at most as there are files.

    Raises:
        UnsupportedModel: no table covers the checkpoint.
        FoldInterrupted: a worker was killed; the next call goes on from there.
        CheckpointError: a file cannot be read or written, or another process folds into ``out``.
        ReplicaExists: ``out`` exists.
    """
    base, out = Path(base), Path(out)
    refuse_existing(out)
    work = prepare(base, key, profile, max_shard_size)
    digest = work.checkpoint.digest()
    binding = work.binding(key, digest)
    with staged(out, binding) as folder:
        resumed = _finished(folder, work.shards)
        todo = [shard for shard in work.shards if shard.name not in resumed]
        count = _counter(tensor_bytes(todo), tensor_bytes(work.shards), progress or _silent)
        parts = parted(todo, min(workers, len(todo)) or 1)
        if len(parts) > 1:
            names = [[shard.name for shard in part] for part in parts]
            asked = orders(
                base,
                folder,
                names,
                profile=profile,
                device=device,
                max_shard_size=max_shard_size,
                digest=digest,
                binding=binding,
            )
            write_by_workers(asked, key, count)
        else:
            write_shards(folder, todo, Evaluator(work.checkpoint, work.plan, device), count)
        _write_configs(folder, work.plan, work.shards)
        report = FoldReport(work.plan, digest, tensor_bytes(work.shards), len(resumed))
        if finish is not None:
            finish(folder, report)
    return report


def fold_part(
    base: Path,
    out: Path,
    key: TenantKey,
    profile: Profile = "rotate",
    *,
    index: int,
    of: int,
    device: str = "cpu",
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> int:
    """Make part ``index`` of ``of`` of what ``fold`` would write, for ``fold`` to finish.

    Parts may run at the same time, on several machines that share the folder of ``out``. When
    all are made, ``fold`` with the same arguments takes them up and publishes; a part that is
    missing it makes itself. Repeated, a part goes on from its finished files.

    Args:
        base: as ``fold``'s, like all that follow: the same for every part.
        out: the replica that ``fold`` will publish.
        key: what the replica is made with.
        profile: ``rotate`` or ``permute``.
        device: torch device of the products.
        max_shard_size: bytes of a file.
        index: 0 to ``of`` - 1.
        of: how many parts there are.
        progress: told of this part's bytes.

    Returns:
        Files that this call has written.

    Raises:
        UnsupportedModel, CheckpointError, ReplicaExists: as ``fold``.
    """
    if not 0 <= index < of:
        raise ValueError("a part's index is 0 to of - 1")
    base, out = Path(base), Path(out)
    refuse_existing(out)
    work = prepare(base, key, profile, max_shard_size)
    with joined(out, work.binding(key, work.checkpoint.digest())) as folder:
        part = parted(work.shards, of)[index]
        todo = [shard for shard in part if not _is_finished(folder, shard)]
        count = _counter(tensor_bytes(todo), tensor_bytes(part), progress or _silent)
        write_shards(folder, todo, Evaluator(work.checkpoint, work.plan, device), count)
    return len(todo)


def join_parts(
    base: Path,
    out: Path,
    key: TenantKey,
    profile: Profile = "rotate",
    *,
    of: int,
    max_shard_size: int = MAX_SHARD_SIZE,
    finish: Finish | None = None,
) -> FoldReport:
    """Publish as ``out`` what ``fold_part`` has made for it in ``of`` parts; nothing is folded here.

    ``finish`` as in ``fold``. Whatever fails, the parts stay.

    Raises:
        FoldInterrupted: a part is missing or not whole, which the message names.
        CheckpointError: a part is still being made, the parts are of another base, key or
            layout, or a file cannot be read or written.
        UnsupportedModel, ReplicaExists: as ``fold``.
    """
    base, out = Path(base), Path(out)
    refuse_existing(out)
    work = prepare(base, key, profile, max_shard_size)
    digest = work.checkpoint.digest()
    with gathered(out, work.binding(key, digest)) as folder:
        for index, part in enumerate(parted(work.shards, of)):
            _check_made(folder, part, f"part {index} of {of}")
        resumed = _finished(folder, work.shards)
        _write_configs(folder, work.plan, work.shards)
        report = FoldReport(work.plan, digest, tensor_bytes(work.shards), len(resumed))
        if finish is not None:
            finish(folder, report)
    return report


def _check_made(folder: Path, part: tuple[Shard, ...], name: str) -> None:
    missing = [shard.name for shard in part if not _is_finished(folder, shard)]
    if missing:
        raise FoldInterrupted(
            f"{name} is not made: {missing[0]} is missing; run that part again, then finish"
        )


def _silent(done: int, total: int) -> None:
    del done, total


def _counter(todo: int, total: int, progress: Progress) -> Count:
    """Adds up what is written, whoever writes it."""
    done = total - todo
    progress(done, total)

    def count(written: int) -> None:
        nonlocal done
        done += written
        progress(done, total)

    return count


def _is_finished(folder: Path, shard: Shard) -> bool:
    path = folder / shard.name
    return path.is_file() and path.stat().st_size == shard.size


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


def _write_configs(folder: Path, plan: TransformPlan, shards: tuple[Shard, ...]) -> None:
    write_index(folder, shards)
    if plan.generation_config is not None:
        write_json(folder / GENERATION_CONFIG, plan.generation_config)
    write_json(folder / CONFIG, plan.config)
