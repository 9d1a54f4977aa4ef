"""The driver for Kubernetes.

resources/   custom resources: what is wanted and how it stands, as typed models
"""
