"""The always-on application at ``/``: it authenticates, holds and forwards, or says why not.

app.py       who asks, for which version, and what is the matter with it
handles.py   the way to replicas: Ray's handles
relay.py     an answer on its way back, whatever happens to the engine meanwhile
tally.py     of each version: held, in flight, served
affinity.py  prompts that begin alike go to one replica
observed.py  spans and times
"""
