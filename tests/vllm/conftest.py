"""An encrypted SmolLM2 and what stock transformers answers in clear; servers that start once per module."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.serve.conftest import Issuer
from tests.servers.vllm_process import VllmProcess, endpoint, vllm_python
from transformers import AutoModelForCausalLM, AutoTokenizer

import anamorph
from anamorph.cli.machine.model import default_model
from anamorph.keys import TenantKey

ROOT = Path(__file__).parents[2]
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEXTS = (
    CHAT.format("What is the capital of France?"),
    CHAT.format("Name three colours."),
    "Once upon a time",
    (ROOT / "LICENSE").read_text()[:1500],
)


@dataclass(frozen=True)
class Reference:
    """The plaintext model under stock transformers in float32, and one tenant's coordinates."""

    base: Path
    replica: Path
    key: TenantKey
    manifest_sha256: str

    @cached_property
    def model(self) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return model.eval()

    @cached_property
    def image(self) -> np.ndarray[Any, Any]:
        return self.key.vocab_key().permutation(int(self.model.config.vocab_size))

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Plain ids of ``TEXTS``."""
        tokenizer: Any = AutoTokenizer.from_pretrained(self.base)
        return [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]

    def encrypt(self, ids: list[int]) -> list[int]:
        return [int(token) for token in self.image[ids]]

    def greedy(self, prompt: list[int], n: int, **options: Any) -> list[int]:
        """Plain ids that stock ``generate`` answers."""
        out = self.model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, **options)
        return [int(token) for token in out[0, len(prompt) :]]

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Of every next token after ``ids``, by plain id; (vocabulary,) float32."""
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0, -1]
        return torch.Tensor(logits.log_softmax(-1))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # beside vLLM's own, threads that wait for each other cost more than they bring


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    vllm_python()  # skips before anything is made
    base = default_model("float32", lambda _: None)
    key = TenantKey.from_root(bytes(range(32)), "acme", "smol", 1)
    replica = tmp_path_factory.mktemp("replicas") / "v1"
    manifest = anamorph.fold(base, replica, key)
    return Reference(base, replica, key, manifest.sha256())


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    return Issuer()


Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def settings(reference: Reference) -> Settings:
    """``EngineSettings`` of the encrypted SmolLM2 under vLLM, as the operator writes them."""

    def build(**changes: Any) -> dict[str, Any]:
        fields = {
            "tenant": "acme",
            "model": "smol",
            "version": 1,
            "replica": str(reference.replica),
            "key_id": reference.key.id,
            "public_key": b64encode(reference.key.public_key()).decode(),
            "manifest_sha256": reference.manifest_sha256,
            "engine": "vllm",
            "context_length": 1024,
        }
        return {**fields, **changes}

    return build


Serve = Callable[[dict[str, Any]], VllmProcess]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory, issuer: Issuer) -> Iterator[Serve]:
    """Start an endpoint of our engine; its processes have ended when the module has."""
    started: list[VllmProcess] = []

    def start(settings: dict[str, Any]) -> VllmProcess:
        jwks = [key.model_dump() for key in issuer.jwks]
        started.append(endpoint(tmp_path_factory.mktemp("endpoint"), settings, jwks))
        return started[-1]

    yield start
    for one in started:
        one.kill()
