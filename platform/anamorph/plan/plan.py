"""A plan: everything that turns one base into one replica, before a byte is read.

A plan is data (steps, axes, configurations) and a source of symmetries that is
drawn from only when a step needs it. It needs NumPy only; ``checkpoint`` carries it out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from anamorph.keys import Stream, TenantKey
from anamorph.models import Table
from anamorph.models.table import Axis, Space, View
from anamorph.plan.draw import Profile, Views, draw
from anamorph.plan.symmetry import Indices, Symmetry, compose, stack

FORMAT = "anamorph-plan/1"

# Enough for the spaces of a few layers at once: steps go through a model layer by layer.
CACHED_SPACES = 32
CACHED_ACTIONS = 32


@dataclass(frozen=True)
class Gain:
    """A norm's gain that is folded into dimension ``dim``: values of ``tensor``, plus ``offset``."""

    dim: int
    tensor: str
    offset: float = 0.0


@dataclass(frozen=True)
class Step:
    """How one tensor of the replica is made.

    Read ``source``, multiply dimension ``gain.dim`` by every gain, move each dimension
    by the symmetry of its axis, store as ``dtype``. With ``fill``, nothing is read: the
    tensor is that constant.
    """

    name: str
    source: str
    axes: tuple[Axis, ...]
    shape: tuple[int, ...]
    dtype: str
    gains: tuple[Gain, ...] = ()
    fill: float | None = None


class Coordinates:
    """The symmetries of one key over one table, drawn when asked for and kept for a while."""

    def __init__(self, table: Table, key: TenantKey, profile: Profile) -> None:
        self._table = table
        self._subkey: Callable[[str], bytes] = key.subkey
        self._vocab = key.vocab_key()
        self._profile = profile
        self._views = lru_cache(maxsize=CACHED_SPACES)(self._draw)
        self.action = lru_cache(maxsize=CACHED_ACTIONS)(self._action)

    def image(self, size: int) -> Indices:
        """The vocabulary's permutation: ``image[plain] == encrypted``. Shape (size,)."""
        return self._vocab.permutation(size)

    def _draw(self, space: str) -> Views:
        group = self._table.spaces[space].group
        return draw(group, self._table.sizes, Stream(self._subkey(space)), self._profile)

    def _action(self, axis: Axis) -> Symmetry:
        return stack(tuple(compose(tuple(map(self._seen, part))) for part in axis.parts))

    def _seen(self, view: View) -> Symmetry:
        symmetry = self._views(view.space)[view.name]
        return symmetry.dual() if view.dual else symmetry


@dataclass(frozen=True)
class TransformPlan:
    """One base, one key, one profile, and what becomes of every tensor.

    Args:
        steps: one per tensor of the replica, in the order of the table.
        config, generation_config: as they stand in the replica.
        added: tensors that the base does not store (an untied head).
        duplicates: stored tensors that must equal another, and are left out.
    """

    table_id: str
    profile: Profile
    key_id: str
    sizes: Mapping[str, int]
    spaces: Mapping[str, Space]
    steps: tuple[Step, ...]
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    added: tuple[str, ...]
    duplicates: Mapping[str, str]
    coordinates: Coordinates = field(repr=False, compare=False)

    def action(self, axis: Axis) -> Symmetry:
        """The symmetry that moves a dimension with this axis."""
        return self.coordinates.action(axis)

    def canonical(self) -> bytes:
        """The plan as canonical JSON: what it does, and no number drawn from the key.

        The same on every machine; a replica's plan tag is a keyed hash of it.
        """
        content = {
            "format": FORMAT,
            "table": self.table_id,
            "profile": self.profile,
            "key_id": self.key_id,
            "sizes": dict(self.sizes),
            "spaces": {space.name: _group(space) for space in self.spaces.values()},
            "steps": [_step(step) for step in self.steps],
            "config": self.config,
            "generation_config": self.generation_config,
            "added": self.added,
            "duplicates": dict(self.duplicates),
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _group(space: Space) -> dict[str, Any]:
    return {"group": type(space.group).__name__, **dataclasses.asdict(space.group)}


def _step(step: Step) -> dict[str, Any]:
    return {**dataclasses.asdict(step), "axes": list(map(str, step.axes))}
