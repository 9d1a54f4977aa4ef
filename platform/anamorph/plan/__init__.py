"""Key × table → plan: which symmetry moves which axis. NumPy only."""

from __future__ import annotations

from anamorph.plan.build import build_plan
from anamorph.plan.draw import PROFILES, Profile
from anamorph.plan.plan import Gain, Step, TransformPlan

__all__ = ["PROFILES", "Gain", "Profile", "Step", "TransformPlan", "build_plan"]
