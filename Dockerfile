# syntax=docker/dockerfile:1
#
#   docker build --target api         -t tdm-api .          HTTP only, no torch
#   docker build --target worker      -t tdm-worker .       runs bundles on a GPU: torch with CUDA, TensorRT
#   docker build --target worker-cpu  -t tdm-worker-cpu .   runs bundles on CPUs: torch without CUDA
#   docker build --target engines     -t tdm-engines .      distils, gates, builds bundles on a GPU: has a C++ compiler
#   docker build --target engines-cpu -t tdm-engines-cpu .  the same without a GPU
#
# What is in one: docker run --rm -i --entrypoint python tdm-api - < deploy/sbom.py
#
# pip's default torch on Linux is the CUDA build, and brings CUDA along: of the host, GPU images want the driver and NVIDIA's container
# toolkit. CPU images take torch from PyTorch's index of CPU builds, or from another one: --build-arg PIP_EXTRA_INDEX_URL=...

FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS python
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Volumes mounted on /data and /bundles take over this ownership when they are new.
RUN useradd --uid 10001 --create-home tdm \
    && install --directory --owner=tdm --group=tdm /data /bundles \
    && python -m venv /opt/venv
WORKDIR /app

# Dependencies only: without packages beside it, the project installs as its metadata, and a change of code keeps these layers. Results may
# go to object storage: s3.
FROM python AS api-dependencies
COPY pyproject.toml constraints.txt README.md LICENSE ./
# TRACING=1: with the extra `tracing`. Not by default, for redis-py loads of OpenTelemetry what it finds, at every start.
ARG TRACING
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt ".[s3${TRACING:+,tracing}]"

FROM api-dependencies AS worker-dependencies
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt '.[s3,worker,tensorrt]'

FROM worker-dependencies AS engines-dependencies
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt '.[s3,worker,tensorrt,tensorrt-build,distill]'

FROM api-dependencies AS worker-cpu-dependencies
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt '.[s3,worker]'

FROM worker-cpu-dependencies AS engines-cpu-dependencies
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt '.[s3,worker,distill]'

FROM python AS api
COPY --from=api-dependencies /opt/venv /opt/venv
COPY engines/__init__.py engines/errors.py engines/files.py engines/
COPY engines/bundle engines/bundle
COPY server server
USER 10001:10001
ENV TDM_HOST=0.0.0.0 TDM_DATA_DIR=/data
EXPOSE 8000 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["python", "-m", "server", "api"]

# Under every image with torch. libgomp: compiled engines run their loops on OpenMP.
FROM python AS torch-runtime
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

FROM torch-runtime AS worker-runtime
ENV TDM_HOST=0.0.0.0 TDM_DATA_DIR=/data
EXPOSE 9101
# A worker that loads or rebuilds its bundle is not listening yet; that may take minutes.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:9101/metrics', timeout=2)"]
CMD ["python", "-m", "server", "worker"]

FROM worker-runtime AS worker
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=worker-dependencies /opt/venv /opt/venv
COPY engines engines
COPY server server
USER 10001:10001

FROM worker-runtime AS worker-cpu
COPY --from=worker-cpu-dependencies /opt/venv /opt/venv
COPY engines engines
COPY server server
USER 10001:10001

FROM torch-runtime AS engines-runtime
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# A command that runs and ends.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "engines"]
CMD ["--help"]

FROM engines-runtime AS engines
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=engines-dependencies /opt/venv /opt/venv
COPY engines engines
USER 10001:10001

FROM engines-runtime AS engines-cpu
COPY --from=engines-cpu-dependencies /opt/venv /opt/venv
COPY engines engines
USER 10001:10001
