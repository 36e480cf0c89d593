# APS with the tested versions, for one machine or a node of a cluster; it runs as a user, not as root. docs/containers.md
#
#   docker build --tag aps .                                     NVIDIA GPUs, and CPUs
#   docker build --tag aps:cpu --build-arg TORCH_INDEX=URL .     CPUs alone, small: URL is PyTorch's index of CPU builds
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD":/work aps snakemake --snakefile /opt/aps/workflow/Snakefile all --cores 4
ARG BASE=debian:12-slim

FROM ${BASE} AS build
ARG TORCH_INDEX=
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/aps
# What the package needs comes first, in a layer that a change of our code leaves as it is.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir aps && touch aps/__init__.py \
    && python3 -m venv .venv \
    && if [ -n "${TORCH_INDEX}" ]; then .venv/bin/pip install --no-cache-dir --constraint constraints.txt --index-url "${TORCH_INDEX}" torch torchvision; fi \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --editable .
COPY aps aps
COPY config config
COPY workflow workflow
COPY Snakefile ./
RUN .venv/bin/python -m compileall -q aps

FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates procps python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 aps \
    && install --directory --owner aps /work
COPY --from=build /opt/aps /opt/aps
ENV PATH=/opt/aps/.venv/bin:$PATH \
    MLFLOW_DISABLE_TELEMETRY=true \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache
USER 1000
WORKDIR /work
CMD ["python", "-m", "aps", "--help"]
