"""One worker of a fold: ``python -m anamorph.checkpoint.worker PIPE``, started by ``workers``.

The key comes through the inherited pipe, the order as one line on standard input, which
then stays open for as long as the caller lives. On standard output go bytes written, or
what went wrong, a JSON object per line.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anamorph.checkpoint.evaluate import Evaluator
from anamorph.checkpoint.work import prepare, write_shards
from anamorph.checkpoint.workers import Order
from anamorph.errors import AnamorphError, CheckpointError
from anamorph.keys import TenantKey

Say = Callable[[dict[str, Any]], None]


def work(order: Order, key: TenantKey, say: Say) -> None:
    """Write the files of the order.

    Raises:
        CheckpointError: a file cannot be read or written, or the base is no longer what the caller saw.
    """
    torch.set_num_threads(order.threads)
    todo = prepare(Path(order.base), key, order.profile, order.max_shard_size)
    if todo.binding(key, order.digest) != order.binding:
        raise CheckpointError(f"{order.base} has changed since the fold began; fold again")
    evaluator = Evaluator(todo.checkpoint, todo.plan, order.device)
    ours = [shard for shard in todo.shards if shard.name in order.shards]
    write_shards(Path(order.folder), ours, evaluator, lambda count: say({"done": count}))


def main() -> int:
    """Take key and order, work, report; the exit status is 0 when every file is written."""
    line = sys.stdin.buffer.readline()
    if not line:  # the caller has ended already
        return 1
    key = TenantKey.take_over(int(sys.argv[1]))
    threading.Thread(target=_die_with_caller, daemon=True).start()
    say = _speaker()
    try:
        order = json.loads(line)
        work(Order(**{**order, "shards": tuple(order["shards"])}), key, say)
    except AnamorphError as error:
        say({"error": type(error).__name__, "message": str(error)})
    except OSError as error:
        message = f"cannot write the replica: {error.strerror or type(error).__name__}"
        say({"error": "CheckpointError", "message": message})
    return 0


def _die_with_caller() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _speaker() -> Say:
    """Writes to standard output, which nothing else in this process does any more."""
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: dict[str, Any]) -> None:
        try:
            os.write(channel, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:  # the caller has ended, and nobody is left to be told
            os._exit(1)

    return say


if __name__ == "__main__":
    sys.exit(main())
