"""A local endpoint for any OpenAI client: text on this side, encrypted token ids on the other.

settings.py   where the key service is, which models, where to listen
app.py        the routes
guard.py      who may call: loopback, no foreign pages
requests.py   what may be asked, in OpenAI's words
jobs.py       text → prompt ids and options
answers.py    ids → text, stop strings, logprobs, as they arrive
shapes.py     OpenAI's answers
sse.py        streaming, and what happens when the caller goes away
"""

from __future__ import annotations

from anamorph.client.proxy.app import create_app
from anamorph.client.proxy.server import run
from anamorph.client.proxy.settings import ProxySettings

__all__ = ["ProxySettings", "create_app", "run"]
