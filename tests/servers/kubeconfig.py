"""A kubeconfig for the test's API server."""

from __future__ import annotations

import json
from pathlib import Path

from tests.servers.kube import ApiServer


def write_kubeconfig(server: ApiServer, path: Path, token: str | None = None, url: str | None = None) -> Path:
    """For the holder of a token; for the admin if none is given."""
    token = token or server.admin.configuration.api_key["BearerToken"].removeprefix("Bearer ")
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                "clusters": [
                    {
                        "name": "test",
                        "cluster": {
                            "server": url or server.url,
                            "certificate-authority": str(server.ca_file),
                        },
                    }
                ],
                "users": [{"name": "test", "user": {"token": token}}],
            }
        )
    )
    return path
