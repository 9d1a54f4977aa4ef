"""What Ray imports and runs: a ``build`` and its replica for each kind of application.

engine.py   one (tenant, model, version) with a route of its own
pool.py     an engine that tenants share, behind the door
door.py     the door, at ``/``
scaling.py  how many replicas, which of them answers, how they begin and end
"""
