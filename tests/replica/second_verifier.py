"""A second implementation of docs/spec/replica.md, section 6: no line of the product is imported.

    python second_verifier.py FOLDER PUBLIC_KEY_BASE64

Exit code 0: verified. 1: refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
import sys
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

CHUNK = 4194304
FIELDS = {
    "format": r"anamorph-replica/v1",
    "key_id": r"[a-z0-9-]{1,63}\.[a-z0-9-]{1,63}\.v[1-9][0-9]{0,8}\.[0-9a-f]{16}",
    "kcv": r"[0-9a-f]{16}",
    "vocab_kcv": r"[0-9a-f]{16}",
    "profile": r"permute|rotate",
    "table": r"[A-Za-z0-9][A-Za-z0-9._/@-]*",
    "base_tag": r"[0-9a-f]{64}",
    "plan_tag": r"[0-9a-f]{64}",
    "signature": r"[A-Za-z0-9+/]{86}==",
}
NAME = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors\.index\.json"
    r"|[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors"
)
FORBIDDEN = {"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"}
NAMING = {"_name_or_path", "name_or_path", "base_model", "base_model_name_or_path"}


class Refused(Exception):
    """The folder is no replica under this key."""


def need(condition: object) -> None:
    if not condition:
        raise Refused


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def walk(value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            need(key not in FORBIDDEN and not (key in NAMING and inner))
            walk(inner)
    elif isinstance(value, list):
        for inner in value:
            walk(inner)


def check_manifest(data: bytes, public_key: bytes) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(data)
    need(canonical(manifest) == data)
    need(set(manifest) == {*FIELDS, "added", "files"})
    need(all(re.fullmatch(pattern, manifest[field]) for field, pattern in FIELDS.items()))
    need(manifest["key_id"].endswith("." + manifest["kcv"]))
    need(all(isinstance(name, str) for name in manifest["added"]))
    signature = base64.b64decode(manifest["signature"], validate=True)
    need(base64.b64encode(signature).decode() == manifest["signature"])
    unsigned = {field: value for field, value in manifest.items() if field != "signature"}
    Ed25519PublicKey.from_public_bytes(public_key).verify(signature, canonical(unsigned))
    return manifest


def check_file(path: Path, entry: dict[str, Any]) -> None:
    data = path.read_bytes()
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    need(entry == {"size": len(data), "chunks": [hashlib.sha256(chunk).hexdigest() for chunk in chunks]})
    if path.suffix == ".json":
        content = json.loads(data)
        walk(content)
        shards = content.get("weight_map", {}).values() if path.name.startswith("model") else []
        need(all(NAME.fullmatch(shard) and shard.endswith(".safetensors") for shard in shards))
    else:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        need(header.get("__metadata__", {}) in ({}, {"format": "pt"}))


def verify(folder: Path, public_key: bytes) -> None:
    names = {path.name for path in folder.iterdir()}
    need(all(stat.S_ISREG((folder / name).lstat().st_mode) for name in names))
    need(all(NAME.fullmatch(name) and ".." not in name for name in names - {"anamorph.json"}))
    manifest = check_manifest((folder / "anamorph.json").read_bytes(), public_key)
    need(set(manifest["files"]) == names - {"anamorph.json"} and "config.json" in names)
    for name, entry in manifest["files"].items():
        check_file(folder / name, entry)


def main(folder: str, public_key: str) -> int:
    try:
        verify(Path(folder), base64.b64decode(public_key))
    except (Refused, InvalidSignature, OSError, ValueError, KeyError, TypeError, AttributeError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
