"""Folding in several processes of this machine, with the bytes that one process writes.

Each worker writes whole files of its own and computes with as many threads as the
caller: the same arithmetic in the same order. The key reaches a worker through an
inherited pipe, never through arguments, environment or a file.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from anamorph import errors
from anamorph.checkpoint.work import Count
from anamorph.errors import CheckpointError, FoldInterrupted
from anamorph.keys import TenantKey
from anamorph.plan import Profile


@dataclass(frozen=True)
class Order:
    """What one worker is to do; nothing in it is secret.

    Args:
        base: folder of the plaintext checkpoint.
        folder: where the files are written.
        digest: of the base, as the caller has computed it.
        binding: what the worker must arrive at too, or it refuses.
        shards: names of the files to write.
        threads: of the products.
    """

    base: str
    folder: str
    profile: Profile
    device: str
    max_shard_size: int
    digest: str
    binding: str
    shards: tuple[str, ...]
    threads: int


def write_by_workers(orders: Sequence[Order], key: TenantKey, count: Count) -> None:
    """Start a worker for each order and wait for all; none outlives this call.

    Raises:
        FoldInterrupted: a worker was killed; what is finished stays.
        AnamorphError: what a worker met, as it would have been raised here.
    """
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for order in orders:
            worker = stack.enter_context(_started(order, key))
            selector.register(_output(worker), selectors.EVENT_READ, (worker, _Lines()))
        while selector.get_map():
            for ready, _ in selector.select():
                worker, lines = ready.data
                data = os.read(ready.fd, 65536)
                for message in lines.added(data):
                    _take(message, count)
                if not data:
                    selector.unregister(ready.fileobj)
                    _check_ended(worker)


@contextmanager
def _started(order: Order, key: TenantKey) -> Iterator[subprocess.Popen[bytes]]:
    receive, send = os.pipe()
    try:
        worker = _spawn(receive)
    except BaseException:
        os.close(send)
        raise
    finally:
        os.close(receive)
    with worker:
        try:
            # If it has died already, its exit status says why.
            with suppress(BrokenPipeError):
                _tell(worker, send, order, key)
            yield worker
        finally:
            worker.kill()


def _tell(worker: subprocess.Popen[bytes], pipe: int, order: Order, key: TenantKey) -> None:
    try:
        # A few hundred bytes: they fit the pipe before anyone reads.
        key.hand_over(pipe)
    finally:
        os.close(pipe)
    # Standard input stays open: when this process dies, the worker sees its end and dies too.
    assert worker.stdin is not None  # noqa: S101 - it is a pipe
    worker.stdin.write(json.dumps(asdict(order)).encode() + b"\n")


def _spawn(pipe: int) -> subprocess.Popen[bytes]:
    # Ctrl-C reaches the whole group of processes; the caller ends the workers itself.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "anamorph.checkpoint.worker", str(pipe)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[pipe],
            # Workers share the cores: a thread that waits for another must sleep, not spin.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _output(worker: subprocess.Popen[bytes]) -> Any:
    assert worker.stdout is not None  # noqa: S101 - it is a pipe
    return worker.stdout


class _Lines:
    """JSON objects, one per line, from pieces of a stream."""

    def __init__(self) -> None:
        self._rest = b""

    def added(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


def _take(message: dict[str, Any], count: Count) -> None:
    if "error" in message:
        kind = getattr(errors, message["error"], CheckpointError)
        raise kind(message["message"])
    count(message["done"])


def _check_ended(worker: subprocess.Popen[bytes]) -> None:
    status = worker.wait()
    if status < 0:
        raise FoldInterrupted(
            f"a worker of the fold was killed by {signal.Signals(-status).name} (memory may be short); "
            "fold again: it goes on from the finished files"
        )
    if status > 0:
        raise CheckpointError(f"a worker of the fold ended with status {status}; its error stands above")


def orders(
    base: Path,
    folder: Path,
    parts: Sequence[Sequence[str]],
    *,
    profile: Profile,
    device: str,
    max_shard_size: int,
    digest: str,
    binding: str,
) -> list[Order]:
    """One order for each part that is not empty."""
    return [
        Order(
            base=str(base.absolute()),
            folder=str(folder.absolute()),
            profile=profile,
            device=device,
            max_shard_size=max_shard_size,
            digest=digest,
            binding=binding,
            shards=tuple(part),
            threads=torch.get_num_threads(),
        )
        for part in parts
        if part
    ]
