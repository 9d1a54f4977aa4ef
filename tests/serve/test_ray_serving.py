"""The applications on a real Ray: deployment, streams, disconnects, kills, refusals."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from base64 import b64encode, urlsafe_b64encode
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anamorph import errors
from anamorph.serve.engines.fake import continuation
from anamorph.serve.local_ray import start_ray, stop_ray
from anamorph.wire import completions as calls
from anamorph.wire.serving import app_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serve.raycluster import Cluster

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = [11, 12, 13]
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One Ray for the module, empty of applications."""
    raycluster = pytest.importorskip("tests.serve.raycluster")
    key = Ed25519PrivateKey.generate()
    x = urlsafe_b64encode(key.public_key().public_bytes_raw()).decode().rstrip("=")
    ray = start_ray(tmp_path_factory.mktemp("ray"), num_cpus=4)
    try:
        yield raycluster.Cluster(ray, [{"kid": "k1", "x": x, "kty": "OKP", "crv": "Ed25519"}], key)
    finally:
        stop_ray(ray)
