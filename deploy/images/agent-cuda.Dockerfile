# The agent with ONNX Runtime's CUDA and TensorRT providers, for machines with NVIDIA's driver and container toolkit:
#   make release && docker build -f deploy/images/agent-cuda.Dockerfile -t shoal-agent:cuda .
#   docker run --gpus all …
# CUDA and cuDNN are the base image's; their major versions must be those that onnxruntime-gpu was built for.
ARG BASE=nvidia/cuda:12.9.1-cudnn-runtime-ubuntu24.04
FROM ${BASE}
ENV PYTHONUNBUFFERED=1 \
    SHOAL_AGENT_STATE_DIR=/var/lib/shoal-agent \
    SHOAL_AGENT_LISTEN=0.0.0.0:8470 \
    PATH=/opt/shoal-agent/bin:$PATH
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv ca-certificates tzdata \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 8470 shoal-agent \
    && useradd --system --uid 8470 --gid 8470 --home-dir /var/lib/shoal-agent --shell /usr/sbin/nologin shoal-agent \
    && install -d -m 0700 -o shoal-agent -g shoal-agent /var/lib/shoal-agent
COPY constraints.txt /tmp/constraints.txt
# hadolint ignore=DL3013
RUN --mount=type=bind,source=dist,target=/dist \
    python3 -m venv /opt/shoal-agent \
    && wheel=$(ls /dist/shoal-*-py3-none-any.whl) \
    && /opt/shoal-agent/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt "shoal[gpu] @ file://$wheel" \
    && rm /tmp/constraints.txt
COPY --chmod=755 deploy/images/agent-entrypoint /usr/local/bin/agent-entrypoint
USER 8470:8470
WORKDIR /var/lib/shoal-agent
VOLUME /var/lib/shoal-agent
EXPOSE 8470
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8470/v2/health/live', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["agent-entrypoint"]
CMD ["run"]
