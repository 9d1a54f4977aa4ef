"""What the acts of the demo share: where things are, who asks, and what was claimed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rich.console import Console

from anamorph.cli.demo.plain import PlainModel
from anamorph.cli.machine.home import MODEL, Home
from anamorph.cli.machine.model import default_model
from anamorph.cli.machine.tenants import keys_as, platform_keys
from anamorph.client.tokenizer import Tokenizer
from anamorph.wire.admin import Dtype, Role
from anamorph.wire.keyservice import KeyService

ACME, GLOBEX = "acme", "globex"


@dataclass
class Stage:
    """One run of the demo."""

    console: Console
    home: Home
    reports: Path
    dtype: Dtype = "float32"
    pairs: int = 12
    broken: list[str] = field(default_factory=list)

    def check(self, holds: bool, claim: str) -> None:
        """Print a claim with its verdict, and remember one that does not hold."""
        self.console.print(f"  {'[green]✓[/green]' if holds else '[red]✗[/red]'} {claim}", highlight=False)
        if not holds:
            self.broken.append(claim)

    @property
    def urls(self) -> dict[str, str]:
        """Base URLs of the running system."""
        return self.home.running().urls

    @cached_property
    def folder(self) -> Path:
        """The plaintext model with its tokenizer, on the tenant's side."""
        return default_model(self.dtype, lambda text: self.console.print(f"  {text}"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder)

    @cached_property
    def plain(self) -> PlainModel:
        """The plaintext model, loaded in this process: the tenant's own."""
        return PlainModel(self.folder, self.dtype)

    def keys(self, tenant: str, role: Role = Role.ADMIN) -> KeyService:
        """The key service as one of the tenants sees it."""
        return keys_as(self.home, self.urls["keysvc"], tenant, role)

    def platform(self) -> KeyService:
        """The key service as the platform sees it."""
        return platform_keys(self.home, self.urls["keysvc"])

    def api_key(self, tenant: str) -> str:
        """The API key of the tenant's clients."""
        return self.home.api_key(tenant, Role.CLIENT).read_text().strip()

    def token(self, tenant: str) -> str:
        """An inference token of the tenant; ``plaintext`` is the baseline's."""
        keys = self.platform() if tenant == "plaintext" else self.keys(tenant, Role.CLIENT)
        with keys:
            return keys.inference_token(tenant, MODEL).token
