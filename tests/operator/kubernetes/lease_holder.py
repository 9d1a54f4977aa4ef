"""A process that takes the lease and then appends a line to a shared log, as fast as it may.

    python lease_holder.py KUBECONFIG NAMESPACE NAME

The log is a ConfigMap, written as everything is: fenced, and with the version that it was read at.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from anamorph import errors
from anamorph_operator.kubernetes.api import Client, configuration
from anamorph_operator.kubernetes.catalogue import CONFIG_MAPS
from anamorph_operator.kubernetes.lease import Lease


def main(kubeconfig: Path, namespace: str, name: str) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    settings = configuration(kubeconfig)
    unfenced = Client(settings, timeout_s=2)
    lease = Lease(unfenced, namespace, "operator", name, os._exit)
    if not lease.acquire(stop):
        return
    lease.keep()
    fenced = Client(settings, lease.fence)
    while not stop.is_set():
        try:
            append(fenced, namespace, name)
        except (errors.Conflict, errors.Unavailable) as error:
            logging.warning("not written: %s", error)
        time.sleep(0.02)
    lease.release()


def append(client: Client, namespace: str, name: str) -> None:
    log = client.get(CONFIG_MAPS, namespace, "log")
    lines = f"{log['data']['lines']}{name} {time.monotonic():.3f}\n"
    client.update({"apiVersion": "v1", "kind": "ConfigMap", **log, "data": {"lines": lines}})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
