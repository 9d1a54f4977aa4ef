"""schemathesis against a running key service: who asks, and what a run has seen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from schemathesis.engine import Status, events

from anamorph.wire.ids import LABEL
from anamorph_keysvc.contract import GRANT, ROLES


@dataclass
class Running:
    """The service at ``url``, as the platform and others may call it."""

    url: str
    platform: str
    admins: dict[str, str] = field(default_factory=dict)

    def call(self, path: str, body: object = None, token: str | None = None) -> dict[str, Any] | None:
        headers = {"Authorization": f"Bearer {token or self.platform}"}
        response = httpx.post(self.url + path, json=body, headers=headers, trust_env=False, timeout=30)
        answer: dict[str, Any] | None = response.json() if response.is_success else None
        return answer

    def admin(self, tenant: str) -> str | None:
        """An administrator's key of a tenant that exists."""
        if tenant not in self.admins:
            made = self.call(f"/v1/tenants/{tenant}/api-keys", {"name": "n", "role": "admin"})
            if made is None:
                return None
            self.admins[tenant] = str(made["secret"])
        return self.admins[tenant]

    def grant(self, tenant: str, model: str, version: int) -> str | None:
        """A new grant of a version that may be materialised now."""
        made = self.call(f"/v1/tenants/{tenant}/models/{model}/keys/{version}:materialize")
        return None if made is None else str(made["secret"])


@dataclass
class Bearer:
    """Chooses a credential that the called operation admits, of the tenant in its path where it has one."""

    running: Running

    def get(self, case: Any, context: Any) -> str | None:
        admitted = context.operation.definition.raw.get(ROLES)
        if admitted is None:
            return None
        path = case.path_parameters or {}
        tenant = path.get("tenant")
        tenant = tenant if isinstance(tenant, str) and re.fullmatch(LABEL, tenant) else "acme"
        wants_root = isinstance(case.body, dict) and case.body.get("purpose") == "materialize"
        if admitted == [GRANT] or (GRANT in admitted and wants_root):
            return self._grant(tenant, path) or self.running.admin("acme")
        if "platform" in admitted:
            return self.running.platform
        return self.running.admin(tenant) or self.running.admin("acme")

    def set(self, case: Any, token: str, _: Any) -> None:
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {token}"}

    def _grant(self, tenant: str, path: dict[str, Any]) -> str | None:
        model, version = path.get("model"), path.get("version")
        if not (isinstance(model, str) and re.fullmatch(LABEL, model) and isinstance(version, int)):
            return None
        return self.running.grant(tenant, model, version)


@dataclass
class Outcome:
    """What a run has seen; ``failures`` says check, request and message of each."""

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    stateful: int = 0
    reached: set[str] = field(default_factory=set)
    freed: Counter[str] = field(default_factory=Counter)
    """Reads, by operation, of what an earlier call of the same scenario had deleted."""
    failures: dict[str, str] = field(default_factory=dict)

    def hear(self, event: Any) -> None:
        if isinstance(event, events.ScenarioFinished):
            self._count(event)
        elif isinstance(event, events.NonFatalError | events.FatalError):
            self.failures[f"error {event}"] = repr(getattr(event, "value", None) or vars(event))

    def _count(self, event: events.ScenarioFinished) -> None:
        recorder = event.recorder
        self.freed.update(_freed(recorder))
        for id_, interaction in recorder.interactions.items():
            self.requests += 1
            self.stateful += recorder.cases[id_].parent_id is not None
            label = recorder.cases[id_].value.operation.label
            if interaction.response is None:
                self.failures[f"no answer: {label}"] = str(interaction.request)
                continue
            self.statuses[interaction.response.status_code] += 1
            if interaction.response.status_code < 300:
                self.reached.add(label)
        for checks in recorder.checks.values():
            for check in checks:
                self.checks[check.name] += 1
                if check.status is not Status.SUCCESS and check.failure_info is not None:
                    failure = check.failure_info.failure
                    text = f"{failure.title}: {failure.message}\n{check.failure_info.code_sample}"
                    self.failures.setdefault(f"{check.name} {failure.operation} {failure.title}", text)

    def report(self) -> str:
        counts = f"{self.requests} requests ({self.stateful} of them follow another by a link)"
        return (
            f"{counts}; statuses {dict(sorted(self.statuses.items()))}; {len(self.reached)} operations done; "
            f"{self.freed.total()} reads after a deletion"
        )


def _freed(recorder: Any) -> Iterator[str]:
    """Reads that ``use_after_free`` judged: of what was created and then deleted in the same scenario."""
    gone: dict[str, Any] = {}
    for id_, interaction in recorder.interactions.items():
        node, path = recorder.cases[id_], urlsplit(interaction.request.uri).path
        case = node.value
        if case.method == "DELETE" and _done(recorder, id_) and _done(recorder, node.parent_id):
            gone[path] = case
        judged = "use_after_free" in {check.name for check in recorder.checks.get(id_, [])}
        if case.method == "GET" and judged:
            related = {one.id for one in recorder.find_related(case_id=id_)}
            yield from (
                case.operation.label
                for freed, deletion in gone.items()
                if f"{path}/".startswith(f"{freed}/") and deletion.id in related
            )


def _done(recorder: Any, id_: str | None) -> bool:
    interaction = recorder.interactions.get(id_)
    answer = interaction and interaction.response
    return answer is not None and 200 <= answer.status_code < 300
