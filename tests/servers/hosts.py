"""Several hosts on one machine: network namespaces on one bridge, whose cables can be pulled.

A cut here is what a network does: packets vanish and no connection is told. Stopping a
process is not that, and a proxy that breaks connections is not either.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.servers.find import binary

# Kept for tests of networks (RFC 2544): no machine has an address of it in use.
NETWORK = "198.18"


@dataclass
class Hosts:
    """Hosts ``NETWORK.n.1``, which is this machine itself, and ``.2`` and so on, made on demand."""

    network: str
    bridge: str
    ip: str
    made: list[int] = field(default_factory=list)

    def command(self, number: int) -> list[str]:
        """What to put before a command so that it runs on a host; the host is made if it is new."""
        if number == 1:
            return []
        if number not in self.made:
            self._make(number)
        return [self.ip, "netns", "exec", self._name(number)]

    def cut(self, number: int) -> None:
        """Pull a host's cable: nothing comes through, in either direction, and nobody is told."""
        self._run("link", "set", self._cable(number), "down")

    def mend(self, number: int) -> None:
        """Put the cable back."""
        self._run("link", "set", self._cable(number), "up")

    def _make(self, number: int) -> None:
        name, cable = self._name(number), self._cable(number)
        self._run("netns", "add", name)
        self.made.append(number)
        self._run("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._run("link", "set", cable, "master", self.bridge, "up")
        inside = ("-n", name)
        self._run(*inside, "address", "add", f"{self.network}.{number}/24", "dev", "eth0")
        self._run(*inside, "link", "set", "eth0", "up")
        self._run(*inside, "link", "set", "lo", "up")

    def start(self) -> None:
        """Make the bridge, which has this machine's own address."""
        self._run("link", "add", self.bridge, "type", "bridge")
        self._run("address", "add", f"{self.network}.1/24", "dev", self.bridge)
        self._run("link", "set", self.bridge, "up")

    def stop(self) -> None:
        """Remove every host; processes that run on one keep running, cut off."""
        for number in self.made:
            # The cable goes first: a namespace lasts as long as a process in it.
            self._run("link", "delete", self._cable(number))
            self._run("netns", "delete", self._name(number))
        self._run("link", "delete", self.bridge)

    def _name(self, number: int) -> str:
        return f"{self.bridge}-{number}"

    def _cable(self, number: int) -> str:
        return f"{self.bridge}c{number}"

    def _run(self, *arguments: str) -> None:
        done = subprocess.run([self.ip, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def running_hosts() -> Iterator[Hosts | None]:
    """Hosts; None where this user may not make any."""
    if os.geteuid() != 0:
        yield None
        return
    hosts = Hosts(f"{NETWORK}.{random.randint(0, 255)}", f"ana{os.getpid() % 10**6}", str(binary("ip")))
    hosts.start()
    try:
        yield hosts
    finally:
        hosts.stop()
