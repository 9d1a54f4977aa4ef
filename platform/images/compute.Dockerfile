# Ray Serve with the torch engine: compute zone, no code that handles keys.
# From the root of the repository: make images, or
#   docker build -f platform/images/compute.Dockerfile -t anamorph-compute .
# BASE is Debian, or a relative of it, with Python 3.11 or newer.
# On x86-64, PIP_EXTRA_INDEX_URL=<PyTorch's CPU index> gives a build without CUDA.
ARG BASE=python:3.11-slim

# pip lies apart from what it installs into, so that the image has none.
FROM ${BASE} AS tools
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY constraints.txt .
RUN python3 -m venv tools \
 && tools/bin/pip install -c constraints.txt hatchling \
 && python3 -m venv --without-pip /opt/anamorph

# The libraries that are wanted: what is below is built anew only when this list has changed.
FROM tools AS wanted
COPY pyproject.toml .
COPY platform/images/images.toml platform/images/part.py platform/images/
RUN python3 platform/images/part.py requirements compute requirements.txt

# torch first and by its exact version: other images share this layer.
FROM tools AS torch
ARG PIP_EXTRA_INDEX_URL
RUN tools/bin/pip --python /opt/anamorph/bin/python install -c constraints.txt "$(grep '^torch==' constraints.txt)"

# The rest beside it, in a layer of its own.
FROM torch AS libraries
COPY --from=wanted /build/requirements.txt .
RUN tools/bin/pip --python /opt/anamorph/bin/python install --prefix /libraries -c constraints.txt -r requirements.txt

# Our own packages, those of images.toml and no others.
FROM wanted AS ours
COPY LICENSE .
COPY platform/anamorph platform/anamorph
RUN python3 platform/images/part.py project compute part \
 && tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist ./part \
 && tools/bin/pip --python /opt/anamorph/bin/python install --no-deps --prefix /ours dist/*.whl

FROM ${BASE}
# The probes of KubeRay's operator run wget.
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
 && echo 'anamorph:x:65532:65532::/tmp:/usr/sbin/nologin' >> /etc/passwd \
 && echo 'anamorph:x:65532:' >> /etc/group
ENV PATH=/opt/anamorph/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0
COPY --from=torch /opt/anamorph /opt/anamorph
COPY --from=libraries /libraries /opt/anamorph
COPY --from=ours /ours /opt/anamorph
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Anamorph: compute" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
USER 65532:65532
WORKDIR /opt/anamorph
ENTRYPOINT ["ray"]
CMD ["--help"]
