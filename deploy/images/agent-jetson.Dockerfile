# The agent for NVIDIA Jetson (JetPack 7: Ubuntu 24.04, Python 3.12), built there or for linux/arm64:
#   make release
#   docker build -f deploy/images/agent-jetson.Dockerfile --build-arg BASE=… --build-arg RUNTIME=… -t shoal-agent:jetson .
#   docker run --runtime nvidia …
# BASE is NVIDIA's l4t-jetpack (or cuda runtime) image of the JetPack on the device. RUNTIME is ONNX Runtime as built for it: a
# file below dist/, or what pip takes; NVIDIA publishes them, for the wheels of PyPI know no integrated GPU.
ARG BASE
# hadolint ignore=DL3006
FROM ${BASE}
ARG RUNTIME=onnxruntime-gpu
ENV PYTHONUNBUFFERED=1 \
    SHOAL_AGENT_STATE_DIR=/var/lib/shoal-agent \
    SHOAL_AGENT_LISTEN=0.0.0.0:8470 \
    PATH=/opt/shoal-agent/bin:$PATH
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv ca-certificates tzdata \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 8470 shoal-agent \
    && useradd --system --uid 8470 --gid 8470 --home-dir /var/lib/shoal-agent --shell /usr/sbin/nologin --groups video shoal-agent \
    && install -d -m 0700 -o shoal-agent -g shoal-agent /var/lib/shoal-agent
COPY constraints.txt /tmp/constraints.txt
# hadolint ignore=DL3003,DL3013
RUN --mount=type=bind,source=dist,target=/dist \
    python3 -m venv /opt/shoal-agent \
    && wheel=$(ls /dist/shoal-*-py3-none-any.whl) \
    && cd /dist \
    && /opt/shoal-agent/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt "$wheel" "${RUNTIME}" \
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
