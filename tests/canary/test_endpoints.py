"""The canary against two real endpoints with the fake engine, over sockets."""

from __future__ import annotations

import socket
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import jwt
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.types import ASGIApp

from anamorph import telemetry
from anamorph.canary import Target, measure
from anamorph.errors import Unauthenticated
from anamorph.serve.api.app import build_app
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.engines.fake import FakeEngine
from anamorph.wire.admin import PublicKey
from anamorph.wire.serving import EngineSettings, KeyState

KEY_ID = "acme.smol.v1." + "0" * 16
SIGNER = Ed25519PrivateKey.generate()


def token(tenant: str) -> str:
    now = int(time.time())
    claims = {"iss": "anamorph", "aud": "inference", "tenant": tenant, "model": "smol", "sub": "canary"}
    return jwt.encode({**claims, "iat": now, "exp": now + 600}, SIGNER, "EdDSA", headers={"kid": "k"})


def endpoint(tenant: str, key_id: str | None, delay_s: float) -> Endpoint:
    settings = EngineSettings(
        tenant=tenant,
        model="smol",
        version=1 if key_id else 0,
        protection="encrypted" if key_id else "plaintext",
        replica="unused",
        key_id=key_id,
        engine="fake",
        context_length=1024,
    )
    engine = FakeEngine(key_id or "plaintext", delay_s=delay_s)
    made = Endpoint(settings, engine, telemetry.build(f"engine-{tenant}"))
    x = urlsafe_b64encode(SIGNER.public_key().public_bytes_raw()).decode().rstrip("=")
    made.reconfigure(KeyState(jwks=(PublicKey(kid="k", x=x),)))
    return made


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def zone() -> Iterator[tuple[Endpoint, Target, Endpoint, Target]]:
    encrypted, plaintext = endpoint("acme", KEY_ID, 0.004), endpoint("plaintext", None, 0.001)
    with served(build_app(encrypted)) as one, served(build_app(plaintext)) as two:
        yield encrypted, Target(one, token("acme"), KEY_ID), plaintext, Target(two, token("plaintext"))
    for each in (encrypted, plaintext):
        each.telemetry.shutdown()


def test_real_endpoints(zone: tuple[Endpoint, Target, Endpoint, Target]) -> None:
    """Both endpoints answer every request in full, and each counts what it was asked for."""
    encrypted, enc_target, plaintext, plain_target = zone
    with httpx.Client(timeout=30) as http:
        report = measure(
            enc_target,
            plain_target,
            model="smol",
            vocab_size=1000,
            http=http,
            pairs=5,
            prompt_tokens=12,
            output_tokens=6,
            warmup=1,
        )
    assert [sample.tokens for sample in (*report.encrypted, *report.plaintext)] == [6] * 10
    for each in (encrypted, plaintext):
        page = each.telemetry.prometheus().decode()
        assert 'gen_ai_token_type="input"} 72.0' in page
        assert f'anamorph_protection="{each.settings.protection}"' in page


def test_credential_of_another_tenant(zone: tuple[Endpoint, Target, Endpoint, Target]) -> None:
    """A refusal by either endpoint ends the run; it does not become a sample."""
    _, enc_target, _, plain_target = zone
    stranger = Target(enc_target.endpoint, token("globex"), KEY_ID)
    with httpx.Client(timeout=30) as http, pytest.raises(Unauthenticated):
        measure(stranger, plain_target, model="smol", vocab_size=1000, http=http, pairs=2)
