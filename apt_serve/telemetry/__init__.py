"""What the server says of its requests: access log and traces. Metrics are in apt_serve.api.metrics."""
