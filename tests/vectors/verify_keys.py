"""A second implementation of docs/spec/keys.md, which checks the vectors beside it.

    python tests/vectors/verify_keys.py [folder]

Plain Python, standard library only, nothing of the project: ChaCha20, HKDF,
Ed25519, draws and key files are written here from their specifications, slowly.
It prints one line per disagreement and exits 1 if there is any.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LABEL = "[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
KEY_ID = re.compile(rf"({LABEL})\.({LABEL})\.v([1-9][0-9]{{0,8}})\.([0-9a-f]{{16}})")
RESERVED = {"plaintext", "v1", "healthz", "metrics", "livez", "readyz", "docs"}
MASK = 0xFFFFFFFF


class Refused(Exception):
    """The input is one that the specification refuses."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Refused(reason)


# --- sections 1 to 3: contexts, subkeys, check values, ids


def encode(*items: str) -> bytes:
    out = b""
    for item in items:
        raw = item.encode("utf-8")
        out += len(raw).to_bytes(4, "big") + raw
    return out


def hkdf(ikm: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 for 32 bytes: one block of the expansion is all of it."""
    require(len(ikm) == 32, "wrong length")
    extracted = hmac.new(salt, ikm, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def check(secret: bytes, tenant: str, model: str, version: int) -> str:
    require(len(secret) == 32, "wrong length")
    return hmac.new(secret, encode(tenant, model, str(version)), hashlib.sha256).hexdigest()[:16]


class Root:
    def __init__(self, root: bytes, tenant: Any, model: Any, version: Any) -> None:
        for label in (tenant, model):
            require(bool(re.fullmatch(LABEL, label)) and label not in RESERVED, "bad id")
        require(type(version) is int and 0 < version < 10**9, "bad version")
        self.root, self.place = root, (tenant, model, version)
        self.kcv = check(self.subkey("kcv"), *self.place)
        self.key_id = f"{tenant}.{model}.v{version}.{self.kcv}"

    def subkey(self, space: str) -> bytes:
        tenant, model, version = self.place
        return hkdf(self.root, b"anamorph/v1", encode(tenant, model, str(version), space))


def parse_key_id(text: str) -> tuple[str, str, int, str]:
    match = KEY_ID.fullmatch(text)
    if match is None:
        raise Refused("not a key id")
    return match[1], match[2], int(match[3]), match[4]


def vocab_key(secret: bytes, key_id: str, vocab_kcv: str) -> None:
    tenant, model, version, _ = parse_key_id(key_id)
    require(check(secret, tenant, model, version) == vocab_kcv, "not the subkey of this id")


# --- section 4: ChaCha20 (RFC 8439) and the draws


def rotate(x: int, bits: int) -> int:
    return ((x << bits) | (x >> (32 - bits))) & MASK


def quarter(s: list[int], a: int, b: int, c: int, d: int) -> None:
    s[a] = (s[a] + s[b]) & MASK
    s[d] = rotate(s[d] ^ s[a], 16)
    s[c] = (s[c] + s[d]) & MASK
    s[b] = rotate(s[b] ^ s[c], 12)
    s[a] = (s[a] + s[b]) & MASK
    s[d] = rotate(s[d] ^ s[a], 8)
    s[c] = (s[c] + s[d]) & MASK
    s[b] = rotate(s[b] ^ s[c], 7)


COLUMNS = [(i, 4 + i, 8 + i, 12 + i) for i in range(4)]
DIAGONALS = [(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4) for i in range(4)]


def chacha20_block(key: bytes, counter: int) -> bytes:
    constants = struct.unpack("<4I", b"expand 32-byte k")
    start = [*constants, *struct.unpack("<8I", key), counter, 0, 0, 0]
    state = list(start)
    for _ in range(10):
        for lane in COLUMNS + DIAGONALS:
            quarter(state, *lane)
    return struct.pack("<16I", *((x + y) & MASK for x, y in zip(state, start, strict=True)))


def keystream_words(key: bytes) -> Iterator[int]:
    for counter in range(2**32):
        yield from struct.unpack("<8Q", chacha20_block(key, counter))


class Draws:
    def __init__(self, subkey: bytes) -> None:
        self.source = keystream_words(subkey)

    def words(self, n: int) -> list[int]:
        return [next(self.source) for _ in range(n)]

    def permutation(self, n: int) -> list[int]:
        words = self.words(n)
        return [index for _, index in sorted((word, index) for index, word in enumerate(words))]

    def signs(self, n: int) -> list[int]:
        return [-1 if word % 2 else 1 for word in self.words(n)]

    def uniforms(self, n: int) -> list[int]:
        return [word // 2**11 for word in self.words(n)]

    def normals(self, n: int) -> list[float]:
        out: list[float] = []
        while len(out) < n:
            a, b = (u / 2**53 for u in self.uniforms(2))
            r = math.sqrt(-2 * math.log(1 - a))
            out += [r * math.cos(2 * math.pi * b), r * math.sin(2 * math.pi * b)]
        return out[:n]

    def orthogonal(self, n: int) -> list[list[float]]:
        """Gram–Schmidt, each column twice: its R has a positive diagonal by construction."""
        flat = self.normals(n * n)
        columns: list[list[float]] = []
        for j in range(n):
            column = flat[j::n]
            for done in columns * 2:
                along = math.fsum(x * y for x, y in zip(done, column, strict=True))
                column = [x - along * y for x, y in zip(column, done, strict=True)]
            length = math.sqrt(math.fsum(x * x for x in column))
            columns.append([x / length for x in column])
        return [list(row) for row in zip(*columns, strict=True)]


# --- Ed25519 (RFC 8032): y² - x² = 1 + d x² y² over the integers modulo p

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int, int]


def add(a: Point, b: Point) -> Point:
    """Projective addition on the twisted Edwards curve; complete, so it doubles too."""
    z = a[2] * b[2] % P
    x, y = a[0] * b[0] % P, a[1] * b[1] % P
    cross = ((a[0] + a[1]) * (b[0] + b[1]) - x - y) % P
    square, slope = z * z % P, D * x * y % P
    low, high = (square - slope) % P, (square + slope) % P
    return z * low * cross % P, z * high * (y + x) % P, low * high % P


def base_point() -> Point:
    y = 4 * pow(5, -1, P) % P
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    return (x if x % 2 == 0 else P - x), y, 1


def times_base(scalar: int) -> bytes:
    total, power = (0, 1, 1), base_point()
    while scalar:
        if scalar & 1:
            total = add(total, power)
        power, scalar = add(power, power), scalar >> 1
    inverse = pow(total[2], -1, P)
    x, y = total[0] * inverse % P, total[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def ed25519(seed: bytes, message: bytes) -> tuple[bytes, bytes]:
    """Public key and signature."""
    digest = hashlib.sha512(seed).digest()
    scalar = int.from_bytes(digest[:32], "little") & (2**254 - 8) | 2**254
    public = times_base(scalar)
    nonce = int.from_bytes(hashlib.sha512(digest[32:] + message).digest(), "little") % ORDER
    commitment = times_base(nonce)
    challenge = int.from_bytes(hashlib.sha512(commitment + public + message).digest(), "little")
    response = (nonce + challenge * scalar) % ORDER
    return public, commitment + response.to_bytes(32, "little")


# --- section 6: the key file


def key_file(content: bytes, mode: int) -> Root:
    require(mode & 0o077 == 0, "open to others")
    require(len(content) <= 4096, "too long")
    pairs: list[list[tuple[str, Any]]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs.append(found)
        return dict(found)

    try:
        fields = json.loads(content.decode("utf-8"), object_pairs_hook=keep)
    except (ValueError, RecursionError) as error:
        raise Refused("not JSON") from error
    require(len(pairs) == 1 and fields == dict(pairs[0]), "not one object")
    require(sorted(name for name, _ in pairs[0]) == ["format", "key_id", "root"], "wrong members")
    require(all(isinstance(value, str) for value in fields.values()), "not text")
    require(fields["format"] == "anamorph-key/1", "another format")
    require(bool(re.fullmatch("[A-Za-z0-9+/]{43}=", fields["root"])), "not 32 bytes of base64")
    raw = base64.b64decode(fields["root"])
    require(base64.b64encode(raw).decode() == fields["root"], "spare bits")
    tenant, model, version, _ = parse_key_id(fields["key_id"])
    root = Root(raw, tenant, model, version)
    require(root.key_id == fields["key_id"], "check value")
    return root


# --- section 7: the vectors


def close(value: Any, wanted: Any, tolerance: float) -> bool:
    if isinstance(wanted, list):
        pairs = zip(value, wanted, strict=True)
        return len(value) == len(wanted) and all(close(a, b, tolerance) for a, b in pairs)
    return bool(abs(value - wanted) <= tolerance)


def step_holds(draws: Draws, step: dict[str, Any], tolerance: float) -> bool:
    value = getattr(draws, step["draw"])(step["n"])
    if "sha256" in step:
        packed = struct.pack(f"<{step['n']}I", *value)
        return hashlib.sha256(packed).hexdigest() == str(step["sha256"])
    wanted = [int(word) for word in step["value"]] if step["draw"] == "words" else step["value"]
    return close(value, wanted, tolerance if step["draw"] in {"normals", "orthogonal"} else 0)


def identity_faults(vector: dict[str, Any], root: Root) -> Iterator[str]:
    tenant, model, version = root.place
    message = bytes.fromhex(vector["signature"]["message"])
    public, signature = ed25519(root.subkey("manifest"), message)
    wanted = {
        "vocab_info": encode(tenant, model, str(version), "vocab").hex(),
        "kcv": root.kcv,
        "vocab_kcv": check(root.subkey("vocab"), *root.place),
        "key_id": root.key_id,
        "public_key": public.hex(),
        "subkeys": {space: root.subkey(space).hex() for space in vector["subkeys"]},
        "signature": {"message": message.hex(), "signature": signature.hex()},
    }
    yield from (name for name, value in wanted.items() if vector[name] != value)


def valid_faults(document: dict[str, Any]) -> Iterator[str]:
    for vector in document["keys"]:
        name = vector["key_id"]
        root = Root(bytes.fromhex(vector["root"]), vector["tenant"], vector["model"], vector["version"])
        yield from (f"{name}: {fault} differs" for fault in identity_faults(vector, root))
        if key_file(vector["key_file"].encode(), 0o600).root != root.root:
            yield f"{name}: key_file gives another root"
        for number, sequence in enumerate(vector["draws"]):
            draws = Draws(root.subkey(sequence["space"]))
            for step in sequence["steps"]:
                if not step_holds(draws, step, document["tolerance"]):
                    yield f"{name}: draws[{number}] {step['draw']}({step['n']}) differs"


INVALID: dict[str, Callable[[dict[str, Any]], object]] = {
    "roots": lambda case: Root(bytes.fromhex(case["root"]), "acme", "m", 1),
    "ids": lambda case: Root(bytes(32), case["tenant"], case["model"], case["version"]),
    "key_ids": lambda case: parse_key_id(case["key_id"]),
    "vocab_keys": lambda case: vocab_key(bytes.fromhex(case["secret"]), case["key_id"], case["vocab_kcv"]),
    "key_files": lambda case: key_file(base64.b64decode(case["content"]), int(case["mode"], 8)),
}


def invalid_faults(document: dict[str, Any]) -> Iterator[str]:
    for kind, attempt in INVALID.items():
        for case in document[kind]:
            try:
                attempt(case)
            except Refused:
                continue
            yield f"{kind}: accepted although {case['why']}"


def main(folder: Path) -> int:
    valid = json.loads((folder / "keys.json").read_text(encoding="utf-8"))
    invalid = json.loads((folder / "keys_invalid.json").read_text(encoding="utf-8"))
    faults = [*valid_faults(valid), *invalid_faults(invalid)]
    print(*faults, sep="\n", end="\n" if faults else "")  # noqa: T201  the report is its output
    refused = sum(len(invalid[kind]) for kind in INVALID)
    print(f"{len(valid['keys'])} keys, {refused} refusals: {len(faults)} faults")  # noqa: T201
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
