"""The compute zone on Ray Serve: encrypted ids in, encrypted ids out, and never a key.

asgi/          what every HTTP application here is made of: who may pass, how refusals look
cluster/       Ray on one machine, and whether something fits on a cluster
engines/       from a replica's folder to tokens: fake, torch, ranks of torch, vLLM
api/           one engine under one key as an HTTP application
slots/         one engine that tenants share, each member with an API of its own
door/          the way in for versions without a route, and the answer for those that are not there
applications/  what Ray imports: an engine, a pool, the door

A line uses only lines above it; slots and door know nothing of each other.
"""
