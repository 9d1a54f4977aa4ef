"""What a trial serves, with the right answers to what is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchmarks.trial.clients import Expected, Question, fake_answer, random_question
from benchmarks.trial.stand import CONTEXT, VOCAB, fake_model, write_tokenizer

from anamorph.cli.demo.plain import PlainModel
from anamorph.cli.machine.tenants import ServedModel
from anamorph.client import TokenCodec
from anamorph.wire.admin import ModelCreate, RotationPolicy, Serving

TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a",
    "The three primary colours are",
    "In the morning I like to drink",
    "The largest planet of the solar system is",
)
SMOLLM2_TOKENS = 12
SHARDED_TOKENS = 24


@dataclass(frozen=True)
class Subject:
    """A served model, questions to it, and their answers."""

    served: ServedModel
    questions: Callable[[np.random.Generator], Question]
    expected: Expected


def fake_subject(folder: Path, policy: RotationPolicy, delay_ms: float, tokens: tuple[int, int]) -> Subject:
    """The fake engine, asked at random."""
    questions = random_question(VOCAB, (8, 64), tokens)
    return Subject(fake_model(folder / "fake", delay_ms, policy), questions, fake_answer(VOCAB))


@dataclass(frozen=True)
class ShardedModel(ServedModel):
    """A model whose replica has two tensor-parallel ranks."""

    def record(self) -> ModelCreate:
        """As any model's, with its ranks."""
        return super().record().model_copy(update={"serving": Serving(tensor_parallel=2)})


def sharded_subject(folder: Path, policy: RotationPolicy) -> Subject:
    """A small random Llama on two ranks, in float32; the plaintext model gives the greedy answers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": CONTEXT}
    # Weights so large that no two tokens are almost equally likely.
    config = LlamaConfig.from_dict({**sizes, **heads, "initializer_range": 0.4})
    LlamaForCausalLM(config).save_pretrained(folder / "sharded")
    write_tokenizer(folder / "sharded")
    served = ShardedModel(folder / "sharded", policy=policy)
    return _known_answers(served, PlainModel(served.folder, "float32"), _random_prompts(), SHARDED_TOKENS)


def _random_prompts() -> list[tuple[int, ...]]:
    source = np.random.default_rng(3)
    return [tuple(source.integers(3, VOCAB, length).tolist()) for length in (3, 9, 20, 40, 70, 100)]


def smollm2_subject(policy: RotationPolicy) -> Subject:
    """SmolLM2 in float32, asked six beginnings of sentences; the plaintext model gives the greedy answers."""
    from anamorph.cli.machine.model import default_model
    from anamorph.client.tokenizer import Tokenizer

    folder = default_model("float32", print)
    tokenizer = Tokenizer(folder)
    prompts = [tuple(tokenizer.encode(text)) for text in TEXTS]
    served = ServedModel(folder, policy=policy)
    return _known_answers(served, PlainModel(folder, "float32"), prompts, SMOLLM2_TOKENS)


def _known_answers(
    served: ServedModel, plain: PlainModel, prompts: Sequence[tuple[int, ...]], tokens: int
) -> Subject:
    """A few prompts with the greedy answers that the plaintext model gives."""
    asked = [Question(prompt, tokens) for prompt in prompts]
    answers = {question: plain.greedy(question.prompt, tokens) for question in asked}

    def expected(codec: TokenCodec, question: Question) -> Sequence[int]:  # noqa: ARG001 - the same under any key
        return answers[question]

    def questions(source: np.random.Generator) -> Question:
        return asked[int(source.integers(len(asked)))]

    return Subject(served, questions, expected)
