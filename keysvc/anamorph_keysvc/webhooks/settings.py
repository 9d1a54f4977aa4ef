"""Settings of webhooks, from ``ANAMORPH_KEYSVC_WEBHOOK_…`` variables."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Network = IPv4Network | IPv6Network


def _narrow_enough(network: Network) -> Network:
    # A wider one would admit more than anybody's private network.
    if network.prefixlen < 8:
        raise ValueError(f"{network} is too wide: name the networks of your receivers, /8 at the widest")
    return network


class WebhookSettings(BaseSettings):
    """Where webhooks may point and how long delivery is tried; durations in seconds.

    Args:
        allow_private: networks that are not public and yet admitted, for receivers in the cluster.
        refuse: public networks that are refused, such as the cluster's own public addresses.
        ca_file: PEM certificates that are trusted besides the system's.
        timeout_s: of one attempt: name, connection, TLS, request and answer together.
        give_up_s: after that time since the event a delivery is dead.
        longest_pause_s: between two attempts.
        lease_s: how long an attempt belongs to one process; longer than any attempt.
        threads, per_tenant: attempts at once, in this process and of one tenant.
        keep_s: how long deliveries that are done or dead stay in the list.
    """

    model_config = SettingsConfigDict(env_prefix="ANAMORPH_KEYSVC_WEBHOOK_", frozen=True)

    allow_private: tuple[Annotated[Network, AfterValidator(_narrow_enough)], ...] = ()
    refuse: tuple[Network, ...] = ()
    ca_file: Path | None = None
    timeout_s: float = Field(default=10, gt=0, le=30)
    give_up_s: float = Field(default=86400, gt=0)
    longest_pause_s: float = Field(default=4 * 3600, gt=0)
    lease_s: float = Field(default=90, ge=60)
    threads: int = Field(default=8, ge=1, le=64)
    per_tenant: int = Field(default=2, ge=1)
    keep_s: float = Field(default=30 * 86400, gt=0)
