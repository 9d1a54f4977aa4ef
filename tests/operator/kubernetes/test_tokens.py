"""Tokens that lie in files which somebody else replaces."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from anamorph import errors
from anamorph.wire.credential import bearer
from anamorph_operator.kubernetes.tokens import token_in


async def test_the_token_is_the_one_that_the_file_holds_now(tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(200)

    file = tmp_path / "token"
    transport = httpx.MockTransport(answer)
    auth = bearer(token_in(file, "mount it"))
    async with httpx.AsyncClient(auth=auth, transport=transport, base_url="http://ray") as ray:
        for token in ("one\n", "two\n"):
            file.write_text(token)
            await ray.get("/")
    assert seen == ["Bearer one", "Bearer two"]


@pytest.mark.parametrize("content", [None, "", "\xe9"])
async def test_no_token_is_no_call(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    transport = httpx.MockTransport(lambda _: httpx.Response(200))
    auth = bearer(token_in(file, "mount it"))
    async with httpx.AsyncClient(auth=auth, transport=transport, base_url="http://ray") as ray:
        with pytest.raises(errors.Unavailable, match=f"{file.name}.*: mount it"):
            await ray.get("/")
