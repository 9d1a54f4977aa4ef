"""Ray Serve through its dashboard's REST API: read all applications, write all applications.

A write is declarative: what is not in the list is deleted. So there is one writer,
and it always sends everything.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from anamorph import errors
from anamorph.wire.serving import (
    APP_IMPORT_PATH,
    DOOR_IMPORT_PATH,
    DoorState,
    EngineSettings,
    KeyState,
)
from anamorph_operator.applications import DOOR
from anamorph_operator.state import Application, AppStatus, Deployed

_PATH = "/api/serve/applications/"


class RayServe:
    """The Serve configuration of one cluster.

    Args:
        http: client with the dashboard's base URL, its token and the caller's timeouts.
        serve_url: where Serve listens; Ray warns when a write names another place.
    """

    def __init__(self, http: httpx.AsyncClient, serve_url: str) -> None:
        self._http = http
        place = urlsplit(serve_url)
        self._http_options = {"host": place.hostname, "port": place.port}

    async def read(self) -> dict[str, Deployed]:
        """Every application by name.

        Raises:
            Unavailable: the dashboard or Serve's controller does not answer.
        """
        body = await self._call("GET")
        return {name: _deployed(name, details) for name, details in body["applications"].items()}

    async def write(self, applications: tuple[Application, ...]) -> None:
        """Replace the whole list.

        Raises:
            Unavailable: the dashboard does not answer.
            BadRequest: Ray refuses the list.
        """
        body = {
            "proxy_location": "HeadOnly",
            "http_options": self._http_options,
            "applications": [as_config(application) for application in applications],
        }
        await self._call("PUT", body)

    async def _call(self, method: str, body: dict[str, Any] | None = None) -> Any:
        try:
            response = await self._http.request(method, _PATH, json=body)
        except httpx.TransportError as error:
            raise errors.Unavailable(f"Ray's dashboard does not answer: {type(error).__name__}") from error
        if response.status_code == 400:
            raise errors.BadRequest(f"Ray Serve refuses the applications: {response.text[:500]}")
        if response.status_code != 200:
            raise errors.Unavailable(f"Ray's dashboard answers {response.status_code}")
        return response.json() if method == "GET" else None


def as_config(application: Application) -> dict[str, Any]:
    """One entry of the list, as Ray's schema wants it.

    Only arguments that were set are written: a release that adds a field with a
    default must not change, and thereby replace, the applications that stand.
    """
    settings = application.settings
    return {
        "name": application.name,
        "route_prefix": application.route,
        "import_path": DOOR_IMPORT_PATH if settings is None else APP_IMPORT_PATH,
        "args": {} if settings is None else settings.model_dump(mode="json", exclude_unset=True),
        "deployments": [
            {
                "name": DOOR if settings is None else "engine",
                "user_config": application.state.model_dump(mode="json"),
            }
        ],
    }


def from_config(config: dict[str, Any]) -> Application | None:
    """The inverse of :func:`as_config`; ``None`` for anything that we would not have written."""
    try:
        door = config["import_path"] == DOOR_IMPORT_PATH
        state = config["deployments"][0]["user_config"]
        return Application(
            name=config["name"],
            route=config["route_prefix"],
            settings=None if door else EngineSettings.model_validate(config["args"]),
            state=(DoorState if door else KeyState).model_validate(state),
        )
    except (KeyError, IndexError, TypeError, ValidationError):
        return None


def _deployed(name: str, details: dict[str, Any]) -> Deployed:
    return Deployed(
        name=name,
        status=AppStatus(details["status"]),
        application=from_config(details.get("deployed_app_config") or {}),
        deployed_at=datetime.fromtimestamp(details.get("last_deployed_time_s") or 0, UTC),
        message=details.get("message") or "",
    )
