"""A twin: a checkpoint of the same shape with random weights, as baseline where the base is private.

The compute zone may not see the plaintext of a private base. What a request costs does
not depend on what the weights are, only on their shapes and types, so a twin costs what
the base would. It is written one piece of one tensor at a time.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import CheckpointError, SetupError

# Values drawn at a time: 32 MiB of normals in float32.
_PIECE = 8 * 2**20
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_LONGEST_HEADER = 100_000_000
# Kept out of the twin: where the base comes from, and its special ids, which are known plaintext.
_DROPPED = ("_name_or_path", "auto_map")


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * _BYTES[self.dtype]


def twin(source: Path, out: Path, *, seed: int | None = None) -> Path:
    """Write a checkpoint with the shapes and types of ``source`` and random, finite weights.

    Only ``config.json`` and the headers of the safetensors files are read. Matrices are
    normal with deviation 1/√columns, so that activations stay of the order of one; vectors
    are ones, and biases zero.

    Args:
        source: folder of the base, or of its replica.
        out: new folder.
        seed: of the weights; the same seed gives the same bytes. Random if absent.

    Returns:
        ``out``.

    Raises:
        SetupError: ``source`` is no checkpoint, or ``out`` exists.
        CheckpointError: a file is no safetensors file, or holds a type that has no random values.
    """
    if not (source / "config.json").is_file():
        raise SetupError(f"{source} holds no config.json: name the folder of a checkpoint")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise SetupError(f"{source} holds no safetensors files")
    if out.exists():
        raise SetupError(f"{out} exists; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _fill(draft, source, files, np.random.default_rng(secrets.randbits(128) if seed is None else seed))
        draft.chmod(0o755)
        draft.rename(out)
    except BaseException:
        rmtree(draft, ignore_errors=True)
        raise
    return out


def _fill(folder: Path, source: Path, files: list[Path], rng: np.random.Generator) -> None:
    for file in files:
        _write(folder / file.name, _tensors(file), rng)
    index = source / "model.safetensors.index.json"
    if index.is_file():
        (folder / index.name).write_text(index.read_text())
    (folder / "config.json").write_text(json.dumps(_config(source), indent=2) + "\n")


def _config(source: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((source / "config.json").read_text())
    return _stripped(fields)


def _stripped(fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in fields.items() if k not in _DROPPED and not k.endswith("_token_id")}
    kept = {k: _stripped(v) if isinstance(v, dict) else v for k, v in kept.items()}
    # None, and not absent: absent ones take the architecture's defaults.
    return kept | {k: None for k in fields if k.endswith("_token_id")}


def _tensors(file: Path) -> list[_Tensor]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            raise CheckpointError(f"{file.name} is no safetensors file")
        try:
            header = json.loads(stream.read(length))
            found = [_tensor(name, entry) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{file.name} is no safetensors file") from None
    for tensor in found:
        if tensor.dtype not in _BYTES:
            raise CheckpointError(
                f"{file.name}: {tensor.name} has type {tensor.dtype}, which a twin cannot have"
            )
    return found


def _tensor(name: str, entry: Mapping[str, Any]) -> _Tensor:
    return _Tensor(name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))


def _write(path: Path, tensors: list[_Tensor], rng: np.random.Generator) -> None:
    at, header = 0, {}
    for tensor in tensors:
        offsets = [at, at + tensor.size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_tensor(stream, tensor, rng)


def _write_tensor(stream: BinaryIO, tensor: _Tensor, rng: np.random.Generator) -> None:
    for values in _values(tensor, rng):
        stream.write(_encoded(values, tensor.dtype))


def _values(tensor: _Tensor, rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
    left = prod(tensor.shape)
    while left > 0:
        piece = min(left, _PIECE)
        left -= piece
        if len(tensor.shape) < 2:
            yield np.full(piece, 0 if tensor.name.endswith("bias") else 1, dtype=np.float32)
        else:
            scale = np.float32(1 / sqrt(tensor.shape[-1]))
            yield rng.standard_normal(piece, dtype=np.float32) * scale


def _encoded(values: NDArray[np.float32], dtype: str) -> bytes:
    """Little-endian bytes; bfloat16 is the upper half of float32, here cut and not rounded."""
    if dtype == "BF16":
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
