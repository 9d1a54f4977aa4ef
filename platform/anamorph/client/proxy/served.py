"""The models behind the proxy: each with its client and its tokenizer, which must belong together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from anamorph.client.client import AsyncClient
from anamorph.client.proxy.settings import ProxySettings
from anamorph.client.tokenizer import Tokenizer
from anamorph.errors import Conflict, NotFound, SetupError
from anamorph.wire.admin import ModelRead
from anamorph.wire.keyservice import AsyncKeyService


@dataclass(frozen=True)
class Served:
    """One model."""

    record: ModelRead
    tokenizer: Tokenizer
    client: AsyncClient

    async def context_length(self) -> int:
        """The model's context length, once its record still fits the tokenizer.

        Raises:
            Conflict: the model record has changed since the proxy started.
        """
        record = (await self.client.lease()).model
        try:
            check(record, self.tokenizer)
        except SetupError as error:
            raise Conflict(str(error), code="wrong_tokenizer") from None
        return record.context_length


def check(record: ModelRead, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that is not the model record's.

    Raises:
        SetupError: a digest differs, the record has none, or the vocabulary is too large.
    """
    folder = tokenizer.folder
    if record.tokenizer_digest is None:
        raise SetupError(f"the record of {record.id} names no tokenizer digest; register the model with one")
    if record.tokenizer_digest != tokenizer.digest:
        raise SetupError(f"{folder} is not the tokenizer that {record.id} is registered with")
    if record.chat_template_digest != tokenizer.chat_template_digest:
        raise SetupError(f"{folder} has not the chat template that {record.id} is registered with")
    if tokenizer.size > record.vocab_size:
        raise SetupError(f"{folder} has more ids than {record.id} has rows in its embedding")


class Models:
    """All models of one proxy, from start to end."""

    def __init__(self, served: Mapping[str, Served]) -> None:
        self.served = MappingProxyType(dict(served))

    @classmethod
    async def open(cls, settings: ProxySettings) -> Models:
        """Load every tokenizer and check it against the model's record.

        Raises:
            SetupError: a tokenizer is not the one of its model.
            ServiceError: the key service does not know the tenant, the model or the API key.
        """
        key = settings.api_key()
        async with AsyncKeyService(settings.keysvc_url, key) as keys:
            records = {name: await keys.get_model(settings.tenant, name) for name in settings.models}
        served = {}
        for name, record in records.items():
            tokenizer = await asyncio.to_thread(Tokenizer, settings.models[name])
            check(record, tokenizer)
            client = AsyncClient(
                settings.keysvc_url, key, settings.tenant, name, retry_for=settings.retry_for
            )
            served[name] = Served(record, tokenizer, client)
        return cls(served)

    def get(self, name: str) -> Served:
        """One model.

        Raises:
            NotFound: the proxy does not serve it.
        """
        if name not in self.served:
            known = ", ".join(self.served)
            raise NotFound(f"no such model here; served are: {known}", code="model_not_found", param="model")
        return self.served[name]

    async def close(self) -> None:
        """Forget all keys and close all connections."""
        for served in self.served.values():
            await served.client.close()
