"""Ray's dashboard and what it serves, for an operator without work: all that is written runs."""

from __future__ import annotations

import json
import time
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from anamorph.wire.serving import Usage

_USAGE = Usage(source="p", tokens=0).model_dump_json()


class Ray:
    """One cluster.

    Attributes:
        app: the ASGI application.
        asked: requests so far.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._standing = _answer([])
        self.app = Starlette(
            routes=[
                Route("/api/serve/applications/", self._applications, methods=["GET", "PUT"]),
                Route("/{place:path}/usage", self._usage),
            ]
        )

    async def _applications(self, request: Request) -> Response:
        self.asked += 1
        if request.method == "PUT":
            self._standing = _answer((await request.json())["applications"])
        return _json(self._standing)

    async def _usage(self, _: Request) -> Response:
        self.asked += 1
        return _json(_USAGE)


def _answer(written: list[dict[str, Any]]) -> str:
    running = {"status": "RUNNING", "last_deployed_time_s": time.time()}
    return json.dumps(
        {"applications": {one["name"]: {**running, "deployed_app_config": one} for one in written}}
    )


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")
