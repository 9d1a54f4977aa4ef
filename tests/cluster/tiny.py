"""A base that folds, loads and answers in seconds, and the answer that it gives in clear."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from anamorph.errors import SetupError

CONTEXT = 512
CONFIG = {
    "vocab_size": 49152,  # SmolLM2's, whose tokenizer it has
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# An answer is judged by its text: no token may be a matter of rounding, each must be plain text.
_LEAST_LEAD, _MOST_SEEDS = 0.01, 2000


def make(folder: Path, tokenizer: Path, question: str, length: int) -> None:
    """Write a random Llama in float32 with SmolLM2's tokenizer, whose answer can be compared.

    Args:
        folder: new.
        tokenizer: folder with the files of ``TOKENIZER``.
        length: most tokens of the answer.

    Raises:
        SetupError: no such model was found.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words: Any = AutoTokenizer.from_pretrained(tokenizer)
    ids = asked(words, question)
    for seed in range(_MOST_SEEDS):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(LlamaConfig.from_dict(CONFIG))
        told = takewhile(lambda one: good(*one, words), islice(greedy(model, ids), length))
        if len(list(told)) == length:
            model.save_pretrained(folder)
            for name in TOKENIZER:
                shutil.copy(tokenizer / name, folder)
            return
    raise SetupError(f"none of {_MOST_SEEDS} random models gives an answer that can be compared")


def answer(folder: Path, question: str, length: int) -> str:
    """What the base of a folder answers greedily, computed in clear; at most ``length`` tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    words: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return text([token for token, _ in islice(greedy(model, asked(words, question)), length)], words)


def asked(tokenizer: Any, question: str) -> list[int]:
    """Ids of a conversation with one question, up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids


def greedy(model: Any, prompt: list[int]) -> Iterator[tuple[int, float]]:
    """Token by token the likeliest, the end's not given; and by how much its logit leads the next one's."""
    import torch

    ids = list(prompt)
    while True:
        with torch.inference_mode():
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        token, lead = int(best.indices[0]), float(best.values[0] - best.values[1])
        if token == CONFIG["eos_token_id"]:
            return
        yield token, lead
        ids.append(token)


def good(token: int, lead: float, tokenizer: Any) -> bool:
    """Whether a token of an answer can be compared by its text."""
    said = text([token], tokenizer)
    return lead >= _LEAST_LEAD and said.isascii() and said.isprintable() and bool(said)


def text(tokens: list[int], tokenizer: Any) -> str:
    """What a proxy's client reads of them."""
    said: str = tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
    return said
