"""A plan says what becomes of every tensor and every option, and never shows what was drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from anamorph.errors import UnsupportedOption, WrongShape
from anamorph.keys import TenantKey
from anamorph.models import TensorInfo
from anamorph.plan import PROFILES, Profile, TransformPlan, build_plan
from anamorph.plan.plan import Coordinates

Tensors = dict[str, TensorInfo]
TIED = {"tie_word_embeddings": True}


def without_head(tensors: Tensors) -> Tensors:
    return {name: info for name, info in tensors.items() if name != "lm_head.weight"}


def step_of(plan: TransformPlan, name: str) -> Any:
    return next(step for step in plan.steps if step.name == name)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_tensor_has_one_step(
    profile: Profile, config: dict[str, Any], tensors: Tensors, key: TenantKey
) -> None:
    """A replica holds exactly the tensors of its base."""
    plan = build_plan(config, tensors, key, profile)
    assert sorted(step.name for step in plan.steps) == sorted(tensors)
    assert {step.name: step.shape for step in plan.steps} == {name: t.shape for name, t in tensors.items()}


def test_rotate_folds_every_gain(config: dict[str, Any], tensors: Tensors, key: TenantKey) -> None:
    """A folded norm leaves ones behind, and each of its readers takes its gain on the side that reads."""
    plan = build_plan(config, tensors, key, "rotate")
    norms = [step for step in plan.steps if "norm" in step.name]
    assert {step.fill for step in norms} == {1.0}
    folded = [(gain.tensor, gain.dim) for step in plan.steps for gain in step.gains]
    assert {name for name, _ in folded} == {step.name for step in norms}
    assert {dim for _, dim in folded} == {1}
    assert len(folded) == 2 * 5 + 1


def test_permute_moves_gains_along(config: dict[str, Any], tensors: Tensors, key: TenantKey) -> None:
    """Under ``permute`` nothing is folded and nothing is filled."""
    plan = build_plan(config, tensors, key, "permute")
    assert not any(step.gains or step.fill is not None for step in plan.steps)


def test_a_tied_head_is_added_by_rotate_only(
    config: dict[str, Any], tensors: Tensors, key: TenantKey
) -> None:
    """The untied head is read from the embedding, takes the last gain, and is recorded as added."""
    rotate = build_plan(config | TIED, without_head(tensors), key, "rotate")
    head = step_of(rotate, "lm_head.weight")
    assert rotate.added == ("lm_head.weight",)
    assert (head.source, head.gains[0].tensor) == ("model.embed_tokens.weight", "model.norm.weight")
    assert rotate.config["tie_word_embeddings"] is False
    permute = build_plan(config | TIED, without_head(tensors), key, "permute")
    assert permute.added == ()
    assert permute.config["tie_word_embeddings"] is True


def test_a_stored_tied_head_is_a_duplicate(config: dict[str, Any], tensors: Tensors, key: TenantKey) -> None:
    """A head that is stored in spite of the tie has to be compared by whoever can read it."""
    plan = build_plan(config | TIED, tensors, key, "permute")
    assert plan.duplicates == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_canonical_plan_depends_on_nothing_drawn(
    config: dict[str, Any], tensors: Tensors, key: TenantKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are made without drawing a single symmetry, so that they are equal on every machine."""
    plan = build_plan(config, tensors, key)

    def refuse(*_: object) -> None:
        raise AssertionError("a symmetry was drawn")

    monkeypatch.setattr(Coordinates, "_draw", refuse)
    assert json.loads(plan.canonical())["format"] == "anamorph-plan/1"


def test_the_canonical_plan_tells_plans_apart(
    config: dict[str, Any], tensors: Tensors, key: TenantKey
) -> None:
    """Another profile, key, option or type is another plan; the same is the same."""
    other = TenantKey.from_root(bytes(32), "acme", "tiny", 1)
    wide = {name: TensorInfo("F32", info.shape) for name, info in tensors.items()}
    plans = [
        build_plan(config, tensors, key),
        build_plan(config, tensors, key, "permute"),
        build_plan(config, tensors, other),
        build_plan(config | {"rms_norm_eps": 1e-3}, tensors, key),
        build_plan(config, wide, key),
        build_plan(config, tensors, key, generation_config={"top_k": 3}),
    ]
    assert len({plan.canonical() for plan in plans}) == len(plans)
    assert build_plan(config, tensors, key).canonical() == plans[0].canonical()


def test_a_plan_does_not_show_its_key(config: dict[str, Any], tensors: Tensors, key: TenantKey) -> None:
    """Neither repr nor canonical form holds a subkey, in raw, hexadecimal or decimal digits."""
    plan = build_plan(config, tensors, key)
    shown = repr(plan) + plan.canonical().decode()
    for space in ("residual", "vocab", "plan"):
        assert key.subkey(space).hex() not in shown
        assert repr(key.subkey(space)) not in shown
    assert "Coordinates" not in shown


def test_producers_and_consumers_meet(config: dict[str, Any], tensors: Tensors, key: TenantKey) -> None:
    """A random linear map through the residual is unchanged: W₂ g⁻¹ · g W₁ = W₂ W₁."""
    plan = build_plan(config, tensors, key)
    random = np.random.default_rng(0)
    down, gate = random.normal(size=(16, 20)), random.normal(size=(20, 16))
    out = step_of(plan, "model.layers.0.mlp.down_proj.weight").axes[0]
    into = step_of(plan, "model.layers.1.mlp.gate_proj.weight").axes[1]
    moved = plan.action(into).act(gate, 1) @ plan.action(out).act(down, 0)
    np.testing.assert_allclose(moved, gate @ down, atol=1e-12)


def test_layers_do_not_share_symmetries(config: dict[str, Any], tensors: Tensors, key: TenantKey) -> None:
    """Each layer's inner spaces have draws of their own; the residual has one for all."""
    plan = build_plan(config, tensors, key)
    rows = [plan.action(step_of(plan, f"model.layers.{n}.mlp.up_proj.weight").axes[0]) for n in (0, 1)]
    columns = [plan.action(step_of(plan, f"model.layers.{n}.mlp.up_proj.weight").axes[1]) for n in (0, 1)]
    assert not np.array_equal(rows[0].matrix(), rows[1].matrix())
    np.testing.assert_array_equal(columns[0].matrix(), columns[1].matrix())


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "I64", "BOOL"])
def test_types_that_cannot_be_folded_are_refused(
    dtype: str, config: dict[str, Any], tensors: Tensors, key: TenantKey
) -> None:
    """Integers and eight-bit floats are not weights that can be multiplied."""
    tensors["model.norm.weight"] = TensorInfo(dtype, (16,))
    with pytest.raises(WrongShape, match=dtype):
        build_plan(config, tensors, key)


def test_an_unknown_profile_is_refused(config: dict[str, Any], tensors: Tensors, key: TenantKey) -> None:
    """There are two profiles, and the error names them."""
    with pytest.raises(UnsupportedOption, match="permute, rotate"):
        build_plan(config, tensors, key, "scramble")  # type: ignore[arg-type]


def test_planning_needs_numpy_only() -> None:
    """No torch, no transformers, no safetensors is imported to plan."""
    code = "import sys, anamorph.plan; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "safetensors", "ray"} & set(loaded.split())
