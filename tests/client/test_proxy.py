"""The proxy's edges: who may call, what is refused and how, what it checks when it starts."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from anamorph.client.proxy import ProxySettings, create_app, run
from anamorph.errors import SetupError
from anamorph.wire.admin import ModelCreate

if TYPE_CHECKING:
    from tests.client.conftest import System
    from tests.client.stack import Stack

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def http(fake_system: System) -> Iterator[httpx.Client]:
    """Calls to a proxy that no test changes."""
    with httpx.Client(base_url=fake_system.url, timeout=30) as client:
        yield client


@pytest.fixture
def own(proxy: str) -> Iterator[httpx.Client]:
    """Calls to a proxy before the test's own stack."""
    with httpx.Client(base_url=proxy, timeout=30) as client:
        yield client


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"model": "chat", "messages": MESSAGES, "max_tokens": 2, **fields}
    headers = {"Content-Type": "application/json"}
    return http.post("/v1/chat/completions", content=json.dumps(body), headers=headers)


def completion(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"model": "chat", "prompt": "Hello", "max_tokens": 2, **fields})


def refused(response: httpx.Response, status: int, code: str, param: str | None) -> bool:
    error = response.json()["error"]
    assert error["message"]
    return (response.status_code, error["code"], error["param"]) == (status, code, param)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:80", ""])
def test_a_foreign_host_is_refused(http: httpx.Client, host: str) -> None:
    """A name pointed at this machine (DNS rebinding) does not reach the routes."""
    assert refused(http.get("/v1/models", headers={"Host": host}), 403, "foreign_host", None)


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1", "[::1]:8600"])
def test_this_machines_names_pass(http: httpx.Client, host: str) -> None:
    """Every name of the loopback interface is answered."""
    assert http.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example", "file://"]
)
def test_a_foreign_page_is_refused(http: httpx.Client, origin: str) -> None:
    """A page of another site cannot make the tenant's browser ask."""
    assert refused(http.get("/v1/models", headers={"Origin": origin}), 403, "foreign_origin", None)


def test_a_local_page_passes(http: httpx.Client) -> None:
    """A page served from this machine may ask."""
    assert http.get("/v1/models", headers={"Origin": "http://localhost:3000"}).status_code == 200


def test_other_content_types_are_refused(http: httpx.Client) -> None:
    """What a foreign page could send without a preflight is no request."""
    body = json.dumps({"model": "chat", "messages": MESSAGES})
    response = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "text/plain"})
    assert refused(response, 400, "invalid_value", None)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.com", "::"])
def test_only_loopback_is_bound(settings: ProxySettings, host: str) -> None:
    """Plaintext is never offered to the network."""
    with pytest.raises(SetupError, match="loopback"):
        replace(settings, host=host)


UNSUPPORTED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "response_format": {"type": "json_object"},
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "store": True,
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "reasoning_effort": "high",
    "suffix": "x",
    "echo": True,
    "best_of": 2,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named(http: httpx.Client, name: str) -> None:
    """A field that would change the answer is refused by name, never ignored."""
    for ask in (chat, completion):
        assert refused(ask(http, **{name: UNSUPPORTED[name]}), 400, "unsupported", name)


NEUTRAL: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "store": False,
    "best_of": 1,
    "echo": False,
    "suffix": None,
    "service_tier": "auto",
    "seed": None,
    "stop": None,
    "user": "somebody",
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_changes_nothing_passes(http: httpx.Client, name: str) -> None:
    """Fields at the values they have anyway, as clients send them, are accepted."""
    for ask in (chat, completion):
        assert ask(http, **{name: NEUTRAL[name]}).status_code == 200


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 3}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"400": 1}}, "logit_bias"),
    ({"seed": 2**64}, "seed"),
    ({"stream": "yes"}, "stream"),
]


@pytest.mark.parametrize(("fields", "param"), INVALID)
def test_a_value_out_of_range_is_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    """A wrong value is a 400 about its field."""
    for ask in (chat, completion):
        error = ask(http, **fields)
        assert error.status_code == 400
        assert error.json()["error"]["param"].split(".")[0] == param


def test_an_unknown_field_is_named(http: httpx.Client) -> None:
    """A field that nobody knows is a 400, in a message too."""
    assert refused(chat(http, tempurature=0.5), 400, "unknown_field", "tempurature")
    odd = [{"role": "user", "content": "x", "mood": "good"}]
    assert refused(chat(http, messages=odd), 400, "unknown_field", "messages.0.mood")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        [{"role": "tool", "content": "x"}],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "half a pair \ud83d"}],
    ],
)
def test_messages_that_cannot_be_read_are_refused(http: httpx.Client, messages: Any) -> None:
    """Whatever is no text of a known role is a 400 about the messages."""
    response = chat(http, messages=messages)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages")


def test_parts_and_developer_messages_read_as_text(http: httpx.Client) -> None:
    """A message in parts is its text, a developer message a system message, an answer may be sent back."""
    answer = chat(http).json()["choices"][0]["message"]
    plain = [{"role": "system", "content": "Be kind."}, *MESSAGES, answer, *MESSAGES]
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    same = [{"role": "developer", "content": parts}, *MESSAGES, answer, *MESSAGES]
    texts = {
        chat(http, messages=m, max_tokens=9).json()["choices"][0]["message"]["content"] for m in (plain, same)
    }
    assert len(texts) == 1


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '"x"'])
def test_a_body_that_is_no_object_is_refused(http: httpx.Client, body: str) -> None:
    """Broken JSON is a 400 in OpenAI's shape."""
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/chat/completions", content=body, headers=headers)
    assert refused(response, 400, "invalid_value", None)


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", ""], [400], [5, "a"], [-1], {"a": 1}])
def test_a_prompt_that_cannot_be_read_is_refused(http: httpx.Client, prompt: Any) -> None:
    """Empty prompts, mixed lists and ids beyond the tokenizer's are 400s about the prompt."""
    response = completion(http, prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"].split(".")[0] == "prompt"


def test_unknown_paths_answer_in_openais_shape(http: httpx.Client) -> None:
    """404 and 405 are errors that OpenAI's client can read."""
    assert http.get("/v1/embeddings").json()["error"]["code"] == "not_found"
    assert http.get("/v1/completions").status_code == 405


def test_a_large_body_is_refused(http: httpx.Client) -> None:
    """The body is bounded before it is read whole."""
    assert refused(completion(http, prompt="x" * (17 * 2**20)), 413, "body_too_large", None)


def test_the_default_limit_is_the_rest_of_the_context(http: httpx.Client) -> None:
    """A chat without a limit may fill the context, here 4096 tokens, and no more."""
    messages = [{"role": "user", "content": "0123456789" * 400}]
    response = chat(http, messages=messages, max_tokens=None)
    assert response.json()["usage"]["total_tokens"] == 4096
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_an_error_upstream_keeps_its_status(own: httpx.Client, stack: Stack) -> None:
    """A suspended key is a 403 here too, streamed or not."""
    stack.tell(1, "suspended")
    for stream in (False, True):
        assert refused(chat(own, stream=stream), 403, "suspended", None)


def test_an_error_inside_a_stream_is_an_event(own: httpx.Client, stack: Stack) -> None:
    """What breaks after the first token ends the stream with an error and without [DONE]."""
    stack.rotate(delay_s=0.01)
    stack.tell(1, "gone")
    with own.stream(
        "POST", "/v1/chat/completions", json={"model": "chat", "messages": MESSAGES, "stream": True}
    ) as response:
        lines = response.iter_lines()
        next(lines)
        vars(stack.endpoint(2).engine)["fails"] = True
        events = [line.removeprefix("data: ") for line in lines if line]
    assert "error" in json.loads(events[-1])
    assert "[DONE]" not in events


@pytest.mark.parametrize("stream", [False, True])
def test_what_reaches_the_compute_zone(own: httpx.Client, stack: Stack, stream: bool) -> None:
    """The caller's trace goes on to the engine; its credentials, cookies and the API key do not."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {
        "traceparent": f"00-{trace}-b7ad6b7169203331-01",
        "tracestate": "vendor=private",
        "Authorization": "Bearer callers-own",
        "Cookie": "session=private",
    }
    body = {"model": "chat", "messages": MESSAGES, "max_tokens": 2, "stream": stream}
    own.post("/v1/chat/completions", json=body, headers=headers).raise_for_status()
    seen = stack.engines.seen[-1]
    assert seen["traceparent"].split("-")[1] == trace
    everything = str(seen.raw)
    assert not any(word in everything for word in ("private", "callers-own", stack.api_key))


def test_rotation_is_not_noticed(own: httpx.Client, stack: Stack) -> None:
    """A caller sees no error when the key changes, only another fingerprint."""
    before = chat(own)
    stack.rotate()
    stack.tell(1, "gone")
    after = chat(own)
    assert [before.status_code, after.status_code] == [200, 200]
    assert ".v2." in after.json()["system_fingerprint"]


def test_nothing_of_the_text_is_logged(
    own: httpx.Client, stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither prompts nor answers nor ids reach a log, in success or in failure."""
    caplog.set_level(logging.DEBUG, logger="anamorph")
    secret = "a very private question"
    private = [{"role": "user", "content": secret}]
    text = chat(own, messages=private, max_tokens=40).json()["choices"][0]["message"]["content"]
    vars(stack.endpoint(1).engine)["fails"] = True
    assert chat(own, messages=private).status_code == 503
    assert chat(own, messages=[{"role": "wizard", "content": secret}]).status_code == 400
    assert secret not in caplog.text
    assert text not in caplog.text


def test_a_local_api_key_is_asked_for(settings: ProxySettings, serve: Any) -> None:
    """With a key of its own the proxy answers nobody else on this machine."""
    with serve(create_app(replace(settings, local_api_key="s3cret"))) as running:
        for header, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer s3cret"}, 200),
        ):
            assert httpx.get(f"{running.url}/v1/models", headers=header).status_code == status


@pytest.mark.parametrize("changed", ["tokenizer.json", "chat_template.jinja"])
def test_a_foreign_tokenizer_is_refused(settings: ProxySettings, tmp_path: Path, changed: str) -> None:
    """A folder with another tokenizer or chat template than the record's does not start."""
    folder = Path(shutil.copytree(settings.models["chat"], tmp_path / "other"))
    text = (folder / changed).read_text()
    (folder / changed).write_text(text.replace("Ġ", "Ģ") if changed.endswith("json") else text + "!")
    with pytest.raises(SetupError, match="registered with"):
        run(replace(settings, models={"chat": folder}, port=0))


def test_a_model_without_digests_is_refused(settings: ProxySettings, stack: Stack) -> None:
    """Where the record names no tokenizer, none is taken on trust."""
    record = ModelCreate(id="bare", base="/models/base", vocab_size=400, context_length=64)
    stack.admin.create_model(stack.tenant, record)
    with pytest.raises(SetupError, match="names no tokenizer digest"):
        run(replace(settings, models={"bare": settings.models["chat"]}, port=0))


def test_a_taken_port_is_named(settings: ProxySettings) -> None:
    """A port in use is an error with its number."""
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with taken, pytest.raises(SetupError, match=str(port)):
        run(replace(settings, port=port))


SCRIPT = """
import json, sys
from pathlib import Path
from anamorph.client.proxy import ProxySettings, run
given = json.load(sys.stdin)
run(ProxySettings(given["keysvc"], "acme", Path(given["key"]), {"chat": Path(given["folder"])}, port=0,
                  port_file=Path(given["port"])))
"""


@pytest.mark.slow
@pytest.mark.real
def test_the_process_says_where_it_listens_and_ends_when_told(
    settings: ProxySettings, tmp_path: Path, stack: Stack
) -> None:
    """A proxy process writes its port once it answers, and SIGTERM ends it."""
    given = {
        "keysvc": stack.keysvc_url,
        "key": str(settings.api_key_file),
        "folder": str(settings.models["chat"]),
        "port": str(tmp_path / "port"),
    }
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(given))
    process.stdin.close()
    stack.wait_until(lambda: (tmp_path / "port").exists() or process.poll() is not None)
    port = int((tmp_path / "port").read_text())
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").json() == {"status": "ok"}
    os.kill(process.pid, signal.SIGTERM)
    process.wait(timeout=30)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz")
