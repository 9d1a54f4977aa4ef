"""How to reach Vault and as whom. No setting is a secret: where one is needed, it names a file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from anamorph.errors import InvalidId, SetupError
from anamorph.wire import ids
from anamorph_keysvc import toml

AUDIT_KEY = "anamorph-audit"
SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class Identity(StrEnum):
    """Whom the key service is to Vault; each has a policy and a token of its own."""

    ISSUER = "issuer"
    RELEASER = "releaser"
    SHREDDER = "shredder"

    @property
    def policy(self) -> str:
        """Name of its policy, and of its role at each auth method."""
        return f"anamorph-{self.value}"


def _segments(value: str) -> str:
    try:
        for part in value.split("/"):
            ids.check_label(part)
    except InvalidId as error:
        raise ValueError(str(error)) from error
    return value


def _address(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise ValueError("an address reads https://host:port, without a user")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("an address has no path: name a namespace or a mount by its own setting")
    return value.rstrip("/")


# Where something is mounted: labels with '/' between them.
MountPath = Annotated[str, AfterValidator(_segments)]
Seconds = Annotated[float, Field(gt=0, le=600)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Kubernetes(_Frozen):
    """Log in with the token of the pod's service account."""

    method: Literal["kubernetes"] = "kubernetes"
    mount: MountPath = "kubernetes"
    role: ids.Label | None = None
    token_file: Path = SERVICE_ACCOUNT_TOKEN


class Jwt(_Frozen):
    """Log in with a token of an identity provider that something else keeps fresh in a file."""

    method: Literal["jwt"] = "jwt"
    mount: MountPath = "jwt"
    role: ids.Label | None = None
    token_file: Path


class Approle(_Frozen):
    """Log in with a role id and a secret id, which arrives wrapped and is opened once.

    ``wrapped_secret_id_file`` holds the response-wrapping token. The secret id itself
    stays in memory; a new token in the file is used when Vault no longer takes the old.
    """

    method: Literal["approle"] = "approle"
    mount: MountPath = "approle"
    role: ids.Label | None = None
    role_id: str = Field(min_length=1, max_length=256)
    wrapped_secret_id_file: Path


class StaticToken(_Frozen):
    """A token from a file: for development only."""

    method: Literal["token"] = "token"
    token_file: Path


Auth = Annotated[Kubernetes | Jwt | Approle | StaticToken, Field(discriminator="method")]


class KubernetesSetup(_Frozen):
    """How Vault reaches the cluster's API server, and whose tokens it takes."""

    host: str
    ca_file: Path | None = None
    service_accounts: tuple[str, ...] = Field(min_length=1)
    namespaces: tuple[str, ...] = Field(min_length=1)
    audience: str | None = None


class JwtSetup(_Frozen):
    """Whose tokens Vault takes: by these keys, of this issuer, for this audience and subject."""

    jwks_url: str | None = None
    public_keys: tuple[Path, ...] = ()
    issuer: str
    audience: str
    subject: str

    @model_validator(mode="after")
    def _one_source(self) -> JwtSetup:
        if bool(self.jwks_url) == bool(self.public_keys):
            raise ValueError("name either jwks_url or public_keys")
        return self


class SetupSettings(_Frozen):
    """What ``vault setup`` needs beyond what the service needs; durations in seconds.

    Args:
        audit_files: where Vault writes its audit log, on Vault's machine, one device for each;
            ``stdout`` in a container. Where none is named, ``stdout`` unless there is a file device.
    """

    audit_files: tuple[Annotated[str, Field(pattern=r"^(stdout|/.+)$")], ...] = ()
    token_ttl_s: int = Field(default=3600, ge=60, le=86400)
    token_max_ttl_s: int = Field(default=86400, ge=60, le=2764800)
    secret_id_ttl_s: int = Field(default=0, ge=0)
    kubernetes: KubernetesSetup | None = None
    jwt: JwtSetup | None = None


class VaultSettings(_Frozen):
    """Everything that the key service needs to know of Vault; durations in seconds.

    Args:
        address: ``https://host:port``; ``http`` only without ``production``.
        ca_file: the only certificates that are trusted; the system's where None, not in production.
        namespace: of Vault Enterprise or OpenBao; the community edition of Vault has none.
        mount: of the transit engine; nothing else should use it.
        deadline_s: for one operation together with its login and retries.
        auto_rotate_h: hours after which Vault adds a version to a KEK by itself; 0 never.
        max_connections: calls under way at once; further ones wait for their turn.
    """

    address: Annotated[str, AfterValidator(_address)]
    ca_file: Path | None = None
    namespace: MountPath | None = None
    mount: MountPath = "anamorph-transit"
    connect_timeout_s: Seconds = 1
    read_timeout_s: Seconds = 3
    deadline_s: Seconds = 3
    auto_rotate_h: int = Field(default=720, ge=0, le=87600)
    max_connections: int = Field(default=32, ge=1, le=1024)
    production: bool = True
    issuer: Auth
    releaser: Auth
    shredder: Auth
    setup: SetupSettings = SetupSettings()

    @model_validator(mode="after")
    def _fit_for_production(self) -> VaultSettings:
        if not self.production:
            return self
        if not self.address.startswith("https://") or self.ca_file is None:
            raise ValueError("production needs an https address and the ca_file of its certificate")
        if any(self.auth(identity).method == "token" for identity in Identity):
            raise ValueError("production takes no static token: use kubernetes, approle or jwt")
        return self

    def auth(self, identity: Identity) -> Kubernetes | Jwt | Approle | StaticToken:
        """How an identity logs in."""
        chosen: Kubernetes | Jwt | Approle | StaticToken = getattr(self, identity.value)
        return chosen


def load(path: Path, **changes: Any) -> VaultSettings:
    """Read settings from a TOML file; ``changes`` take precedence.

    Raises:
        SetupError: no such file, no TOML, or not these settings; what the file holds is not repeated.
    """
    return toml.read(path, VaultSettings, **changes)


def read_secret(path: Path, what: str) -> str:
    """What a file holds, without the white space around it.

    Raises:
        SetupError: missing, unreadable, empty, or more than one word.
    """
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{what} cannot be read from {path}: {type(error).__name__}") from None
    if not text.isascii() or not text.isprintable() or len(text.split()) != 1:
        raise SetupError(f"{path} should hold {what} and nothing else")
    return text
