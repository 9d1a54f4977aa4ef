"""Settings of the proxy."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anamorph.errors import SetupError


@dataclass(frozen=True)
class ProxySettings:
    """Where the proxy gets keys, what it serves, and where it listens.

    Args:
        keysvc_url: base URL of the key service.
        tenant: tenant id.
        api_key_file: file with the tenant's API key (role client).
        models: model id of the tenant → folder of its tokenizer; callers name the model by the same id.
        host: a loopback address or ``localhost``; others are refused.
        port: 0 takes a free one.
        port_file: gets the port number once the proxy answers.
        local_api_key: if set, callers must send it as their bearer token.
        retry_for: seconds over which a request is repeated upstream.
        otlp_endpoint: where traces go; nowhere by default.

    Raises:
        SetupError: ``host`` is no loopback address, or no model is named.
    """

    keysvc_url: str
    tenant: str
    api_key_file: Path
    models: Mapping[str, Path]
    host: str = "127.0.0.1"
    port: int = 8600
    port_file: Path | None = None
    local_api_key: str | None = field(default=None, repr=False)
    retry_for: float = 60.0
    max_body_bytes: int = 16 * 2**20
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not is_loopback(self.host):
            raise SetupError(f"the proxy carries plaintext and binds loopback only, not {self.host}")
        if not self.models:
            raise SetupError("name at least one model and its tokenizer folder, as NAME=FOLDER")

    def api_key(self) -> str:
        """The tenant's API key.

        Raises:
            SetupError: the file cannot be read or is empty.
        """
        try:
            key = Path(self.api_key_file).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            reason = type(error).__name__
            raise SetupError(
                f"{self.api_key_file} cannot be read ({reason}); put the API key there"
            ) from None
        if not key:
            raise SetupError(f"{self.api_key_file} is empty; put the API key there")
        return key


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine and nothing else: ``localhost`` or a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
