"""The Kubernetes API: the one place that calls its client.

Every call has a timeout and is made once: whoever looks again every two seconds needs no retries
here. Every write first asks the fence whether this process still holds the lease, and what replaces
something carries the ``resourceVersion`` at which it was read. So a process that was stopped between the two
writes nothing over what its successor wrote.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import urllib3
from kubernetes import client, config

from anamorph import errors
from anamorph.wire.problems import STATUS
from anamorph_operator.kubernetes.catalogue import Object, Resource, resource_of

FIELD_MANAGER = "anamorph-operator"
PAGE = 500
_IN_CLUSTER = "KUBERNETES_SERVICE_HOST"
_METHODS = {
    "get": "GET",
    "list": "GET",
    "create": "POST",
    "update": "PUT",
    "patch": "PATCH",
    "delete": "DELETE",
}
_READS = frozenset({"get", "list"})
_APPLY, _MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
_WRITTEN = (("fieldManager", FIELD_MANAGER), ("fieldValidation", "Strict"))

Propagation = Literal["Background", "Foreground"]
Count = Callable[[str, Resource, int], None]
"""Told of every answer: verb, resource, HTTP status (0 for none)."""


def configuration(kubeconfig: Path | None = None) -> client.Configuration:
    """How to reach the API server: the pod's service account, or else a kubeconfig.

    The service account's token is read again each minute, as the kubelet replaces it.

    Raises:
        SetupError: there is neither, or it cannot be read.
    """
    made = client.Configuration()
    made.proxy = None  # else taken from the environment, which would hand our token to a proxy
    made.retries = False  # and with it redirects: they would carry the token along
    made.connection_pool_maxsize = 16
    try:
        if kubeconfig is None and os.environ.get(_IN_CLUSTER):
            config.load_incluster_config(client_configuration=made)
        else:
            place = None if kubeconfig is None else str(kubeconfig)
            config.load_kube_config(config_file=place, client_configuration=made, persist_config=False)
    except (config.ConfigException, OSError) as error:
        raise errors.SetupError(
            f"no Kubernetes API server is configured ({error}): run in a pod, or give a kubeconfig"
        ) from None
    return made


@dataclass(frozen=True)
class Connection:
    """The same for another client: URL, token and files."""

    server: str
    ca_file: str | None
    token: str | None = field(repr=False)
    certificate_file: str | None
    key_file: str | None


def connection(settings: client.Configuration) -> Connection:
    """What a configuration says now; its token may be another one later."""
    header = settings.get_api_key_with_prefix("BearerToken") or ""
    token = header.split()[-1] if header else None
    return Connection(settings.host, settings.ssl_ca_cert, token, settings.cert_file, settings.key_file)


def quiet() -> None:
    """Keep the client from logging: on level DEBUG it writes whole answers, tokens among them."""
    for name in ("kubernetes", "kubernetes.client.rest"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Client:
    """Calls, one at a time; for threads, several of which may share it.

    Args:
        configuration: see :func:`configuration`.
        fence: called before every write; it does not return where this process must not write.
        timeout_s: seconds for one call, connection included.
        count: told of every answer.

    Every call raises:
        Unavailable: the API server does not answer, or not usefully.
        Forbidden: the message names the verb and the resource to grant.
        Unauthenticated, NotFound, Conflict, Unprocessable, BadRequest, TooManyRequests: as it says.
    """

    def __init__(
        self,
        configuration: client.Configuration,
        fence: Callable[[], None] = lambda: None,
        timeout_s: float = 10,
        count: Count = lambda _verb, _resource, _status: None,
    ) -> None:
        quiet()
        self._api = client.ApiClient(configuration)
        self._fence = fence
        self._timeout_s = timeout_s
        self._count = count

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """One object."""
        return self._call("get", resource, namespace, name)

    def list(self, resource: Resource, namespace: str | None, labels: str = "") -> list[Object]:
        """Every object of a collection, or those that a label selector takes, by pages."""
        return list(self._pages(resource, namespace, labels))

    def create(self, body: Object) -> Object:
        """A new object; Conflict with the code ``AlreadyExists`` where there is one of its name."""
        resource, namespace, _ = _place(body)
        return self._call("create", resource, namespace, body=body, query=_WRITTEN)

    def update(self, body: Object) -> Object:
        """The object anew; Conflict where it is no longer at the ``resourceVersion`` in it."""
        resource, namespace, name = _place(body)
        body["metadata"]["resourceVersion"]  # none would replace whatever is there
        return self._call("update", resource, namespace, name, body=body, query=_WRITTEN)

    def merge(self, body: Object) -> Object:
        """Change the fields that are in it; Conflict where the object has not the ``uid`` in it."""
        resource, namespace, name = _place(body)
        body["metadata"]["uid"]  # of whatever has that name now, we know nothing
        return self._call("patch", resource, namespace, name, body=body, query=_WRITTEN, content=_MERGE)

    def apply(self, body: Object, *, force: bool = False, part: str | None = None) -> Object:
        """Server-side apply: what we applied before and leave out now is removed, others' fields stay.

        Args:
            body: what is ours of it; with a ``resourceVersion``, Conflict where it is at another one.
            force: take fields over that somebody else has set; only for what is ours alone.
            part: ``status``, for that alone.
        """
        resource, namespace, name = _place(body)
        query = [*_WRITTEN, ("force", "true" if force else "false")]
        return self._call(
            "patch", resource, namespace, name, part=part, body=body, query=query, content=_APPLY
        )

    def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        propagation: Propagation = "Background",
    ) -> None:
        """Delete an object; one that is gone already is no error.

        With a ``uid`` it is that very object, and Conflict where another has its name. ``Foreground`` keeps
        it until what it owns is gone.
        """
        body: Object = {"propagationPolicy": propagation}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            self._call("delete", resource, namespace, name, body=body)
        except errors.NotFound:
            return

    def close(self) -> None:
        """Close the connections."""
        self._api.close()
        self._api.rest_client.pool_manager.clear()

    def _pages(self, resource: Resource, namespace: str | None, labels: str) -> Iterator[Object]:
        query = [("limit", str(PAGE)), *([("labelSelector", labels)] if labels else [])]
        more = ""
        while True:
            after = [("continue", more)] if more else []
            page = self._call("list", resource, namespace, query=[*query, *after])
            yield from page["items"]
            more = page["metadata"].get("continue", "")
            if not more:
                return

    def _call(
        self,
        verb: str,
        resource: Resource,
        namespace: str | None,
        name: str | None = None,
        *,
        part: str | None = None,
        body: Object | None = None,
        query: Sequence[tuple[str, str]] = (),
        content: str = "application/json",
    ) -> Object:
        if verb not in _READS:
            self._fence()
        try:
            answer, status, _ = self._api.call_api(
                resource.path(namespace, name, part),
                _METHODS[verb],
                query_params=list(query),
                header_params={"Accept": "application/json", "Content-Type": content},
                body=body,
                response_types_map=dict.fromkeys(range(200, 300), "object"),
                auth_settings=["BearerToken"],
                _request_timeout=self._timeout_s,
            )
        except client.ApiException as error:
            self._count(verb, resource, error.status or 0)
            # Without its text, which is the whole answer.
            raise _fault(error, verb, resource, namespace, name) from None
        except (urllib3.exceptions.HTTPError, OSError, AttributeError) as error:
            # The client stumbles over a failed TLS handshake: AttributeError.
            self._count(verb, resource, 0)
            raise errors.Unavailable(
                f"the Kubernetes API server does not answer: {type(error).__name__}"
            ) from None
        self._count(verb, resource, status)
        found: Object = answer
        return found


def _place(body: Object) -> tuple[Resource, str, str]:
    return resource_of(body), body["metadata"]["namespace"], body["metadata"]["name"]


def _fault(
    error: client.ApiException, verb: str, resource: Resource, namespace: str | None, name: str | None
) -> errors.ServiceError:
    """Our error for an answer: ``wire.problems`` says which, this says what to do."""
    said = _status(error)
    what = " ".join(part for part in (verb, str(resource), name, namespace and f"in {namespace}") if part)
    message = f"Kubernetes does not {what}: {str(said.get('message', error.reason))[:500]}"
    if error.status == 403 and f"cannot {verb} " in message:
        message += f"; grant the operator the verb {verb!r} on {resource} there (chart: its Role)"
    # Some mistakes of ours it answers with 500: server-side apply with an unknown field, for one.
    return STATUS.get(error.status or 0, errors.Unavailable)(message, code=said.get("reason"))


def _status(error: client.ApiException) -> Object:
    """The ``Status`` that an error answer is."""
    try:
        said = json.loads(error.body or "{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


class Api:
    """The same calls for asyncio: each in a thread, so that none holds up the loop."""

    def __init__(self, calls: Client) -> None:
        self._calls = calls

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """As ``Client.get``."""
        return await asyncio.to_thread(self._calls.get, resource, namespace, name)

    async def list(self, resource: Resource, namespace: str | None, labels: str = "") -> list[Object]:
        """As ``Client.list``."""
        return await asyncio.to_thread(self._calls.list, resource, namespace, labels)

    async def create(self, body: Object) -> Object:
        """As ``Client.create``."""
        return await asyncio.to_thread(self._calls.create, body)

    async def merge(self, body: Object) -> Object:
        """As ``Client.merge``."""
        return await asyncio.to_thread(self._calls.merge, body)

    async def apply(self, body: Object, *, force: bool = False, part: str | None = None) -> Object:
        """As ``Client.apply``."""
        return await asyncio.to_thread(self._calls.apply, body, force=force, part=part)

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        propagation: Propagation = "Background",
    ) -> None:
        """As ``Client.delete``."""
        await asyncio.to_thread(
            self._calls.delete, resource, namespace, name, uid=uid, propagation=propagation
        )
