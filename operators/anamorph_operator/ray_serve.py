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
from anamorph.serve.cluster.placement import Node, nodes_of
from anamorph.wire.serving import (
    APP_IMPORT_PATH,
    DOOR_IMPORT_PATH,
    POOL_IMPORT_PATH,
    DoorState,
    EngineSettings,
    KeyState,
    PoolSettings,
    PoolState,
    deployment_name,
)
from anamorph_operator.applications import DOOR
from anamorph_operator.state import Application, AppStatus, Deployed

_PATH = "/api/serve/applications/"
_NODES = "/api/v0/nodes"
MOST_NODES = 10_000
_STATES: dict[str, type[DoorState | KeyState | PoolState]] = {
    DOOR_IMPORT_PATH: DoorState,
    APP_IMPORT_PATH: KeyState,
    POOL_IMPORT_PATH: PoolState,
}


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

    async def nodes(self) -> tuple[Node, ...]:
        """The nodes that are alive, with all that each has.

        Raises:
            Unavailable: the dashboard does not answer.
        """
        body = await self._call("GET", path=f"{_NODES}?limit={MOST_NODES}&detail=true")
        return nodes_of(body)

    async def _call(self, method: str, body: dict[str, Any] | None = None, path: str = _PATH) -> Any:
        try:
            response = await self._http.request(method, path, json=body)
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
        "import_path": _import_path(settings),
        "args": {} if settings is None else settings.model_dump(mode="json", exclude_unset=True),
        "deployments": [
            {
                "name": DOOR if settings is None else deployment_name(application.name),
                "user_config": application.state.model_dump(mode="json"),
            }
        ],
    }


def _import_path(settings: EngineSettings | PoolSettings | None) -> str:
    if settings is None:
        return DOOR_IMPORT_PATH
    return POOL_IMPORT_PATH if isinstance(settings, PoolSettings) else APP_IMPORT_PATH


def from_config(config: dict[str, Any]) -> Application | None:
    """The inverse of :func:`as_config`; ``None`` for anything that we would not have written."""
    try:
        path = config["import_path"]
        return Application(
            name=config["name"],
            route=config.get("route_prefix"),
            settings=_settings(path, config["args"]),
            state=_STATES[path].model_validate(config["deployments"][0]["user_config"]),
        )
    except (KeyError, IndexError, TypeError, ValidationError):
        return None


def _settings(path: str, args: dict[str, Any]) -> EngineSettings | PoolSettings | None:
    if path == DOOR_IMPORT_PATH:
        return None
    return (PoolSettings if path == POOL_IMPORT_PATH else EngineSettings).model_validate(args)


def _deployed(name: str, details: dict[str, Any]) -> Deployed:
    application = from_config(details.get("deployed_app_config") or {})
    return Deployed(
        name=name,
        status=_status(details, application),
        application=application,
        deployed_at=datetime.fromtimestamp(details.get("last_deployed_time_s") or 0, UTC),
        message=details.get("message") or "",
    )


def _status(details: dict[str, Any], application: Application | None) -> AppStatus:
    """Ray's word, but for one that could not wake: it was up as soon as it was written, asleep.

    Ray then calls it unhealthy and tries no more, as with one that failed to deploy.
    """
    status = AppStatus(details["status"])
    settings = None if application is None else application.settings
    scales = isinstance(settings, EngineSettings) and not settings.autoscaling.single
    gone = not any(deployment.get("replicas") for deployment in details.get("deployments", {}).values())
    return AppStatus.DEPLOY_FAILED if status is AppStatus.UNHEALTHY and scales and gone else status
