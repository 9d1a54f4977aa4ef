"""Logging in to Vault as a pod does: with the token of its service account, which a real cluster reviews."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from tests.servers.kube import ISSUER, ApiServer, running_apiserver

from anamorph import errors
from anamorph_keysvc.vault.admin import Admin
from anamorph_keysvc.vault.auth import Vault
from anamorph_keysvc.vault.settings import VaultSettings
from anamorph_keysvc.vault.setup import setup
from anamorph_keysvc.vault.transport import Transport
from anamorph_keysvc.vault.wrapper import VaultTransitWrapper
from anamorph_keysvc.wrapper import root_context

if TYPE_CHECKING:
    from pathlib import Path

    from tests.keysvc.vault.conftest import Place

pytestmark = [pytest.mark.real, pytest.mark.slow]

NAMESPACE, AUDIENCE = "anamorph", "vault"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_apiserver(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def settings(place: Place, cluster: ApiServer, tmp_path: Path) -> VaultSettings:
    """Vault set up for the pods of ``anamorph/keysvc``; the token is in a file, as it is in a pod."""
    login = {"method": "kubernetes", "token_file": tmp_path / "token"}
    bound = {"service_accounts": ["keysvc"], "namespaces": [NAMESPACE], "audience": AUDIENCE}
    section = {"host": cluster.url, "ca_file": cluster.ca_file, **bound}
    chosen = VaultSettings.model_validate(
        {
            **place.settings().model_dump(),
            "issuer": login,
            "releaser": login,
            "shredder": login,
            "setup": {"kubernetes": section},
        }
    )
    transport = Transport(chosen)
    setup(Admin(transport, place.server.root_token), chosen)
    transport.close()
    return chosen


def test_a_pod_logs_in_with_its_service_accounts_token(
    settings: VaultSettings, cluster: ApiServer, tmp_path: Path, kek: str
) -> None:
    """Three identities from one account; another account, audience or namespace is nobody to Vault."""
    account = cluster.account(NAMESPACE, "keysvc")
    # Outside the cluster Vault reviews a token with that very token.
    cluster.allow_reviews(NAMESPACE, account)
    audiences = [AUDIENCE, ISSUER]
    (tmp_path / "token").write_text(cluster.token(NAMESPACE, account, audiences))
    vault = Vault.open(settings)
    try:
        wrapper, context = VaultTransitWrapper(vault), root_context("acme", "chat", 1)
        assert wrapper.unwrap(kek, wrapper.wrap(kek, b"root", context), context) == b"root"
    finally:
        vault.close()
    strangers = {
        "another account": cluster.token(NAMESPACE, cluster.account(NAMESPACE), audiences),
        "another audience": cluster.token(NAMESPACE, account, ["somebody-else"]),
        "another namespace": cluster.token("elsewhere", cluster.account("elsewhere", "keysvc"), audiences),
    }
    for stranger, token in strangers.items():
        (tmp_path / "token").write_text(token)
        vault = Vault.open(settings)
        with pytest.raises(errors.Unavailable) as refused:
            vault.releaser.ready()
        assert (stranger, refused.value.code) == (stranger, "kms_denied")
        vault.close()
