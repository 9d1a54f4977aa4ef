"""Ray underneath: started on one machine, and asked what it has room for.

local.py      start, watch and stop a cluster of one machine
session.py    all processes of it, found and ended whatever became of their parents
proxy.py      runs inside Ray's HTTP proxy: its own errors in OpenAI's shape
placement.py  whether an application fits, and why not
sizing.py     how much memory a model takes
"""
