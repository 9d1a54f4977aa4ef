"""What every HTTP application here is made of, as plain ASGI.

connection.py  path, start and end, the client's leaving
auth.py        inference tokens, verified offline
middleware.py  what stands in front, outermost first
answers.py     refusals in OpenAI's shape
forward.py     a request that crosses from the door to a replica, and its answer
"""
