"""The tenant's side: token codec, clients and the local OpenAI-compatible proxy.

    codec = TokenCodec(key, vocab_size)
    client = Client(keysvc_url, api_key, "acme", "smol")
    answer = client.complete(ids, max_tokens=32)      # plain ids in, plain ids out

Here, and only here, ciphertext meets plaintext. The proxy and the tokenizers are
imported by name (``anamorph.client.proxy``, ``anamorph.client.tokenizer``), so that
the clients need neither a web server nor transformers.
"""

from __future__ import annotations

from anamorph.client.client import AsyncClient, Client
from anamorph.client.codec import TokenCodec

__all__ = ["AsyncClient", "Client", "TokenCodec"]
