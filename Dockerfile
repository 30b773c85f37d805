# syntax=docker/dockerfile:1
#
#   docker build --target api     -t tdm-api .        HTTP only, no torch
#   docker build --target worker  -t tdm-worker .     runs bundles
#   docker build --target engines -t tdm-engines .    distils, gates, builds bundles: has a C++ compiler
#
# pip's default torch on Linux is the CUDA build. For CPU images, pass PyTorch's index of CPU builds as
# --build-arg PIP_EXTRA_INDEX_URL=...

FROM python:3.11-slim-bookworm AS python
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Volumes mounted on /data and /bundles take over this ownership when they are new.
RUN useradd --uid 10001 --create-home tdm \
    && install --directory --owner=tdm --group=tdm /data /bundles \
    && python -m venv /opt/venv
WORKDIR /app

# Dependencies only: without packages beside it, the project installs as its metadata, and a change of code keeps these layers.
FROM python AS api-dependencies
COPY pyproject.toml constraints.txt README.md LICENSE ./
# TRACING=1: with the extra `tracing`. Not by default, for redis-py loads of OpenTelemetry what it finds, at every start.
ARG TRACING
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt ".${TRACING:+[tracing]}"

FROM api-dependencies AS worker-dependencies
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt '.[worker]'

FROM worker-dependencies AS engines-dependencies
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt '.[worker,distill]'

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

FROM python AS worker
# libgomp: compiled engines run their loops on OpenMP.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=worker-dependencies /opt/venv /opt/venv
COPY engines engines
COPY server server
USER 10001:10001
ENV TDM_HOST=0.0.0.0 TDM_DATA_DIR=/data
EXPOSE 9101
# A worker that loads or rebuilds its bundle is not listening yet; that may take minutes.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:9101/metrics', timeout=2)"]
CMD ["python", "-m", "server", "worker"]

FROM worker AS engines
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=engines-dependencies /opt/venv /opt/venv
USER 10001:10001
# A command that runs and ends.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "engines"]
CMD ["--help"]
