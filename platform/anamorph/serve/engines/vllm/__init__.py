"""Stock vLLM behind the engine protocol; it is imported only where it is started.

engine.py     requests and tokens
arguments.py  what it is told when it starts
plugin.py     what it loads in its own processes: they end with whoever started them
watch.py      what it reports after each step
logging.json  warnings and errors only, and nothing of a request
"""
