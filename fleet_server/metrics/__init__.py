"""What Prometheus may ask of the server: `GET /metrics`."""
