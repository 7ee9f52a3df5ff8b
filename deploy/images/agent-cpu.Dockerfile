# The agent with ONNX Runtime on CPUs, of its Debian package: make deb (and make deb ARCH=arm64), then
#   docker buildx build --platform linux/amd64,linux/arm64 -f deploy/images/agent-cpu.Dockerfile -t shoal-agent:cpu .
FROM debian:bookworm-slim
ARG TARGETARCH
ENV PYTHONUNBUFFERED=1 \
    SHOAL_AGENT_STATE_DIR=/var/lib/shoal-agent \
    SHOAL_AGENT_LISTEN=0.0.0.0:8470
RUN groupadd --system --gid 8470 shoal-agent \
    && useradd --system --uid 8470 --gid 8470 --home-dir /var/lib/shoal-agent --no-create-home \
        --shell /usr/sbin/nologin shoal-agent
# hadolint ignore=DL3008
RUN --mount=type=bind,source=dist,target=/dist \
    apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates tzdata /dist/shoal-agent_*_"${TARGETARCH}".deb \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log
COPY --chmod=755 deploy/images/agent-entrypoint /usr/local/bin/agent-entrypoint
USER 8470:8470
WORKDIR /var/lib/shoal-agent
VOLUME /var/lib/shoal-agent
EXPOSE 8470
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["/usr/bin/python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8470/v2/health/live', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["agent-entrypoint"]
CMD ["run"]
