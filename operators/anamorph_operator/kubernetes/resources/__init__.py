"""Custom resources of ``anamorph.dev/v1alpha1``.

part.py              what every part of a resource has in common
encrypted_model.py   one tenant's model: what is wanted, how it stands
serving_cluster.py   a Ray cluster that hosts replicas
objects.py           objects as the API server holds them → typed values
definition.py        models → CustomResourceDefinitions
admission.py         which namespace may name which tenant
"""
