"""The driver for Kubernetes.

resources/      custom resources: what is wanted and how it stands, as typed models
build/          manifests of Jobs and of the RayService
assignment.py   which cluster a version lies on, and for which models there is room
records.py      what a resource says, in the words of the key service
intent.py       what to do in the key service so that it has that
conditions.py   how a model stands, as conditions
status.py       the status of a resource
trouble.py      what stands in its way, as values

All of it is pure: functions of values, without a client, a clock or a file.
"""
