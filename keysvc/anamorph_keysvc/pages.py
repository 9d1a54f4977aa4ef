"""Lists in pages: ordered by key, continued after the last item seen, opaque to callers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Query
from pydantic import BaseModel
from sqlalchemy import tuple_
from sqlmodel import Session
from sqlmodel.sql.expression import SelectOfScalar

from anamorph import errors
from anamorph.wire.admin import Page

Row = TypeVar("Row")
Item = TypeVar("Item", bound=BaseModel)

PageToken = Annotated[str | None, Query(max_length=1000)]
PageSize = Annotated[int, Query(ge=1, le=500)]
DEFAULT_SIZE = 100


def page_of(
    session: Session,
    statement: SelectOfScalar[Row],
    order: tuple[Any, ...],
    read: Callable[[Row], Item],
    token: str | None,
    size: int,
) -> Page[Item]:
    """One page of what ``statement`` selects.

    ``order`` are columns that identify a row; ``token`` is the ``next_page`` of the
    page before.

    Raises:
        BadRequest: the token is not one of this list.
    """
    statement = statement.order_by(*order).limit(size + 1)
    if token is not None:
        statement = statement.where(tuple_(*order) > tuple_(*_position(token, order)))
    rows = list(session.exec(statement))
    items = [read(row) for row in rows[:size]]
    if len(rows) <= size:
        return Page(items=items)
    last = [getattr(rows[size - 1], column.key) for column in order]
    return Page(items=items, next_page=base64.urlsafe_b64encode(json.dumps(last).encode()).decode())


def _position(token: str, order: tuple[Any, ...]) -> list[Any]:
    try:
        values = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
    except ValueError:
        values = None
    # SQLModel's text columns are decorated types, which do not say what they hold.
    kinds = [getattr(column.type, "impl_instance", column.type).python_type for column in order]
    if not isinstance(values, list) or [type(value) for value in values] != kinds:
        raise errors.BadRequest(
            "no such page: take next_page from the answer before", code="invalid_page", param="page"
        )
    if not all(_storable(value) for value in values):
        raise errors.BadRequest("no such page", code="invalid_page", param="page")
    return values


def _storable(value: Any) -> bool:
    """Whether a database can be asked for it: no huge number, no NUL, no lone surrogate."""
    return abs(value) < 2**63 if isinstance(value, int) else str(value).isprintable()
