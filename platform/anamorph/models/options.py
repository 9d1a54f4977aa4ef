"""What may stand in a configuration, and what becomes of it in a replica.

Every key of ``config.json`` and ``generation_config.json`` needs a rule; one without
is refused by name. A rule carries a value over, leaves it out of the replica, or
moves the token ids in it, and says which values the tables are right for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from anamorph.errors import UnsupportedOption


@dataclass(frozen=True)
class Rule:
    """What becomes of an option, and a check that says why its value is refused (or ``None``)."""

    fate: Literal["keep", "drop", "move"]
    complaint: Callable[[Any], str | None] = lambda _: None

    def check(self, name: str, value: Any) -> None:
        """Refuse a value outside what the table covers.

        Raises:
            UnsupportedOption: names the option.
        """
        reason = self.complaint(value)
        if reason:
            raise UnsupportedOption(f"option '{name}': {reason}")


KEEP = Rule("keep")
DROP = Rule("drop")
MOVE = Rule("move")


def only(*allowed: Any, fate: Literal["keep", "drop"] = "keep") -> Rule:
    """A rule for the values listed; True and 1 are told apart."""

    def complaint(value: Any) -> str | None:
        if any(value == one and type(value) is type(one) for one in allowed):
            return None
        return f"{value!r} is not supported; supported: {', '.join(map(repr, allowed))}"

    return Rule(fate, complaint)


def each(*allowed: Any) -> Rule:
    """A rule for lists (or null) of the values listed."""

    def complaint(value: Any) -> str | None:
        if value is None or (isinstance(value, list) and all(one in allowed for one in value)):
            return None
        return f"{value!r} is not supported; supported are lists of {', '.join(map(repr, allowed))}"

    return Rule("keep", complaint)


FLAG = only(True, False)
UNSET = only(None, False, fate="drop")

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
_ROPE_FIELDS = frozenset(
    {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"}
    | {"beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor"}
    | {"mscale", "mscale_all_dim", "truncate", "partial_rotary_factor"}
)


def _rope_complaint(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        return "an object or null is expected"
    unknown = sorted(set(value) - _ROPE_FIELDS)
    if unknown:
        return f"'{unknown[0]}' is not supported"
    kind = value.get("rope_type", value.get("type", "default"))
    if kind not in ROPE_TYPES or value.get("type", kind) != kind:
        return f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
    share = value.get("partial_rotary_factor")
    return _share_complaint(share) if kind == "proportional" else _partial_complaint(share)


def _share_complaint(value: Any) -> str | None:
    # Pairs beyond the share have frequency 0: whatever commutes with a rotation commutes with none.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if value is None or (number and 0 <= value <= 1) else "partial_rotary_factor is from 0 to 1"


def _partial_complaint(value: Any) -> str | None:
    # Llama's rotary embedding has no un-rotated part: a factor below 1 fails in the reference class too.
    return None if value is None or value == 1 else f"partial_rotary_factor {value!r} is not supported"


ROPE = Rule("keep", _rope_complaint)
PARTIAL_ROTARY = Rule("keep", _partial_complaint)

# An elementwise function on the gate commutes with every permutation of neurons.
ACTIVATION = only("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu")


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


TOKEN_IDS = _rules(
    MOVE,
    """bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
    bad_words_ids force_words_ids sequence_bias""",
)

# Generation settings are numbers and switches that say nothing about token ids …
GENERATION: dict[str, Rule] = {
    **TOKEN_IDS,
    **_rules(
        KEEP,
        """max_length max_new_tokens min_length min_new_tokens early_stopping max_time do_sample num_beams
        num_beam_groups num_return_sequences use_cache cache_implementation max_cache_len temperature top_k
        top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty
        encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size renormalize_logits
        remove_invalid_values exponential_decay_length_penalty guidance_scale diversity_penalty low_memory
        output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
        prefill_chunk_size disable_compile prompt_lookup_num_tokens max_matching_ngram_size is_assistant
        num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
        assistant_lookbehind target_lookbehind assistant_ensemble_weight transformers_version
        _from_model_config""",
    ),
    # … but for these: they read text, the order of ids, hidden states before the head, or unknown objects.
    **_rules(
        UNSET,
        """stop_strings token_healing watermarking_config constraints forced_decoder_ids dola_layers
        penalty_alpha assistant_early_exit use_mtp speculation_type compile_config cache_config
        continuous_batching_config""",
    ),
}

# What any configuration may hold whatever its family.
COMMON: dict[str, Rule] = {
    **GENERATION,
    **_rules(
        KEEP,
        """architectures model_type dtype torch_dtype transformers_version use_cache initializer_range
        max_position_embeddings
        return_dict chunk_size_feed_forward""",
    ),
    # Whatever names the base, runs code, or belongs to another runtime.
    **_rules(
        DROP,
        """_name_or_path _model_name_or_path name_or_path _commit_hash auto_map custom_pipelines
        _attn_implementation _attn_implementation_autoset attn_implementation tokenizer_class
        transformers.js_config task_specific_params finetuning_task problem_type id2label label2id
        torchscript tf_legacy_loss use_bfloat16 pruned_heads""",
    ),
    "tie_word_embeddings": FLAG,
    "is_decoder": only(True, False, fate="drop"),
    "is_encoder_decoder": only(False),
    "add_cross_attention": only(False, fate="drop"),
    "cross_attention_hidden_size": UNSET,
    "tie_encoder_decoder": UNSET,
    "quantization_config": UNSET,
    "compression_config": UNSET,
}
