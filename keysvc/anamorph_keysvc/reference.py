"""The API's reference page, written from its OpenAPI contract.

python -m anamorph_keysvc.reference docs/api.md
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anamorph.wire.problems import STATUS
from anamorph_keysvc.app import describe
from anamorph_keysvc.contract import ROLES

Document = dict[str, Any]

_PAGE = "Page_"
_INTRODUCTION = """\
# API reference

Written by `python -m anamorph_keysvc.reference` from the contract that the service serves at
`/openapi.json`; do not edit it here.

Every call but those marked *no credential* takes `Authorization: Bearer …` with one of:

{schemes}

*Callers* names the roles that may call; all of them but `platform` reach their own tenant only,
and other tenants' objects are 404 to them. `grant` is the grant of a materialisation, for its own
key version.

All times are UTC, all durations seconds. A page of a list holds `items` and, unless it is the last,
`next_page`: send that back as `page`. Changes take an `Idempotency-Key` unless the text says
otherwise, and then the same request is done once. Answers with one key version or model carry its `ETag`,
which `If-Match` takes. All answers are `no-store`.

Errors are problems (RFC 9457) of the type `application/problem+json`: see [Problem](#problem).

| status | meaning |
|---|---|
{errors}
"""


def page(document: Document) -> str:
    """The page, as Markdown."""
    groups: dict[str, list[str]] = defaultdict(list)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            groups[operation["tags"][0]].append(_operation(method, path, operation))
    parts = [_introduction(document)]
    for tag, operations in groups.items():
        parts += [f"## {tag[0].upper()}{tag[1:]}\n", *operations]
    messages = sorted(document["components"]["schemas"].items())
    parts += ["## Messages\n", *(_message(*item) for item in messages if not item[0].startswith(_PAGE))]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _introduction(document: Document) -> str:
    components = document["components"]
    schemes = [
        f"- `{scheme['bearerFormat']}`: {scheme['description']}"
        for scheme in components["securitySchemes"].values()
    ]
    rows = [
        f"| {status} | {components['responses'][error.__name__]['description']} |"
        for status, error in sorted(STATUS.items())
    ]
    return _INTRODUCTION.format(schemes="\n".join(schemes), errors="\n".join(rows))


def _operation(method: str, path: str, operation: Document) -> str:
    lines = [f"### `{method.upper()} {path}`", "", _prose(operation["description"]), ""]
    lines.append(f"- Callers: {_callers(operation)}")
    query = [item for item in operation.get("parameters", []) if item["in"] == "query"]
    lines += [f"- Query `{item['name']}`: {_type(item['schema'])}. {item['description']}" for item in query]
    if body := operation.get("requestBody"):
        lines.append(f"- Request: {_type(_content(body))}")
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            lines.append(f"- Answer: {status}, {_type(_content(answer))}")
    if "412" in operation["responses"]:
        lines.append("- Takes `If-Match`")
    errors = [status for status in operation["responses"] if not status.startswith("2")]
    return "\n".join([*lines, f"- Errors: {', '.join(errors)}"])


def _callers(operation: Document) -> str:
    who = operation.get(ROLES)
    return "no credential" if who is None else ", ".join(f"`{role}`" for role in who)


def _content(holder: Document) -> Document:
    schema: Document = next(iter(holder["content"].values()))["schema"]
    return schema


def _message(name: str, schema: Document) -> str:
    lines = [f"### {name}", ""]
    if text := _prose(schema.get("description", "")):
        lines += [text, ""]
    if "enum" in schema:
        return "\n".join([*lines, f"One of {_values(schema['enum'])}."]) + "\n"
    lines += ["| field | type | |", "|---|---|---|"]
    required = schema.get("required", [])
    for field, kind in schema.get("properties", {}).items():
        note = "required" if field in required else _default(kind)
        lines.append(f"| `{field}` | {_type(kind)} | {note} |".replace("  ", " "))
    return "\n".join(lines) + "\n"


def _default(kind: Document) -> str:
    value = kind.get("default")
    if value is None or isinstance(value, list | dict):
        return ""
    return f"default `{json.dumps(value)}`"


def _type(kind: Document) -> str:
    """A schema in words."""
    if "$ref" in kind:
        name = kind["$ref"].rpartition("/")[2]
        item = name.removeprefix(_PAGE).rstrip("_")
        return ("page of " if name.startswith(_PAGE) else "") + f"[{item}](#{item.lower()})"
    if "anyOf" in kind:
        return " or ".join(_type(one) for one in kind["anyOf"])
    if "enum" in kind or "const" in kind:
        return _values(kind.get("enum", [kind.get("const")]))
    if kind.get("type") == "array":
        return f"list of {_type(kind['items'])}" if "items" in kind else "list"
    if kind.get("type") == "object" and isinstance(kind.get("additionalProperties"), dict):
        return f"object of {_type(kind['additionalProperties'])}"
    return " ".join([str(kind.get("format", kind.get("type", "any"))), *_bounds(kind)])


def _bounds(kind: Document) -> Iterator[str]:
    for low, high, unit in (("minimum", "maximum", ""), ("minLength", "maxLength", " characters")):
        least, most = (_number(kind[name]) if name in kind else "" for name in (low, high))
        if least and most:
            yield f"{least} to {most}{unit}"
        elif least or most:
            yield f"{f'from {least}' if least else f'at most {most}'}{unit}"


def _number(value: float) -> str:
    return str(int(value) if value == int(value) else value)


def _values(values: list[Any]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _prose(text: str) -> str:
    """A docstring as Markdown: its list of fields as a list."""
    text = inspect.cleandoc(text).replace("``", "`")
    head, _, fields = text.partition("\nArgs:\n")
    listed = re.sub(r"(?m)^    (?=\w)([\w, ]+): ", r"- `\1`: ", fields).replace("\n        ", "\n  ")
    return f"{head.rstrip()}\n\n{listed}".strip() if fields else head


def main(arguments: list[str]) -> None:
    """Write the page to the file that is named."""
    Path(arguments[0]).write_text(page(describe()))


if __name__ == "__main__":
    main(sys.argv[1:])
