# The fleet server, of its Debian package: make deb (and make deb ARCH=arm64), then
#   docker buildx build --platform linux/amd64,linux/arm64 -f deploy/images/server.Dockerfile -t shoal-server .
# It must be told SHOAL_ADMIN_TOKEN, for it listens beyond loopback; docs/deploying.md.
FROM debian:bookworm-slim
ARG TARGETARCH
ENV PYTHONUNBUFFERED=1 \
    SHOAL_STATE_DIR=/var/lib/shoal \
    SHOAL_HOST=0.0.0.0 \
    SHOAL_TLS=true \
    SHOAL_BROKER_HOST=0.0.0.0 \
    SHOAL_BROKER_TLS=true
# A number that volumes and brokers beside it can rely on.
RUN groupadd --system --gid 7470 shoal-server \
    && useradd --system --uid 7470 --gid 7470 --home-dir /var/lib/shoal --no-create-home \
        --shell /usr/sbin/nologin shoal-server
# hadolint ignore=DL3008
RUN --mount=type=bind,source=dist,target=/dist \
    apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates tzdata /dist/shoal-server_*_"${TARGETARCH}".deb \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log
COPY --chmod=755 deploy/images/server-health deploy/images/broker-keeper /usr/local/bin/
USER 7470:7470
WORKDIR /var/lib/shoal
VOLUME /var/lib/shoal
EXPOSE 7470 7471
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["server-health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["shoal-server"]
