"""What a replica's own configuration files say to an engine that does not read them itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anamorph.errors import SetupError, UnsupportedOption

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# Options of generation_config.json that change which token comes next, and values that leave it as it is.
# Temperature, top-k and top-p are not here: they are a request's own, never the folder's.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "suppress_tokens": (),
    "watermarking_config": (),
}


def read(folder: Path, name: str) -> dict[str, Any]:
    """One of the two files; empty for a model without generation_config.json, which it need not have.

    Raises:
        SetupError: config.json is missing, or the file is not a JSON object.
    """
    path = folder / name
    if not path.exists():
        if name == CONFIG:
            raise SetupError(f"the folder holds no {name}; a model's folder needs one")
        return {}
    try:
        fields = json.loads(path.read_text())
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise SetupError(f"{name} is not a JSON object")
    return fields


def refuse_code(folder: Path) -> None:
    """Refuse a folder that names code of its own.

    Raises:
        UnsupportedOption: ``auto_map`` stands in one of the files.
    """
    for name in (CONFIG, GENERATION_CONFIG):
        if "auto_map" in read(folder, name):
            raise UnsupportedOption(f"{name} names code to run (auto_map); it is refused")


def refuse_decoding_rules(folder: Path) -> None:
    """Refuse a folder whose own rules change greedy decoding: it would not be served as it says.

    Raises:
        UnsupportedOption: names the rules.
    """
    fields = read(folder, GENERATION_CONFIG)
    rules = [name for name, neutral in _NEUTRAL.items() if fields.get(name) not in (None, *neutral)]
    if rules:
        raise UnsupportedOption(f"generation_config.json asks for {', '.join(rules)}")


def eos_ids(folder: Path) -> frozenset[int]:
    """The model's end-of-text ids: of generation_config.json, else of config.json."""
    for name in (GENERATION_CONFIG, CONFIG):
        value = read(folder, name).get("eos_token_id")
        if value is not None:
            return frozenset([value] if isinstance(value, int) else value)
    return frozenset()
