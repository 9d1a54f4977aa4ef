"""Where webhooks may not point: hostile URLs, addresses, names and name servers."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from pydantic import ValidationError

from anamorph import errors
from anamorph_keysvc import deadline
from anamorph_keysvc.webhooks.guard import Destination, Guard, is_public, parse
from anamorph_keysvc.webhooks.resolver import SystemResolver
from anamorph_keysvc.webhooks.settings import WebhookSettings

HOSTILE_URLS = (
    "",
    "http://example.com/",
    "HTTPS://example.com/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "//example.com/",
    "https:/example.com/",
    "https:example.com",
    "https://",
    "https:///path",
    "https://user@example.com/",
    "https://user:password@example.com/",
    "https://example.com@127.0.0.1/",
    "https://example.com\\@127.0.0.1/",
    "https://127.0.0.1#@example.com/",
    "https://example.com/#fragment",
    "https://example.com:22/",
    "https://example.com:80/",
    "https://example.com:0/",
    "https://example.com:0443/",
    "https://example.com:65536/",
    "https://example.com:+443/",
    "https://example.com:/",
    "https://example.com:443:443/",
    "https://exämple.com/",
    "https://１２７.0.0.1/",
    "https://example。com/",
    "https://example.com/ü",
    "https://exam ple.com/",
    "https://example.com/ ",
    " https://example.com/",
    "https://example.com/\n",
    "https://example.com/\r\nHost: other",
    "https://example.com/\x00",
    "https://exam\tple.com/",
    "https://example.com./",
    "https://.example.com/",
    "https://example..com/",
    "https://-example.com/",
    "https://exa_mple.com/",
    "https://%31%32%37.0.0.1/",
    "https://example.com/?a=[b]",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.1/",
    "https://127.1/",
    "https://0177.0.0.1/",
    "https://127.0.0.01/",
    "https://017700000001/",
    "https://[::1/",
    "https://::1/",
    "https://[fe80::1%25eth0]/",
    "https://[127.0.0.1]x/",
    "https://[v1.x]/",
    "https://" + "a" * 64 + ".com/",
    "https://example.com/" + "a" * 2000,
)
HOSTILE_ADDRESSES = (
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
)
PUBLIC = ("1.1.1.1", "93.184.216.34", "172.32.0.1", "192.0.1.1", "2606:4700:4700::1111", "2a00:1450::1")


def resolving(*addresses: str) -> Guard:
    return Guard(lambda *_: list(addresses))


@pytest.mark.parametrize("url", HOSTILE_URLS)
def test_a_hostile_url_is_refused(url: str) -> None:
    """Whatever its host would resolve to."""
    with pytest.raises(errors.Unprocessable) as caught:
        resolving("1.1.1.1").check(url)
    assert (caught.value.code, caught.value.param) == ("url_refused", "url")


@pytest.mark.parametrize("address", HOSTILE_ADDRESSES)
def test_a_hostile_address_is_refused_however_it_comes(address: str) -> None:
    """As an address, as what a name resolves to, and beside a public one; nobody is told which."""
    literal = f"[{address}]" if ":" in address else address
    for guard, host in (
        (resolving(), literal),
        (resolving(address), "name.test"),
        (resolving("1.1.1.1", address), "name.test"),
        (resolving(address, "1.1.1.1"), "name.test"),
    ):
        with pytest.raises(errors.Unprocessable) as caught:
            guard.check(f"https://{host}/")
        assert caught.value.code == "url_refused"
        assert address not in str(caught.value)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_admitted(address: str) -> None:
    """By name and as it stands."""
    assert is_public(ip_address(address))
    literal = f"[{address}]" if ":" in address else address
    resolving().check(f"https://{literal}/hook")
    resolving(address).check("https://name.test/hook")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://Example.COM", ("example.com", 443)),
        ("https://example.com:443/a?b=c", ("example.com", 443)),
        ("https://example.com?b=c", ("example.com", 443)),
        ("https://example.com:8443/%20", ("example.com", 8443)),
        ("https://xn--exmple-cua.com:65535/", ("xn--exmple-cua.com", 65535)),
        ("https://[2606:4700::1]:1024/", ("2606:4700::1", 1024)),
        ("https://receiver/", ("receiver", 443)),
    ],
)
def test_an_ordinary_url_is_taken_apart(url: str, expected: tuple[str, int]) -> None:
    """Names in any case, with and without port, path and query."""
    assert parse(url) == Destination(*expected)


@pytest.mark.parametrize("failure", [OSError("no such host"), UnicodeError("label too long"), TimeoutError()])
def test_a_name_that_does_not_resolve_is_said_so(failure: Exception) -> None:
    """It is the caller's to mend, and different from a refusal."""

    def fail(*_: object) -> list[str]:
        raise failure

    with pytest.raises(errors.Unprocessable) as caught:
        Guard(fail).check("https://name.test/")
    assert caught.value.code == "host_not_found"


@pytest.mark.parametrize("found", [(), ("not an address",), ("",)])
def test_an_answer_without_addresses_is_refused(found: tuple[str, ...]) -> None:
    """Nothing is connected to that was not checked."""
    with pytest.raises(errors.Unprocessable):
        resolving(*found).check("https://name.test/")


def test_private_networks_are_admitted_by_name_only() -> None:
    """The setting admits what it lists, and no other spelling of it."""
    guard = Guard(lambda *_: ["10.1.2.3"], allow=(ip_network("10.0.0.0/8"),))
    guard.check("https://receiver.cluster.test/")
    for other in ("11.0.0.1", "8.8.8.8"):
        assert guard.admits(ip_address(other))
    for other in ("::ffff:10.1.2.3", "127.0.0.1", "169.254.169.254"):
        assert not guard.admits(ip_address(other))


def test_public_networks_of_one_s_own_can_be_refused() -> None:
    """Such as a cluster's own public addresses."""
    guard = Guard(lambda *_: [], refuse=(ip_network("1.1.1.0/24"),))
    assert not guard.admits(ip_address("1.1.1.1"))
    assert guard.admits(ip_address("1.1.2.1"))


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks as a JSON list."""
    monkeypatch.setenv("ANAMORPH_KEYSVC_WEBHOOK_ALLOW_PRIVATE", '["10.0.0.0/8", "fd00::/8"]')
    assert WebhookSettings().allow_private == (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize("network", ["0.0.0.0/0", "::/0", "128.0.0.0/1"])
def test_no_setting_admits_everything(network: str) -> None:
    """A network so wide is a mistake."""
    with pytest.raises(ValidationError, match="too wide"):
        WebhookSettings(allow_private=(ip_network(network),))


def test_the_system_s_resolver_knows_loopback() -> None:
    """The real name service, and that the guard refuses what it says."""
    resolver = SystemResolver()
    assert set(resolver("localhost", 443)) & {"127.0.0.1", "::1"}
    with pytest.raises(errors.Unprocessable) as caught:
        Guard(resolver).check("https://localhost/")
    assert caught.value.code == "url_refused"


@pytest.mark.parametrize("name", ["does-not-exist.invalid", "a" * 300, "x" * 64 + ".test"])
def test_the_system_s_resolver_fails_in_one_way(name: str) -> None:
    """Unknown names and impossible ones alike."""
    with pytest.raises(OSError, match=r"."):
        SystemResolver()(name, 443)


def test_the_resolver_s_room_is_bounded_and_given_back() -> None:
    """Looked up one after another, more names than there is room for."""
    resolver = SystemResolver(at_once=1)
    for _ in range(5):
        assert resolver("127.0.0.1", 443) == ["127.0.0.1"]


def test_a_spent_deadline_looks_nothing_up() -> None:
    """The request that asks has ended already."""
    with deadline.within(0), pytest.raises(errors.Unavailable):
        SystemResolver()("localhost", 443)
