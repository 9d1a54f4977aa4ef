"""Both clients against a real key service and the serving application on a fake engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from anamorph import errors
from anamorph.client import AsyncClient, Client, session
from anamorph.serve.engines.fake import continuation
from anamorph.wire.inference import KEY_ID_HEADER, Completion
from anamorph.wire.states import State

if TYPE_CHECKING:
    from tests.client.stack import Stack

PROMPT = [5, 6, 7]


class Recorder(httpx.HTTPTransport):
    """The network, with a list of what crossed it and answers that can be put in its way."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[httpx.Request] = []
        self.instead: list[httpx.Response] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        return self.instead.pop(0) if self.instead else super().handle_request(request)


@pytest.fixture
def wire() -> Recorder:
    return Recorder()


@pytest.fixture
def make(stack: Stack, wire: Recorder) -> Iterator[Callable[..., Client]]:
    """Makes clients of the stack whose calls to engines are recorded, and which never really wait."""
    made: list[Client] = []

    def build(**options: Any) -> Client:
        settings = {"transport": wire, "sleep": lambda _: None, **options}
        made.append(Client(stack.keysvc_url, stack.api_key, stack.tenant, stack.model, **settings))
        return made[-1]

    yield build
    for client in made:
        client.close()


def expected(client: Client, prompt: list[int], n: int) -> list[int]:
    codec = client.lease().codec
    return codec.decrypt(continuation(codec.key_id, codec.encrypt(prompt), n, codec.vocab_size))


def tokens(chunks: Iterator[Completion]) -> list[int]:
    return [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids]


def test_ids_come_back_plain(client: Client) -> None:
    """Plain ids go in, and what the engine said under encryption comes out plain."""
    answer = client.complete(PROMPT, max_tokens=4)
    assert answer.choices[0].token_ids == expected(client, PROMPT, 4)


def test_a_stream_says_the_same(client: Client) -> None:
    """The chunks of a stream are the whole answer, and the last one carries the usage."""
    chunks = list(client.stream(PROMPT, max_tokens=4))
    assert tokens(iter(chunks)) == expected(client, PROMPT, 4)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 7


def test_several_prompts_and_choices(client: Client) -> None:
    """Prompt ``i // n`` is answered by choice ``i``."""
    answer = client.complete([PROMPT, [9]], n=2, max_tokens=3)
    texts = [choice.token_ids for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    assert texts == [expected(client, prompt, 3) for prompt in (PROMPT, PROMPT, [9], [9])]


async def test_the_asynchronous_twin_does_the_same(stack: Stack, client: Client) -> None:
    """``AsyncClient`` gives the answers of ``Client``, whole and streamed."""
    async with AsyncClient(stack.keysvc_url, stack.api_key, stack.tenant, stack.model) as twin:
        answer = await twin.complete(PROMPT, max_tokens=4)
        chunks = [chunk async for chunk in twin.stream(PROMPT, max_tokens=4)]
    assert answer.choices[0].token_ids == tokens(iter(chunks)) == expected(client, PROMPT, 4)


def test_no_plain_id_crosses_the_wire(stack: Stack, make: Callable[..., Client], wire: Recorder) -> None:
    """Prompt, bias and stop ids are all encrypted; the API key stays out of the compute zone."""
    client = make()
    codec = client.lease().codec
    client.complete(PROMPT, max_tokens=1, logit_bias={5: 2.0}, stop_token_ids=[6])
    sent = httpx.Response(200, content=wire.seen[0].content).json()
    assert sent["prompt"] == codec.encrypt(PROMPT)
    assert sent["logit_bias"] == {str(codec.encrypt([5])[0]): 2.0}
    assert sent["stop_token_ids"] == codec.encrypt([6])
    assert stack.api_key not in str(wire.seen[0].headers.raw)


def test_stop_ids_and_logprobs_come_back_plain(client: Client) -> None:
    """The id that stopped an answer and the names in its logprobs are the tenant's own."""
    second = expected(client, PROMPT, 2)[1]
    choice = client.complete(PROMPT, max_tokens=9, stop_token_ids=[second], logprobs=2).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", second)
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.token_ids]
    assert all(
        name in top for name, top in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True)
    )


@pytest.mark.parametrize("prompt", [[], [[]], [[5], []], [400], [-1]])
def test_an_impossible_prompt_is_refused_here(client: Client, prompt: list[Any]) -> None:
    """An empty prompt, or an id outside the vocabulary, goes nowhere."""
    with pytest.raises(errors.BadRequest):
        client.complete(prompt)


def test_it_moves_to_the_new_version(stack: Stack, client: Client) -> None:
    """After a rotation a client with the old key answers under the new one, with no error on the way."""
    before = client.complete(PROMPT, max_tokens=4)
    stack.rotate()
    stack.tell(1, "gone")
    after = client.complete(PROMPT, max_tokens=4)
    assert after.choices[0].token_ids == expected(client, PROMPT, 4)
    assert (".v1." in before.system_fingerprint, ".v2." in after.system_fingerprint) == (True, True)


def test_streams_move_too(stack: Stack, client: Client) -> None:
    """A stream that has not begun moves like any other request."""
    client.complete(PROMPT)
    stack.rotate()
    stack.tell(1, "gone")
    assert tokens(client.stream(PROMPT, max_tokens=4)) == expected(client, PROMPT, 4)


async def test_concurrent_requests_fetch_the_new_key_once(stack: Stack) -> None:
    """Sixteen requests that find their key gone cause one release, not sixteen."""
    async with AsyncClient(stack.keysvc_url, stack.api_key, stack.tenant, stack.model) as client:
        await client.complete(PROMPT)
        stack.rotate()
        stack.tell(1, "gone")
        before = stack.releases()
        await asyncio.gather(*(client.complete([token]) for token in range(16)))
    assert stack.releases() == before + 1


def test_threads_share_one_fetch(stack: Stack, make: Callable[..., Client]) -> None:
    """The same for threads of a client that has no key yet."""
    client, failed = make(), []

    def use() -> None:
        try:
            client.complete(PROMPT)
        except Exception as error:  # noqa: BLE001 - reported below
            failed.append(error)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (failed, stack.releases()) == ([], 1)


def test_a_stream_is_not_moved_once_it_has_begun(stack: Stack, client: Client) -> None:
    """What breaks after the first token is an error: nobody gets the end of another answer."""
    stack.rotate(delay_s=0.02)
    chunks = client.stream(PROMPT, max_tokens=500)
    next(chunks)
    vars(stack.endpoint(2).engine)["fails"] = True
    with pytest.raises(errors.StreamInterrupted):
        list(chunks)


def test_leaving_a_stream_cancels_it(stack: Stack, client: Client) -> None:
    """Closing the iterator ends the generation in the engine."""
    stack.rotate(delay_s=0.02)
    chunks = client.stream(PROMPT, max_tokens=4000)
    next(chunks)
    assert stack.running(2) == 1
    chunks.close()
    stack.wait_until(lambda: stack.running(2) == 0)


def test_a_gone_key_without_successor_is_an_error(
    stack: Stack, make: Callable[..., Client], wire: Recorder
) -> None:
    """Where the key service still names the version that is gone, the client does not ask for ever."""
    client = make()
    stack.tell(1, "gone")
    with pytest.raises(errors.Gone):
        client.complete(PROMPT)
    assert len(wire.seen) == 1


def test_a_suspended_version_is_an_error(stack: Stack, client: Client) -> None:
    """403 is final: suspending is somebody's decision."""
    stack.tell(1, "suspended")
    with pytest.raises(errors.Forbidden):
        client.complete(PROMPT)


def test_without_an_active_version_there_is_no_key(stack: Stack, client: Client) -> None:
    """A revoked model gives a clear error instead of an old key."""
    stack.admin.revoke(stack.tenant, stack.model, 1)
    with pytest.raises(errors.Conflict, match="no ACTIVE"):
        client.complete(PROMPT)


def test_an_answer_from_another_key_is_discarded(make: Callable[..., Client], wire: Recorder) -> None:
    """A key id header that is not the request's is an error and is not tried again."""
    client = make()
    wire.instead = [httpx.Response(200, headers={KEY_ID_HEADER: "acme.chat.v9.0123456789abcdef"}, json={})]
    with pytest.raises(errors.KeyMismatch):
        client.complete(PROMPT)
    assert len(wire.seen) == 1


def full(seconds: int) -> httpx.Response:
    body = {"error": {"message": "the queue is full", "code": "overloaded"}}
    return httpx.Response(429, headers={"Retry-After": str(seconds)}, json=body)


def test_retry_after_is_obeyed(make: Callable[..., Client], wire: Recorder) -> None:
    """A full queue is asked again when it said, and not before."""
    waited: list[float] = []
    client = make(sleep=waited.append)
    wire.instead = [full(3), full(7)]
    assert client.complete(PROMPT, max_tokens=1).choices
    assert waited == [3, 7]


def test_waiting_ends_at_the_deadline(make: Callable[..., Client], wire: Recorder) -> None:
    """A wait that would end after the deadline is not begun."""
    waited: list[float] = []
    client = make(sleep=waited.append, retry_for=10)
    wire.instead = [full(11)]
    with pytest.raises(errors.TooManyRequests):
        client.complete(PROMPT)
    assert waited == []


def test_pauses_grow_and_are_jittered(make: Callable[..., Client], wire: Recorder) -> None:
    """Without Retry-After the pauses double up to a bound, spread by chance."""
    waited: list[float] = []
    client = make(sleep=waited.append, jitter=lambda: 0.0)
    wire.instead = [httpx.Response(503, text="down") for _ in range(8)]
    client.complete(PROMPT)
    assert waited == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 2.5])


def test_a_broken_answer_is_asked_for_again(make: Callable[..., Client], wire: Recorder) -> None:
    """A stream that breaks before its first token has delivered nothing, and is repeated."""
    client = make()
    key_id = client.lease().key_id
    wire.instead = [httpx.Response(200, headers={KEY_ID_HEADER: key_id}, text="")]
    assert tokens(client.stream(PROMPT, max_tokens=4)) == expected(client, PROMPT, 4)


def test_a_refused_token_is_renewed_once(make: Callable[..., Client], wire: Recorder) -> None:
    """401 leads to a fresh token; a second one in a row is bounded."""
    client = make()
    refused = {"error": {"message": "no", "code": "invalid_token"}}
    wire.instead = [httpx.Response(401, json=refused)]
    client.complete(PROMPT)
    wire.instead = [httpx.Response(401, json=refused) for _ in range(9)]
    with pytest.raises(errors.Unauthenticated):
        client.complete(PROMPT)
    assert len(wire.instead) == 5


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, start: float) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


async def test_nobody_waits_for_others_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key service that is silent: who waits for the fetch of another gives up by itself."""
    monkeypatch.setattr(session, "_FETCH_S", 0.2)
    silent = await asyncio.start_server(_say_nothing, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with silent:
        client = AsyncClient(url, "key", "acme", "chat", retry_for=0)
        asked = [asyncio.create_task(client.complete(PROMPT)) for _ in range(5)]
        done, fetching = await asyncio.wait(asked, timeout=5)
        assert len(fetching) == 1, "the first one still waits for its answer"
        assert all(isinstance(one.exception(), errors.Unavailable) for one in done)
        for one in fetching:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await client.close()


async def _say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


def test_a_key_is_dropped_at_the_end_of_its_lease(
    stack: Stack, make: Callable[..., Client], clock: Clock
) -> None:
    """After ``client_cache_ttl_s`` the key is fetched anew, even if nothing has changed."""
    client = make(clock=clock)
    client.complete(PROMPT)
    clock.now += 301
    client.complete(PROMPT)
    assert stack.releases() == 2


def test_a_key_is_held_through_an_outage_but_not_beyond_its_lease(
    stack: Stack, make: Callable[..., Client], clock: Clock
) -> None:
    """With the key service away, a valid key goes on serving, and an expired one never does."""
    client = make(clock=clock, retry_for=0)
    client.complete(PROMPT)
    stack.stop_keysvc()
    clock.now += 200
    assert client.complete(PROMPT).choices
    clock.now += 101
    with pytest.raises(errors.Unavailable):
        client.complete(PROMPT)


def test_a_half_spent_lease_follows_a_rotation_by_itself(
    stack: Stack, make: Callable[..., Client], clock: Clock
) -> None:
    """Renewal before the end finds the new ACTIVE version while the old one still serves."""
    client = make(clock=clock)
    client.complete(PROMPT)
    stack.rotate()
    clock.now += 151
    assert ".v2." in client.complete(PROMPT).system_fingerprint


def test_a_foreign_api_key_learns_nothing(stack: Stack) -> None:
    """Without a valid API key there is neither key nor token."""
    foreign = Client(stack.keysvc_url, "wrong", stack.tenant, stack.model)
    with foreign, pytest.raises(errors.Unauthenticated):
        foreign.complete(PROMPT)


def test_draining_is_what_the_old_version_does(stack: Stack) -> None:
    """The stack rotates as the product does: one ACTIVE version, the one before DRAINING."""
    stack.rotate()
    states = [stack.platform.get_version(stack.tenant, stack.model, version).state for version in (1, 2)]
    assert states == [State.DRAINING, State.ACTIVE]
