"""After a whole run no key byte lies where it should not; what the compute zone sees opens no door."""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, OpenAI

from anamorph.cli.machine.home import MODEL
from anamorph.cli.machine.processes import marked
from anamorph.client import Client
from anamorph.keys import TenantKey
from anamorph.telemetry import build
from anamorph.wire.admin import Role
from anamorph.wire.keyservice import KeyService
from anamorph.wire.states import State
from anamorph_keysvc import homes as keysvc_home
from anamorph_keysvc.app import build_app
from anamorph_keysvc.homes import Home as KeysvcHome
from anamorph_keysvc.service.work import utc_now

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


def version_with_a_known_root(system: Any) -> tuple[int, bytes]:
    """A version, active now, whose root was released to the test before its job asked."""
    command = system.kill("operator")
    number = system.rotate()
    with system.keys(Role.PLATFORM) as platform:
        grant = platform.materialize("acme", MODEL, number)
    with KeyService(system.url, grant.secret) as job:
        root = job.release("acme", MODEL, number, "materialize").material()
    system.restart("operator", command)
    system.await_state(number, State.ACTIVE)
    return number, root


@pytest.fixture(scope="module")
def canary_root(system: Any) -> bytes:
    """A root that the test knows, of a version that then went through a whole life."""
    number, root = version_with_a_known_root(system)
    with Client(system.url, system.api_key(), "acme", MODEL) as client:
        for length in range(1, 8):
            client.complete([length] * length, max_tokens=4)
    system.await_state(system.rotate(), State.ACTIVE)
    system.await_state(number, State.RETIRED)
    return root


def spellings(secret: bytes) -> list[bytes]:
    """Raw, hexadecimal in both cases, base64 in both alphabets without its last, shared characters."""
    hexadecimal = secret.hex().encode()
    both = {b64encode(secret)[:42], urlsafe_b64encode(secret)[:42]}
    return [secret, hexadecimal, hexadecimal.upper(), *both]


def secrets_of(root: bytes, version: int) -> dict[str, bytes]:
    key = TenantKey.from_root(root, "acme", MODEL, version)
    return {"root": root, "vocab": key.subkey("vocab"), "manifest": key.subkey("manifest")}


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()


def rest_answers(system: Any) -> Iterator[tuple[str, bytes]]:
    ray = system.ray
    paths = (
        "/api/serve/applications/",
        "/api/v0/actors?detail=1",
        "/api/v0/tasks?detail=1",
        "/api/v0/workers",
    )
    for path in (*paths, "/api/v0/runtime_envs", "/api/jobs/", "/nodes?view=summary", "/api/cluster_status"):
        yield path, httpx.get(ray.dashboard_url + path, headers=ray.headers(), timeout=60).content
    for url in (f"{system.active().endpoint}/metrics", f"{system.url}/metrics"):
        yield url, httpx.get(url, timeout=30).content


def processes(system: Any) -> Iterator[tuple[str, bytes]]:
    for process in marked(system.home.running().instance):
        for part in ("cmdline", "environ"):
            yield f"{process.pid}/{part}", Path(f"/proc/{process.pid}/{part}").read_bytes()


def everything_visible(system: Any) -> list[tuple[str, bytes]]:
    home, ray = system.home.root, system.ray.temp_dir
    return [*files(home), *files(ray), *rest_answers(system), *processes(system)]


def find(places: list[tuple[str, bytes]], secret: bytes) -> list[str]:
    return [place for place, content in places if any(form in content for form in spellings(secret))]


def test_no_key_byte_is_anywhere(system: Any, canary_root: bytes, collector: tuple[str, Path]) -> None:
    """Logs, database, Ray's answers, replicas, traces, metrics, command lines, environments: nowhere."""
    exported = list(files(collector[1]))
    assert {Path(place).name.partition("-")[0] for place, _ in exported} == {"traces", "metrics"}
    places = everything_visible(system) + exported
    assert len(places) > 50
    version = system.active().version - 1
    for name, secret in secrets_of(canary_root, version).items():
        assert find(places, secret) == [], name


def test_torch_and_the_proxy_keep_text_and_key_to_themselves(
    torch_system: Any, words: list[str], collector: tuple[str, Path]
) -> None:
    """A real model, asked in words through the proxy: no log, file, trace or answer says one, or a key."""
    number, root = version_with_a_known_root(torch_system)
    asked = [20, 31, 42, 53, 24, 35]
    url = torch_system.home.running().urls["proxy-acme"]
    with OpenAI(base_url=url, api_key="none") as client:
        prompt = " ".join(words[id_] for id_ in asked)
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
        with pytest.raises(APIStatusError):  # an error in full view is where text likes to slip out
            client.completions.create(model=MODEL, prompt=prompt, max_tokens=10_000)
    said = answer.choices[0].text.split()
    assert len(said) == 8
    assert set(said) <= set(words)
    assert answer.system_fingerprint == torch_system.active().key_id
    places = everything_visible(torch_system) + list(files(collector[1]))
    assert {"proxy-acme.log", "key-service.log", "operator.log"} <= {Path(place).name for place, _ in places}
    for form in (b"quokka", json.dumps(asked)[1:-1].encode(), ",".join(map(str, asked)).encode()):
        assert [place for place, content in places if form in content] == [], form
    for name, secret in secrets_of(root, number).items():
        assert find(places, secret) == [], name


def test_the_database_holds_the_root_only_wrapped(system: Any, canary_root: bytes) -> None:
    """A positive control for the search: what is there in clear is found."""
    wrapping = (system.home.keysvc / "wrapping.key").read_bytes()
    found = find(list(files(system.home.root)), wrapping)
    assert [Path(place).name for place in found] == ["wrapping.key"]
    assert find(list(files(system.home.keysvc)), canary_root) == []


def test_an_inference_token_opens_nothing_of_the_key_service(system: Any, tmp_path: Path) -> None:
    """A header captured in the compute zone is 401 on every route but the public ones."""
    with system.keys(Role.CLIENT) as keys:
        token = keys.inference_token("acme", MODEL).token
    routes = list(keysvc_routes(tmp_path / "keysvc"))
    assert len(routes) > 30
    headers = {"Authorization": f"Bearer {token}"}
    for method, path in routes:
        answer = httpx.request(method, system.url + path, headers=headers, json={}, timeout=30)
        assert answer.status_code == 401, f"{method} {path}: {answer.status_code}"


PUBLIC = {"/livez", "/readyz", "/metrics", "/v1/inference-keys"}


def keysvc_routes(home: Path) -> Iterator[tuple[str, str]]:
    """Every route of the key service, with real ids in the places of its parameters."""
    place = KeysvcHome(home)
    keysvc_home.init(place, utc_now, os.urandom)
    service = keysvc_home.open_service(place, production=False, clock=utc_now, entropy=os.urandom)
    try:
        schema = build_app(service, build("test")).openapi()
    finally:
        service.database.close()
    for path, methods in schema["paths"].items():
        if path not in PUBLIC:
            filled = path.replace("{tenant}", "acme").replace("{model}", MODEL).replace("{version}", "1")
            filled = re.sub(r"{\w+}", "id_1", filled)
            yield from ((method.upper(), filled) for method in methods)
