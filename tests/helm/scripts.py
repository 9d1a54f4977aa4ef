"""Scripts that the chart puts into ConfigMaps, as modules."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from tests.helm.chart import CHART


def script(name: str) -> Any:
    """The module of one script; it is not started."""
    spec = importlib.util.spec_from_file_location(name, CHART / "files" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
