"""Configurations of a replica: token ids moved, names of the base and code left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anamorph.errors import UnsupportedOption
from anamorph.models.options import Rule
from anamorph.plan.symmetry import Indices


def rewrite(config: Mapping[str, Any], rules: Mapping[str, Rule], image: Indices) -> dict[str, Any]:
    """``config`` as it stands in the replica; ``image[plain] == encrypted``.

    Raises:
        UnsupportedOption: an option without a rule, a value that its rule refuses, or
            a token id outside the vocabulary; names the option.
    """
    rewritten: dict[str, Any] = {}
    for name, value in config.items():
        if name not in rules:
            raise UnsupportedOption(f"option '{name}' is unknown")
        rule = rules[name]
        rule.check(name, value)
        if rule.fate == "move":
            rewritten[name] = _biases(value, image) if name == "sequence_bias" else _moved(name, value, image)
        elif rule.fate == "keep":
            rewritten[name] = value
    return rewritten


def _moved(name: str, value: Any, image: Indices) -> Any:
    """Token ids, at any depth of lists, as the replica knows them."""
    if value is None:
        return None
    if isinstance(value, list):
        return [_moved(name, one, image) for one in value]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(image):
        raise UnsupportedOption(f"option '{name}' holds something that is no token id of this vocabulary")
    return int(image[value])


def _biases(value: Any, image: Indices) -> Any:
    """``sequence_bias`` in JSON: a list of [[token ids], bias]."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, list) and len(one) == 2 for one in value):
        raise UnsupportedOption("option 'sequence_bias': a list of [token ids, bias] is expected")
    return [[_moved("sequence_bias", ids, image), bias] for ids, bias in value]
