"""Tables are data that stand up to the reference classes, and refuse what they do not cover."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from anamorph.errors import UnknownArchitecture, UnsupportedOption
from anamorph.keys.derive import KCV, MANIFEST
from anamorph.models import FAMILIES, table_for
from anamorph.models.table import Axis, Family, Tensor, View

BASIC: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {}),
    ("mistral", {"head_dim": 6, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
]


def config_of(family: str, **options: Any) -> dict[str, Any]:
    named = next(one for one in FAMILIES if one.model_type == family)
    return {"architectures": [named.architecture], "model_type": family, **BASIC, **options}


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_a_table_names_the_parameters_of_the_reference_class(family: str, options: dict[str, Any]) -> None:
    """Names and shapes of a table are exactly those of transformers' class, with every option."""
    table = table_for(config_of(family, **options))
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(family, **BASIC, **options))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {
        tensor.name: tuple(table.length(axis) for axis in tensor.axes) for tensor in table.tensors.values()
    } == expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_a_configuration_that_transformers_writes_is_covered(family: Family) -> None:
    """Every key that the class saves by itself has a rule."""
    config = AutoConfig.for_model(family.model_type, **BASIC)
    written = config.to_dict() | {"architectures": [family.architecture]}
    written.pop("sliding_window", None)
    assert table_for(written).id == family.id


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_every_view_is_one_that_its_group_has(family: Family) -> None:
    """No axis names a space or a view that does not exist."""
    table = table_for(config_of(family.model_type))
    for tensor in table.tensors.values():
        assert all(table.length(axis) > 0 for axis in tensor.axes), tensor.name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_spaces_do_not_collide_with_other_purposes_of_a_key(family: Family) -> None:
    """A space's subkey is never one that signs, tags, binds or checks."""
    taken = {MANIFEST, KCV, "plan", "base", "fold", "compare"}
    assert not taken & set(table_for(config_of(family.model_type)).spaces)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_every_norm_is_read_by_its_consumers(family: Family) -> None:
    """Each consumer of a norm reads, on exactly one dimension, the space that the norm's gain lies in."""
    table = table_for(config_of(family.model_type))
    for norm in table.norms.values():
        (out,) = table.tensors[norm.gain].axes
        for consumer in norm.consumers:
            assert table.tensors[consumer].axes.count(~out) == 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_whatever_reads_a_folded_norm_takes_its_gain(family: Family) -> None:
    """All readers of the residual behind a norm are consumers of it: none is forgotten."""
    table = table_for(config_of(family.model_type))
    readers = {
        tensor.name
        for tensor in table.tensors.values()
        if len(tensor.axes) == 2 and tensor.axes[1] == ~Axis(((View("residual"),),))
    }
    assert readers == {consumer for norm in table.norms.values() for consumer in norm.consumers}


@pytest.mark.parametrize(
    "named", [None, [], "LlamaForCausalLM", ["GPT2LMHeadModel"], ["LlamaForCausalLM", "X"]]
)
def test_an_unknown_architecture_is_refused(named: object) -> None:
    """No table, no guess: the error says which tables there are."""
    with pytest.raises(UnknownArchitecture, match="LlamaForCausalLM"):
        table_for(config_of("llama") | {"architectures": named})


def test_architecture_and_model_type_must_agree() -> None:
    """A configuration that claims two architectures is refused."""
    with pytest.raises(UnsupportedOption, match="model_type"):
        table_for(config_of("llama") | {"model_type": "mistral"})


REFUSED: list[tuple[str, str, Any]] = [
    ("llama", "some_new_option", 1),
    ("llama", "some_new_option", None),
    ("llama", "hidden_act", "softmax"),
    ("llama", "attention_bias", "yes"),
    ("llama", "attention_bias", 1),
    ("llama", "pretraining_tp", 2),
    ("llama", "rope_scaling", {"type": "su", "factor": 2.0}),
    ("llama", "rope_scaling", {"rope_type": "mrope", "mrope_section": [1, 2]}),
    ("llama", "rope_scaling", {"rope_type": "linear", "type": "yarn"}),
    ("llama", "rope_scaling", "linear"),
    ("llama", "rope_parameters", {"full_attention": {"rope_type": "default"}}),
    ("llama", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
    ("llama", "rope_parameters", {"rope_type": "proportional", "partial_rotary_factor": 1.5}),
    ("llama", "rope_parameters", {"rope_type": "proportional", "partial_rotary_factor": True}),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "rope_interleaved", True),
    ("llama", "quantization_config", {"quant_method": "gptq"}),
    ("llama", "is_encoder_decoder", True),
    ("llama", "layer_types", ["full_attention"]),
    ("llama", "sliding_window", 4),
    ("llama", "vocab_size", 0),
    ("llama", "vocab_size", "24"),
    ("llama", "vocab_size", True),
    ("llama", "hidden_size", None),
    ("mistral", "attention_bias", True),
    ("mistral", "layer_types", ["full_attention", "sliding_attention"]),
    ("qwen2", "attention_bias", True),
    ("qwen2", "layer_types", ["full_attention", "chunked_attention"]),
    ("qwen2", "use_mrope", True),
]


@pytest.mark.parametrize(("family", "name", "value"), REFUSED)
def test_an_option_outside_the_table_is_refused_by_name(family: str, name: str, value: Any) -> None:
    """Unknown keys, and known keys with values that no table covers, are named in the error."""
    with pytest.raises(UnsupportedOption, match=name):
        table_for(config_of(family, **{name: value}))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 3)])
def test_sizes_must_divide(heads: int, kv_heads: int) -> None:
    """Heads that do not divide the width or each other are refused."""
    with pytest.raises(UnsupportedOption, match="multiple"):
        table_for(config_of("llama", num_attention_heads=heads, num_key_value_heads=kv_heads))


def test_an_odd_head_is_refused() -> None:
    """RoPE turns pairs of coordinates; an odd head has one left over."""
    with pytest.raises(UnsupportedOption, match="head_dim"):
        table_for(config_of("llama", head_dim=5))


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_missing_sizes_are_never_defaulted(family: str) -> None:
    """Classes differ in what they take for a missing number of heads; a table does not guess."""
    config = config_of(family)
    del config["num_key_value_heads"]
    with pytest.raises(UnsupportedOption, match="num_key_value_heads"):
        table_for(config)


def test_the_first_llamas_have_a_key_value_head_per_query_head() -> None:
    """Llama's class reads a missing number of key-value heads as ungrouped attention."""
    config = config_of("llama")
    del config["num_key_value_heads"]
    assert table_for(config).sizes["copies"] == 1


def test_an_axis_reads_aloud() -> None:
    """Axes print as what they do, in the order in which they do it."""
    query = Axis(((View("heads", "query"), ~View("qk", "query")),))
    assert str(query + ~query) == "heads/query then ~qk/query + ~heads/query then qk/query"


def test_dual_twice_is_the_axis_itself() -> None:
    """Consuming what consumes is producing."""
    fused = Axis(((View("a"), ~View("b", "x")), (View("c"),)))
    assert ~~fused == fused
    assert ~fused != fused


def test_tables_are_frozen() -> None:
    """A table is a constant; nothing can edit one for another checkpoint."""
    with pytest.raises(AttributeError):
        FAMILIES[0].tensors[0].name = "other"  # type: ignore[misc]


def test_layers_follow_each_other() -> None:
    """Tensors come layer by layer, so that a fold draws each layer's symmetries once."""
    table = table_for(config_of("llama", attention_bias=True))
    layers = [int(name.split(".")[2]) for name in table.tensors if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert isinstance(next(iter(table.tensors.values())), Tensor)
