"""A namespace of Vault Enterprise or OpenBao: said with every call that lives in it, and with no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from tests.servers.proxies import StatusProxy

from anamorph_keysvc.vault.admin import Admin
from anamorph_keysvc.vault.settings import Identity
from anamorph_keysvc.vault.transport import Transport
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper
from anamorph_keysvc.wrapper import root_context

if TYPE_CHECKING:
    from tests.keysvc.vault.conftest import Place

pytestmark = pytest.mark.real
HEADER, NAMESPACE = "x-vault-namespace", "teams/a"
AT = root_context("acme", "chat", 1)


@pytest.fixture
def proxy(place: Place) -> Iterator[StatusProxy]:
    """Before a server that takes any namespace for its only one, as the community edition does."""
    server = place.server
    with StatusProxy(
        server.url,
        authority=server.ca_file,
        certificate=server.certificate,
        keep=frozenset({HEADER}),
    ) as running:
        yield running
        place.close()


def use(place: Place, proxy: StatusProxy, kek: str, namespace: str | None) -> dict[str, str | None]:
    """Log all identities in, do what they do, end their tokens: the namespace of each path that was asked."""
    wrapper = VaultTransitWrapper(place.open(address=proxy.url, namespace=namespace))
    wrapped = wrapper.wrap(kek, b"root", AT)
    assert wrapper.unwrap(kek, wrapped, AT) == b"root"
    wrapper.rotate(kek)
    wrapper.rewrap(kek, [(wrapped, AT)])
    wrapper.check()
    place.close()
    return {arrival.path: arrival.headers.get(HEADER) for arrival in proxy.arrived}


def test_a_namespace_goes_with_logins_and_calls(place: Place, proxy: StatusProxy, kek: str) -> None:
    """Opening the wrapped secret id, login, transit, the end of the token."""
    asked = use(place, proxy, kek, NAMESPACE)
    assert set(asked.values()) == {NAMESPACE}
    for part in ("sys/wrapping/unwrap", "auth/approle/login", "encrypt/", "decrypt/", "rewrap/", "revoke"):
        assert any(part in path for path in asked), part


def test_without_a_namespace_none_is_said(place: Place, proxy: StatusProxy, kek: str) -> None:
    """Nor an empty one."""
    assert set(use(place, proxy, kek, None).values()) == {None}


def test_what_lives_outside_every_namespace_is_asked_there(place: Place, proxy: StatusProxy) -> None:
    """Audit devices belong to the whole server, policies to the namespace."""
    transport = Transport(place.settings(address=proxy.url, namespace=NAMESPACE))
    admin = Admin(transport, place.server.root_token)
    assert admin.read("sys/audit", root=True)
    assert admin.read(f"sys/policies/acl/{Identity.ISSUER.policy}")
    transport.close()
    assert [arrival.headers for arrival in proxy.arrived] == [{}, {HEADER: NAMESPACE}]


def test_no_credential_is_ever_kept() -> None:
    """What the proxy keeps is printed where a test fails."""
    with pytest.raises(AssertionError, match="shown"):
        StatusProxy("http://127.0.0.1:9", keep=frozenset({"x-vault-token"}))
