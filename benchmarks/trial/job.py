"""A materialisation job for a site with fake and real models: each order goes to the job that it needs.

It becomes that job, and starts no other process: the kernel ends it with the operator.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

QUICK = Path(__file__).parents[2] / "tests" / "system" / "quick_materializer.py"


def main() -> None:
    """Read the order, and go on as the job with the order on its standard input."""
    order = sys.stdin.buffer.read()
    config = json.loads((Path(json.loads(order)["base"]) / "config.json").read_text())
    job = [str(QUICK)] if "delay_ms" in config else ["-m", "anamorph.cli", "materialize"]
    reader, writer = os.pipe()
    os.write(writer, order)  # an order is far smaller than a pipe
    os.close(writer)
    os.dup2(reader, 0)
    os.execv(sys.executable, [sys.executable, *job])  # noqa: S606 -- no shell is wanted


if __name__ == "__main__":
    main()
