# What the tests' cluster needs beside our own images, in one: PostgreSQL, Redis, Vault, SeaweedFS, KubeRay's operator.
# Built by `make test-cluster`, whose context is a folder with the three binaries. Elsewhere the projects' own images do.
ARG BASE=python:3.11-slim
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends postgresql-15 redis-server \
 && rm -rf /var/lib/apt/lists/* /var/lib/postgresql/15 \
 # initdb wants to know its user by name; the project's own image has this one.
 && usermod --non-unique --uid 999 postgres
COPY vault weed /usr/local/bin/
COPY kuberay-operator /manager
USER 65532:65532
