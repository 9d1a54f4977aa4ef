"""One engine under one key as an HTTP application: OpenAI's completions over token ids.

app.py          the routes
endpoint.py     engine, key state, counters
admission.py    the bounded queue
requests.py     a body → sequences that are safe to compute
generation.py   several sequences of one request, merged as they come
completions.py  whole answers and event streams
"""
