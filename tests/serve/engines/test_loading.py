"""What is refused before anything is served, and what a replica process does with its settings."""

from __future__ import annotations

import re
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import ValidationError

from anamorph import telemetry
from anamorph.errors import ReplicaRefused, SetupError
from anamorph.serve.api.endpoint import Endpoint
from anamorph.serve.applications.engine import EngineReplica, build
from anamorph.serve.engines.loading import open_engine
from anamorph.wire.serving import EngineSettings

if TYPE_CHECKING:
    from tests.serve.conftest import Serve

KEY_ID = "acme.smol.v1.0123456789abcdef"
ANCHOR = b64encode(bytes(32)).decode()


def settings(**changes: Any) -> EngineSettings:
    fields = {"tenant": "acme", "model": "smol", "version": 1, "replica": "fake:", "engine": "fake"}
    return EngineSettings.model_validate({**fields, "key_id": KEY_ID, "context_length": 100, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"key_id": None},
        {"key_id": "nonsense"},
        {"key_id": KEY_ID.replace("acme", "globex")},
        {"key_id": KEY_ID.replace("v1", "v2")},
        {"protection": "plaintext", "tenant": "plaintext", "version": 0},
    ],
)
def test_settings_that_contradict_their_key_are_refused(changes: dict[str, Any]) -> None:
    """An application serves the version it is named after, or nothing."""
    with pytest.raises(ReplicaRefused):
        open_engine(settings(**changes))


@pytest.mark.parametrize("engine", ["fake", "torch"])
def test_an_encrypted_folder_needs_its_anchor_and_a_manifest(tmp_path: Path, engine: str) -> None:
    """Without the public key nothing is verified, without a manifest nothing is a replica."""
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    with pytest.raises(ReplicaRefused, match="public key"):
        open_engine(settings(replica=str(tmp_path), engine=engine))
    with pytest.raises(ReplicaRefused):
        open_engine(settings(replica=str(tmp_path), engine=engine, public_key=ANCHOR))


def test_what_is_not_there_cannot_be_loaded(tmp_path: Path) -> None:
    """A missing folder, and a torch engine without files, are setup errors that say so."""
    with pytest.raises(SetupError, match="does not exist"):
        open_engine(settings(replica=str(tmp_path / "none"), public_key=ANCHOR))
    with pytest.raises(SetupError, match="without files"):
        open_engine(settings(engine="torch"))


@pytest.mark.parametrize("engine", ["fake", "torch"])
def test_a_folder_without_its_configuration_is_refused_by_name(tmp_path: Path, engine: str) -> None:
    """Whatever the engine, a missing config.json is said to be missing."""
    baseline = {"tenant": "plaintext", "version": 0, "protection": "plaintext", "key_id": None}
    with pytest.raises(SetupError, match=r"no config\.json"):
        open_engine(settings(**baseline, replica=str(tmp_path), engine=engine))


def test_unknown_settings_fail_the_deployment() -> None:
    """A typing error in an argument is not ignored."""
    with pytest.raises(ValidationError):
        build({**settings().model_dump(), "max_tokenz": 1})


def test_a_replica_takes_pushed_state_and_reports_its_health() -> None:
    """``user_config`` replaces state and keys; an engine that stopped fails Ray's health check."""
    replica = EngineReplica(settings().model_dump(mode="json"))
    replica.check_health()
    replica.reconfigure({"status": "gone", "jwks": []})
    endpoint: Endpoint = replica._endpoint
    assert endpoint.state.status == "gone"
    endpoint.engine.close()
    with pytest.raises(RuntimeError):
        replica.check_health()


async def test_a_request_continues_its_callers_trace(serve: Serve) -> None:
    """The span's parent is the caller's, its phases are its children; none holds ids."""
    spans = InMemorySpanExporter()
    observed = telemetry.build("anamorph-test", span_processors=[SimpleSpanProcessor(spans)])
    served = serve()
    served.endpoint.telemetry = observed
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {**served.headers(), "traceparent": f"00-{trace}-{parent}-01"}
    body = {"prompt": [11, 12, 13], "max_tokens": 4}
    await served.http.post("/v1/completions", json=body, headers=headers)
    *phases, span = spans.get_finished_spans()
    observed.shutdown()
    assert span.context is not None
    assert span.parent is not None
    assert [(phase.name, phase.parent) for phase in phases] == [
        (name, span.context) for name in ("queue", "prefill", "decode")
    ]
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace, parent)
    assert (span.attributes or {})[telemetry.names.KEY_ID] == KEY_ID
    told = str([each.attributes for each in (span, *phases)]).replace(KEY_ID, "")
    assert not re.search(r"\b1[123]\b", told)
