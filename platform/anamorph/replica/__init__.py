"""Identity and publication of encrypted replicas: manifest, signature, verification, store.

Nothing here knows a key: signing functions and trust anchors are passed in.
"""

from anamorph.replica.cache import Cache
from anamorph.replica.held import Held, Kept, hold
from anamorph.replica.manifest import CHUNK, FORMAT, MANIFEST, FileEntry, Identity, ReplicaManifest, keyed_tag
from anamorph.replica.ranged import RangedReplica
from anamorph.replica.seal import build_manifest, seal, sign
from anamorph.replica.store import Store, fetch
from anamorph.replica.tensors import StoredTensor, Tensors, read_header
from anamorph.replica.verify import verify

__all__ = [
    "CHUNK",
    "FORMAT",
    "MANIFEST",
    "Cache",
    "FileEntry",
    "Held",
    "Identity",
    "Kept",
    "RangedReplica",
    "ReplicaManifest",
    "Store",
    "StoredTensor",
    "Tensors",
    "build_manifest",
    "fetch",
    "hold",
    "keyed_tag",
    "read_header",
    "seal",
    "sign",
    "verify",
]
