"""Load tests over HTTP and WebSocket: `python -m benchmarks.serve.load`, or `make load`."""
