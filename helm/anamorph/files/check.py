"""``helm test``: a tenant of its own gets a model, asks it, rotates its key and asks again.

    python check.py check.json WORK

There is no plain model here to compare with. But greedy decoding under two keys must give the same plain ids,
while other ids cross the wire: so what encrypted, the replica and what decrypted belong together.
WORK is a folder in memory, for API keys.
"""

from __future__ import annotations

import json
import secrets
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from anamorph.client import Client
from anamorph.wire import trust

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API_SERVER = "https://kubernetes.default.svc"
MODELS = "/apis/anamorph.dev/v1alpha1/namespaces/{}/encryptedmodels"
PAUSE_S = 2.0
TOKENS = 8
_GONE_S = 600.0

Object = dict[str, Any]


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@dataclass
class Resource:
    """The ``EncryptedModel`` of the test; ``api`` is the API server's, ``token`` reads its credential."""

    api: httpx.Client
    token: Callable[[], str]
    body: Object
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def create(self) -> None:
        """Make it; what an earlier run has left goes first.

        Raises:
            SystemExit: the API server refuses it.
        """
        if self.read() is not None:
            say("an earlier run has left its model: it goes first")
            self.delete()
        answer = self._call("POST", "", self.body)
        if answer.is_error:
            sys.exit(f"the API server refuses the EncryptedModel: {answer.text}")

    def ready(self, within_s: float) -> None:
        """Wait until it is served; says every change of its conditions.

        Raises:
            SystemExit: it is not in time.
        """
        end, before = self.clock() + within_s, ""
        while True:
            conditions = self._conditions()
            now = ", ".join(f"{one['type']}={one['status']} ({one['reason']})" for one in conditions)
            if now != before:
                say(f"  {now}")
            if any((one["type"], one["status"]) == ("Ready", "True") for one in conditions):
                return
            if self.clock() >= end:
                sys.exit(f"not Ready within {within_s:.0f} s: {_messages(conditions)}")
            before = now
            self.sleep(PAUSE_S)

    def delete(self) -> None:
        """Take it away, and wait until it is gone.

        Raises:
            SystemExit: it stays.
        """
        self._call("DELETE", self._path())
        end = self.clock() + _GONE_S
        while self.read() is not None:
            if self.clock() >= end:
                sys.exit(f"{self._name} is still there {_GONE_S:.0f} s after its deletion: see its events")
            self.sleep(PAUSE_S)

    def read(self) -> Object | None:
        """It as it is; none if there is none."""
        answer = self._call("GET", self._path())
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        return dict(answer.raise_for_status().json())

    @property
    def _name(self) -> str:
        return str(self.body["metadata"]["name"])

    def _path(self) -> str:
        return f"/{self._name}"

    def _conditions(self) -> list[Object]:
        return list(((self.read() or {}).get("status") or {}).get("conditions") or [])

    def _call(self, method: str, path: str, body: Object | None = None) -> httpx.Response:
        url = MODELS.format(self.body["metadata"]["namespace"]) + path
        return self.api.request(method, url, json=body, headers={"Authorization": f"Bearer {self.token()}"})


def _messages(conditions: list[Object]) -> str:
    wrong = [one for one in conditions if one["status"] != "True"]
    return "; ".join(f"{one['type']}: {one['reason']}: {one.get('message', '')}" for one in wrong)


class Inside(httpx.HTTPTransport):
    """Asks the serving cluster by its Service, whatever address clients outside are told.

    Args:
        serve: URL of the Service; of another address only path and query count.
    """

    def __init__(self, serve: str) -> None:
        super().__init__(verify=trust.context(), trust_env=False)
        self._serve = httpx.URL(serve)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it there."""
        place = self._serve
        request.url = request.url.copy_with(scheme=place.scheme, host=place.host, port=place.port)
        request.headers["Host"] = place.netloc.decode("ascii")
        return super().handle_request(request)


@dataclass
class Commands:
    """The product's own commands, as a platform and as the test's tenant.

    Args:
        serve: URL of the serving cluster's Service.
        tenant: the test's own.
        credential: the platform's token, which is replaced while it lies there.
        work: private folder.
    """

    keysvc: str
    serve: str
    tenant: str
    credential: Path
    work: Path
    _made: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        """The tenant is there, with a key for its admin and one for its client."""
        if self._run("platform", "tenant", "show", self.tenant, check=False) is None:
            self._run("platform", "tenant", "create", self.tenant, "--display-name", "helm test")
            say(f"made tenant {self.tenant}")
        try:
            for role in ("admin", "client"):
                self._file(role).unlink(missing_ok=True)
                options = ("--name", "helm-test", "--role", role, "--out", str(self._file(role)))
                made = self._run("platform", "tenant", "api-key", "create", self.tenant, *options)
                self._made.append(str((made or {})["id"]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """The tenant's API keys end; its record and audit trail stay, as every tenant's."""
        for key in self._made:
            self._run("platform", "tenant", "api-key", "revoke", self.tenant, key, "--yes", check=False)

    def rotate(self, model: str, within_s: float) -> None:
        """Begin a rotation and wait for its end."""
        options = ("--wait", f"--timeout={within_s:.0f}")
        self._run("admin", "key", "rotate", self.tenant, model, *options)

    def client(self, model: str) -> Client:
        """The tenant's client of its model."""
        key = self._file("client").read_text().strip()
        return Client(self.keysvc, key, self.tenant, model, transport=Inside(self.serve))

    def _file(self, role: str) -> Path:
        return self.work / f"{role}.key"

    def _run(self, role: str, *command: str, check: bool = True) -> Object | None:
        if role == "platform":  # no file of a volume is its reader's alone
            self._file(role).touch(0o600)
            self._file(role).write_text(self.credential.read_text())
        place = ("--keysvc", self.keysvc, "--api-key-file", str(self._file(role)))
        program = [sys.executable, "-m", "anamorph.cli", *command, *place, "--json"]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return dict(json.loads(done.stdout))
        if check:
            sys.exit(f"anamorph {' '.join(command)}: {done.stderr.strip()}")
        return None


@dataclass(frozen=True)
class Answer:
    """What one key version made of the prompt: ids as the wire has them, and the plain answer."""

    key_id: str
    wire: Sequence[int]
    plain: Sequence[int]


def ask(client: Client, prompt: Sequence[int]) -> Answer:
    """The greedy answer to ``prompt``.

    Raises:
        SystemExit: the answer is empty, or the prompt would have crossed the wire in clear.
    """
    lease = client.lease()
    wire = list(lease.codec.encrypt(prompt))
    done = client.complete(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
    plain = list(done.choices[0].token_ids)
    if not plain:
        sys.exit("the answer is empty")
    if wire == list(prompt):
        sys.exit("the prompt is not encrypted")
    say(f"  {len(plain)} ids answered under {lease.key_id}")  # neither prompt nor answer is for a log
    return Answer(lease.key_id, wire, plain)


def check(resource: Resource, commands: Commands, within_s: float) -> None:
    """Issue, encrypt, infer, rotate; the model and the tenant's keys go whatever happens."""
    spec = resource.body["spec"]
    # Drawn anew: a prompt that everybody knows would be known plaintext.
    prompt = [secrets.randbelow(spec["vocabSize"]) for _ in range(16)]
    with commands:
        try:
            say("a model is issued its key, and materialised")
            resource.create()
            resource.ready(within_s)
            first = _asked(commands, spec["model"], prompt)
            say("its key is rotated")
            commands.rotate(spec["model"], within_s)
            second = _asked(commands, spec["model"], prompt)
        finally:
            say("the model goes")
            resource.delete()
    compare(first, second)


def _asked(commands: Commands, model: str, prompt: Sequence[int]) -> Answer:
    with commands.client(model) as client:
        return ask(client, prompt)


def compare(first: Answer, second: Answer) -> None:
    """Other key, other ids on the wire, same plain answer.

    Raises:
        SystemExit: one of these is not so.
    """
    if first.key_id == second.key_id or list(first.wire) == list(second.wire):
        sys.exit(f"the rotation changed nothing: {first.key_id}, {second.key_id}")
    if list(first.plain) != list(second.plain):
        sys.exit(f"the answers differ under {first.key_id} and {second.key_id}")
    say("passed: another key, other ids on the wire, the same answer")


def main(config: Path, work: Path) -> None:
    """Run with the pod's own credentials."""
    settings = json.loads(config.read_text())
    model = settings["model"]
    places = settings["keysvc"], settings["serve"]
    commands = Commands(*places, model["spec"]["tenant"], Path(settings["credential"]), work)
    trusted = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
    with httpx.Client(base_url=API_SERVER, verify=trusted, trust_env=False, timeout=30) as api:
        resource = Resource(api, (ACCOUNT / "token").read_text, model)
        check(resource, commands, settings["within_s"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
