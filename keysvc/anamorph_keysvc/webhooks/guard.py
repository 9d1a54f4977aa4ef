"""Where a webhook may point: public https receivers only, whatever a URL or a name server says.

A URL is held to a strict grammar, so that no two parsers read it differently. A name
is resolved once per connection, every address of it is checked, and the connection
goes to a checked address: a name that changes its mind in between has no effect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from anamorph import errors
from anamorph_keysvc.webhooks.settings import Network

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Sequence[str]]
"""Textual addresses of a name for a port; raises ``OSError`` where there are none."""

LONGEST_URL = 2000

_URL = re.compile(
    r"https://(?P<host>[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:(?P<port>[1-9][0-9]{0,4}))?"
    r"(/[A-Za-z0-9\-._~!$&'()*+,;=:@%/]*)?(\?[A-Za-z0-9\-._~!$&'()*+,;=:@%/?]*)?"
)
_NAME_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# Old resolvers read such a last label as part of an IPv4 address: 127.1, 0x7f.1, 2130706433.
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")

# IANA's special-purpose addresses, written out: what ``is_global`` means differs between Pythons.
_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT, and a cloud's metadata service
        "127.0.0.0/8",
        "168.63.129.16/32",  # a cloud's host, reachable from every machine of it
        "169.254.0.0/16",  # link-local: metadata services
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",  # relays into 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",
    )
)
# All public IPv6 unicast is in here; loopback, mapped IPv4, NAT64, ULA, link-local and multicast are not.
_PUBLIC_V6 = ip_network("2000::/3")


@dataclass(frozen=True)
class Destination:
    """The host, as a lower-case name or an address without brackets, and the port of a URL."""

    host: str
    port: int


@dataclass(frozen=True)
class Guard:
    """Decides where webhooks may point.

    Args:
        resolve: the name service.
        allow: networks admitted although they are not public.
        refuse: networks refused although they are public.
    """

    resolve: Resolver
    allow: tuple[Network, ...] = ()
    refuse: tuple[Network, ...] = ()

    def check(self, url: str) -> None:
        """Check a URL and where it leads to at this moment.

        Raises:
            Unprocessable: as ``parse`` and ``addresses``.
        """
        self.addresses(parse(url))

    def addresses(self, destination: Destination) -> tuple[Address, ...]:
        """The addresses to connect to: all that the host has, each of them admitted.

        Raises:
            Unprocessable: there are none, or one is not admitted.
        """
        found = tuple(_address(text) for text in self._look_up(destination))
        if not found or not all(self.admits(address) for address in found):
            # Which address it was is not for the caller: it may be a name of our own network.
            raise _refused("it leads to an address that is not public")
        return found

    def admits(self, address: Address) -> bool:
        """Whether a webhook may be delivered to ``address``."""
        if _within(address, self.allow):
            return True
        return is_public(address) and not _within(address, self.refuse)

    def _look_up(self, destination: Destination) -> Sequence[str]:
        if _literal(destination.host) is not None:
            return (destination.host,)
        try:
            return self.resolve(destination.host, destination.port)
        except (OSError, UnicodeError):
            raise errors.Unprocessable(
                "the host of the webhook's URL does not resolve", code="host_not_found", param="url"
            ) from None


def parse(url: str) -> Destination:
    """Host and port of a webhook's URL.

    Raises:
        Unprocessable: not https, or with user, fragment, odd port, or odd characters.
    """
    match = _URL.fullmatch(url) if len(url) <= LONGEST_URL else None
    if match is None:
        raise _refused("write https://host[:port]/path in ASCII, without user or fragment")
    port = int(match["port"] or 443)
    if port != 443 and not 1024 <= port <= 65535:
        raise _refused("its port is neither 443 nor from 1024 to 65535")
    return Destination(_host(match["host"].lower()), port)


def is_public(address: Address) -> bool:
    """Whether an address is unicast on the public internet, with no other address inside it."""
    if address.version == 6 and address not in _PUBLIC_V6:
        return False
    return address.is_global and not _within(address, _NOT_PUBLIC)


def _host(host: str) -> str:
    bare = host.removeprefix("[").removesuffix("]")
    if _literal(bare) is not None:
        return bare
    labels = host.split(".")
    if not all(_NAME_LABEL.fullmatch(label) for label in labels) or _NUMERIC.fullmatch(labels[-1]):
        raise _refused("its host is neither a name nor an address in the usual form")
    return host


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _address(text: str) -> Address:
    address = _literal(text)
    if address is None:
        raise _refused("its host resolves to something that is not an address")
    return address


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _refused(why: str) -> errors.Unprocessable:
    return errors.Unprocessable(f"no webhook may have this URL: {why}", code="url_refused", param="url")
