"""The smallest policy of each identity: what it does and nothing else, down to parameters.

``+`` stands for one name. With ``keys/*`` an issuer could reach ``keys/NAME/config`` and
make a KEK exportable. The exact path of the audit key wins over ``+``, so what is
denied for it stays denied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from anamorph_keysvc.vault.settings import AUDIT_KEY, Identity
from anamorph_keysvc.vault.wrapper import KEK_TYPE

CHECKER_POLICY: Final = "anamorph-checker"
_ANY: Final[Sequence[Any]] = ()


@dataclass(frozen=True)
class Rule:
    """What one path grants. ``parameters``: allowed names with their values; None for no limit."""

    path: str
    capabilities: tuple[str, ...]
    parameters: Mapping[str, Sequence[Any]] | None = None
    required: tuple[str, ...] = field(default=())

    def text(self) -> str:
        """The rule in Vault's own language.

        Not in JSON, which Vault takes too: it then reads ``[true]`` as no limit at all.
        """
        lines = [f"capabilities = {json.dumps(self.capabilities)}"]
        if self.parameters is not None:
            lines += ["allowed_parameters = {", *map(_limit, self.parameters.items()), "}"]
        if self.required:
            lines.append(f"required_parameters = {json.dumps(self.required)}")
        body = "\n".join(f"  {line}" for line in lines)
        return f'path "{self.path}" {{\n{body}\n}}\n'


def _limit(parameter: tuple[str, Sequence[Any]]) -> str:
    name, values = parameter
    return f"  {name} = {json.dumps(list(values))}"


def policies(mount: str) -> dict[str, str]:
    """The text of every policy by its name; always the same, so that a check can compare."""
    rules = {
        Identity.ISSUER.policy: _issuer(mount),
        Identity.RELEASER.policy: _releaser(mount),
        Identity.SHREDDER.policy: _shredder(mount),
        CHECKER_POLICY: _checker(mount),
    }
    return {name: "\n".join(rule.text() for rule in own) for name, own in rules.items()}


def _issuer(mount: str) -> list[Rule]:
    made: Mapping[str, Sequence[Any]] = {
        "type": [KEK_TYPE],
        "derived": [True],
        "auto_rotate_period": _ANY,
    }
    return [
        *_token(),
        # Without "read": it, too, would need the required parameters. The releaser reads.
        Rule(f"{mount}/keys/+", ("update",), made, ("type", "derived")),
        Rule(f"{mount}/keys/{AUDIT_KEY}", ("read",)),
        Rule(f"{mount}/keys/+/rotate", ("update",)),
        Rule(f"{mount}/keys/{AUDIT_KEY}/rotate", ("deny",)),
        # Only "update": "create" is what encrypting under a key that does not exist needs.
        Rule(
            f"{mount}/encrypt/+",
            ("update",),
            {"plaintext": _ANY, "context": _ANY},
            ("plaintext", "context"),
        ),
        Rule(f"{mount}/sign/{AUDIT_KEY}", ("update",), {"input": _ANY}, ("input",)),
    ]


def _releaser(mount: str) -> list[Rule]:
    opened: Mapping[str, Sequence[Any]] = {"ciphertext": _ANY, "context": _ANY}
    return [
        *_token(),
        Rule(f"{mount}/keys/+", ("read",)),
        Rule(f"{mount}/decrypt/+", ("update",), opened, ("ciphertext", "context")),
        Rule(f"{mount}/rewrap/+", ("update",), {"batch_input": _ANY}, ("batch_input",)),
    ]


def _shredder(mount: str) -> list[Rule]:
    floors: Mapping[str, Sequence[Any]] = {"min_decryption_version": _ANY, "min_encryption_version": _ANY}
    trim = "min_available_version"
    return [
        *_token(),
        Rule(f"{mount}/keys/+", ("read",)),
        Rule(f"{mount}/keys/+/config", ("update",), floors),
        Rule(f"{mount}/keys/+/trim", ("update",), {trim: _ANY}, (trim,)),
        Rule(f"{mount}/keys/{AUDIT_KEY}/config", ("deny",)),
        Rule(f"{mount}/keys/{AUDIT_KEY}/trim", ("deny",)),
    ]


def _checker(mount: str) -> list[Rule]:
    """For ``vault check``: reads how everything is set, and no secret."""
    return [
        *_token(),
        Rule("sys/audit", ("read", "sudo")),
        Rule("sys/policies/acl/+", ("read",)),
        Rule(f"sys/mounts/{mount}", ("read",)),
        Rule(f"{mount}/config/keys", ("read",)),
        Rule(f"{mount}/keys", ("list",)),
        Rule(f"{mount}/keys/+", ("read",)),
        Rule("auth/+/role/+", ("read",)),
    ]


def _token() -> list[Rule]:
    """What everyone may do with its own token; Vault's default policy would add much more."""
    return [
        Rule("auth/token/lookup-self", ("read",)),
        Rule("auth/token/renew-self", ("update",)),
        Rule("auth/token/revoke-self", ("update",)),
        Rule("sys/capabilities-self", ("update",)),
    ]
