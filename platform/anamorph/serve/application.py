"""``anamorph.serve.application:build``: what Ray imports for one (tenant, model, version)."""

from __future__ import annotations

from typing import Any

from anamorph.serve.deployment import deployment
from anamorph.wire.serving import EngineSettings


def build(args: dict[str, Any]) -> Any:
    """The Ray Serve application of ``args``, which are ``EngineSettings``.

    Raises:
        pydantic.ValidationError: unknown or malformed settings; the application fails to deploy.
    """
    settings = EngineSettings.model_validate(args)
    return deployment(settings).bind(settings.model_dump(mode="json"))
