"""One real system for all tests here: key service, operator and Ray as processes, fake engines."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from anamorph.cli.machine.home import MODEL, Home, Running
from anamorph.cli.machine.processes import alive, marked, spawn
from anamorph.cli.machine.system import Plan, start, stop
from anamorph.cli.machine.tenants import ServedModel, keys_as, platform_keys
from anamorph.client import TokenCodec
from anamorph.errors import ServiceError
from anamorph.keys import VocabKey
from anamorph.serve.cluster.local import RayProcess
from anamorph.serve.engines.fake import continuation
from anamorph.wire.admin import KeyVersionRead, Role, RotationPolicy
from anamorph.wire.keyservice import KeyService, everything
from anamorph.wire.states import State

TENANT = "acme"
VOCAB = 64
POLICY = RotationPolicy(
    client_cache_ttl_s=1,
    longest_request_s=3,
    clock_skew_s=0,
    propagation_s=1,
    grace_s=5,
    destroy_delay_s=3600,
)
# On a busy machine everything takes long; a test waits for an event and never asserts on time.
PATIENCE_S = 180


@dataclass
class System:
    """The running system, with what tests do to it."""

    home: Home

    @property
    def url(self) -> str:
        return self.home.running().urls["keysvc"]

    @property
    def serve_url(self) -> str:
        return self.home.running().urls["serve"]

    @property
    def ray(self) -> RayProcess:
        ray = RayProcess.load(self.home.ray)
        assert ray is not None
        return ray

    def keys(self, role: Role = Role.ADMIN) -> KeyService:
        if role is Role.PLATFORM:
            return platform_keys(self.home, self.url)
        return keys_as(self.home, self.url, TENANT, role)

    def api_key(self) -> str:
        return self.home.api_key(TENANT, Role.CLIENT).read_text()

    def versions(self) -> list[KeyVersionRead]:
        with self.keys() as keys:
            found = list(everything(keys.list_versions, TENANT, MODEL))
        return sorted(found, key=lambda version: version.version)

    def active(self) -> KeyVersionRead:
        [version] = [one for one in self.versions() if one.state is State.ACTIVE]
        return version

    def rotate(self) -> int:
        """Ask for a rotation; the new version's number."""
        with self.keys() as keys:
            return keys.rotate(TENANT, MODEL).version

    def codec(self, version: int) -> TokenCodec:
        """The codec of a version that may still be released."""
        with self.keys(Role.CLIENT) as keys:
            release = keys.release(TENANT, MODEL, version, "client")
        secret = release.material()
        return TokenCodec(VocabKey(secret, release.key_id, release.vocab_kcv), VOCAB)

    def await_until(self, what: Callable[[], bool]) -> None:
        """Wait until something holds; what cannot be asked now does not hold yet."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                if what():
                    return
            except ServiceError:
                pass
            time.sleep(0.1)
        log = (self.home.logs / "operator.log").read_text()[-3000:]
        raise AssertionError(f"this did not come about; the operator's log ends:\n{log}")

    def await_state(self, version: int, *states: State) -> None:
        self.await_until(lambda: {v.version: v.state for v in self.versions()}[version] in states)

    def process(self, name: str) -> Running:
        [running] = [one for one in self.home.running().processes if one.name == name]
        return running

    def kill(self, name: str) -> list[str]:
        """kill -9 one component; return the command that starts it again."""
        process = psutil.Process(self.process(name).pid)
        command: list[str] = process.cmdline()
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        return command

    def restart(self, name: str, command: list[str]) -> None:
        state = self.home.running()
        fresh = spawn(name, command, self.home.logs / f"{name}.log", state.instance)
        others = tuple(one for one in state.processes if one.name != name)
        self.home.save(replace(state, processes=(*others, fresh)))

    def jobs(self) -> list[psutil.Process]:
        """Materialisation jobs that run."""
        return [p for p in marked(self.home.running().instance) if _is_job(p)]


def _is_job(process: psutil.Process) -> bool:
    # The operator names the job's command in its own arguments.
    try:
        return any(part.endswith("quick_materializer.py") for part in process.cmdline()[1:2])
    except psutil.NoSuchProcess:
        return False


def right_answer(codec: TokenCodec, key_id: str, prompt: list[int], tokens: int) -> list[int]:
    """What the fake engine must answer under a key, in plain ids."""
    return list(codec.decrypt(continuation(key_id, codec.encrypt(prompt), tokens, VOCAB)))


@pytest.fixture(scope="session")
def answer() -> Callable[[TokenCodec, str, list[int], int], list[int]]:
    return right_answer


def save_tokenizer(words: list[str], folder: Path) -> None:
    """A tokenizer of whole words, whose ids are their places."""
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Backend(models.WordLevel(vocabulary, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    kind: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights: the fake engine needs none."""
    folder = tmp_path_factory.mktemp("base")
    config = {"model_type": "llama", "vocab_size": VOCAB, "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer([f"w{number}" for number in range(VOCAB)], folder)
    return folder


@pytest.fixture(scope="session")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An OTLP collector that keeps every body as a file: its URL and its folder."""
    folder = tmp_path_factory.mktemp("otlp")

    class Keep(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            (folder / f"{self.path.rpartition('/')[2]}-{uuid.uuid4().hex}").write_bytes(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Keep) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


@contextmanager
def running_system(plan: Plan) -> Iterator[System]:
    """A whole system in a home of its own; no process and no file of it is left."""
    home = Home(Path(tempfile.mkdtemp(prefix="anamorph-system-")))
    home.create()
    try:
        start(home, plan, lambda _: None, lambda _: None)
        instance = home.running().instance
        yield System(home)
    finally:
        stop(home)
    assert marked(instance) == []
    shutil.rmtree(home.root)


@pytest.fixture(scope="session")
def system(base: Path, collector: tuple[str, Path]) -> Iterator[System]:
    job = Path(__file__).with_name("quick_materializer.py")
    plan = Plan(
        ServedModel(base, engine="fake", policy=POLICY),
        proxies=(),
        interval_s=0.2,
        materializer=f"{sys.executable} {job}",
        otlp_endpoint=collector[0],
    )
    with running_system(plan) as running:
        yield running


@pytest.fixture(scope="session")
def words() -> list[str]:
    """The words of the real model's tokenizer, by id: nothing else in the world says them."""
    return [f"quokka{number:02d}" for number in range(VOCAB)]


@pytest.fixture(scope="module")
def torch_system(
    words: list[str], collector: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """Nothing in place of anything: a model with weights, folded and served by torch, behind the proxy."""
    folder = tmp_path_factory.mktemp("torch-base")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    special = {"eos_token_id": 1, "bos_token_id": 0, "initializer_range": 0.4}
    LlamaForCausalLM(LlamaConfig.from_dict({**sizes, **heads, **special})).save_pretrained(folder)
    save_tokenizer(words, folder)
    plan = Plan(
        ServedModel(folder, policy=POLICY),
        tenants=(TENANT,),
        proxies=(TENANT,),
        baseline=False,
        interval_s=0.2,
        otlp_endpoint=collector[0],
    )
    with running_system(plan) as running:
        yield running


@pytest.fixture
def settled(system: System) -> System:
    """The system with one ACTIVE version and nothing on its way; whatever a test killed runs again."""
    for process in system.home.running().processes:
        assert alive(process), f"{process.name} was left dead by a test"
    ends = {State.RETIRED, State.FAILED, State.ACTIVE, State.COMPROMISED}
    system.await_until(lambda: all(version.state in ends for version in system.versions()))
    assert len([v for v in system.versions() if v.state is State.ACTIVE]) == 1
    return system
