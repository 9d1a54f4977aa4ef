"""Fixtures of the tenant's side: tokenizers, a key, and running proxies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI
from tests.client.stack import Server, Stack, real_engine, running_stack, wait_until
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from anamorph.cli.smollm2 import FOLDER, default_cache
from anamorph.client import Client
from anamorph.client.proxy import ProxySettings, create_app
from anamorph.client.tokenizer import Tokenizer
from anamorph.keys import TenantKey

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Ein schöner Tag über den Dächern von Köln.",
    "你好，世界。今天天气很好。",
    "Emoji such as 👋🌍 and 👩‍👩‍👧 are several bytes each.",
    "def add(a, b):\n    return a + b\n",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 400 ids with a chat template, as a Hugging Face folder."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    """The small tokenizer, loaded."""
    return Tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """SmolLM2's own tokenizer, where its folder has been made on this machine."""
    folder = default_cache() / FOLDER
    if not folder.is_dir():
        pytest.skip("SmolLM2 is not on this machine; `make demo` fetches it")
    return Tokenizer(folder)


@pytest.fixture
def key() -> TenantKey:
    """A key of known bytes."""
    return TenantKey.from_root(bytes(range(32)), "acme", "chat", 1)


@pytest.fixture
def stack(tmp_path: Path, tokenizer: Tokenizer) -> Iterator[Stack]:
    """A stack of the test's own, to rotate, revoke and break."""
    with running_stack(tmp_path, tokenizer) as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    """A client of the stack."""
    with Client(stack.keysvc_url, stack.api_key, stack.tenant, stack.model) as made:
        yield made


@dataclass(frozen=True)
class System:
    """A running proxy, on whatever stands behind it."""

    url: str
    model: str
    tokenizer: Tokenizer
    in_flight: Callable[[], int]

    def openai(self, **options: Any) -> OpenAI:
        """The unmodified client of OpenAI."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, **options)

    def aopenai(self) -> AsyncOpenAI:
        """Its asynchronous twin."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    wait_until = staticmethod(wait_until)


def settings_for(stack: Stack, folder: Path, key_file: Path) -> ProxySettings:
    """Settings of a proxy before a stack."""
    key_file.write_text(stack.api_key + "\n")
    models = {stack.model: folder}
    return ProxySettings(stack.keysvc_url, stack.tenant, key_file, models, retry_for=5)


@pytest.fixture
def settings(stack: Stack, tokenizer_folder: Path, tmp_path: Path) -> ProxySettings:
    """Settings of a proxy before the test's own stack."""
    return settings_for(stack, tokenizer_folder, tmp_path / "api.key")


@pytest.fixture(scope="session")
def serve() -> type[Server]:
    """How to serve an application on a real socket."""
    return Server


@pytest.fixture
def proxy(settings: ProxySettings) -> Iterator[str]:
    """URL of a running proxy before the stack."""
    with Server(create_app(settings)) as running:
        yield running.url


@contextmanager
def running_system(folder: Path, tokenizer: Tokenizer, **options: Any) -> Iterator[System]:
    """A proxy before a stack that no test changes."""
    with ExitStack() as stays:
        stack = stays.enter_context(running_stack(folder, tokenizer, **options))
        settings = settings_for(stack, tokenizer.folder, folder / "api.key")
        proxy = stays.enter_context(Server(create_app(settings)))
        yield System(proxy.url, stack.model, tokenizer, lambda: stack.running(1))


@pytest.fixture(scope="session")
def fake_system(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Before an engine without a model, slow enough to be left."""
    with running_system(tmp_path_factory.mktemp("fake"), tokenizer, delay_s=0.002) as system:
        yield system


@pytest.fixture(scope="session")
def real_system(smollm2: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Before SmolLM2 itself, encrypted and on the torch engine."""
    folder = tmp_path_factory.mktemp("real")
    engine = {"make_engine": real_engine, "base": smollm2.folder, "out": folder / "replica"}
    with running_system(folder, smollm2, **engine) as system:
        yield system


@pytest.fixture(scope="session")
def deployed_system(smollm2: Tokenizer) -> Iterator[System]:
    """The whole product as `anamorph up` starts it: key service, operator, Ray, SmolLM2."""
    # Ray's sockets lie below the home, and the names of sockets are limited.
    with tempfile.TemporaryDirectory(prefix="an-") as folder, ExitStack() as stays:
        stays.callback(anamorph, "down", "--home", folder)
        anamorph("up", "--home", folder)
        urls = json.loads((Path(folder) / "state.json").read_text())["urls"]
        endpoint = f"{urls['serve']}/acme/smollm2/v1"
        proxy = urls["proxy-acme"].removesuffix("/v1")
        yield System(proxy, "smollm2", smollm2, lambda: running_sequences(endpoint))


def anamorph(*arguments: str) -> None:
    """Run the command line as a user would."""
    done = subprocess.run(
        [sys.executable, "-m", "anamorph.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def running_sequences(endpoint: str) -> int:
    """Sequences in the engine's batch, as its metrics page tells."""
    page = httpx.get(f"{endpoint}/metrics").text
    counted = re.findall(r"^anamorph_engine_sequences_running\S* (\S+)$", page, re.MULTILINE)
    return int(float(counted[0]))


REAL = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]
SYSTEMS = ["fake_system", *(pytest.param(name, marks=REAL) for name in ("real_system", "deployed_system"))]


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> System:
    """A running proxy: before the fake engine, before a real model, and before the whole product on Ray."""
    chosen: System = request.getfixturevalue(request.param)
    return chosen
