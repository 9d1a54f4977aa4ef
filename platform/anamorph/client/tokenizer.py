"""A tokenizer folder: its digests, and the tokenizer with its chat template.

The tokenizer decides what the ids mean, so it is part of what must match: the model
record carries the digests of ``tokenizer.json`` and of the chat template, and the
proxy refuses a folder with others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from anamorph.errors import BadRequest, SetupError

_TEMPLATE_FILE = "chat_template.jinja"


def tokenizer_digest(folder: str | Path) -> str:
    """``sha256:…`` of ``tokenizer.json`` as canonical JSON (sorted keys, no white space, UTF-8).

    Canonical, so that saving the same tokenizer again does not make it another one.

    Raises:
        SetupError: no ``tokenizer.json`` in ``folder``, or no JSON in it.
    """
    content = _read_json(Path(folder) / "tokenizer.json")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return _digest(canonical)


def chat_template_digest(folder: str | Path) -> str | None:
    """``sha256:…`` of the chat template's text, or ``None`` where the folder has none."""
    template = _chat_template(Path(folder))
    return None if template is None else _digest(template)


@dataclass(frozen=True)
class Piece:
    """One token as logprobs show it.

    ``raw`` are the bytes it adds to the text, ``None`` for a special token, which adds
    none; ``text`` reads as they do, or spells them out where they are part of a
    character, or is the special token's name.
    """

    text: str
    raw: bytes | None


class Tokenizer:
    """Text to ids and back, and chats to prompts; loaded without torch.

    Args:
        folder: local folder with ``tokenizer.json``; code in it is never run.

    Attributes:
        size: one more than the highest id.

    Raises:
        SetupError: the folder holds no tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.digest = tokenizer_digest(folder)
        self.chat_template_digest = chat_template_digest(folder)
        self._template = _chat_template(self.folder)
        self._tokenizer = _load(self.folder)
        self._byte_level = _is_byte_level(self._tokenizer.backend_tokenizer.to_str())
        # Kept: the library builds a dictionary each time it is asked.
        self.size: int = 1 + max(self._tokenizer.get_vocab().values())
        self._added: dict[int, AddedToken] = self._tokenizer.added_tokens_decoder

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens that the tokenizer puts around a text.

        Control tokens written out in ``text`` are read as such, as in any completion prompt.
        """
        return list(self._tokenizer.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens read as nothing."""
        text: str = self._tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a chat up to where the assistant's next message begins.

        Control tokens inside messages are encoded as text: only the template writes them.

        Raises:
            BadRequest: the folder has no template, or the template refuses these messages.
        """
        if self._template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", code="unsupported")
        from jinja2.exceptions import TemplateError

        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._template,
                add_generation_prompt=True,
                sanitize_control_tokens=True,
                return_dict=False,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRequest(
                f"the chat template refuses these messages: {error}", code="invalid_value", param="messages"
            ) from None
        return list(ids)

    def piece(self, token_id: int) -> Piece:
        """What a token stands for."""
        added = self._added.get(token_id)
        if added is not None:
            return Piece(added.content, None if added.special else added.content.encode())
        piece: str | None = self._tokenizer.backend_tokenizer.id_to_token(token_id)
        if piece is None:
            return Piece("", b"")  # rows of the embedding beyond the tokenizer's vocabulary
        raw = _byte_level(piece) if self._byte_level else _sentence_piece(piece)
        return Piece(_shown(raw), raw)


def _shown(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _load(folder: Path) -> Any:
    # This class reads any tokenizer.json; AutoTokenizer would import model code, and torch with it.
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    try:
        return TokenizersBackend.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises a bare Exception for a file it cannot read
        raise SetupError(f"{folder} holds no tokenizer that can be loaded: {error}") from error


def _chat_template(folder: Path) -> str | None:
    """The default template: its own file, or the entry of ``tokenizer_config.json``."""
    file = folder / _TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    entry = _read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(entry, list):
        entry = {item["name"]: item["template"] for item in entry}.get("default")
    return entry if isinstance(entry, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} cannot be read ({type(error).__name__}); pass a tokenizer folder") from None
    if not isinstance(content, dict):
        raise SetupError(f"{path} holds no JSON object; pass a tokenizer folder")
    return content


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _is_byte_level(tokenizer_json: str) -> bool:
    """Whether pieces spell bytes as GPT-2 does, which only the decoder tells."""
    decoder = json.loads(tokenizer_json).get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def _byte_table() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_table()


def _byte_level(piece: str) -> bytes:
    if all(char in _BYTES for char in piece):
        return bytes(_BYTES[char] for char in piece)
    return piece.encode()


def _sentence_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
