"""The plaintext model in the tenant's own process: what every answer is compared with.

Prompts of the demo are never sent to the plaintext baseline in the compute zone: a
prompt that is seen both in clear and encrypted gives the key away bit by bit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anamorph.wire.admin import Dtype


class PlainModel:
    """Greedy answers of the base model.

    Args:
        folder: Hugging Face folder.
        dtype: the type that the engines compute in.
    """

    def __init__(self, folder: Path, dtype: Dtype) -> None:
        # Read when torch is loaded: its threads leave the cores to the engines while they wait.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        quiet: Any = logging
        quiet.disable_progress_bar()
        self._torch: Any = torch
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = loaded.eval()

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Up to ``max_tokens`` ids; the end-of-text id, if it comes, is the last."""
        ids = self._torch.tensor([list(prompt)])
        with self._torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=0,
            )
        return [int(token) for token in out[0, len(prompt) :]]
