"""Settings that would trust too much are refused when they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from anamorph import errors
from anamorph.wire.admin import Role
from anamorph_keysvc.identity.bearer import open_identity
from anamorph_keysvc.identity.bindings import Binding
from anamorph_keysvc.identity.settings import IdentitySettings, KubernetesSettings, OidcSettings

OIDC = {
    "name": "idp",
    "issuer": "https://idp.example",
    "audiences": ["anamorph-keysvc"],
    "tenant": "acme",
    "roles_claim": "groups",
    "roles": {"admins": "admin"},
}
BINDING = {"namespace": "jobs", "service_account": "*", "tenant": "acme"}
KUBERNETES = {"api_server": "https://kube.example", "audiences": ["anamorph-keysvc"], "bindings": [BINDING]}


def both(oidc: dict[str, Any] | None = None, **more: Any) -> IdentitySettings:
    return IdentitySettings.model_validate(
        {"oidc": [{**OIDC, **(oidc or {})}], "kubernetes": KUBERNETES, **more}
    )


def test_defaults() -> None:
    """Nobody beside holders of API keys; jobs are materializers; one algorithm, the standard's."""
    assert IdentitySettings() == IdentitySettings(oidc=(), kubernetes=None, development=False)
    read = both()
    assert read.kubernetes is not None
    assert read.kubernetes.bindings[0].role is Role.MATERIALIZER
    assert read.oidc[0].algorithms == ("RS256",)


def test_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables hold them as JSON."""
    monkeypatch.setenv("ANAMORPH_KEYSVC_IDENTITY_OIDC", json.dumps([OIDC]))
    monkeypatch.setenv("ANAMORPH_KEYSVC_IDENTITY_KUBERNETES", json.dumps(KUBERNETES))
    assert IdentitySettings() == both()


@pytest.mark.parametrize(
    "changed",
    [
        {"algorithms": ["HS256"]},
        {"algorithms": ["RS256", "HS512"]},
        {"algorithms": ["none"]},
        {"algorithms": []},
        {"audiences": []},
        {"audiences": [""]},
        {"audiences": ["inference"]},
        {"issuer": "anamorph"},
        {"issuer": "http://idp.example"},
        {"issuer": "file:///etc/passwd"},
        {"issuer": "https://user:secret@idp.example"},
        {"jwks_url": "http://idp.example/jwks"},
        {"jwks_url": "file:///etc/passwd"},
        {"jwks_url": "http://127.0.0.1/jwks"},
        {"tenant": "Acme"},
        {"tenant": "plaintext"},
        {"tenant": None},
        {"tenant_claim": "tenant"},
        {"roles": {}},
        {"roles": {"admins": "root"}},
        {"roles": {"admins": "platform"}},
        {"client_secret": "hidden"},
    ],
)
def test_issuers_that_are_refused(changed: dict[str, Any]) -> None:
    """Symmetric or no algorithms, no audience, plain http, a tenant's issuer above tenants: refused."""
    assert both()
    with pytest.raises(ValidationError):
        both(changed)


def test_platform_only_where_it_is_mapped() -> None:
    """An issuer may give the platform role if the settings say so, and then needs no tenant."""
    platform = {**OIDC, "tenant": None, "roles": {"ops": "platform"}}
    assert OidcSettings.model_validate(platform).roles == {"ops": Role.PLATFORM}
    with pytest.raises(ValidationError):
        OidcSettings.model_validate({**platform, "roles": {"ops": "platform", "admins": "admin"}})


def test_development_admits_this_machine_only() -> None:
    """http is for this machine, while developing."""
    for host in ("127.0.0.1:8080", "localhost", "[::1]"):
        assert both({"issuer": f"http://{host}"}, development=True)
    with pytest.raises(ValidationError):
        both({"issuer": "http://10.0.0.1"}, development=True)


def test_one_verifier_per_issuer() -> None:
    """Which part verifies a token must be plain: no issuer and no name twice."""
    for second in ({"issuer": "https://two.example"}, {"name": "two"}):
        with pytest.raises(ValidationError, match="twice"):
            IdentitySettings.model_validate({"oidc": [OIDC, {**OIDC, **second}]})
    with pytest.raises(ValidationError, match="twice"):
        both(kubernetes={**KUBERNETES, "issuer": OIDC["issuer"]})
    with pytest.raises(ValidationError, match="never taken"):
        both(kubernetes={**KUBERNETES, "issuer": "anamorph"})


@pytest.mark.parametrize(
    "changed",
    [
        {"audiences": []},
        {"audiences": ["https://kubernetes.default.svc.cluster.local"]},
        {"audiences": ["api"]},
        {"audiences": ["inference"]},
        {"bindings": []},
        {"bindings": [BINDING, BINDING]},
        {"cache_s": 61},
        {"api_server": "http://kube.example"},
        {"token": "secret"},
    ],
)
def test_clusters_that_are_refused(changed: dict[str, Any]) -> None:
    """The API server's own audience, doubtful bindings and long memories are refused."""
    with pytest.raises(ValidationError):
        both(kubernetes={**KUBERNETES, **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {"namespace": "*"},
        {"namespace": "a:b"},
        {"service_account": ""},
        {"service_account": "*job"},
        {"service_account": "job-**"},
        {"service_account": "Job"},
        {"service_account": "job-"},
        {"tenant": None},
        {"role": "platform"},
        {"tenant": None, "role": "platform"},
    ],
)
def test_bindings_that_are_refused(changed: dict[str, Any]) -> None:
    """A tenant for every role but platform, which only a named account gets; no pattern but those below."""
    with pytest.raises(ValidationError):
        Binding.model_validate({**BINDING, **changed})


NAMED = {"namespace": "jobs", "service_account": "materializer-*", "tenant_from": "name"}


@pytest.mark.parametrize("name", ["m*", "materializer*", "materializer-*", "a.b-*"])
def test_names_that_say_the_tenant(name: str) -> None:
    """A beginning and one star, which stands for the tenant."""
    binding = Binding.model_validate({**NAMED, "service_account": name})
    assert (binding.beginning, binding.tenant, binding.role) == (name[:-1], None, Role.MATERIALIZER)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"tenant_from": None}, "set tenant_from"),
        ({"tenant_from": None, "tenant": "acme"}, "set tenant_from"),
        ({"tenant_from": "namespace"}, "'name'"),
        ({"tenant": "acme"}, "not both"),
        ({"role": "platform"}, "stands above tenants"),
        ({"service_account": "materializer-acme"}, "ends in one"),
        ({"service_account": "*"}, "ends in one"),
        ({"service_account": "*-materializer"}, "at its end"),
        ({"service_account": "materializer-*-*"}, "at its end"),
        ({"service_account": "materializer-**"}, "at its end"),
    ],
)
def test_names_that_say_no_tenant(changed: dict[str, Any], why: str) -> None:
    """Refused with what to do instead."""
    with pytest.raises(ValidationError, match=why):
        Binding.model_validate({**NAMED, **changed})


def test_one_name_says_one_tenant() -> None:
    """Beginnings of which one account could have both are refused; in two namespaces they may be the same."""
    for second in ("m*", "materializer-a*", "materializer*"):
        with pytest.raises(ValidationError, match="of two tenants"):
            bound(NAMED, {**NAMED, "service_account": second})
    assert len(bound(NAMED, {**NAMED, "service_account": "auditor-*"}).bindings) == 2
    assert len(bound(NAMED, {**NAMED, "namespace": "more"}).bindings) == 2


def bound(*bindings: dict[str, Any]) -> KubernetesSettings:
    return KubernetesSettings.model_validate({**KUBERNETES, "bindings": bindings})


@pytest.mark.parametrize(
    ("host", "url"), [("10.0.0.1", "https://10.0.0.1:443"), ("fd00::1", "https://[fd00::1]:443")]
)
def test_in_a_pod(monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    """In a pod the cluster says where its API server is."""
    read = KubernetesSettings.model_validate({**KUBERNETES, "api_server": None})
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    assert read.url() == url


def test_outside_a_pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Elsewhere the settings must say where the API server and its authority are."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for changed, remedy in (
        ({"api_server": None}, "api_server"),
        ({"ca_file": tmp_path / "none"}, "ca_file"),
    ):
        with pytest.raises(errors.SetupError, match=remedy):
            open_identity(both(kubernetes={**KUBERNETES, **changed}), bool)


def test_opening_asks_nobody(tmp_path: Path) -> None:
    """What the settings describe is opened without a network."""
    (tmp_path / "ca.crt").write_text("")
    open_identity(both(kubernetes={**KUBERNETES, "ca_file": tmp_path / "ca.crt"}), bool).close()
