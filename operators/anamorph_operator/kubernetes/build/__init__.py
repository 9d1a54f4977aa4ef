"""Manifests of what the operator makes: pure functions of what is wanted, dicts out, no client.

pods.py              what every pod of ours has: labels, security, the store's credential
materialization.py   names, labels, service account, task of one version's materialisation
jobs.py              its Jobs
ray_pods.py          pods of a Ray cluster
ray_service.py       the RayService that KubeRay makes of them
serve_config.py      what Serve is told: ``serveConfigV2``

The same input gives the same manifest, so that writing it again changes nothing.
"""
